/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Paths as a process sees them: components from the leaf up to the process's root, each ended by
 * a NUL, so that nothing has to be moved; user space turns them round.
 */
#pragma once

#include "place.bpf.h"
#include "state.bpf.h"

#ifdef OLD_KERNEL
/* The deepest path that is walked without bpf_loop (5.17); what is deeper is sent with FLAG_PARTIAL. */
#define MAX_COMPONENTS 128
#endif

#define TEXT_BYTES (PATH_TEXT_BYTES + CGROUP_TEXT_BYTES)
/* As many different paths of one process's cgroups are sent. */
#define CGROUP_PATHS 8

/* A place to build one record in; too large for the stack of 512 bytes. */
struct scratch {
	__u32 is_taken;
	__u32 text_end; /* where the next component goes */
	__u32 text_limit;
	__u32 is_partial;
	struct dentry *dentry;
	struct vfsmount *mnt;
	struct path root;
	struct kernfs_node *node;
	union {
		struct record head;
		struct map_record map;
		struct process_record process;
	} record; /* both are of one size, so the text follows at once and one copy sends all */
	char text[TEXT_BYTES + NAME_BYTES];
	__u32 cgroup_count;
	__u32 cgroup_hashes[CGROUP_PATHS];
	__u64 place; /* of what was walked last, as place_of() */
};

_Static_assert(sizeof(struct map_record) == sizeof(struct process_record), "text must follow the record");

enum scratch_owner { SCRATCH_HOOKS, SCRATCH_READER };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} hook_scratch SEC(".maps");

/* The iterator may be preempted and may move to another CPU; there is one reader at a time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} reader_scratch SEC(".maps");

static __always_inline struct scratch *scratch_of(enum scratch_owner owner)
{
	__u32 zero = 0;

	if (owner == SCRATCH_READER)
		return bpf_map_lookup_elem(&reader_scratch, &zero);
	return bpf_map_lookup_elem(&hook_scratch, &zero);
}

/* Appends one name. False when the text is full. */
static __always_inline bool append(struct scratch *scratch, const unsigned char *name)
{
	__u32 at = scratch->text_end;
	long length;

	if (at >= scratch->text_limit || at >= TEXT_BYTES) {
		scratch->is_partial = 1;
		return false;
	}
	length = bpf_probe_read_kernel_str(scratch->text + at, NAME_BYTES, name);
	if (length <= 0) {
		scratch->is_partial = 1;
		return false;
	}
	scratch->text_end = at + length;
	return true;
}

/* One step up: true while there is more to walk. */
static __always_inline bool step_up(struct scratch *scratch)
{
	struct dentry *dentry = scratch->dentry, *parent;
	struct vfsmount *mnt = scratch->mnt;
	__u64 hash_len;

	if (dentry == scratch->root.dentry && mnt == scratch->root.mnt)
		return false;
	if (dentry == BPF_CORE_READ(mnt, mnt_root)) {
		struct mount *mount = container_of(mnt, struct mount, mnt);
		struct mount *below = BPF_CORE_READ(mount, mnt_parent);

		if (below == mount || !below) /* the root of a mount namespace, or a detached mount */
			return false;
		scratch->dentry = BPF_CORE_READ(mount, mnt_mountpoint);
		scratch->mnt = (void *)below + bpf_core_field_offset(struct mount, mnt);
		return true;
	}
	hash_len = BPF_CORE_READ(dentry, d_name.hash_len);
	if (!append(scratch, BPF_CORE_READ(dentry, d_name.name)))
		return false;
	/* Of a name that was changed in between: a place that no file has. */
	if (hash_len != BPF_CORE_READ(dentry, d_name.hash_len))
		hash_len = 0;
	scratch->place = add_to_place(scratch->place, hash_len);
	parent = BPF_CORE_READ(dentry, d_parent);
	scratch->dentry = parent;
	return parent != dentry; /* its own parent: a memfd or another file without a directory */
}

/* A global function: the verifier reads it once, not in every round, nor for each caller of the walk. */
__noinline int step_up_once(enum scratch_owner owner)
{
	struct scratch *scratch = scratch_of(owner);

	return scratch && step_up(scratch);
}

#ifdef OLD_KERNEL

/* So small that it is closed by a jump; kernels before 6.2 refuse a loop that control falls into. */
static __always_inline void walk_up(enum scratch_owner owner, struct scratch *scratch)
{
	for (int i = 0; i < MAX_COMPONENTS; i++)
		if (!step_up_once(owner))
			return;
	scratch->is_partial = 1;
}

#else

static long step_up_from_loop(__u32 index, void *context)
{
	return !step_up_once(*(enum scratch_owner *)context);
}

static __always_inline void walk_up(enum scratch_owner owner, struct scratch *scratch)
{
	bpf_loop(PATH_TEXT_BYTES, step_up_from_loop, &owner, 0);
}

#endif

/* Appends the path to scratch->text; gives the number of bytes it took. */
static __always_inline __u32 walk_path(enum scratch_owner owner, struct scratch *scratch, struct path from,
				       struct path root, __u32 limit)
{
	__u32 before = scratch->text_end;

	scratch->dentry = from.dentry;
	scratch->mnt = from.mnt;
	scratch->root = root;
	scratch->text_limit = before + limit;
	scratch->is_partial = 0;
	scratch->place = PLACE_SEED;
	walk_up(owner, scratch);
	return scratch->text_end - before;
}

static __always_inline struct kernfs_node *parent_node(struct kernfs_node *node)
{
	if (bpf_core_field_exists(node->__parent))
		return BPF_CORE_READ(node, __parent);
	return BPF_CORE_READ((struct kernfs_node___named_parent *)node, parent);
}
