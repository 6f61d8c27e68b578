/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the programs remember: maps, counters, and the words user space writes while they run. */
#pragma once

#include "reads.bpf.h"
#include "ring.bpf.h"

#include <bpf/bpf_tracing.h>

#define MAX_RANGES 32
#define NEEDS_RESCAN 1
#define THROTTLED 2 /* and user space knows that records of it were dropped */

/*
 * A process somebody may want to hear of: it maps, or may map, a file that a rule wants. Made at
 * sys_enter, copied to the child by fork, removed by exec and by the exit of the last thread. User
 * space never removes it, for another thread may be mapping a wanted file at that moment; it
 * untracks it (see `untrack`), which the next mapping undoes. So there is no moment in which a
 * process of interest is not tracked.
 * Its executable ranges decide which munmap is worth a record; they only ever grow between two
 * scans, so a stale one costs a needless event and a missing one cannot be.
 */
struct process {
	__u64 start_ns;
	__u64 min_start;
	__u64 max_end;
	__u32 range_count;    /* above MAX_RANGES: every range within [min_start, max_end) counts */
	__u32 dirty;          /* NEEDS_RESCAN or more; set here, cleared when the scan begins */
	__u32 introduced;     /* its RECORD_INTRO was sent */
	__u32 shares_vm;      /* another process may hold the same mm */
	__u64 company_ns;     /* when a thread of it, but not the last, ended last */
	__u64 scan_run;       /* the scan that scanned it last, and through which thread */
	__u64 facts;          /* what its last introduction reported, see facts_of */
	__u64 window;         /* where in the ring it began to count `waiting`, see has_too_many_waiting */
	__u32 first_activity; /* what activity counts from, see track */
	__u32 vm_root;        /* who else has to know of its ranges; itself if that is not known; 0: nobody */
	__u32 scan_tid;
	__u32 rate_s; /* the second, and how many records it has sent in it: see is_throttled */
	__u32 rate;
	__u16 waiting;
	__u16 strikes;
	__u32 payer; /* whose `waiting` counts its records; 0: its own */
#ifdef OLD_KERNEL
	/* What scans have found, by their own hand: without atomics two may not fill one list. */
	__u32 covered_count; /* above MAX_RANGES: every range counts */
	struct {
		__u64 start;
		__u64 end;
	} covered[MAX_RANGES];
	__u32 reserved;
#endif
	/* Mappings that brought it here. 0, or first_activity on an old kernel: untracked, nothing of it is wanted. */
	__u32 activity;
	struct {
		__u64 start;
		__u64 end;
	} ranges[MAX_RANGES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct process);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct file_key);
	__type(value, struct verdict_value);
} verdicts SEC(".maps");

/* A system call under way that will change executable mappings if it succeeds. */
enum pending_kind {
	PENDING_MAP = 1 << 0,           /* maps a file executable */
	PENDING_UNMAP = 1 << 1,         /* takes this range away from what we know */
	PENDING_REREAD = 1 << 2,        /* changes it in a way only a scan can determine */
	PENDING_MPROTECT_EXEC = 1 << 3, /* may make a file mapping executable */
	PENDING_ASK = 1 << 4,           /* the file has no verdict yet */
	PENDING_UNSURE_FD = 1 << 5,     /* the fd table is shared: the fd may name another file by now */
	PENDING_COUNTED = 1 << 6,       /* counted in its process's activity */
	PENDING_SHARED_MM = 1 << 7,     /* others could interfere when it began */
	PENDING_AMONG_THREADS = 1 << 8, /* and there were other threads of its process among them */
};

struct pending {
	__u32 kind;
	__u32 reserved;
	__u64 start;
	__u64 length; /* whole pages */
	__u64 offset_bytes;
	__u64 file; /* struct file *, as a number: only ever read through probe reads */
	struct file_key key;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct pending);
} pending_calls SEC(".maps");

