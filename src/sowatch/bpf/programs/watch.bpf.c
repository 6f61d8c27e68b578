// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Which process has which file mapped executable: strategy core, hook set syscall.
 *
 * The story, top to bottom: a call enters; if it may change an executable mapping of a file that
 * user space has not told us to ignore, we note it (pending_calls) and follow its process
 * (processes). When it leaves and has succeeded, we say so. Fork, exec and exit keep `processes`
 * true. The iterator at the end reads what there is: all of it at the start and after a loss, one
 * process when a claim left doubt.
 *
 * Facts and claims: a process that is alone in its address space gives facts, user space changes
 * its map by the record alone. Where other threads may interfere the record is a claim and the
 * process is dirty: one record carries FLAG_DIRTY, user space clears the bit by starting a
 * reading, and what happens later sets it again. docs/decisions/0002-facts-and-claims.md.
 *
 * Why sys_exit and not sys_enter: a fact is true once the call has succeeded and nobody else can
 * have changed it in between; a claim only has to come after the change, so that the reading
 * which follows it sees the change.
 */
#include "emit.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* ---- a call enters ---------------------------------------------------------------------------- */

/* Whether the range holds something we follow. While a reading runs everything counts: the reader
 * may be about to add a range that this call takes away. */
static __always_inline bool matters(struct process *process, __u64 start, __u64 length)
{
	if (report & REPORT_RANGES)
		return true;
	if (!process)
		return false;
	if (process->shares_vm) {
		if (is_shared(current_task()))
			return true; /* the other holder's ranges are not in our entry */
		process->shares_vm = 0;
	}
	return overlaps(process, start, start + length);
}

/* Alone at both ends of the call makes a fact: one who was there at its beginning may have acted
 * meanwhile and be gone by its end. */
static __always_inline void note(__u64 pid_tgid, struct pending *call)
{
	if (!is_alone(current_task()))
		call->kind |= PENDING_IN_COMPANY;
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

SEC("tp/syscalls/sys_enter_mmap")
int enter_mmap(struct syscall_enter *context)
{
	__u64 protection = context->args[2], flags = context->args[3];
	bool maps_file = !(flags & MAP_ANONYMOUS) && makes_executable(protection);
	bool replaces = flags & MAP_FIXED;
	struct pending call = {};
	__u64 pid_tgid;

	if (!maps_file && !replaces)
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	if (maps_file) {
		struct task_struct *task = current_task();
		struct file *file = file_of_fd(task, context->args[4]);
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
			} else {
				count(COUNT_IGNORED);
			}
			/* Followed from now on, so that a fork before the exit of this call is seen. */
			if (verdict != VERDICT_IGNORE && touch_process(task))
				call.kind |= PENDING_TOUCHED;
		} else if (call.kind & PENDING_UNSURE_FD) {
			call.kind |= PENDING_MAP | PENDING_ASK;
		}
	}
	call.start = context->args[0];
	call.length = whole_pages(context->args[1]);
	call.offset_bytes = context->args[5];
	if (replaces && matters(find_process(pid_tgid >> 32), call.start, call.length))
		call.kind |= PENDING_UNMAP;
	if (!(call.kind & (PENDING_MAP | PENDING_UNMAP)))
		return 0;
	note(pid_tgid, &call);
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

SEC("tp/syscalls/sys_enter_munmap")
int enter_munmap(struct syscall_enter *context)
{
	return enter_range_call(context->args[0], context->args[1], PENDING_UNMAP);
}

/* Also on pkey_mprotect, whose key comes after the arguments that matter. */
SEC("tp/syscalls/sys_enter_mprotect")
int enter_mprotect(struct syscall_enter *context)
{
	struct pending call = {
		.kind = PENDING_MPROTECT_EXEC, .start = context->args[0], .length = whole_pages(context->args[1])};

	if (!makes_executable(context->args[2]))
		return enter_range_call(context->args[0], context->args[1], PENDING_UNMAP);
	note(bpf_get_current_pid_tgid(), &call);
	return 0;
}

/* Moves, grows, shrinks, and replaces what is at the target: rare enough to look again. */
SEC("tp/syscalls/sys_enter_mremap")
int enter_mremap(struct syscall_enter *context)
{
	__u64 old = context->args[0], new_length = context->args[2], flags = context->args[3];
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct process *process = find_process(pid_tgid >> 32);
	struct pending call = {.kind = PENDING_REREAD};
	/* Without a length a shared mapping is not moved, but mapped once more. */
	__u64 old_length = context->args[1] ? whole_pages(context->args[1]) : 1;

	if (matters(process, old, old_length) ||
	    (flags & MREMAP_FIXED && matters(process, context->args[4], whole_pages(new_length))))
		note(pid_tgid, &call);
	return 0;
}

