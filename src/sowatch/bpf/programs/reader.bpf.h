/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Scans what there is: every mapping of one process, or of all, by the kernel's own iterator. */
#pragma once

#include "emit.bpf.h"

/*
 * What the newest session has sent of a file. Many processes have it mapped, and it is described once: a path takes
 * longer than all else of a row, here and in user space. The place catches a rename of any directory above it.
 */
struct described {
	__u64 session;
	__u64 place;
	__u64 changed_ns;
	__u32 number;
	__u32 is_deleted;
};

/* Where the reader stands; one scan runs at a time. */
struct reader {
	__u64 run;
	__u64 session; /* the newest: older ones were given up by user space, and nobody takes their rows */
	__u32 tgid;
	__u32 tid;
	__u64 interpreter_base;
	struct file_id exe; /* the main executable */
	__u32 is_skipped;
	__u32 is_again; /* skipped, and to be read again */
	__u32 scan_sent;
	__u32 visit_flags;
	__u32 rows;          /* of this process */
	__u32 files;         /* that this session has described: the number of the last one */
	__u32 has_row;       /* `row` is to be added to `found` */
	__u32 is_begun;      /* all that is sent of a process beside its rows was sent */
	struct file_key key; /* of the file that is mapped; not on the stack, which is short */
	struct described now;
	struct row row;
	struct rows_record found; /* what was found in one process, and is not sent yet */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reader);
} reader_state SEC(".maps");

#ifndef OLD_KERNEL
/* How many ranges of a file a scan has met, once it has listed so many that one file may have too many. */
struct listed {
	__u64 run;
	__u32 tid;
	__u32 count;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct file_key);
	__type(value, struct listed);
} listed_files SEC(".maps");

/*
 * The file's entry if this scan has listed many ranges; NULL: list it. A process may have as many ranges as it
 * likes (vm.max_map_count), and each costs user space fifty times what it costs here. So once a process has had
 * MAX_FILE_RANGES rows, of each file as many more are listed, and then each MAX_FILE_RANGES-th. An entry that was dropped for want of space
 * begins anew: then more are listed.
 */
static __noinline struct listed *count_of(struct reader *reader, const struct file_key *key)
{
	struct listed fresh = {}, *entry;

	if (!reader || !key || reader->rows < MAX_FILE_RANGES)
		return NULL;
	entry = bpf_map_lookup_elem(&listed_files, key);
	if (!entry) {
		bpf_map_update_elem(&listed_files, key, &fresh, BPF_ANY);
		entry = bpf_map_lookup_elem(&listed_files, key);
		if (!entry)
			return NULL;
	}
	if (entry->run != reader->run || entry->tid != reader->tid) {
		entry->run = reader->run;
		entry->tid = reader->tid;
		entry->count = 0;
	}
	return entry;
}
#endif

#ifndef OLD_KERNEL
/* An entry that was dropped for want of space costs one more description. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct file_key);
	__type(value, struct described);
} described_files SEC(".maps");

/* The number of a file, which is described if this session has not done so; 0: the buffer is full. */
static __noinline __u32 number_of(struct reader *reader, struct seq_file *seq, struct task_struct *task,
				  struct file *file, const struct file_key *key)
{
	struct described *now, *known;
	struct scratch *scratch;
	struct map_record *record;
	bool sent;

	if (!reader || !seq || !task || !file || !key)
		return 0;
	now = &reader->now;
	now->session = reader->session;
	now->place = place_of(key);
	now->changed_ns = changed_ns_of(TYPED(struct file, file));
	now->is_deleted = has_lost_its_name(file);
	known = bpf_map_lookup_elem(&described_files, key);
	if (known && known->session == now->session && known->place && known->place == now->place &&
	    known->changed_ns == now->changed_ns && known->is_deleted == now->is_deleted)
		return known->number;
	scratch = take_scratch(SCRATCH_READER);
	if (!scratch)
		return 0;
	record = &scratch->record.map;
	__builtin_memset(record, 0, sizeof(*record));
	fill_head(&record->head, task, RECORD_FILE, 0, 0);
	now->number = reader->files + 1;
	record->start = now->number;
	describe_file(SCRATCH_READER, scratch, file, key);
	now->place = record->place;
	now->changed_ns = record->changed_ns;
	now->is_deleted = record->head.flags & FLAG_DELETED ? 1 : 0;
	sent = send_scratch(seq, scratch);
	give_back(scratch);
	if (!sent)
		return 0;
	reader->files = now->number;
	bpf_map_update_elem(&described_files, key, now, BPF_ANY);
	return now->number;
}

static __always_inline bool send_rows(struct seq_file *seq, struct reader *reader)
{
	__u32 count = reader->found.count, size;

	if (count > MAX_ROWS)
		count = MAX_ROWS;
	size = __builtin_offsetof(struct rows_record, rows) + count * sizeof(struct row);
	reader->found.head.size = size;
	return bpf_seq_write(seq, &reader->found, size) == 0;
}