/* Written by user space through the mapped section, read by every program. */
__u32 rules_epoch = 0;
__u32 report = 0; /* enum report_bit */
__u32 now_s = 0;  /* ticks about once a second; a clock read per mmap would cost more */
__u64 scan_run = 0;
/* 0, which the verifier does not know: a number that begins with it is one state for it, not one for each value. */
__u32 unknown_zero = 0;
__u32 max_records_s = 0; /* records one process may send in a second; 0: any number */

/* A global function: the verifier reads it once, not for each of its callers. Those with pointers: 5.12+. */
#ifdef OLD_KERNEL
#define VERIFIED_ONCE static __noinline
#else
#define VERIFIED_ONCE __noinline
#endif

/*
 * How many calls are in pending_calls. An exit hook that finds 0 has nothing to look up, which
 * keeps calls of no interest at the price of one load. On a cache line of its own. Raised after
 * the insert and lowered after the delete, so it is never too low.
 */
__u32 calls_under_way SEC(".data.calls") = 0;

static __always_inline bool is_error(long ret)
{
	return (unsigned long)ret > -4096UL;
}

/*
 * Authoritative records need a process that nobody can interfere with: one task in its address space and nobody
 * beside it on its fd table. mm_users counts threads and CLONE_VM processes alike (and, for a
 * moment, a reader of /proc/PID/maps: that makes a needless tentative record, never a wrong authoritative one).
 */
static __always_inline bool is_single_user(struct task_struct *task)
{
	return BPF_CORE_READ(task, mm, mm_users.counter) == 1;
}

/* Whether somebody beside the task's own threads holds its address space. */
static __always_inline bool is_shared(struct task_struct *task)
{
	return BPF_CORE_READ(task, mm, mm_users.counter) > BPF_CORE_READ(task, signal, live.counter);
}

/*
 * Whether a process that is not tracked may hold the task's address space. A thread on its way out
 * is counted until it is gone, so this is never true for that reason; for a moment it is while
 * somebody reads /proc/PID/maps, which costs a needless scan.
 */
static __always_inline bool has_untracked_sharers(struct task_struct *task, int readers)
{
	int threads = BPF_CORE_READ(task, signal, nr_threads);

	if (!BPF_CORE_READ(task, group_leader, mm))
		threads--; /* a dead leader is counted to the end */
	return BPF_CORE_READ(task, mm, mm_users.counter) - readers > threads;
}

static __always_inline bool has_own_fds(struct task_struct *task)
{
	return READ(TYPED(struct task_struct, task), files, count.counter) == 1;
}

/*
 * How many tracked processes have a tgid with these low bits. Most calls come from processes that
 * are not tracked, and this shows it at the price of a load.
 */
#define SLOTS 65536
__u32 process_slots[SLOTS];

static __always_inline __u32 *slot_of(__u32 tgid)
{
	return &process_slots[tgid & (SLOTS - 1)];
}

static __always_inline bool is_tracked(struct process *process)
{
#ifdef OLD_KERNEL
	return process->activity != process->first_activity;
#else
	return process->activity;
#endif
}

/* The process if it is here and not untracked. */
static __always_inline struct process *find_process(__u32 tgid)
{
	struct process *process;

	if (!*slot_of(tgid))
		return NULL;
	process = bpf_map_lookup_elem(&processes, &tgid);
	return process && is_tracked(process) ? process : NULL;
}

/*
 * While it was not tracked user space has forgotten with whom it shares its address space: the next record
 * of it says that it does, see sharing_flag.
 */
static __always_inline void forget_sharers(struct process *process)
{
	process->shares_vm = 0;
	process->vm_root = 0;
}

#ifdef OLD_KERNEL

/*
 * Before 5.12 an atomic addition gives no value, and there is no other atomic operation. So activity
 * are only ever counted, from a random number on, and a process is untracked by setting first_activity to
 * the count up to which all is known: any mapping that was counted since makes the two differ. A slot
 * once taken stays taken: after as many processes as there are slots each call pays for a look-up.
 */
