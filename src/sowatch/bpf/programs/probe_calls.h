/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What probe_calls.bpf.c counts and records, as user space reads it; sowatch.uprobes has the same layouts. */
#pragma once

#include <linux/types.h>

#define LATENCY_BUCKETS 64 /* bucket N: at least 2^N ns and less than 2^(N+1); 0 is in bucket 0 */
#define MAX_FRAMES 16   /* calls of one function by one thread that are under way at once; deeper ones are not timed */
#define MAX_ARGUMENTS 6 /* that stand in registers on every architecture */
#define MAX_TEXT 256    /* bytes of one string, with its terminating 0 */
#define STACK_DEPTH 64
#define RECORDS_BYTES (4 << 20)

/* 24 bytes */
struct calls_key {
	__u64 probe;
	__u64 start_ns; /* of the process: a pid is reused */
	__u32 tgid;
	__u32 unused;
};

/* 528 bytes */
struct calls {
	__u64 calls;                    /* entries */
	__u64 sum_ns;                   /* spent in those whose return was seen */
	__u64 buckets[LATENCY_BUCKETS]; /* how many those are */
};

struct frames_key {
	__u64 probe;
	__u64 pid_tgid;
};

struct frames {
	__u64 start_ns; /* of the process */
	__u32 depth;
	__u32 unread; /* a bit for each frame whose texts could not be read */
	struct {
		__u64 stack;
		__u64 since_ns;
	} frames[MAX_FRAMES];
};

enum value_kind {
	VALUE_NONE,
	VALUE_REGISTER, /* as it is */
	VALUE_STRING,   /* up to its terminating 0 */
	VALUE_BYTES,    /* that many */
};

/* What a record has of a call; user space sets it before loading. 56 bytes */
struct call_format {
	struct {
		__u16 kind; /* enum value_kind */
		__u16 size; /* of a string or of bytes, a multiple of 8 up to MAX_TEXT */
		__u16 at;   /* where in `texts` it goes */
		__u16 unused;
	} arguments[MAX_ARGUMENTS], result;
};

enum record_kind {
	RECORD_ENTRY,
	RECORD_RETURN,
	RECORD_AGAIN, /* an entry, whose texts have been read anew at the return */
};

struct arguments {
	__u64 values[MAX_ARGUMENTS];
};

struct unread_key {
	__u64 probe;
	__u64 since_ns;
	__u64 pid_tgid;
};

/* 112 bytes, then the texts. An entry and its return have the same probe, tid and since_ns. */
struct call_record {
	__u64 probe;
	__u64 start_ns; /* of the process */
	__u64 since_ns; /* CLOCK_MONOTONIC of the entry */
	__u64 spent_ns; /* of a return */
	__u32 tgid;
	__u32 tid;
	__u32 kind; /* enum record_kind */
	__u32 unused;
	__u64 values[MAX_ARGUMENTS]; /* registers; of a return the first one */
	__s16 lengths[8];            /* of texts, with the 0 of a string; negative: could not be read */
	char texts[];
};

/* 40 bytes */
struct stacks_key {
	__u64 probe;
	__u64 start_ns;
	__u64 caller; /* where the call returns to, 0 if unknown: the kernel's walk may leave it out at an entry */
	__u32 tgid;
	__s32 stack; /* in `stacks`; negative: there is none */
	__u64 unused;
};

enum probe_counter {
	PROBE_LOST,         /* no space in `calls`: not counted elsewhere */
	PROBE_UNTIMED,      /* counted, but not timed */
	PROBE_RECORDS_LOST, /* no space in `records` */
	PROBE_STACKS_LOST,  /* no stack, or no space for its count */
	PROBE_COUNTERS,
};

_Static_assert(sizeof(struct calls_key) == 24, "sowatch.uprobes.calls.KEY");
_Static_assert(sizeof(struct calls) == 528, "sowatch.uprobes.calls.VALUE");
_Static_assert(sizeof(struct call_format) == 56, "sowatch.uprobes.call_format.CallFormat.pack");
_Static_assert(sizeof(struct call_record) == 112, "sowatch.uprobes.call_records.HEAD");
_Static_assert(sizeof(struct stacks_key) == 40, "sowatch.uprobes.stacks.KEY");
