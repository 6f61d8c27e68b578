// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Counts and times the calls of functions, by probe and process: sowatch trace, and rules that count.
 *
 * A probe is one function of one file; its number comes as the attach cookie. calls_entered runs at a function's entry,
 * calls_returned at its return. What they count stands in `calls` until user space takes it away. With a format each
 * call is a record in a ring, too; with stacks its callers are counted.
 *
 * Uprobe programs may be preempted by others of their own, so nothing here is kept by CPU.
 */
#include "probe_calls.h"

#define COUNTERS PROBE_COUNTERS
#include "probe.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Set before loading. */
const volatile bool is_timed;          /* both programs are attached */
const volatile __u64 only_probe;       /* without has_cookies the object is for one probe */
const volatile bool sees_instructions; /* calls_returned is on return instructions, not a return probe */
const volatile bool has_stacks;
const volatile __u64 entry_bytes;  /* of a record; 0: none are made */
const volatile __u64 return_bytes; /* the same */
const volatile struct call_format format;

static __always_inline void read_arguments(struct arguments *made, struct pt_regs *context)
{
	made->values[0] = ARGUMENT1(context);
	made->values[1] = ARGUMENT2(context);
	made->values[2] = ARGUMENT3(context);
	made->values[3] = ARGUMENT4(context);
	made->values[4] = ARGUMENT5(context);
	made->values[5] = ARGUMENT6(context);
}

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct calls_key);
	__type(value, struct calls);
} calls SEC(".maps");

/*
 * Threads that called timed functions. An entry stays when its thread is outside, for the next call; least recently used
 * ones go: a thread may end.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct frames_key);
	__type(value, struct frames);
} frames SEC(".maps");

/* User space makes these as large as they are needed, or as small as they can be. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, RECORDS_BYTES);
} records SEC(".maps");

/* Calls of which some text was not in memory at the entry: the program may not have used its own string yet. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct unread_key);
	__type(value, struct arguments);
} unread SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_STACK_TRACE);
	__uint(max_entries, 16384);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, STACK_DEPTH * sizeof(__u64));
} stacks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct stacks_key);
	__type(value, __u64);
} stack_counts SEC(".maps");

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

static __always_inline __u64 probe_of(void *context)
{
	return has_cookies ? bpf_get_attach_cookie(context) : only_probe;
}

static __always_inline struct calls *calls_of(__u64 probe, __u32 tgid, __u64 start_ns)
{
	struct calls_key key = {.probe = probe, .start_ns = start_ns, .tgid = tgid};
	struct calls *found = bpf_map_lookup_elem(&calls, &key);
	__u32 zero = 0;

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

/* Reads what a pointer leads to; gives its length, or below 0 if that is not in memory. */
static __always_inline __s16 read_text(char *text, __u16 kind, __u16 size, __u64 pointer)
{
	if (kind == VALUE_STRING)
		return bpf_probe_read_user_str(text, size, (void *)pointer);
	return bpf_probe_read_user(text, size, (void *)pointer) ? -1 : size;
}

/* Records arguments; gives whether some text of them could not be read. */
static __always_inline bool record_arguments(const struct arguments *arguments, const struct frames_key *key,
					     __u64 start_ns, __u64 since_ns, __u32 kind)
{
	struct call_record *record = bpf_ringbuf_reserve(&records, entry_bytes, 0);
	bool is_unread = false;

	if (!record) {
		count(PROBE_RECORDS_LOST);
		return false;
	}
	record->probe = key->probe;
	record->start_ns = start_ns;
	record->since_ns = since_ns;
	record->spent_ns = 0;
	record->tgid = key->pid_tgid >> 32;
	record->tid = key->pid_tgid;
	record->kind = kind;
	record->unused = 0;
#pragma unroll
	for (int i = 0; i < MAX_ARGUMENTS; i++) {
		record->values[i] = arguments->values[i];
		record->lengths[i] = 0;
		if (format.arguments[i].kind > VALUE_REGISTER) {
			record->lengths[i] = read_text(record->texts + format.arguments[i].at, format.arguments[i].kind,
						       format.arguments[i].size, arguments->values[i]);
			is_unread |= record->lengths[i] < 0 && arguments->values[i];
		}
	}
	record->lengths[6] = record->lengths[7] = 0;
	/* User space looks some times a second: nobody is woken. */
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return is_unread;
}

static __always_inline void count_stack(struct pt_regs *context, __u64 probe, __u64 pid_tgid, __u64 start_ns)
{
	struct stacks_key key = {.probe = probe, .start_ns = start_ns, .tgid = pid_tgid >> 32};
	__u64 *found, one = 1;

	key.stack = bpf_get_stackid(context, &stacks, BPF_F_USER_STACK);
	if (key.stack < 0) {
		count(PROBE_STACKS_LOST);
		key.stack = -1;
	}
	key.caller = caller_of(context);
	found = bpf_map_lookup_elem(&stack_counts, &key);
	if (!found && !bpf_map_update_elem(&stack_counts, &key, &one, BPF_NOEXIST))
		return;
	if (!found)
		found = bpf_map_lookup_elem(&stack_counts, &key);
	if (found)
		__sync_fetch_and_add(found, 1);
	else
		count(PROBE_STACKS_LOST);
}

