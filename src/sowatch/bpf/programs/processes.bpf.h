/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Processes come and go: fork, exec, exit; and are untracked when nothing of theirs is wanted. */
#pragma once

#include "calls.bpf.h"

/*
 * A fork copies the mappings some time before it is reported, and a thread that mapped meanwhile may
 * be gone by then. No fork takes this long: copying the tables of a terabyte takes some 10 s.
 */
#define FORK_NS (60 * NS_PER_S)

static __always_inline bool had_company(struct process *process)
{
	return process && process->company_ns && bpf_ktime_get_ns() - process->company_ns < FORK_NS;
}

/*
 * Whether fork left out a mapping (MADV_DONTFORK, device memory): its pages are not counted in the
 * child. All pages are compared, for the kernel does not count a writable mapping as executable.
 */
static __always_inline bool has_fewer_pages(struct mm_struct *mm, struct task_struct *parent)
{
	return BPF_CORE_READ(mm, total_vm) < BPF_CORE_READ(parent, mm, total_vm);
}

/*
 * Runs in the parent, after its mappings were copied and before the child does anything. If the
 * parent's mm is shared, a mapping may have come or gone between the copying and now: a tentative record.
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
		inherited->activity = 0;
		begin_tracking(inherited, child_tgid);
		track(inherited, child_tgid);
		inherited->start_ns = BPF_CORE_READ(child, start_boottime);
		inherited->dirty = 0;
		inherited->scan_run = 0;
		inherited->payer = process->payer ?: tgid;
		if (flags & FLAG_SHARED_VM) {
			inherited->shares_vm = 1;
			inherited->vm_root = process->vm_root ?: tgid;
			process->shares_vm = 1;
		}
	}
	flags |= compat_flag(child);
	if (!(flags & FLAG_SHARED_VM) && (!is_single_user(parent) || had_company(process) ||
					  (process && process->shares_vm) || has_fewer_pages(mm, parent))) {
		flags |= FLAG_NEEDS_RESCAN;
		if (inherited)
			inherited->dirty = 1;
	}
	sent = send_process(SCRATCH_HOOKS, NULL, child, parent, inherited, RECORD_FORK, flags,
			    process && process->introduced ? WITHOUT_EXE : WITH_EXE);
	if (inherited) {
		inherited->introduced = sent;
		inherited->facts = facts_of(child);
	}
	return 0;
}

#ifdef OLD_KERNEL
#define EACH_IMAGE static __always_inline /* there is only one, and no space for another frame on the stack */
#else
#define EACH_IMAGE static __noinline
#endif

/* What exec itself mapped never passed mmap: reported here, as if it had, with FLAG_IMAGE. */
EACH_IMAGE int report_image(struct task_struct *task, struct found_vma *image)
{
	struct process *process;
	__u32 flags = FLAG_IMAGE;
	enum verdict verdict;

	if (!image || !image->file)
		return 0;
	verdict = look_up_verdict(&image->key);
	if (verdict == VERDICT_IGNORE)
		return 0;
	if (verdict == VERDICT_NONE)
		flags |= FLAG_ASK;
	process = count_activity(task);
	if (!process)
		return 0;
	add_range(process, image->start, image->end);
	introduce(task, process);
	send_map(SCRATCH_HOOKS, NULL, task, process, image->file, &image->key, image->start, image->end, 0, flags);
	return 0;
}

static __noinline int report_images(struct task_struct *task)
{
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct found_vma image = {.file = TYPED(struct file, BPF_CORE_READ(mm, exe_file))};
	__u64 base = interpreter_base_of((__u64)mm);

	if (image.file) {
		make_key(task, image.file, &image.key);
		image.start = BPF_CORE_READ(mm, start_code) & ~PAGE_MASK_LOW;
		image.end = whole_pages(BPF_CORE_READ(mm, end_code));
		report_image(task, &image);
	}
#ifdef OLD_KERNEL
	/* Only a scan finds it. */
	if (base)
		send_needs_rescan(task, count_activity(task));
#else
	/* Usually the headers are mapped before the code, readable only. */
	if (base && find_vma_at(base, &image) == 0 && !image.is_executable)
		find_vma_at(image.end, &image);
	if (image.is_executable)
		report_image(task, &image);
#endif
	return 0;
}

/* Not inlined: its stack would not fit beside those of the images' reports. */
static __noinline int report_exec(struct task_struct *task)
{
	send_process(SCRATCH_HOOKS, NULL, task, NULL, NULL, RECORD_EXEC, 0,
		     report & REPORT_PROCESSES ? WITH_EXE : WITHOUT_EXE);
	return 0;
}

/* Every mapping of the old image is gone, and every other thread. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(process_execs, struct task_struct *task)
{
	__u32 tgid = BPF_CORE_READ(task, tgid);
	bool is_tracked = find_process(tgid);

	if (is_tracked || report & REPORT_PROCESSES)
		report_exec(task);
	remove_process(tgid);
	if (compat_flag(task) && count_activity(task))
		send_small(task, RECORD_NEEDS_RESCAN, FLAG_NEEDS_RESCAN | FLAG_COMPAT, 0, 0);
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
	if (process && process->introduced)
		introduce(task, process);
	if (process || report & REPORT_PROCESSES)
		send_small(task, RECORD_EXIT, 0, 0, 0);
	remove_process(tgid);
	return 0;
}

/*
 * Run by user space, not by an event: nothing of this process is wanted, says somebody who has
 * seen all that brought it here. If another mapping has been counted since, it stays; if not, it
 * is not tracked any more, until one is. Arguments: tgid, start_ns, activity. 1 if it was untracked.
 */
SEC("raw_tp")
int untrack(struct bpf_raw_tracepoint_args *context)
{
	__u32 tgid = context->args[0], activity = context->args[2];
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!process || process->start_ns != context->args[1] || !activity)
		return 0;
	process->introduced = 0; /* user space forgets it; before the swap, for it may come back at once */
#ifdef OLD_KERNEL
	process->first_activity = activity;
	return !is_tracked(process);
#else
	if (__sync_val_compare_and_swap(&process->activity, activity, 0) != activity)
		return 0;
	__sync_fetch_and_sub(slot_of(tgid), 1);
	return 1;
#endif
}
