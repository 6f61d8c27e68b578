/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Building records, and sending them: to the ring from a hook, to the seq file from the reader. */
#pragma once

#include "identity.bpf.h"
#include "cgroups.bpf.h"
#include "paths.bpf.h"

/*
 * One record at a time is built on a CPU. Hooks run with preemption off today; should a kernel
 * preempt one, the other finds the scratch taken and its record is a counted, repaired loss.
 */
static __always_inline struct scratch *take_scratch(enum scratch_owner owner)
{
	struct scratch *scratch = scratch_of(owner);

	if (!scratch)
		return NULL;
	if (owner == SCRATCH_HOOKS && scratch->is_taken) {
		count(LOST_SCRATCH);
		return NULL;
	}
	scratch->is_taken = 1;
	scratch->text_end = 0;
	return scratch;
}

static __always_inline void give_back(struct scratch *scratch)
{
	scratch->is_taken = 0;
}

static __always_inline void fill_head(struct record *head, struct task_struct *task, enum record_type type, __u32 flags,
				      __u32 size)
{
	head->size = size;
	head->type = type;
	head->flags = flags;
	head->tgid = BPF_CORE_READ(task, tgid);
	head->tid = BPF_CORE_READ(task, pid);
	head->start_ns = BPF_CORE_READ(task, group_leader, start_boottime);
	head->t_ns = bpf_ktime_get_ns();
	head->exec_id = BPF_CORE_READ(task, self_exec_id);
	head->activity = 0;
}

/* Up to its NUL: before 5.17 what follows that is left of an earlier, longer name. */
static __always_inline void read_comm(struct task_struct *task, char comm[COMM_BYTES])
{
	__builtin_memset(comm, 0, COMM_BYTES);
	bpf_probe_read_kernel_str(comm, COMM_BYTES, BPF_CORE_READ(task, group_leader)->comm);
}

/* 32-bit programs on a 64-bit kernel make calls that the syscall tracepoints leave out. */
static __always_inline __u32 compat_flag(struct task_struct *task)
{
	__u64 task_size = BPF_CORE_READ(task, mm, task_size);

	return task_size && task_size <= 0xffffffff ? FLAG_COMPAT : 0;
}

/* Sends a record without text. False if the ring was full, which is counted. */
static __always_inline bool send_small(struct task_struct *task, enum record_type type, __u32 flags, __u64 start,
				       __u64 end)
{
	struct range_record *record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);

	if (!record) {
		count(LOST_RING);
		return false;
	}
	fill_head(&record->head, task, type, flags, sizeof(*record));
	record->start = start;
	record->end = end;
	bpf_ringbuf_submit(record, 0);
	return true;
}

/* Sends the record in the scratch with its text; the size is rounded up to 8. */
static __always_inline bool send_scratch(struct seq_file *seq, struct scratch *scratch)
{
	__u32 size = (sizeof(scratch->record) + scratch->text_end + 7) & ~7u;

	/* Never true; the verifier wants to see it. */
	if (size > sizeof(scratch->record) + sizeof(scratch->text))
		size = sizeof(scratch->record) + sizeof(scratch->text);
	scratch->record.head.size = size;
	if (seq)
		return bpf_seq_write(seq, &scratch->record, size) == 0;
	if (bpf_ringbuf_output(&ring, &scratch->record, size, 0)) {
		count(LOST_RING);
		return false;
	}
	return true;
}

static __always_inline __u64 mix(__u64 sum, __u64 word)
{
	return ((sum << 5 | sum >> 59) ^ word) * 0x9e3779b97f4a7c15ULL;
}

/*
 * A number made of what an introduction says of a process and may change while it runs its program:
 * the user, the cgroups (the set of them is another object after any move; it may get the address of
 * one that is gone, so that of version 2 counts by its own number, too), the parent, the root, the
 * name. As /proc does, of a process its leader is asked. Global: verified once.
 */
__noinline __u64 facts_of_leader(__u64 leader_address, __u64 fs_address)
{
	struct task_struct *leader = (void *)leader_address;
	struct fs_struct *fs = (void *)fs_address;
	struct css_set *set = BPF_CORE_READ(leader, cgroups);
	__u64 sum = 0, name[COMM_BYTES / sizeof(__u64)] = {};

	bpf_probe_read_kernel_str(name, sizeof(name), leader->comm);
	sum = mix(sum, BPF_CORE_READ(leader, cred, uid.val));
	sum = mix(sum, BPF_CORE_READ(leader, real_parent, tgid));
	sum = mix(sum, (__u64)set);
	sum = mix(sum, BPF_CORE_READ(set, dfl_cgrp, kn, id));
	sum = mix(sum, (__u64)BPF_CORE_READ(fs, root.dentry));
	sum = mix(sum, (__u64)BPF_CORE_READ(fs, root.mnt));
	return mix(mix(sum, name[0]), name[1]);
}

static __always_inline __u64 facts_of(struct task_struct *task)
{
	return facts_of_leader((__u64)BPF_CORE_READ(task, group_leader), (__u64)BPF_CORE_READ(task, fs));
}

/* Where exec put ld.so, from the vector that it wrote for it; 0 for a static program. Global: verified once. */
__noinline __u64 interpreter_base_of(__u64 mm_address)
{
	struct mm_struct *mm = (void *)mm_address;
	unsigned long pair[2];

	/* AT_BASE stands among the first dozen (create_elf_tables); the vector has 26 at the most. */
	for (int i = 0; i < 20; i++) {
		if (bpf_probe_read_kernel(pair, sizeof(pair),
					  (void *)mm + bpf_core_field_offset(mm->saved_auxv) + i * sizeof(pair)))
			return 0;
		if (pair[0] == AT_BASE)
			return pair[1];
		if (!pair[0])
			return 0;
	}
	return 0;
}