SEC("uprobe")
int calls_entered(struct pt_regs *context)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid(), stack = STACK(context), start_ns, since_ns = 0;
	struct frames_key key = {.probe = probe_of(context), .pid_tgid = pid_tgid};
	struct arguments arguments;
	bool is_unread = false;
	struct frames *thread;
	struct calls *found;
	__u32 depth;

	if (!is_wanted(pid_tgid >> 32))
		return 0;
	start_ns = process_start();
	found = calls_of(key.probe, pid_tgid >> 32, start_ns);
	if (found)
		__sync_fetch_and_add(&found->calls, 1);
	else
		count(PROBE_LOST);
	if (has_stacks)
		count_stack(context, key.probe, pid_tgid, start_ns);
	if (is_timed || entry_bytes)
		since_ns = bpf_ktime_get_ns();
	if (entry_bytes) {
		read_arguments(&arguments, context);
		is_unread = record_arguments(&arguments, &key, start_ns, since_ns, RECORD_ENTRY);
	}
	if (!is_timed || !found)
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
	thread->start_ns = start_ns;
	thread->frames[depth % MAX_FRAMES].stack = stack;
	thread->frames[depth % MAX_FRAMES].since_ns = since_ns;
	thread->depth = depth + 1;
	if (entry_bytes && return_bytes) {
		thread->unread &= ~(1U << (depth % MAX_FRAMES));
		if (is_unread) {
			struct unread_key place = {key.probe, since_ns, pid_tgid};

			thread->unread |= 1U << (depth % MAX_FRAMES);
			bpf_map_update_elem(&unread, &place, &arguments, BPF_ANY);
		}
	}
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

static __always_inline void record_again(const struct frames_key *key, __u64 start_ns, __u64 since_ns)
{
	struct unread_key place = {key->probe, since_ns, key->pid_tgid};
	struct arguments *found = bpf_map_lookup_elem(&unread, &place), arguments;

	if (!found)
		return;
	arguments = *found;
	bpf_map_delete_elem(&unread, &place);
	record_arguments(&arguments, key, start_ns, since_ns, RECORD_AGAIN);
}

static __always_inline void record_return(struct pt_regs *context, struct frames_key *key, __u64 start_ns,
					  __u64 since_ns, __u64 spent_ns)
{
	struct call_record *record = bpf_ringbuf_reserve(&records, return_bytes, 0);

	if (!record) {
		count(PROBE_RECORDS_LOST);
		return;
	}
	record->probe = key->probe;
	record->start_ns = start_ns;
	record->since_ns = since_ns;
	record->spent_ns = spent_ns;
	record->tgid = key->pid_tgid >> 32;
	record->tid = key->pid_tgid;
	record->kind = RECORD_RETURN;
	record->unused = 0;
	__builtin_memset(record->values, 0, sizeof(record->values));
	__builtin_memset(record->lengths, 0, sizeof(record->lengths));
	record->values[0] = RESULT(context);
	if (format.result.kind > VALUE_REGISTER)
		record->lengths[0] =
			read_text(record->texts, format.result.kind, format.result.size, record->values[0]);
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

SEC("uretprobe")
int calls_returned(struct pt_regs *context)
{
	/*
	 * x86 has popped the return address by the time of a return probe, not before the instruction; where it is in
	 * a register, the stack is as it was at the entry.
	 */
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	__u64 stack = STACK(context) - (sees_instructions ? 0 : RETURN_ADDRESS_BYTES);
	struct frames_key key = {.probe = probe_of(context), .pid_tgid = pid_tgid};
	struct frames *thread = frames_of(&key, false);
	__u64 since_ns, spent_ns, start_ns;
	bool is_unread;
	struct calls *found;
	__u32 depth;

	if (!thread) /* it was inside when the probe came, or is not wanted */
		return 0;
	/* One byte less, so that the frame that returns is still there. */
	depth = live_frames(thread, stack - 1);
	if (!depth || depth > MAX_FRAMES || thread->frames[(depth - 1) % MAX_FRAMES].stack != stack)
		return 0;
	start_ns = thread->start_ns;
	since_ns = thread->frames[(depth - 1) % MAX_FRAMES].since_ns;
	spent_ns = bpf_ktime_get_ns() - since_ns;
	is_unread = thread->unread & (1U << ((depth - 1) % MAX_FRAMES));
	thread->depth = depth - 1;
	found = calls_of(key.probe, pid_tgid >> 32, start_ns);
	if (!found) {
		count(PROBE_LOST);
		return 0;
	}
	__sync_fetch_and_add(&found->sum_ns, spent_ns);
	__sync_fetch_and_add(&found->buckets[log2_of(spent_ns) % LATENCY_BUCKETS], 1);
	if (entry_bytes && return_bytes && is_unread)
		record_again(&key, start_ns, since_ns);
	if (return_bytes)
		record_return(context, &key, start_ns, since_ns, spent_ns);
	return 0;
}