SEC("tp/syscalls/sys_enter_shmat")
int enter_shmat(struct syscall_enter *context)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct pending call = {.kind = PENDING_REREAD};

	if (!(context->args[2] & (SHM_EXEC | SHM_REMAP)))
		return 0;
	if (context->args[2] & SHM_EXEC || find_process(pid_tgid >> 32)) {
		if (context->args[2] & SHM_EXEC)
			touch_process(current_task());
		note(pid_tgid, &call);
	}
	return 0;
}

/* Takes away a whole segment, of a length that only the kernel knows. */
SEC("tp/syscalls/sys_enter_shmdt")
int enter_shmdt(struct syscall_enter *context)
{
	return enter_range_call(context->args[0], 1, PENDING_REREAD);
}

/* ---- the call leaves -------------------------------------------------------------------------- */

static __always_inline void send_dirty(struct task_struct *task, struct process *process)
{
	if (process && mark_dirty(process))
		send_small(task, RECORD_DIRTY, FLAG_DIRTY, 0, 0);
}

/*
 * Whether a process sends so many records that it would drown the others. The rest of that second
 * it only counts them, and is dirty: readings tell what it has, at the reader's pace.
 */
static __always_inline bool is_throttled(struct task_struct *task, struct process *process)
{
	if (!process || !max_records_s)
		return false;
	if (process->rate_s != now_s) {
		process->rate_s = now_s;
		process->rate = 0;
	}
	if (++process->rate <= max_records_s)
		return false;
	count(LOST_THROTTLED);
	/* After the first of them user space knows whom to read although it was dirty before. */
	if (mark_dirty(process) || process->rate == max_records_s + 1)
		send_small(task, RECORD_DIRTY, FLAG_DIRTY | FLAG_THROTTLED, 0, 0);
	return true;
}

static __always_inline void introduce(struct task_struct *task, struct process *process)
{
	if (!process->introduced)
		process->introduced = send_process(SCRATCH_HOOKS, NULL, task, NULL, process, RECORD_INTRO, 0, WITH_EXE);
}

static __always_inline void untouch(const struct pending *call, __u32 tgid)
{
	if (call->kind & PENDING_TOUCHED)
		unfollow(find_process(tgid), tgid);
}

static __always_inline bool was_alone(const struct pending *call, struct task_struct *task)
{
	return !(call->kind & PENDING_IN_COMPANY) && is_alone(task);
}

/* Not inlined: its stack of two keys would not fit beside its caller's. */
static __noinline int report_mapping(struct pending *call, __u64 start)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct task_struct *task = current_task();
	struct found_vma found = {};
	struct process *process = NULL;
	bool is_whole = true;
	bool is_alone_now;
	__u32 flags = 0;

	if (!call)
		return 0;
	is_alone_now = was_alone(call, task);
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
		if (verdict == VERDICT_IGNORE && confirmed)
			count(COUNT_IGNORED);
		if (!found.file || !found.is_executable || (verdict == VERDICT_IGNORE && confirmed)) {
			if (!confirmed || !is_whole)
				send_dirty(task, touch_process(task));
			untouch(call, tgid);
			return 0;
		}
		if (verdict == VERDICT_NONE)
			flags |= FLAG_ASK;
		if (!confirmed || !is_whole)
			is_alone_now = false;
	} else if (call->kind & PENDING_ASK) {
		flags |= FLAG_ASK;
	}
	if (call->kind & PENDING_TOUCHED)
		process = find_process(tgid);
	if (!process) /* or it was settled since the entry */
		process = touch_process(task);
	if (process) {
		add_range(process, found.start, found.end);
		if (is_throttled(task, process))
			return 0;
		introduce(task, process);
		if (!is_alone_now && mark_dirty(process))
			flags |= FLAG_DIRTY;
	}
	send_map(SCRATCH_HOOKS, NULL, task, process, found.file, &found.key, found.start, found.end, found.offset_bytes,
		 flags);
	return 0;
}

