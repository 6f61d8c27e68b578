/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The place of a file: a number made of every component of its path, so that a rename of any
 * directory above it, or a move of a mount, makes it another one. The kernel's own sequences that
 * would show it (rename_lock, mount_lock) are out of reach: no BTF, and kallsyms lists them on some
 * kernels only. docs/decisions/0024-what-the-hooks-did-not-see.md.
 */
#pragma once

#include "reads.bpf.h"
#include "records.h"

/* Components and mounts between a file and its root; what is deeper has no place, and is asked about each time. */
#ifdef PROBE_READS
#define PLACE_STEPS 48
#else
#define PLACE_STEPS PATH_TEXT_BYTES
#define PLACE_STEPS_INLINE 8
#endif
#define PLACE_SEED 0x6a09e667f3bcc909ULL

/* d_name.hash is salted with the address of the parent, so equal names in two directories differ. */
static __always_inline __u64 add_to_place(__u64 place, __u64 hash_len)
{
	return ((place << 5 | place >> 59) ^ hash_len) * 0x9e3779b97f4a7c15ULL;
}

/* A walk from a file to its root. */
struct ascent {
	struct dentry *dentry;
	struct vfsmount *mnt;
	__u64 root_dentry;
	__u64 root_mnt;
	__u64 place;
	__u32 is_done;
};

/* The same steps as step_up(), which collects the path. False at the root. */
static __always_inline bool ascend(struct ascent *at)
{
	struct dentry *dentry = at->dentry, *parent;
	struct vfsmount *mnt = at->mnt;

	if ((__u64)dentry == at->root_dentry && (__u64)mnt == at->root_mnt)
		return false;
	if (dentry == READ(TYPED(struct vfsmount, mnt), mnt_root)) {
		struct mount *mount = TYPED(struct mount, container_of(mnt, struct mount, mnt));
		struct mount *below = READ(mount, mnt_parent);

		if (below == mount || !below)
			return false;
		at->dentry = READ(mount, mnt_mountpoint);
		at->mnt = TYPED(struct vfsmount, (void *)below + bpf_core_field_offset(struct mount, mnt));
		return true;
	}
	dentry = TYPED(struct dentry, dentry);
	at->place = add_to_place(at->place, READ(dentry, d_name.hash_len));
	parent = READ(dentry, d_parent);
	at->dentry = parent;
	return parent != dentry;
}

#ifdef PROBE_READS

static __always_inline void walk_to_root(struct ascent *at)
{
	for (int i = 0; i < PLACE_STEPS; i++)
		if (!ascend(at)) {
			at->is_done = 1;
			return;
		}
}

#else

static long ascend_from_loop(__u32 index, void *context)
{
	struct ascent *at = context;

	at->is_done = !ascend(at);
	return at->is_done;
}

/* The first steps are in place: a call for each takes longer than what it does, and few paths have more. */
static __always_inline void walk_to_root(struct ascent *at)
{
	for (int i = 0; i < PLACE_STEPS_INLINE; i++)
		if (!ascend(at)) {
			at->is_done = 1;
			return;
		}
	bpf_loop(PLACE_STEPS - PLACE_STEPS_INLINE, ascend_from_loop, at, 0);
}

#endif

/*
 * Of the file that a verdict is about, now; 0 if it cannot be determined. Global functions: the verifier
 * reads them once. Before 5.12 such a one takes no pointers; and where loads are typed the key
 * holds typed pointers, which are no numbers to it.
 */
static __always_inline __u64 place_below(__u64 dentry, __u64 mnt, __u64 root_dentry, __u64 root_mnt)
{
	struct ascent at = {.root_dentry = root_dentry, .root_mnt = root_mnt, .place = PLACE_SEED};

	at.dentry = TYPED(struct dentry, (void *)dentry);
	at.mnt = TYPED(struct vfsmount, (void *)mnt);
	walk_to_root(&at);
	return at.is_done ? at.place : 0;
}

#ifdef PROBE_READS
__noinline __u64 place_of_four(__u64 dentry, __u64 mnt, __u64 root_dentry, __u64 root_mnt)
{
	return place_below(dentry, mnt, root_dentry, root_mnt);
}

static __always_inline __u64 place_of(const struct file_key *key)
{
	return place_of_four(key->dentry, key->mnt, key->root_dentry, key->root_mnt);
}
#else
__noinline __u64 place_of(const struct file_key *key)
{
	return key ? place_below(key->dentry, key->mnt, key->root_dentry, key->root_mnt) : 0;
}
#endif