static __always_inline __u32 pid_in_own_namespace(struct task_struct *task)
{
	struct pid *pid = BPF_CORE_READ(task, group_leader, thread_pid);
	__u32 level = BPF_CORE_READ(pid, level);
	struct upid upid = {};

	bpf_probe_read_kernel(&upid, sizeof(upid),
			      (void *)pid + bpf_core_field_offset(pid->numbers) +
				      level * bpf_core_type_size(struct upid));
	return upid.nr;
}

enum process_text { WITHOUT_EXE, WITH_EXE };

/* Whether the reader counts among the users of the address space that it reads. */
#ifdef OLD_KERNEL
#define READER_HOLDS 0
#else
#define READER_HOLDS 1
#endif

/*
 * What user space may untrack a process by after a mapping or a scan: nothing, while a thread
 * may be on its way to map a file, which is counted already and not reported yet.
 */
static __always_inline __u32 activity_of(enum scratch_owner owner, struct task_struct *task, struct process *process)
{
	int holders = BPF_CORE_READ(task, mm, mm_users.counter);

	return process && holders == (owner == SCRATCH_READER ? 1 + READER_HOLDS : 1) ? process->activity : 0;
}

/* All that user space could not read any more if the process were gone by then. */
static __always_inline bool send_process(enum scratch_owner owner, struct seq_file *seq, struct task_struct *task,
					 struct task_struct *parent, struct process *process, enum record_type type,
					 __u32 flags, enum process_text with)
{
	struct scratch *scratch = take_scratch(owner);
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct process_record *record;
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct path root = BPF_CORE_READ(task, fs, root);
	struct file *exe;
	bool sent;

	if (!scratch)
		return false;
	record = &scratch->record.process;
	__builtin_memset(record, 0, sizeof(*record));
	fill_head(&record->head, task, type, flags, 0);
	record->head.activity = process ? process->activity : 0;
	if (parent) {
		record->parent_tgid = BPF_CORE_READ(parent, tgid);
		record->parent_start_ns = BPF_CORE_READ(parent, group_leader, start_boottime);
	}
	record->ppid = BPF_CORE_READ(leader, real_parent, tgid);
	record->uid = BPF_CORE_READ(leader, cred, uid.val);
	record->ns_pid = pid_in_own_namespace(task);
	record->root_dentry = (__u64)root.dentry;
	record->root_mnt = (__u64)root.mnt;
	read_comm(task, record->comm);
	record->cgroup_bytes = append_cgroups(owner, scratch, leader);
	exe = mm ? BPF_CORE_READ(mm, exe_file) : NULL;
	if (exe) {
		identify(TYPED(struct file, exe), &record->exe);
		record->interpreter_base = interpreter_base_of((__u64)mm);
		if (with == WITH_EXE) {
			record->path_bytes =
				walk_path(owner, scratch, opened_path(TYPED(struct file, exe)), root, PATH_TEXT_BYTES);
			if (scratch->is_partial)
				record->head.flags |= FLAG_PARTIAL;
		}
	}
	sent = send_scratch(seq, scratch);
	give_back(scratch);
	return sent;
}

/* What is the same for everyone who maps the file under this name: its path, its state. */
static __always_inline void describe_file(enum scratch_owner owner, struct scratch *scratch, struct file *file,
					  const struct file_key *key)
{
	struct map_record *record = &scratch->record.map;
	struct path opened = opened_path(TYPED(struct file, file)), root;

	record->key = *key;
	record->changed_ns = changed_ns_of(TYPED(struct file, file));
	record->mode = BPF_CORE_READ(file, f_inode, i_mode);
	root.mnt = (void *)key->root_mnt;
	root.dentry = (void *)key->root_dentry;
	if (!BPF_CORE_READ(opened.dentry, d_hash.pprev))
		record->head.flags |= FLAG_DELETED;
	record->path_bytes = walk_path(owner, scratch, opened, root, PATH_TEXT_BYTES);
	if (scratch->is_partial)
		record->head.flags |= FLAG_PARTIAL;
	record->place = scratch->is_partial ? 0 : scratch->place;
}

static __always_inline bool has_lost_its_name(struct file *file)
{
	return !BPF_CORE_READ(opened_path(TYPED(struct file, file)).dentry, d_hash.pprev);
}

/* A file mapped executable at [start, end), with the path that the process sees. */
static __always_inline bool send_map(enum scratch_owner owner, struct seq_file *seq, struct task_struct *task,
				     struct process *process, struct file *file, const struct file_key *key,
				     __u64 start, __u64 end, __u64 offset_bytes, __u32 flags)
{
	struct scratch *scratch = take_scratch(owner);
	struct map_record *record;
	bool sent;

	if (!scratch)
		return false;
	record = &scratch->record.map;
	fill_head(&record->head, task, RECORD_MAP, flags, 0);
	record->head.activity = activity_of(owner, task, process);
	record->start = start;
	record->end = end;
	record->offset_bytes = offset_bytes;
	read_comm(task, record->comm);
	describe_file(owner, scratch, file, key);
	sent = send_scratch(seq, scratch);
	give_back(scratch);
	return sent;
}
