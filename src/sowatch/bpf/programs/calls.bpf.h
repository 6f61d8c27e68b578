/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The system calls that change mappings: what is noted when one enters, and what is reported when it
 * leaves. Which hook they are called from is all the same to them.
 */
#pragma once

#include "emit.bpf.h"

/* ---- a call enters ---------------------------------------------------------------------------- */

static __always_inline void send_needs_rescan(struct task_struct *task, struct process *process)
{
	__u32 sharing;

	if (!process)
		return;
	sharing = sharing_flag(task, process, 0);
	if (mark_needs_rescan(process) || sharing)
		send_small(task, RECORD_NEEDS_RESCAN, FLAG_NEEDS_RESCAN | sharing, 0, 0);
}

/* Whether the range holds something that is tracked. While a scan runs everything counts: the reader
 * may be about to add a range that this call takes away. */
static __always_inline bool matters(struct process *process, __u64 start, __u64 length)
{
	if (report & REPORT_RANGES)
		return true;
	if (!process)
		return false;
	if (process->shares_vm) {
		if (is_shared(current_task()))
			return true; /* the ranges of the other sharer are not in our entry */
		process->shares_vm = 0;
		if (process->vm_root) {
			process->vm_root = 0;
			forget_ranges(process);
			send_needs_rescan(current_task(), process);
		}
	}
	return overlaps(process, start, start + length);
}

/* A single-user mm at both ends of the call makes the record authoritative: who was there at its beginning may have acted
 * meanwhile and be gone by its end. */
static __always_inline void note(__u64 pid_tgid, struct pending *call)
{
	struct task_struct *task = current_task();

	if (!is_single_user(task)) {
		call->kind |= PENDING_SHARED_MM;
		if (BPF_CORE_READ(task, signal, nr_threads) > 1)
			call->kind |= PENDING_AMONG_THREADS;
	}
	if (bpf_map_update_elem(&pending_calls, &pid_tgid, call, BPF_ANY)) {
		count(LOST_PENDING);
		return;
	}
	__sync_fetch_and_add(&calls_under_way, 1);
}

static __always_inline __u64 whole_pages(__u64 length)
{
	return (length + PAGE_MASK_LOW) & ~PAGE_MASK_LOW;
}

/* What mmap and mprotect are asked for, and what an old personality adds to it. */
static __always_inline bool makes_executable(__u64 protection)
{
	return protection & PROT_EXEC ||
	       (protection & PROT_READ && READ(current_task(), personality) & READ_IMPLIES_EXEC);
}

/* hugetlbfs rounds up to its own pages, which are its blocks. */
static __always_inline __u64 whole_pages_of(struct file *file, __u64 length)
{
	__u64 page = PAGE_MASK_LOW + 1;

	if (READ(file, f_inode, i_sb, s_magic) == HUGETLBFS_MAGIC)
		page = READ(file, f_inode, i_sb, s_blocksize);
	return (length + page - 1) & ~(page - 1);
}

static __always_inline int enter_mmap(__u64 start, __u64 length, __u64 protection, __u64 flags, __u64 fd,
				      __u64 offset_bytes)
{
	bool executes = makes_executable(protection);
	bool maps_file = executes && !(flags & MAP_ANONYMOUS);
	/* Is a file of the kernel's own, /dev/zero, which no fd names. */
	bool shares_memory = executes && flags & MAP_ANONYMOUS && flags & MAP_SHARED;
	bool replaces = flags & MAP_FIXED;
	struct pending call = {.kind = unknown_zero};

	if (!maps_file && !shares_memory && !replaces)
		return 0;
	if (maps_file) {
		struct task_struct *task = current_task();
		struct file *file = file_of_fd(task, fd);
		enum verdict verdict;

		if (!has_own_fds(task))
			call.kind |= PENDING_UNSURE_FD;
		if (file) {
			/* A device may put another file into the mapping than its own. */
			if ((READ(file, f_inode, i_mode) & S_IFMT) != S_IFREG)
				call.kind |= PENDING_UNSURE_FD;
			make_key(task, file, &call.key);
			verdict = look_up_verdict(&call.key);
			/* Another thread may put another file in place of an ignored one. */
			if (verdict != VERDICT_IGNORE || call.kind & PENDING_UNSURE_FD) {
				call.kind |= PENDING_MAP;
				if (verdict == VERDICT_NONE)
					call.kind |= PENDING_ASK;
				call.file = (__u64)file;
				length = whole_pages_of(file, length);
			}
			/* Tracked from now on, so that a fork before the exit of this call is seen. */
			if (verdict != VERDICT_IGNORE && count_activity(task))
				call.kind |= PENDING_COUNTED;
		} else if (call.kind & PENDING_UNSURE_FD) {
			call.kind |= PENDING_MAP | PENDING_ASK;
		}
	}
	if (shares_memory) {
		count_activity(current_task());
		call.kind |= PENDING_REREAD;
	}
	call.start = start;
	call.length = whole_pages(length);
	call.offset_bytes = offset_bytes;
	/* Asked for no sooner: the call of a helper is a tenth of what an ignored file costs. */
	if (replaces && matters(find_process(bpf_get_current_pid_tgid() >> 32), call.start, call.length))
		call.kind |= PENDING_UNMAP;
	if (!(call.kind & (PENDING_MAP | PENDING_UNMAP | PENDING_REREAD)))
		return 0;
	note(bpf_get_current_pid_tgid(), &call);
	return 0;
}

