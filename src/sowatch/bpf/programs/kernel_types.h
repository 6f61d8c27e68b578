/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel structures the programs look into, cut down to the fields they read. Offsets
 * here mean nothing: preserve_access_index makes libbpf fill in those of the running kernel.
 * Names and types are the kernel's own; tests/kernel/bpf/test_layout.py checks them against its BTF.
 */
#pragma once

#include <linux/bpf.h>
#include <stdbool.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

typedef struct refcount_struct {
	atomic_t refs;
} refcount_t;

struct qstr {
	union {
		struct {
			__u32 hash;
			__u32 len;
		};
		__u64 hash_len;
	};
	const unsigned char *name;
};

struct list_head {
	struct list_head *next;
};

struct hlist_bl_node {
	struct hlist_bl_node **pprev;
};

struct super_block {
	__u32 s_dev;
	unsigned long s_blocksize;
	unsigned long s_magic;
};

struct dentry {
	struct hlist_bl_node d_hash;
	struct dentry *d_parent;
	struct qstr d_name;
	struct super_block *d_sb;
};

struct vfsmount {
	struct dentry *mnt_root;
	struct super_block *mnt_sb;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct inode {
	unsigned short i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	__u32 i_generation;
	__s64 i_ctime_sec; /* 6.11+ */
	__u32 i_ctime_nsec;
};

struct timespec64 {
	__s64 tv_sec;
	long tv_nsec;
};

/* 6.6 to 6.10, and before; libbpf ignores what follows the three underscores. */
struct inode___v6_6 {
	struct timespec64 __i_ctime;
};

struct inode___v5 {
	struct timespec64 i_ctime;
};

struct file {
	unsigned int f_mode;
	void *private_data;
	struct inode *f_inode;
	struct path f_path;
};

/* 6.5+: the file a stacked file system maps instead of its own; user_path is what was opened. */
struct backing_file {
	struct file file;
	struct path user_path;
};

/* 6.13+: what private_data of an overlayfs file points to; before, it was the real file itself. */
struct ovl_file {
	struct file *realfile;
};

struct btrfs_key {
	__u64 objectid;
};

struct btrfs_root {
	struct btrfs_key root_key;
};

struct btrfs_inode {
	struct btrfs_root *root;
	struct inode vfs_inode;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	atomic_t count;
	struct fdtable *fdt;
};

struct fs_struct {
	struct path root;
};

struct mm_struct {
	atomic_t mm_users;
	struct file *exe_file;
	unsigned long task_size;
	unsigned long total_vm;
	unsigned long start_code;
	unsigned long end_code;
	unsigned long saved_auxv[52];
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	unsigned long vm_flags;
	unsigned long vm_pgoff;
	struct file *vm_file;
};

struct upid {
	int nr;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct signal_struct {
	atomic_t live;
	int nr_threads;
};

typedef struct {
	__u32 val;
} kuid_t;

struct cred {
	kuid_t uid;
};

struct kernfs_node {
	__u64 id;
	struct kernfs_node *__parent;
	const char *name;
	unsigned int hash;
};

/* Before 6.15 the field had no underscores; libbpf ignores what follows the three of them. */
struct kernfs_node___named_parent {
	struct kernfs_node *parent;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp;
	struct list_head cgrp_links;
};

struct cgrp_cset_link {
	struct cgroup *cgrp;
	struct list_head cgrp_link;
};

struct completion {
	unsigned int done;
};

#if defined(__TARGET_ARCH_x86)
/* The first member of a task; of other machines no call comes by two ways. */
struct thread_info {
	__u32 status;
};
#endif

struct task_struct {
#if defined(__TARGET_ARCH_x86)
	struct thread_info thread_info;
#endif
	unsigned int __state;
	unsigned int in_execve : 1;
	int pid;
	int tgid;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct mm_struct *mm;
	struct files_struct *files;
	struct fs_struct *fs;
	struct signal_struct *signal;
	struct pid *thread_pid;
	const struct cred *cred;
	struct css_set *cgroups;
	struct completion *vfork_done;
	__u64 start_boottime;
	__u32 self_exec_id;
	unsigned int personality;
	char comm[16];
};

/* Before 5.14; libbpf ignores what follows the three underscores. */
struct task_struct___v5_10 {
	volatile long state;
};

/* Registers as a system call's own function gets them; ARGUMENT is one of its arguments. */
#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long di;
	unsigned long si;
	unsigned long dx;
	unsigned long r10;
	unsigned long r8;
	unsigned long r9;
	unsigned long bx;
	unsigned long cx;
	unsigned long orig_ax;
};
#define SYSCALL_FUNCTION "__x64_sys_"
#define ARGUMENT(regs, number) ((regs)->ARGUMENT_##number)
#define ARGUMENT_0 di
#define ARGUMENT_1 si
#define ARGUMENT_2 dx
#define ARGUMENT_3 r10
#define ARGUMENT_4 r8
#define ARGUMENT_5 r9
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs {
	__u64 regs[31];
};
#define SYSCALL_FUNCTION "__arm64_sys_"
#define ARGUMENT(from, number) ((from)->regs[number])
#endif

struct seq_file {
	__u64 index;
};

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
	__u64 seq_num;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

struct bpf_iter__task_vma {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct vm_area_struct *vma;
};

#pragma clang attribute pop

/* Arguments of a syscall tracepoint, as every format file under events/syscalls lays them out. */
struct syscall_enter {
	__u64 common;
	__u64 nr;
	__u64 args[6];
};

struct syscall_exit {
	__u64 common;
	__u64 nr;
	long ret;
};

/* include/uapi/asm-generic/mman-common.h, linux/magic.h, linux/fs.h, linux/mm.h, uapi/linux/auxvec.h */
#define PROT_READ 0x1
#define PROT_EXEC 0x4
#define MAP_FIXED 0x10
#define MAP_SHARED 0x01 /* also a bit of MAP_SHARED_VALIDATE */
#define MAP_ANONYMOUS 0x20
#define MREMAP_FIXED 0x2
#define SHM_REMAP 040000
#define SHM_EXEC 0100000
#define VM_EXEC 0x4
#define HUGETLBFS_MAGIC 0x958458f6
#define OVERLAYFS_SUPER_MAGIC 0x794c7630
#define BTRFS_SUPER_MAGIC 0x9123683e
#define AT_BASE 7
#define TASK_NEW 0x800 /* linux/sched.h */
#define READ_IMPLIES_EXEC 0x0400000
#define S_IFMT 00170000
#define S_IFREG 0100000
/* asm/thread_info.h, uapi/asm/unistd.h */
#define TS_COMPAT 0x2
#define X32_SYSCALL_BIT 0x40000000
#define PAGE_SHIFT 12
#define PAGE_MASK_LOW 0xfffULL
