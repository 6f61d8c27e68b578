/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the kernel side reports to user space, in the ring buffer and in what the iterator writes.
 * Read by the programs, by the C side of the binding and, field by field, by records.py; a test
 * compares the three. All integers are in host order, all times CLOCK_MONOTONIC or boot time in
 * ns, all addresses and lengths in bytes. Each record starts at a multiple of 8 and says its size.
 */
#pragma once

#include <linux/types.h>

#define COMM_BYTES 16
#define PATH_TEXT_BYTES 4096
#define CGROUP_TEXT_BYTES 1024
#define NAME_BYTES 256
/* So many ranges of one file in one process are listed, and kept by user space. */
#define MAX_FILE_RANGES 256

enum record_type {
	RECORD_MAP = 1,          /* map_record: a file was mapped executable */
	RECORD_RANGE = 2,        /* range_record: nothing of ours is left in this range */
	RECORD_NEEDS_RESCAN = 3, /* record: read this process's mappings again */
	RECORD_FORK = 4,         /* process_record: a child with its parent's mappings */
	RECORD_EXEC = 5,         /* process_record: everything it had is gone */
	RECORD_EXIT = 6,         /* record: its last thread is gone */
	RECORD_INTRO = 7,        /* process_record: introduction of a process, before its first map_record */
	RECORD_SCAN = 8,         /* range_record: the reader starts on this process; start is its address space */
	RECORD_FILE = 9,         /* map_record: a file that rows of this scan name by its start, counted from 1 */
	RECORD_ROWS = 10,        /* rows_record: what the reader has found mapped in this process */
};

enum record_flag {
	FLAG_ASK = 1 << 0,          /* there is no verdict on this file yet */
	FLAG_NEEDS_RESCAN = 1 << 1, /* a tentative record: read the process again */
	FLAG_DELETED = 1 << 2,      /* the file's name is gone */
	FLAG_PARTIAL = 1 << 3,      /* the path is cut off at its start */
	/* A fork with CLONE_VM: parent and child share one address space. Of another record: some
	 * process shares it, and this is the first record of that. */
	FLAG_SHARED_VM = 1 << 4,
	FLAG_MPROTECT = 1 << 5,  /* became executable by mprotect */
	FLAG_IMAGE = 1 << 6,     /* mapped by exec itself: the main executable or the interpreter */
	FLAG_COMPAT = 1 << 7,    /* a 32-bit process: its calls pass the hooks unseen */
	FLAG_AGAIN = 1 << 8,     /* of a scan: in the middle of an exec; read it again */
	FLAG_THROTTLED = 1 << 9, /* of a needs-rescan record: there were too many; some of it was dropped */
	/* Of a row: before it, and perhaps after it, stand ranges of the file that are not listed;
	 * offset_bytes says how many there are between it and the row before. */
	FLAG_MANY = 1 << 10,
};

enum verdict {
	VERDICT_NONE = 0,
	VERDICT_MATCH = 1,
	VERDICT_IGNORE = 2,
};

enum report_bit {
	REPORT_PROCESSES = 1 << 0, /* fork, exec and exit of every process */
	REPORT_RANGES = 1 << 1,    /* range events of every process: while something is being read */
	REPORT_IMAGES = 1 << 2,    /* main executables and interpreters too */
	REPORT_SCANS = 1 << 3,     /* a scan record also of a process that is not tracked */
	REPORT_INTROS = 1 << 4,    /* an introduction of each that is read, introduced already or not */
	REPORT_FENCE = 1 << 5,     /* nothing at all: the reader only ends what older sessions of it still do */
};

enum counter {
	LOST_RING = 0,      /* the ring buffer was full */
	LOST_PROCESSES = 1, /* the process map was full */
	LOST_PENDING = 2,   /* the map of system calls under way was full */
	LOST_SCRATCH = 3,   /* the buffer to build a record in was taken */
	LOST_THROTTLED = 4, /* dropped because their process reported too much */
	COUNTERS = 5,
};

