/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What probe_calls.bpf.c and tls_taps.bpf.c have in common. Each defines COUNTERS, how many it has, before. */
#pragma once

#include "counters.bpf.h"
#include "registers.bpf.h"

#include <linux/bpf.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

/* Set before loading. */
const volatile bool has_cookies;  /* bpf_get_attach_cookie, 5.15+ */
const volatile bool has_task_btf; /* bpf_get_current_task_btf, 5.11+ */
const volatile bool is_filtered;  /* only the processes in `wanted` */

struct task_struct {
	struct task_struct *group_leader;
	__u64 start_boottime;
	__u64 self_exec_id; /* 64 bits since 5.7 */
	struct files_struct *files;
} __attribute__((preserve_access_index));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); /* tgid */
	__type(value, __u8);
} wanted SEC(".maps");

static __always_inline bool is_wanted(__u32 tgid)
{
	return !is_filtered || bpf_map_lookup_elem(&wanted, &tgid);
}

/* When the process started, in ns since boot. */
static __always_inline __u64 process_start(void)
{
	if (has_task_btf)
		return ((struct task_struct *)bpf_get_current_task_btf())->group_leader->start_boottime;
	return BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), group_leader, start_boottime);
}