/* One program on the exits of all six calls: what it has to know was noted at the entry. */
SEC("tp/syscalls/sys_exit_mmap")
int leave(struct syscall_exit *context)
{
	long ret = context->ret;
	struct task_struct *task;
	struct pending *call;
	__u64 pid_tgid;

	if (!calls_under_way)
		return 0;
	pid_tgid = bpf_get_current_pid_tgid();
	call = bpf_map_lookup_elem(&pending_calls, &pid_tgid);
	if (!call)
		return 0;
	task = current_task();
	if (call->kind & PENDING_UNMAP) {
		/*
		 * In company a reading decides. So it does after a failure: mmap and mprotect may
		 * have taken something away before they failed. A failed munmap changes nothing,
		 * but that is rare and a reading cheap.
		 */
		struct process *process = find_process(pid_tgid >> 32);

		if (!was_alone(call, task) || is_error(ret))
			send_dirty(task, process);
		else if (!is_throttled(task, process))
			send_small(task, RECORD_RANGE, 0, call->start, call->start + call->length);
	}
	if (call->kind & PENDING_REREAD) {
		struct process *process = find_process(pid_tgid >> 32);

		/* The reader may have passed the place where this has put something. */
		if (!process && report & REPORT_RANGES)
			process = touch_process(task);
		send_dirty(task, process);
	}
	if (call->kind & PENDING_MAP) {
		if (is_error(ret))
			untouch(call, pid_tgid >> 32);
		else
			report_mapping(call, ret);
	}
	if (call->kind & PENDING_MPROTECT_EXEC) {
		/* A hole, or a mapping that may not be, ends it, but what came before it is done. */
		if (is_error(ret))
			send_dirty(task, touch_process(task));
		else
			report_mapping(call, call->start);
	}
	bpf_map_delete_elem(&pending_calls, &pid_tgid);
	__sync_fetch_and_sub(&calls_under_way, 1);
	return 0;
}

/*
 * A fork copies the mappings some time before it is told, and a thread that mapped meanwhile may
 * be gone by then. No fork takes this long: copying the tables of a terabyte takes some 10 s.
 */
#define FORK_NS (60 * NS_PER_S)

/* ---- processes come and go -------------------------------------------------------------------- */

static __always_inline bool had_company(struct process *process)
{
	return process && process->company_ns && bpf_ktime_get_ns() - process->company_ns < FORK_NS;
}

/*
 * Runs in the parent, after its mappings were copied and before the child does anything. If the
 * parent has company, a mapping may have come or gone between the copying and now: a claim.
 */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(process_forks, struct task_struct *parent, struct task_struct *child)
{
	__u32 tgid = BPF_CORE_READ(parent, tgid), child_tgid = BPF_CORE_READ(child, tgid);
	struct process *process = find_process(tgid), *inherited = NULL;
	struct mm_struct *mm = BPF_CORE_READ(child, mm);
	__u32 flags = 0;
	bool sent;

	if (child_tgid == tgid || !mm)
		return 0; /* a thread, or a kernel thread */
	if (!process && !(report & REPORT_PROCESSES))
		return 0;
	if (mm == BPF_CORE_READ(parent, mm))
		flags |= FLAG_SHARED_VM;
	if (process) {
		remove_process(child_tgid);
		bpf_map_update_elem(&processes, &child_tgid, process, BPF_ANY);
		inherited = bpf_map_lookup_elem(&processes, &child_tgid);
		if (!inherited)
			count(LOST_PROCESSES);
	}
	if (inherited) {
		inherited->touches = 0;
		follow(inherited, child_tgid);
		inherited->start_ns = BPF_CORE_READ(child, start_boottime);
		inherited->dirty = 0;
		inherited->visit_run = 0;
		if (flags & FLAG_SHARED_VM) {
			inherited->shares_vm = 1;
			process->shares_vm = 1;
		}
	}
	flags |= narrow_flag(child);
	if (!(flags & FLAG_SHARED_VM) && (!is_alone(parent) || had_company(process))) {
		flags |= FLAG_DIRTY;
		if (inherited)
			inherited->dirty = 1;
	}
	sent = send_process(SCRATCH_HOOKS, NULL, child, parent, inherited, RECORD_FORK, flags,
			    process && process->introduced ? WITHOUT_EXE : WITH_EXE);
	if (inherited)
		inherited->introduced = sent;
	return 0;
}

/* What exec itself mapped never passed mmap: told here, as if it had, with FLAG_IMAGE. */
static __noinline int report_image(struct task_struct *task, struct file *file, __u64 start, __u64 end)
{
	struct process *process;
	struct file_key key = {};
	__u32 flags = FLAG_IMAGE;
	enum verdict verdict;

	if (!file)
		return 0;
	make_key(TYPED(struct task_struct, task), TYPED(struct file, file), &key);
	verdict = look_up_verdict(&key);
	if (verdict == VERDICT_IGNORE)
		return 0;
	if (verdict == VERDICT_NONE)
		flags |= FLAG_ASK;
	process = touch_process(task);
	if (!process)
		return 0;
	add_range(process, start, end);
	introduce(task, process);
	send_map(SCRATCH_HOOKS, NULL, task, process, file, &key, start, end, 0, flags);
	return 0;
}