/* 24 bytes: the real inode, see sowatch.model.identity.FileId. dev is the kernel's: major << 20 | minor. */
struct file_id {
	__u64 inode;
	__u64 subvolume;
	__u32 dev;
	__u32 generation;
};

/*
 * 64 bytes: a file under one name in one view of the file system, which is what a verdict is
 * about. The leaf's name hash and the dentry catch a rename; the mount and the root distinguish views
 * apart; the epoch makes every verdict of older rules unknown at once.
 */
struct file_key {
	struct file_id file;
	__u64 dentry;
	__u64 mnt;
	__u64 root_dentry;
	__u64 root_mnt;
	__u32 name_hash;
	__u32 epoch;
};

/*
 * 16 bytes: the answer of user space. expires_s is compared with the now_s that it keeps. An ignore
 * stands for the place that the map_record had which it answers, see place_of(): of a file whose
 * directory was renamed or moved, or whose mount was, nothing is known.
 */
struct verdict_value {
	__u32 verdict;
	__u32 expires_s;
	__u64 place;
};

/* 40 bytes: the head of every record. */
struct record {
	__u32 size;
	__u16 type;
	__u16 flags;
	__u32 tgid;
	__u32 tid;
	__u64 start_ns;
	__u64 t_ns;
	__u32 exec_id;
	__u32 activity; /* of a map, fork or intro record: see untrack */
};

struct range_record {
	struct record head;
	__u64 start;
	__u64 end;
};

/* 168 bytes, then the text: path_bytes of components from the leaf up, each ended by a NUL. */
struct map_record {
	struct record head;
	struct file_key key;
	__u64 start;
	__u64 end;
	__u64 offset_bytes;
	__u64 changed_ns; /* ctime of the real inode: what was read of the file before is void after it */
	__u64 place;      /* of which the path in the text is; 0: not known */
	char comm[COMM_BYTES];
	__u32 mode;
	__u32 path_bytes;
};

/*
 * 168 bytes, then the text: cgroup_bytes of the paths of its cgroups, then path_bytes of the executable's. The first
 * cgroup is that of version 2; an empty component begins the next one, of another hierarchy and with another path.
 */
struct process_record {
	struct record head;
	__u64 parent_start_ns;
	__u32 parent_tgid;
	__u32 ppid;
	__u32 uid;
	__u32 ns_pid;
	struct file_id exe;
	__u64 interpreter_base;
	__u64 root_dentry;
	__u64 root_mnt;
	__u64 reserved[4];
	char comm[COMM_BYTES];
	__u32 cgroup_bytes;
	__u32 path_bytes;
};

/* 32 bytes: one executable mapping of a file. */
struct row {
	__u64 start;
	__u64 end;
	__u64 offset_bytes;
	__u32 file;  /* the number of a RECORD_FILE */
	__u32 flags; /* beside those of that */
};

#define MAX_ROWS 64

/* 64 bytes, then the rows. Its time is that of the newest, its activity the highest of any. */
struct rows_record {
	struct record head;
	char comm[COMM_BYTES];
	__u32 count;
	__u32 reserved;
	struct row rows[MAX_ROWS];
};

/* The same on every architecture: all fields have a width, and none needs padding. */
_Static_assert(sizeof(struct file_id) == 24, "sowatch.bpf.records.FILE_ID");
_Static_assert(sizeof(struct file_key) == 64, "sowatch.sources.core.FILE_KEY");
_Static_assert(sizeof(struct verdict_value) == 16, "sowatch.sources.core.VERDICT_VALUE");
_Static_assert(sizeof(struct record) == 40, "sowatch.bpf.records.HEAD");
_Static_assert(sizeof(struct range_record) == 56, "sowatch.bpf.records.RANGE");
_Static_assert(sizeof(struct map_record) == 168, "sowatch.bpf.records.MAP");
_Static_assert(sizeof(struct process_record) == 168, "sowatch.bpf.records.PROCESS");
_Static_assert(sizeof(struct row) == 32, "sowatch.bpf.records.ROW");
_Static_assert(__builtin_offsetof(struct rows_record, rows) == 64, "sowatch.bpf.records.ROWS");