static __always_inline void add_row(struct reader *reader, struct task_struct *task, struct process *process)
{
	struct rows_record *found = &reader->found;
	__u32 at = found->count, activity;

	if (!at) {
		fill_head(&found->head, task, RECORD_ROWS, 0, 0);
		read_comm(task, found->comm);
	} else {
		found->head.t_ns = bpf_ktime_get_ns();
	}
	activity = activity_of(SCRATCH_READER, task, process);
	if (activity > found->head.activity)
		found->head.activity = activity;
	if (at < MAX_ROWS) {
		found->rows[at] = reader->row;
		found->count = at + 1;
	}
}
#endif

static __always_inline __u32 state_of(struct task_struct *task)
{
	if (bpf_core_field_exists(task->__state))
		return BPF_CORE_READ(task, __state);
	return BPF_CORE_READ((struct task_struct___v5_10 *)task, state);
}

/*
 * The first vma of a task. The lock of its mappings is held for reading, so what we mark here
 * comes before any change that this scan will not see.
 */
static __noinline int begin_visit(struct reader *reader, struct task_struct *task)
{
	struct mm_struct *mm;
	struct process *process;
	struct file *exe;
	__u32 tgid, tid;

	if (!reader)
		return 0;
	tgid = READ(task, tgid);
	tid = READ(task, pid);
	reader->run = scan_run;
	reader->tgid = tgid;
	reader->tid = tid;
	reader->scan_sent = 0;
	reader->rows = 0;
	reader->is_begun = 0;
	reader->visit_flags = compat_flag(task);
	/*
	 * Gone, although its mappings are still there; or a vfork child, which shows its parent's;
	 * or one that fork has not finished, which it will report;
	 * or one of the many threads that are scanned once the leader is dead, but not the first.
	 */
	reader->is_skipped =
		READ(task, signal, live.counter) == 0 || READ(task, vfork_done) != NULL || state_of(task) & TASK_NEW;
	/*
	 * Within exec a task shows what is neither the old program's nor all of the new one's; a
	 * vfork child shows its parent's still, although vfork_done is gone already.
	 */
	reader->is_again = !reader->is_skipped && BPF_CORE_READ_BITFIELD_PROBED(task, in_execve);
	reader->is_skipped |= reader->is_again;
	process = find_process(tgid);
	if (tid != tgid) {
		if (READ(task, group_leader, mm))
			reader->is_skipped = 1;
		else if (process && process->scan_run == scan_run && process->scan_tid != tid)
			reader->is_skipped = 1;
	}
	if (reader->is_skipped)
		return 0;
	/*
	 * What another process of its address space may map tomorrow is its own, too. And where nothing
	 * keeps a process from changing while it is read, it is tracked first: each change is reported then.
	 */
	if (!process && (!READER_HOLDS || compat_flag(task) || has_untracked_sharers(task, READER_HOLDS)))
		process = count_activity(task);
	if (process) {
		process->scan_run = scan_run;
		process->scan_tid = tid;
		process->dirty = 0;
		if (report & REPORT_INTROS)
			process->introduced = 0;
		reader->visit_flags |= sharing_flag(task, process, READER_HOLDS);
		/* Make space; while a scan runs every range counts, so none is missed meanwhile. */
		if (process->range_count > MAX_RANGES) {
			process->range_count = 0;
			process->min_start = 0;
			process->max_end = 0;
		}
#ifdef OLD_KERNEL
		if (process->covered_count > MAX_RANGES)
			process->covered_count = 0;
#endif
	}
	mm = BPF_CORE_READ(task, mm); /* a number, for interpreter_base_of */
	exe = BPF_CORE_READ(mm, exe_file);
	__builtin_memset(&reader->exe, 0, sizeof(reader->exe));
	if (exe)
		identify(TYPED(struct file, exe), &reader->exe);
	reader->interpreter_base = interpreter_base_of((__u64)mm);
	return 0;
}

static __noinline int send_visit(struct seq_file *seq, struct task_struct *task, struct process *process, __u32 flags)
{
	struct range_record visit = {};

	if (!seq || !task)
		return 0;
	fill_head(&visit.head, task, RECORD_SCAN, flags, sizeof(visit));
	visit.head.activity = activity_of(SCRATCH_READER, task, process);
	visit.start = (__u64)BPF_CORE_READ(task, mm);
	return bpf_seq_write(seq, &visit, sizeof(visit)) == 0;
}

#ifndef OLD_KERNEL
/* One mapping. False if the buffer is full: the kernel drops what this call has written, and calls again for it. */
static __always_inline bool read_mapping(struct reader *reader, struct seq_file *seq, struct task_struct *task,
					 struct vm_area_struct *vma)
{
	__u32 flags = 0, number;
	struct process *process;
	bool introduces = false;
	__u64 facts = 0;
	struct file_key *key = &reader->key;
	struct row *row = &reader->row; /* not on the stack either */
	enum verdict verdict;
	struct listed *listed;
	struct file *file;

