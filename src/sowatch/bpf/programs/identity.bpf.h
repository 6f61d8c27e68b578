/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which file is it: the real inode below stacked file systems, and the name it was opened by. */
#pragma once

#include "place.bpf.h"
#include "state.bpf.h"

/* overlayfs on overlayfs on a real file system is as deep as the kernel lets it be stacked
 * (FILESYSTEM_MAX_STACK_DEPTH is 2). */
#define MAX_STACK_DEPTH 3

/* linux/fs.h; a macro, so BTF does not know it. The kernel does not count these among open files. */
#define FMODE_NOACCOUNT (1u << 29)

static __always_inline struct path user_path_of(struct file *file)
{
	struct backing_file *backing = TYPED(struct backing_file, container_of(file, struct backing_file, file));
	struct path path;

	path.mnt = READ(backing, user_path.mnt);
	path.dentry = READ(backing, user_path.dentry);
	return path;
}

/*
 * Whether a stacked file system has opened this file below itself (6.5+). The bit that says so was
 * moved in 6.14 and in some stable kernels, without a trace in BTF; but all of them are not
 * counted, and hold a path, whose two halves belong to one file system.
 */
static __always_inline bool is_backing(struct file *file)
{
	struct super_block *sb;
	struct path path;

	if (!bpf_core_type_exists(struct backing_file) || !(READ(file, f_mode) & FMODE_NOACCOUNT))
		return false;
	path = user_path_of(file);
	sb = BPF_CORE_READ(path.mnt, mnt_sb);
	return sb && sb == BPF_CORE_READ(path.dentry, d_sb);
}

/*
 * The name of a mapped file. A vma below overlayfs holds a backing file whose own path lies in a
 * layer that the process cannot see; its user_path is what was opened. Before 6.5 a vma's f_path is
 * the overlay's own already.
 */
static __always_inline struct path opened_path(struct file *file)
{
	struct path path;

	if (is_backing(file))
		return user_path_of(file);
	path.mnt = READ(file, f_path.mnt);
	path.dentry = READ(file, f_path.dentry);
	return path;
}

/*
 * The file below overlayfs. private_data is a struct ovl_file from 6.13 on, the file itself before.
 * If overlayfs is a module that came after this program, it is not known which: what is a backing
 * file is the file, and what is not points to it.
 */
static __always_inline struct file *one_layer_down(struct file *file)
{
	void *data = READ(file, private_data);

	if (bpf_core_type_exists(struct ovl_file))
		return BPF_CORE_READ((struct ovl_file *)data, realfile);
	if (!bpf_core_type_exists(struct backing_file) || is_backing(TYPED(struct file, data)))
		return data;
	return load_pointer(data);
}

static __always_inline void identify(struct file *file, struct file_id *id)
{
	struct super_block *sb = NULL;
	struct inode *inode = NULL;
	unsigned long magic = 0;

	for (int depth = 0; depth < MAX_STACK_DEPTH; depth++) {
		inode = READ(file, f_inode);
		sb = READ(inode, i_sb);
		magic = READ(sb, s_magic);
		if (magic != OVERLAYFS_SUPER_MAGIC)
			break;
		file = TYPED(struct file, one_layer_down(file));
	}
	id->inode = READ(inode, i_ino);
	id->generation = READ(inode, i_generation);
	id->dev = READ(sb, s_dev);
	id->subvolume = 0;
	if (magic == BTRFS_SUPER_MAGIC && bpf_core_type_exists(struct btrfs_inode)) {
		struct btrfs_inode *btrfs = container_of(inode, struct btrfs_inode, vfs_inode);

		id->subvolume = BPF_CORE_READ(btrfs, root, root_key.objectid);
	}
}

static __always_inline bool is_same_file(const struct file_id *one, const struct file_id *other)
{
	return one->inode == other->inode && one->dev == other->dev && one->generation == other->generation &&
	       one->subvolume == other->subvolume;
}

#define NS_PER_S 1000000000ULL
/* linux/fs.h, 6.13+: in this bit of the nanoseconds the kernel notes that somebody has asked for them. */
#define I_CTIME_QUERIED (1u << 31)

