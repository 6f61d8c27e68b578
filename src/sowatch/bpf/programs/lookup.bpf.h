/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Scans before iter/task_vma (5.12): the kernel says who is there, /proc says what is mapped
 * where, and for each file among that the kernel says which one it is, of a descriptor that user
 * space has opened through /proc/PID/map_files.
 */
#pragma once

#include "reader.bpf.h"

__u32 reading_tgid = 0; /* whom to scan; 0: everyone */

/* Each process once: that it is being read from now on, and who it is. */
SEC("iter/task")
int visit_processes(struct bpf_iter__task *context)
{
	struct seq_file *seq = context->meta->seq;
	struct task_struct *task = context->task;
	struct process *process;
	struct reader *reader;
	__u32 zero = 0;

	if (!task || (reading_tgid && reading_tgid != BPF_CORE_READ(task, tgid)) || !BPF_CORE_READ(task, mm))
		return 0;
	reader = bpf_map_lookup_elem(&reader_state, &zero);
	if (!reader)
		return 0;
	begin_visit(reader, task);
	if (reader->is_skipped) {
		if (reader->is_again)
			send_visit(seq, task, NULL, FLAG_AGAIN);
		return 0;
	}
	process = find_process(reader->tgid);
	if (!process)
		return 0; /* the map is full, which is counted */
	/* Its exit may have come before the entry was made; it would stay for ever. */
	if (BPF_CORE_READ(task, signal, live.counter) == 0) {
		remove_process(reader->tgid);
		return 0;
	}
	if (send_visit(seq, task, process, reader->visit_flags))
		send_process(SCRATCH_READER, seq, task, NULL, process, RECORD_INTRO, 0, WITH_EXE);
	return 0;
}

/* linux/fs.h: opened with O_PATH, so that no file system was asked for anything. */
#define FMODE_PATH 0x4000

enum lookup_result {
	LOOKUP_NO_FILE = 0,
	LOOKUP_TO_OPEN = 1,
	LOOKUP_DONE = 2,
	LOOKUP_IGNORED = 3,
};

_Static_assert(__builtin_offsetof(struct scratch, record) == 56, "user space looks for the answer there");

/*
 * Which file is behind a descriptor of the caller, as it is called below a root: the answer is left
 * in reader_scratch as a map_record, with device and inode of its own file system, whatever lies
 * below that, as start and end. Arguments: fd, root_dentry, root_mnt, which are only compared.
 * A file of overlayfs has its real one only if it is open, not with O_PATH.
 */
SEC("raw_tp")
int look_up_file(struct bpf_raw_tracepoint_args *context)
{
	struct scratch *scratch = take_scratch(SCRATCH_READER);
	struct task_struct *task = current_task();
	struct file *file = file_of_fd(task, context->args[0]);
	struct file_key key = {};
	enum verdict verdict;

	if (!scratch || !file)
		return LOOKUP_NO_FILE;
	if (READ(file, f_mode) & FMODE_PATH && READ(file, f_inode, i_sb, s_magic) == OVERLAYFS_SUPER_MAGIC)
		return LOOKUP_TO_OPEN;
	make_key(task, file, &key);
	key.root_dentry = context->args[1];
	key.root_mnt = context->args[2];
	verdict = look_up_verdict(&key);
	__builtin_memset(&scratch->record.map, 0, sizeof(scratch->record.map));
	if (verdict == VERDICT_NONE)
		scratch->record.head.flags = FLAG_ASK;
	scratch->record.map.start = READ(file, f_inode, i_sb, s_dev);
	scratch->record.map.end = READ(file, f_inode, i_ino);
	describe_file(SCRATCH_READER, scratch, file, &key);
	return verdict == VERDICT_IGNORE ? LOOKUP_IGNORED : LOOKUP_DONE;
}

/*
 * A scan has found something that is not ignored at [start, end). Arguments: tgid, start_ns,
 * start, end; of an end of 0 nothing but that it was introduced. One reader at a time writes this list, so nothing in it is lost.
 */
SEC("raw_tp")
int cover(struct bpf_raw_tracepoint_args *context)
{
	__u32 tgid = context->args[0], slot;
	__u64 start = context->args[2], end = context->args[3];
	struct process *process = bpf_map_lookup_elem(&processes, &tgid);

	if (!process || process->start_ns != context->args[1])
		return 0; /* it has ended, and that was reported */
	process->introduced = 1;
	if (!end)
		return 1;
	for (slot = 0; slot < MAX_RANGES; slot++) {
		if (slot >= process->covered_count)
			break;
		if (process->covered[slot].start <= start && process->covered[slot].end >= end)
			return 1;
	}
	slot = process->covered_count;
	if (slot < MAX_RANGES) {
		process->covered[slot].start = start;
		process->covered[slot].end = end;
	}
	if (slot <= MAX_RANGES)
		process->covered_count = slot + 1;
	return 1;
}