static __always_inline void begin_tracking(struct process *process, __u32 tgid)
{
	__u32 from = bpf_get_prandom_u32() >> 1;

	*slot_of(tgid) = 1;
	process->first_activity = from;
	/* Two threads may both begin: then the sum is as random, and fits no first_activity. */
	__sync_fetch_and_add(&process->activity, from);
}

static __always_inline void track(struct process *process, __u32 tgid)
{
	if (!is_tracked(process))
		forget_sharers(process);
	__sync_fetch_and_add(&process->activity, 1);
}

static __always_inline void drop_activity(struct process *process, __u32 tgid)
{
	if (process)
		__sync_fetch_and_sub(&process->activity, 1);
}

static __always_inline void remove_process(__u32 tgid)
{
	bpf_map_delete_elem(&processes, &tgid);
}

#else

static __always_inline void begin_tracking(struct process *process, __u32 tgid)
{
}

/*
 * Each time the count begins it does so somewhere else, so that a late answer of user space, to
 * what the process was before an exec or before it was untracked, never fits what it is now.
 */
static __always_inline void track(struct process *process, __u32 tgid)
{
	if (__sync_fetch_and_add(&process->activity, 1))
		return;
	forget_sharers(process);
	__sync_fetch_and_add(slot_of(tgid), 1);
	process->first_activity = bpf_get_prandom_u32() >> 1;
	__sync_fetch_and_add(&process->activity, process->first_activity);
}

/* The call that was counted at its entry sends no record after all. */
static __always_inline void drop_activity(struct process *process, __u32 tgid)
{
	__u32 left;

	if (!process)
		return;
	left = __sync_fetch_and_sub(&process->activity, 1) - 1;
	if (left == process->first_activity && __sync_val_compare_and_swap(&process->activity, left, 0) == left)
		__sync_fetch_and_sub(slot_of(tgid), 1);
}

/* For good: its last thread is gone, or its program is another one. */
static __always_inline void remove_process(__u32 tgid)
{
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!process)
		return;
	/* Taken, not read: user space may be untracking it at this moment. */
	if (__sync_lock_test_and_set(&process->activity, 0))
		__sync_fetch_and_sub(slot_of(tgid), 1);
	bpf_map_delete_elem(&processes, &tgid);
}

#endif

/*
 * The process, made if it is not here; from now on it is tracked. NULL when the map is full,
 * which is counted.
 */
static __always_inline struct process *count_activity(struct task_struct *task)
{
	static const struct process blank;
	__u32 tgid = BPF_CORE_READ(task, tgid);
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!process) {
		bpf_map_update_elem(&processes, &tgid, &blank, BPF_NOEXIST);
		process = bpf_map_lookup_elem(&processes, &tgid);
	}
	if (!process) {
		count(LOST_PROCESSES);
		return NULL;
	}
	if (!process->start_ns) {
		process->start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
		begin_tracking(process, tgid);
	}
	track(process, tgid);
	return process;
}

/* With a loop over all ranges, and several callers. An old kernel has no stack left for their frames. */
#ifdef OLD_KERNEL
#define LOOP_ONCE static __always_inline
#else
#define LOOP_ONCE __noinline
#endif

/* From now on until the next scan every range counts. */
static __always_inline void forget_ranges(struct process *process)
{
	process->range_count = MAX_RANGES + 1;
	process->min_start = 0;
	process->max_end = ~0ULL;
}

/*
 * Threads may add at once: the slot is taken atomically, and one that is not filled in yet can
 * only be overlooked while its owner's tentative record, which comes after, is still to be sent. Where a slot
 * cannot be taken so (before 5.12) only the task of a single-user mm adds, and of a shared mm every range counts.
 */