/* When the file below all stacked file systems was changed last, in ns since 1970; 0 if it cannot be determined. */
static __always_inline __u64 changed_ns_of(struct file *file)
{
	struct inode *inode = NULL;

	for (int depth = 0; depth < MAX_STACK_DEPTH; depth++) {
		inode = READ(file, f_inode);
		if (READ(inode, i_sb, s_magic) != OVERLAYFS_SUPER_MAGIC)
			break;
		file = TYPED(struct file, one_layer_down(file));
	}
	if (bpf_core_field_exists(inode->i_ctime_sec))
		return BPF_CORE_READ(inode, i_ctime_sec) * NS_PER_S +
		       (BPF_CORE_READ(inode, i_ctime_nsec) & ~I_CTIME_QUERIED);
	if (bpf_core_field_exists(struct inode___v6_6, __i_ctime)) {
		struct inode___v6_6 *older = (void *)inode;

		return BPF_CORE_READ(older, __i_ctime.tv_sec) * NS_PER_S + BPF_CORE_READ(older, __i_ctime.tv_nsec);
	}
	if (bpf_core_field_exists(struct inode___v5, i_ctime)) {
		struct inode___v5 *oldest = (void *)inode;

		return BPF_CORE_READ(oldest, i_ctime.tv_sec) * NS_PER_S + BPF_CORE_READ(oldest, i_ctime.tv_nsec);
	}
	return 0;
}

/* What a verdict on this file, as this task sees it, is filed under. */
static __always_inline void make_key(struct task_struct *task, struct file *file, struct file_key *key)
{
	struct fs_struct *fs = READ(TYPED(struct task_struct, task), fs);
	struct path opened = opened_path(file);

	identify(file, &key->file);
	key->dentry = (__u64)opened.dentry;
	key->mnt = (__u64)opened.mnt;
	key->root_dentry = (__u64)READ(fs, root.dentry);
	key->root_mnt = (__u64)READ(fs, root.mnt);
	key->name_hash = READ(opened.dentry, d_name.hash);
	key->epoch = rules_epoch;
}

static __always_inline bool is_same_key(const struct file_key *one, const struct file_key *other)
{
	return one->file.inode == other->file.inode && one->file.generation == other->file.generation &&
	       one->dentry == other->dentry && one->mnt == other->mnt && one->name_hash == other->name_hash;
}

static __always_inline enum verdict look_up_verdict(const struct file_key *key)
{
	struct verdict_value *value = bpf_map_lookup_elem(&verdicts, key);

	if (!value)
		return VERDICT_NONE;
	if (value->verdict != VERDICT_IGNORE)
		return value->verdict;
	if (now_s >= value->expires_s || !value->place)
		return VERDICT_NONE;
	/* Last, for it costs most: a directory above it may have another name, or another place, by now. */
	if (value->place != place_of(key))
		return VERDICT_NONE;
	return VERDICT_IGNORE;
}

/* The file behind a descriptor of the calling task, or NULL. */
static __always_inline struct file *file_of_fd(struct task_struct *task, __u32 fd)
{
	struct fdtable *table = READ(TYPED(struct task_struct, task), files, fdt);
	struct file *file;

	if (fd >= READ(table, max_fds))
		return NULL;
	file = load_pointer(READ(table, fd) + fd);
	return file ? TYPED(struct file, file) : NULL;
}

/* The confirmed answer to "what is mapped at this address", filled in by bpf_find_vma. */
struct found_vma {
	struct file *file;
	struct file_key key;
	__u64 start;
	__u64 end;
	__u64 offset_bytes;
	bool is_executable;
};

#ifdef OLD_KERNEL

/* Nobody can be asked; the caller makes a tentative record. */
static __always_inline long find_vma_at(__u64 address, struct found_vma *found)
{
	return -1;
}

#else

static long take_vma(struct task_struct *task, struct vm_area_struct *vma, void *context)
{
	struct found_vma *found = context;
	struct file *file = TYPED(struct file, BPF_CORE_READ(vma, vm_file));

	found->file = file;
	found->start = BPF_CORE_READ(vma, vm_start);
	found->end = BPF_CORE_READ(vma, vm_end);
	found->offset_bytes = (__u64)BPF_CORE_READ(vma, vm_pgoff) << PAGE_SHIFT;
	found->is_executable = BPF_CORE_READ(vma, vm_flags) & VM_EXEC;
	if (file)
		make_key(TYPED(struct task_struct, task), file, &found->key);
	return 0;
}

/*
 * 0 if the address is mapped and found is filled in. Not so while another thread holds the lock
 * of the mappings (-EBUSY), and on kernels before 5.17, which have no bpf_find_vma.
 */
static __always_inline long find_vma_at(__u64 address, struct found_vma *found)
{
	if (!bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_find_vma))
		return -1;
	return bpf_find_vma(bpf_get_current_task_btf(), address, take_vma, found, 0);
}

#endif
