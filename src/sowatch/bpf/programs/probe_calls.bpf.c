// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Counts and times the calls of functions, by probe and process: sowatch trace, and rules that count.
 *
 * A probe is one function of one file; its number comes as the attach cookie. calls_entered runs at a function's entry,
 * calls_returned at its return. What they count stands in `calls` until user space takes it away.
 */
#include "probe_calls.h"

#include <linux/bpf.h>
#include <stdbool.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Set before loading. */
const volatile bool is_timed;    /* both programs are attached */
const volatile bool has_cookies; /* bpf_get_attach_cookie, 5.15+; else the object is for one probe: */
const volatile __u64 only_probe;
const volatile bool is_filtered; /* only the processes in `wanted` */

struct task_struct {
	struct task_struct *group_leader;
	__u64 start_boottime;
} __attribute__((preserve_access_index));

/* The stack pointer has this name on every architecture. */
struct pt_regs {
	unsigned long sp;
} __attribute__((preserve_access_index));

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct calls_key);
	__type(value, struct calls);
} calls SEC(".maps");

/* Threads inside timed functions. Least recently used ones go: a thread may end inside. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct frames_key);
	__type(value, struct frames);
} frames SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); /* tgid */
	__type(value, __u8);
} wanted SEC(".maps");

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct calls);
} no_calls SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frames);
} no_frames SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PROBE_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

static __always_inline void count(__u32 what)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &what);

	if (counter)
		(*counter)++;
}

static __always_inline __u64 probe_of(void *context)
{
	return has_cookies ? bpf_get_attach_cookie(context) : only_probe;
}

static __always_inline bool is_wanted(__u32 tgid)
{
	return !is_filtered || bpf_map_lookup_elem(&wanted, &tgid);
}

static __always_inline struct calls *calls_of(__u64 probe, __u32 tgid)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct calls_key key = {.probe = probe, .tgid = tgid};
	struct calls *found;
	__u32 zero = 0;

	key.start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	found = bpf_map_lookup_elem(&calls, &key);
	if (found)
		return found;
	found = bpf_map_lookup_elem(&no_calls, &zero);
	if (!found)
		return NULL;
	/* Another thread may be first: then this one finds what that put. */
	bpf_map_update_elem(&calls, &key, found, BPF_NOEXIST);
	return bpf_map_lookup_elem(&calls, &key);
}

static __always_inline struct frames *frames_of(struct frames_key *key, bool is_made)
{
	struct frames *found = bpf_map_lookup_elem(&frames, key);
	__u32 zero = 0;

	if (found || !is_made)
		return found;
	found = bpf_map_lookup_elem(&no_frames, &zero);
	if (!found)
		return NULL;
	bpf_map_update_elem(&frames, key, found, BPF_ANY);
	return bpf_map_lookup_elem(&frames, key);
}

/*
 * Drops the frames that the thread has left without a return (longjmp, an exception): the stack grows down, so
 * whatever is below the stack pointer is gone. Gives how many are left.
 */
static __always_inline __u32 live_frames(struct frames *thread, __u64 stack)
{
	__u32 depth = thread->depth;

	for (int i = 0; i < MAX_FRAMES; i++) {
		if (!depth || depth > MAX_FRAMES || thread->frames[(depth - 1) % MAX_FRAMES].stack > stack)
			break;
		depth--;
	}
	return depth;
}

SEC("uprobe")
int calls_entered(struct pt_regs *context)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), stack = context->sp;
	struct frames_key key = {.probe = probe_of(context), .pid_tgid = pid_tgid};
	struct frames *thread;
	struct calls *found;
	__u32 depth;

	if (!is_wanted(pid_tgid >> 32))
		return 0;
	found = calls_of(key.probe, pid_tgid >> 32);
	if (!found) {
		count(PROBE_LOST);
		return 0;
	}
	__sync_fetch_and_add(&found->calls, 1);
	if (!is_timed)
		return 0;
	thread = frames_of(&key, true);
	if (!thread) {
		count(PROBE_UNTIMED);
		return 0;
	}
	depth = live_frames(thread, stack);
	if (depth >= MAX_FRAMES) {
		count(PROBE_UNTIMED);
		return 0;
	}
	thread->frames[depth % MAX_FRAMES].stack = stack;
	thread->frames[depth % MAX_FRAMES].since_ns = bpf_ktime_get_ns();
	thread->depth = depth + 1;
	return 0;
}

static __always_inline __u32 log2_of(__u64 value)
{
	__u32 result = 0;

	for (__u32 shift = 32; shift; shift >>= 1)
		if (value >> shift) {
			value >>= shift;
			result += shift;
		}
	return result;
}

SEC("uretprobe")
int calls_returned(struct pt_regs *context)
{
	/* x86 has popped the return address by now; where it is in a register, the stack is as it was at the entry. */
	__u64 pid_tgid = bpf_get_current_pid_tgid(), stack = context->sp - RETURN_ADDRESS_BYTES;
	struct frames_key key = {.probe = probe_of(context), .pid_tgid = pid_tgid};
	struct frames *thread = frames_of(&key, false);
	struct calls *found;
	__u64 spent_ns;
	__u32 depth;

	if (!thread) /* it was inside when the probe came, or is not wanted */
		return 0;
	/* One byte less, so that the frame that returns is still there. */
	depth = live_frames(thread, stack - 1);
	if (!depth || depth > MAX_FRAMES || thread->frames[(depth - 1) % MAX_FRAMES].stack != stack)
		return 0;
	spent_ns = bpf_ktime_get_ns() - thread->frames[(depth - 1) % MAX_FRAMES].since_ns;
	thread->depth = depth - 1;
	if (depth == 1)
		bpf_map_delete_elem(&frames, &key);
	found = calls_of(key.probe, pid_tgid >> 32);
	if (!found) {
		count(PROBE_LOST);
		return 0;
	}
	__sync_fetch_and_add(&found->timed, 1);
	__sync_fetch_and_add(&found->sum_ns, spent_ns);
	__sync_fetch_and_add(&found->buckets[log2_of(spent_ns) % LATENCY_BUCKETS], 1);
	return 0;
}