	if (reader->run != scan_run || reader->tgid != task->tgid || reader->tid != task->pid)
		begin_visit(reader, task);
	if (reader->is_skipped) {
		if (reader->is_again && !send_visit(seq, task, NULL, FLAG_AGAIN))
			return false;
		reader->is_again = 0;
		return true;
	}
	process = find_process(reader->tgid);
	if (!reader->scan_sent && (process || report & REPORT_SCANS) &&
	    !send_visit(seq, task, process, reader->visit_flags))
		return false;
	if (process && (!reader->scan_sent || !process->introduced))
		facts = facts_of(task);
	/* One that was introduced is so again if it is not any more what it was reported to be. */
	if (process && ((!process->introduced && reader->visit_flags & FLAG_SHARED_VM) ||
			(process->introduced && facts && facts != process->facts))) {
		introduces = true;
		if (!send_process(SCRATCH_READER, seq, task, NULL, process, RECORD_INTRO, 0, WITH_EXE))
			return false;
	}
	file = vma->vm_file;
	if (!file || !(vma->vm_flags & VM_EXEC))
		goto shown;
	row->start = vma->vm_start;
	row->end = vma->vm_end;
	row->offset_bytes = vma->vm_pgoff << PAGE_SHIFT;
	make_key(task, TYPED(struct file, file), key);
	/*
	 * No more than a tentative record: prctl(PR_SET_MM_MAP) sets both, and anything may be mapped over what exec
	 * has mapped. So such a mapping is reported in any case; user space reads the file itself.
	 */
	if (is_same_file(&key->file, &reader->exe) ||
	    (reader->interpreter_base && row->start - row->offset_bytes == reader->interpreter_base))
		flags |= FLAG_IMAGE;
	verdict = look_up_verdict(key);
	if (verdict == VERDICT_IGNORE)
		goto shown;
	if (verdict == VERDICT_NONE)
		flags |= FLAG_ASK;
	if (!process) {
		process = count_activity(task);
		if (process) {
			process->scan_run = scan_run;
			process->scan_tid = task->pid;
			/* Its exit may have come before the entry was made; it would stay for ever. */
			if (BPF_CORE_READ(task, signal, live.counter) == 0) {
				remove_process(reader->tgid);
				reader->is_skipped = 1;
				return true;
			}
			facts = facts_of(task);
			reader->visit_flags |= sharing_flag(task, process, 1);
			if (!reader->scan_sent && !send_visit(seq, task, process, reader->visit_flags))
				return false;
		}
	}
	if (process) {
		if (!process->introduced && !introduces &&
		    !send_process(SCRATCH_READER, seq, task, NULL, process, RECORD_INTRO, 0, WITH_EXE))
			return false;
		add_shared_range(process, row->start, row->end);
	}
	listed = count_of(reader, key);
	if (listed && listed->count >= MAX_FILE_RANGES) {
		if (listed->count % MAX_FILE_RANGES) {
			listed->count++;
			goto introduced;
		}
		flags |= FLAG_MANY;
		row->offset_bytes = listed->count == MAX_FILE_RANGES ? 0 : MAX_FILE_RANGES - 1;
	}
	number = number_of(reader, seq, task, file, key);
	if (!number)
		return false;
	row->file = number;
	row->flags = flags;
	reader->has_row = 1;
	reader->rows++;
	if (listed)
		listed->count++;
introduced:
	introduces = true;
shown:
	if (process && introduces) {
		process->introduced = 1;
		if (facts)
			process->facts = facts;
	}
	if (process || report & REPORT_SCANS)
		reader->scan_sent = 1;
	return true;
}

SEC("iter/task_vma")
int read_mappings(struct bpf_iter__task_vma *context)
{
	struct seq_file *seq = context->meta->seq;
	struct task_struct *task = context->task;
	struct vm_area_struct *vma = context->vma;
	__u32 zero = 0;
	struct reader *reader;
	bool sends;

	reader = bpf_map_lookup_elem(&reader_state, &zero);
	if (!reader || context->meta->session_id < reader->session)
		return 0;
	if (reader->session != context->meta->session_id) {
		reader->session = context->meta->session_id;
		reader->files = 0;
		reader->found.count = 0;
	}
	if (report & REPORT_FENCE)
		return 0;
	if (!task || !vma) { /* the end */
		if (reader->found.count && send_rows(seq, reader))
			reader->found.count = 0;
		return 0;
	}
	/* Most mappings are of no interest, and all that is read of them is this: the rest is not in the cache. */
	if (reader->is_begun && reader->tid == task->pid && reader->tgid == task->tgid && reader->run == scan_run &&
	    (!vma->vm_file || !(vma->vm_flags & VM_EXEC)))
		return 0;
	/* Rows go once another process comes, or there are many; they are kept until all that this call writes fits. */
	sends = reader->found.count && (reader->found.count >= MAX_ROWS || reader->found.head.tgid != task->tgid ||
					reader->found.head.tid != task->pid);
	if (sends && !send_rows(seq, reader))
		return 0;
	reader->has_row = 0;
	if (!read_mapping(reader, seq, task, vma))
		return 0;
	if (sends)
		reader->found.count = 0;
	if (reader->has_row)
		add_row(reader, task, find_process(reader->tgid));
	reader->is_begun = 1;
	return 0;
}
#endif