LOOP_ONCE int add_range(struct process *process, __u64 start, __u64 end)
{
	__u32 slot;

	if (!process)
		return 0;
#ifdef OLD_KERNEL
	if (!is_single_user(current_task())) {
		forget_ranges(process);
		return 0;
	}
#endif
	if (!process->max_end || start < process->min_start)
		process->min_start = start;
	if (end > process->max_end)
		process->max_end = end;
	for (slot = 0; slot < MAX_RANGES && slot < process->range_count; slot++)
		if (process->ranges[slot].start <= start && process->ranges[slot].end >= end)
			return 0;
#ifdef OLD_KERNEL
	slot = process->range_count;
#else
	slot = __sync_fetch_and_add(&process->range_count, 1);
#endif
	if (slot < MAX_RANGES) {
		process->ranges[slot].start = start;
		process->ranges[slot].end = end;
	}
#ifdef OLD_KERNEL
	/* Still added atomically: a scan may have set it back to 0, which is to last. */
	__sync_fetch_and_add(&process->range_count, 1);
#endif
	return 0;
}

/*
 * A range of an address space that several processes share is reported to the one that the others came
 * from, too: they may be gone when it gives it up. It has what they map, so it is tracked.
 */
static __noinline int add_shared_range(struct process *process, __u64 start, __u64 end)
{
	struct process *root;
	__u32 tgid;

	if (!process)
		return 0;
	add_range(process, start, end);
	tgid = process->vm_root;
	if (!tgid)
		return 0;
	root = bpf_map_lookup_elem(&processes, &tgid);
	if (root && root != process) {
		add_range(root, start, end);
		track(root, tgid);
	}
	return 0;
}

LOOP_ONCE int overlaps_range(struct process *process, __u64 start, __u64 end)
{
	if (!process)
		return false;
	for (__u32 slot = 0; slot < MAX_RANGES; slot++) {
		if (slot >= process->range_count)
			return false;
		if (start < process->ranges[slot].end && end > process->ranges[slot].start)
			return true;
	}
	return false;
}

static __always_inline bool overlaps(struct process *process, __u64 start, __u64 end)
{
#ifdef OLD_KERNEL
	if (process->covered_count > MAX_RANGES)
		return true;
	for (__u32 slot = 0; slot < MAX_RANGES; slot++) {
		if (slot >= process->covered_count)
			break;
		if (start < process->covered[slot].end && end > process->covered[slot].start)
			return true;
	}
#endif
	if (end <= process->min_start || start >= process->max_end)
		return false;
	return process->range_count > MAX_RANGES || overlaps_range(process, start, end);
}

/* True for the one who turns the bit on: that one sends the record. */
static __always_inline bool mark_needs_rescan(struct process *process)
{
#ifdef OLD_KERNEL
	/* Two may both turn it on, and one record too many be sent. None is missed: see the decision 0011. */
	if (process->dirty)
		return false;
	process->dirty = NEEDS_RESCAN;
	return true;
#else
	return !process->dirty && __sync_lock_test_and_set(&process->dirty, NEEDS_RESCAN) == 0;
#endif
}

/* The same after something of it was dropped: true although it needed a rescan before, once until the scan. */
static __always_inline bool mark_throttled(struct process *process)
{
	if (process->dirty == THROTTLED)
		return false;
#ifdef OLD_KERNEL
	process->dirty = THROTTLED;
	return true;
#else
	return __sync_lock_test_and_set(&process->dirty, THROTTLED) != THROTTLED;
#endif
}

/*
 * Who is charged for its records: the process that it was forked by, without an exec since, and so on.
 * A pid that is another process's by now is of one that started later.
 */
static __always_inline struct process *payer_of(struct process *process)
{
	__u32 tgid = process->payer;
	struct process *payer;

	if (!tgid)
		return process;
	payer = bpf_map_lookup_elem(&processes, &tgid);
	return payer && payer->start_ns <= process->start_ns ? payer : process;
}

/*
 * FLAG_SHARED_VM for the first record of a process whose address space a process that is not
 * tracked may share: user space scans all to find it.
 */
static __always_inline __u32 sharing_flag(struct task_struct *task, struct process *process, int readers)
{
	if (process->shares_vm || !has_untracked_sharers(task, readers))
		return 0;
	process->shares_vm = 1;
	process->vm_root = BPF_CORE_READ(task, tgid);
	return FLAG_SHARED_VM;
}