static __noinline int report_images(struct task_struct *task)
{
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct found_vma found = {};
	__u64 base = interpreter_base_of(mm);

	report_image(task, BPF_CORE_READ(mm, exe_file), BPF_CORE_READ(mm, start_code) & ~PAGE_MASK_LOW,
		     whole_pages(BPF_CORE_READ(mm, end_code)));
	/* Usually the headers are mapped before the code, readable only. */
	if (base && find_vma_at(base, &found) == 0 && !found.is_executable)
		find_vma_at(found.end, &found);
	if (found.is_executable)
		report_image(task, found.file, found.start, found.end);
	return 0;
}

/* Every mapping of the old image is gone, and every other thread. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(process_execs, struct task_struct *task)
{
	__u32 tgid = BPF_CORE_READ(task, tgid);
	bool is_followed = find_process(tgid);

	if (is_followed || report & REPORT_PROCESSES)
		send_process(SCRATCH_HOOKS, NULL, task, NULL, NULL, RECORD_EXEC, 0,
			     report & REPORT_PROCESSES ? WITH_EXE : WITHOUT_EXE);
	remove_process(tgid);
	if (narrow_flag(task) && touch_process(task))
		send_small(task, RECORD_DIRTY, FLAG_DIRTY | FLAG_NARROW, 0, 0);
	if (report & REPORT_IMAGES)
		report_images(task);
	return 0;
}

/*
 * Runs for every thread; the process is gone with the last one, whichever that is. Two last
 * threads may both find nobody left: the second deletes and says nothing new.
 */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(process_exits, struct task_struct *task)
{
	__u32 tgid = BPF_CORE_READ(task, tgid);
	struct process *process = find_process(tgid);

	if (BPF_CORE_READ(task, signal, live.counter) > 0) {
		if (process)
			process->company_ns = bpf_ktime_get_ns();
		return 0;
	}
	if (process || report & REPORT_PROCESSES)
		send_small(task, RECORD_EXIT, 0, 0, 0);
	remove_process(tgid);
	return 0;
}

/*
 * Run by user space, not by an event: nothing of this process is wanted, says somebody who has
 * seen all that brought it here. If another mapping has been counted since, it stays; if not, it
 * is not followed any more, until one is. Arguments: tgid, start_ns, touches. 1 if it was settled.
 */
SEC("raw_tp")
int settle(struct bpf_raw_tracepoint_args *context)
{
	__u32 tgid = context->args[0], touches = context->args[2];
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!process || process->start_ns != context->args[1] || !touches)
		return 0;
	process->introduced = 0; /* user space forgets it; before the swap, for it may come back at once */
	if (__sync_val_compare_and_swap(&process->touches, touches, 0) != touches)
		return 0;
	__sync_fetch_and_sub(slot_of(tgid), 1);
	return 1;
}

/* ---- reading what there is -------------------------------------------------------------------- */

/* Where the reader stands; one reading runs at a time. */
struct reader {
	__u64 run;
	__u32 tgid;
	__u32 tid;
	__u64 interpreter_base;
	struct file_id exe; /* the main executable */
	__u32 is_skipped;
	__u32 is_again; /* skipped, and to be read again */
	__u32 visit_sent;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reader);
} reader_state SEC(".maps");

/*
 * The first vma of a task. The lock of its mappings is held for reading, so what we mark here
 * comes before any change that this reading will not see.
 */