static __always_inline int enter_range_call(__u64 start, __u64 length, enum pending_kind kind)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct pending call = {.kind = kind, .start = start, .length = whole_pages(length)};

	if (matters(find_process(pid_tgid >> 32), call.start, call.length))
		note(pid_tgid, &call);
	return 0;
}

static __always_inline int enter_munmap(__u64 start, __u64 length)
{
	return enter_range_call(start, length, PENDING_UNMAP);
}

static __always_inline int enter_mprotect(__u64 start, __u64 length, __u64 protection)
{
	struct pending call = {.kind = PENDING_MPROTECT_EXEC, .start = start, .length = whole_pages(length)};

	if (!makes_executable(protection))
		return enter_range_call(start, length, PENDING_UNMAP);
	note(bpf_get_current_pid_tgid(), &call);
	return 0;
}

/* Moves, grows, shrinks, and replaces what is at the target: rare enough for a scan. */
static __always_inline int enter_mremap(__u64 old, __u64 old_length, __u64 new_length, __u64 flags, __u64 target)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct process *process = find_process(pid_tgid >> 32);
	struct pending call = {.kind = PENDING_REREAD};
	/* Without a length a shared mapping is not moved, but mapped once more. */
	__u64 was_length = old_length ? whole_pages(old_length) : 1;

	if (matters(process, old, was_length) ||
	    (flags & MREMAP_FIXED && matters(process, target, whole_pages(new_length))))
		note(pid_tgid, &call);
	return 0;
}

static __always_inline int enter_shmat(__u64 flags)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct pending call = {.kind = PENDING_REREAD};
	bool executes = makes_executable(flags & SHM_EXEC ? PROT_EXEC : PROT_READ);

	if (!executes && !(flags & SHM_REMAP))
		return 0;
	if (executes || find_process(pid_tgid >> 32)) {
		if (executes)
			count_activity(current_task());
		note(pid_tgid, &call);
	}
	return 0;
}

/* Takes away a whole segment, of a length that only the kernel knows. */
static __always_inline int enter_shmdt(__u64 start)
{
	return enter_range_call(start, 1, PENDING_REREAD);
}

/* ---- the call leaves -------------------------------------------------------------------------- */

/*
 * Whether a process sends so many records that it would drown the others: too many in this second, or more
 * than may wait to be read. Then they are only counted, and it needs a rescan: scans find what it
 * has, at the reader's pace.
 */
static __always_inline bool is_throttled(struct task_struct *task, struct process *process)
{
	struct process *payer;

	if (!process || !max_records_s)
		return false;
	if (process->rate_s != now_s) {
		process->rate_s = now_s;
		process->rate = 0;
	}
	payer = payer_of(process);
	if (++process->rate <= max_records_s && !has_too_many_waiting(&payer->window, &payer->waiting, &payer->strikes))
		return false;
	count(LOST_THROTTLED);
	if (mark_throttled(process))
		send_small(task, RECORD_NEEDS_RESCAN, FLAG_NEEDS_RESCAN | FLAG_THROTTLED, 0, 0);
	return true;
}

/* Again if it is not any more what was reported of it. Inlined: kernels before 6.13 have 512 bytes of stack for
 * all frames. */
static __always_inline int introduce(struct task_struct *task, struct process *process)
{
	__u64 facts;

	if (!process)
		return 0;
	facts = facts_of(task);
	if (process->introduced && process->facts == facts)
		return 0;
	process->introduced = send_process(SCRATCH_HOOKS, NULL, task, NULL, process, RECORD_INTRO, 0, WITH_EXE);
	process->facts = facts;
	return 0;
}

static __always_inline void undo_activity(const struct pending *call, __u32 tgid)
{
	if (call->kind & PENDING_COUNTED)
		drop_activity(find_process(tgid), tgid);
}

static __always_inline bool was_single_user(const struct pending *call, struct task_struct *task)
{
	return !(call->kind & PENDING_SHARED_MM) && is_single_user(task);
}

