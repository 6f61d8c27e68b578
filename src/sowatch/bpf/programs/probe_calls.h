/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What probe_calls.bpf.c counts, as user space reads it; sowatch.uprobes.calls has the same layouts. */
#pragma once

#include <linux/types.h>

#define LATENCY_BUCKETS 64 /* bucket N: at least 2^N ns and less than 2^(N+1); 0 is in bucket 0 */
#define MAX_FRAMES 16 /* calls of one function by one thread that are under way at once; deeper ones are not timed */

#if defined(__TARGET_ARCH_x86)
#define RETURN_ADDRESS_BYTES 8
#else
#define RETURN_ADDRESS_BYTES 0
#endif

/* 24 bytes */
struct calls_key {
	__u64 probe;
	__u64 start_ns; /* of the process: a pid is reused */
	__u32 tgid;
	__u32 unused;
};

/* 536 bytes */
struct calls {
	__u64 calls;  /* entries */
	__u64 timed;  /* returns whose entry was seen */
	__u64 sum_ns; /* spent in those */
	__u64 buckets[LATENCY_BUCKETS];
};

struct frames_key {
	__u64 probe;
	__u64 pid_tgid;
};

struct frames {
	__u32 depth;
	__u32 unused;
	struct {
		__u64 stack;
		__u64 since_ns;
	} frames[MAX_FRAMES];
};

enum probe_counter {
	PROBE_LOST,    /* no room in `calls`: not counted elsewhere */
	PROBE_UNTIMED, /* counted, but not timed */
	PROBE_COUNTERS,
};

_Static_assert(sizeof(struct calls_key) == 24, "sowatch.uprobes.calls.KEY");
_Static_assert(sizeof(struct calls) == 536, "sowatch.uprobes.calls.VALUE");