static __noinline int begin_visit(struct reader *reader, struct task_struct *task)
{
	struct mm_struct *mm;
	struct process *process;
	struct file *exe;
	__u32 tgid, tid;

	if (!reader)
		return 0;
	tgid = BPF_CORE_READ(task, tgid);
	tid = BPF_CORE_READ(task, pid);
	reader->run = reading_run;
	reader->tgid = tgid;
	reader->tid = tid;
	reader->visit_sent = 0;
	/*
	 * Gone, although its mappings are still there; or a vfork child, which shows its parent's;
	 * or one that fork has not finished, which it will tell of;
	 * or one of the many threads that are visited once the leader is dead, but not the first.
	 */
	reader->is_skipped = BPF_CORE_READ(task, signal, live.counter) == 0 ||
			     BPF_CORE_READ(task, vfork_done) != NULL || BPF_CORE_READ(task, __state) & TASK_NEW;
	/*
	 * Within exec a task shows what is neither the old program's nor all of the new one's; a
	 * vfork child shows its parent's still, although vfork_done is gone already.
	 */
	reader->is_again = !reader->is_skipped && BPF_CORE_READ_BITFIELD_PROBED(task, in_execve);
	reader->is_skipped |= reader->is_again;
	process = find_process(tgid);
	if (tid != tgid) {
		if (BPF_CORE_READ(task, group_leader, mm))
			reader->is_skipped = 1;
		else if (process && process->visit_run == reading_run && process->visit_tid != tid)
			reader->is_skipped = 1;
	}
	if (reader->is_skipped)
		return 0;
	if (!process && narrow_flag(task))
		process = touch_process(task);
	if (process) {
		process->visit_run = reading_run;
		process->visit_tid = tid;
		process->dirty = 0;
		/* Make room; while a reading runs every range counts, so none is missed meanwhile. */
		if (process->range_count > MAX_RANGES) {
			process->range_count = 0;
			process->min_start = 0;
			process->max_end = 0;
		}
	}
	mm = BPF_CORE_READ(task, mm);
	exe = BPF_CORE_READ(mm, exe_file);
	__builtin_memset(&reader->exe, 0, sizeof(reader->exe));
	if (exe)
		identify(TYPED(struct file, exe), &reader->exe);
	reader->interpreter_base = interpreter_base_of(mm);
	return 0;
}

static __always_inline bool tell_visit(struct seq_file *seq, struct task_struct *task, struct process *process,
				       __u32 flags)
{
	struct record visit = {};

	fill_head(&visit, task, RECORD_VISIT, flags, sizeof(visit));
	visit.touches = touches_of(SCRATCH_READER, task, process);
	return bpf_seq_write(seq, &visit, sizeof(visit)) == 0;
}

SEC("iter/task_vma")
int read_mappings(struct bpf_iter__task_vma *context)
{
	struct seq_file *seq = context->meta->seq;
	struct task_struct *task = context->task;
	struct vm_area_struct *vma = context->vma;
	__u32 zero = 0, flags = 0;
	struct reader *reader;
	struct process *process;
	struct file_key key = {};
	enum verdict verdict;
	struct file *file;
	__u64 start, end, offset_bytes;

	if (!task || !vma)
		return 0;
	reader = bpf_map_lookup_elem(&reader_state, &zero);
	if (!reader)
		return 0;
	if (reader->run != reading_run || reader->tgid != task->tgid || reader->tid != task->pid)
		begin_visit(reader, task);
	if (reader->is_skipped) {
		if (reader->is_again && tell_visit(seq, task, NULL, FLAG_AGAIN))
			reader->is_again = 0;
		return 0;
	}
	process = find_process(reader->tgid);
	if (!reader->visit_sent && (process || report & REPORT_VISITS) &&
	    !tell_visit(seq, task, process, narrow_flag(task)))
		return 0; /* the buffer is full: the kernel calls again for this vma */
	file = vma->vm_file;
	if (!file || !(vma->vm_flags & VM_EXEC))
		goto shown;
	start = vma->vm_start;
	end = vma->vm_end;
	offset_bytes = vma->vm_pgoff << PAGE_SHIFT;
	make_key(TYPED(struct task_struct, task), TYPED(struct file, file), &key);
	if (is_same_file(&key.file, &reader->exe) ||
	    (reader->interpreter_base && start - offset_bytes == reader->interpreter_base)) {
		if (!(report & REPORT_IMAGES))
			goto shown;
		flags |= FLAG_IMAGE;
	}
	verdict = look_up_verdict(&key);
	if (verdict == VERDICT_IGNORE)
		goto shown;
	if (verdict == VERDICT_NONE)
		flags |= FLAG_ASK;
	if (!process) {
		process = touch_process(task);
		if (process) {
			process->visit_run = reading_run;
			process->visit_tid = task->pid;
			/* Its exit may have come before the entry was made; it would stay for ever. */
			if (BPF_CORE_READ(task, signal, live.counter) == 0) {
				remove_process(reader->tgid);
				reader->is_skipped = 1;
				return 0;
			}
		}
	}
	if (process) {
		if (!process->introduced &&
		    !send_process(SCRATCH_READER, seq, task, NULL, process, RECORD_INTRO, 0, WITH_EXE))
			return 0;
		add_range(process, start, end);
	}
	if (!send_map(SCRATCH_READER, seq, task, process, file, &key, start, end, offset_bytes, flags))
		return 0;
	if (process)
		process->introduced = 1;
shown:
	if (process || report & REPORT_VISITS)
		reader->visit_sent = 1;
	return 0;
}