/* Not inlined: its stack of two keys would not fit beside its caller's. */
VERIFIED_ONCE int report_mapping(struct pending *call, __u64 start)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct task_struct *task = current_task();
	struct found_vma found = {};
	struct process *process = NULL;
	bool is_whole = true;
	bool is_single_user_now;
	__u32 flags = 0;

	if (!call)
		return 0;
	is_single_user_now = was_single_user(call, task);
	found.key = call->key;
	found.file = (struct file *)call->file;
	found.start = start;
	found.end = start + call->length;
	found.offset_bytes = call->offset_bytes;
	found.is_executable = true;
	if (call->kind & (PENDING_UNSURE_FD | PENDING_MPROTECT_EXEC)) {
		/* What is there now is certain to have been there; the fd may have been switched. */
		bool confirmed = find_vma_at(start, &found) == 0;
		enum verdict verdict;

		/* mprotect may span several mappings, of which this is the first. */
		if (call->kind & PENDING_MPROTECT_EXEC) {
			flags |= FLAG_MPROTECT;
			is_whole = confirmed && start + call->length <= found.end;
		}
		/* The file may have been closed since the entry, and its memory be another one's. */
		if (!confirmed && found.file) {
			make_key(task, TYPED(struct file, found.file), &found.key);
			if (!is_same_key(&found.key, &call->key))
				found.file = NULL;
		}
		verdict = found.file ? look_up_verdict(&found.key) : VERDICT_NONE;
		if (!found.file || !found.is_executable || (verdict == VERDICT_IGNORE && confirmed)) {
			if (!confirmed || !is_whole)
				send_needs_rescan(task, count_activity(task));
			undo_activity(call, tgid);
			return 0;
		}
		if (verdict == VERDICT_NONE)
			flags |= FLAG_ASK;
		if (!confirmed || !is_whole)
			is_single_user_now = false;
	} else if (call->kind & PENDING_ASK) {
		flags |= FLAG_ASK;
	}
	if (call->kind & PENDING_COUNTED)
		process = find_process(tgid);
	if (!process) /* or it was untracked since the entry */
		process = count_activity(task);
	if (process) {
		add_shared_range(process, found.start, found.end);
		if (is_throttled(task, process))
			return 0;
		introduce(task, process);
		flags |= sharing_flag(task, process, 0);
		if (!is_single_user_now && mark_needs_rescan(process))
			flags |= FLAG_NEEDS_RESCAN;
	}
	send_map(SCRATCH_HOOKS, NULL, task, process, found.file, &found.key, found.start, found.end, found.offset_bytes,
		 flags);
	return 0;
}

/*
 * Of a shared mm a scan decides. So it does after a failure: mmap and mprotect may have taken
 * something away before they failed. A failed munmap changes nothing, but that is rare and a
 * scan cheap.
 * If no thread is beside this one, the other user is mostly a reader of /proc/PID/maps, the
 * reader of these programs among them: the range is reported, so that what comes and goes meanwhile is
 * reported, too, and a scan corrects it if there was another process after all.
 */
static __noinline int report_unmapping(struct task_struct *task, struct process *process, const struct pending *call,
				       long ret)
{
	__u32 flags = 0;

	if (is_error(ret) || call->kind & PENDING_AMONG_THREADS) {
		send_needs_rescan(task, process);
		return 0;
	}
	if (is_throttled(task, process))
		return 0;
	if (process && process->introduced)
		introduce(task, process);
	if (process && !was_single_user(call, task)) {
		flags = sharing_flag(task, process, 0);
		if (mark_needs_rescan(process))
			flags |= FLAG_NEEDS_RESCAN;
	}
	send_small(task, RECORD_RANGE, flags, call->start, call->start + call->length);
	return 0;
}

#define ANY_CALL (PENDING_MAP | PENDING_UNMAP | PENDING_REREAD | PENDING_MPROTECT_EXEC)

/* Reports what a call has done. kinds: those that this call can be. */
static __always_inline void report_call(struct task_struct *task, struct pending *call, long ret, __u32 kinds)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;

	if (call->kind & kinds & PENDING_UNMAP) {
		struct process *process = find_process(tgid);

		/* The reader may have found in another sharer what this has taken away. */
		if (!process && report & REPORT_RANGES && has_untracked_sharers(task, 0))
			process = count_activity(task);
		report_unmapping(task, process, call, ret);
	}
	if (call->kind & kinds & PENDING_REREAD) {
		struct process *process = find_process(tgid);

		/* The reader may have passed the place where this has put something. */
		if (!process && report & REPORT_RANGES)
			process = count_activity(task);
		send_needs_rescan(task, process);
	}
	if (call->kind & kinds & (PENDING_MAP | PENDING_MPROTECT_EXEC)) {
		bool is_mmap = call->kind & PENDING_MAP;

		if (!is_error(ret))
			report_mapping(call, is_mmap ? ret : call->start);
		else if (is_mmap)
			undo_activity(call, tgid);
		else /* A hole, or a mapping that may not be, ends it, but what came before it is done. */
			send_needs_rescan(task, count_activity(task));
	}
}

/* For every call: what has to be known was noted at the entry. */
static __always_inline int leave_call(long ret, __u32 kinds)
{
	struct pending *call;
	__u64 pid_tgid;

	if (!calls_under_way)
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	call = bpf_map_lookup_elem(&pending_calls, &pid_tgid);
	if (!call)
		return 0;
	report_call(current_task(), call, ret, kinds);
	bpf_map_delete_elem(&pending_calls, &pid_tgid);
	__sync_fetch_and_sub(&calls_under_way, 1);
	return 0;
}
