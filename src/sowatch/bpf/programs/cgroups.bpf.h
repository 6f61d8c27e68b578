/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cgroups of a process. It has one in each hierarchy: on hosts with version 1, or both, a runtime may have placed a
 * container in some of them only. User space chooses the one that names a container, so all paths that differ are sent.
 */
#pragma once

#include "paths.bpf.h"

/* Containers nest deep, but a cgroup path of more levels than this is cut at its start. */
#define CGROUP_LEVELS 16
/*
 * There are 14 controllers; systemd and others add hierarchies of their own, which are listed last. Those beyond this
 * are not seen, nor are more paths that differ than CGROUP_PATHS or than fit: docs/reliability.md.
 */
#define CGROUP_HIERARCHIES 64
/* What the path of version 2 may take, so that something is left for the others. */
#define FIRST_CGROUP_BYTES 512

/* Global functions, so that the verifier reads them once: see step_up_once. Pointers go as numbers. */

/* A number that is the same for equal paths, 0 for the root: the kernel has hashed each name. */
__noinline __u32 hash_cgroup(__u64 node_address)
{
	struct kernfs_node *node = (void *)node_address, *parent;
	__u32 hash = 0;

	for (int i = 0; i < CGROUP_LEVELS; i++) {
		parent = node ? parent_node(node) : NULL;
		if (!parent)
			break;
		hash = hash * 31 + BPF_CORE_READ(node, hash) + 1;
		node = parent;
	}
	return hash;
}

/* Rounds of loops, too. Where loads are not typed the programs have no stack left for the frames of these. */
#ifdef PROBE_READS
#define ROUND_ONCE static __always_inline
#else
#define ROUND_ONCE __noinline
#endif

/* Appends a component; gives the node above it, 0 for the nameless root, or if there is no space. */
ROUND_ONCE __u64 append_level(enum scratch_owner owner, __u64 node_address)
{
	struct kernfs_node *node = (void *)node_address, *parent = node ? parent_node(node) : NULL;
	struct scratch *scratch = scratch_of(owner);

	if (!scratch || !parent || !append(scratch, (const unsigned char *)BPF_CORE_READ(node, name)))
		return 0;
	return (__u64)parent;
}

/* Appends the path's components from the leaf up, without the nameless root. */
__noinline int walk_cgroup(enum scratch_owner owner, __u64 node_address)
{
	__u64 node = node_address;

	for (int i = 0; node && i < CGROUP_LEVELS; i++)
		node = append_level(owner, node);
	return 0;
}

/* Whether a path with this hash was sent for this process, or too many were; remembers it if not. */
static __always_inline bool was_sent(struct scratch *scratch, __u32 hash)
{
	__u32 count = scratch->cgroup_count;

	if (count >= CGROUP_PATHS)
		return true;
	for (__u32 i = 0; i < CGROUP_PATHS; i++)
		if (i < count && scratch->cgroup_hashes[i] == hash)
			return true;
	scratch->cgroup_hashes[count] = hash;
	scratch->cgroup_count = count + 1;
	return false;
}

/* Appends what is not the root and differs, after an empty component; gives the link of the next hierarchy. */
__noinline __u64 append_next_cgroup(enum scratch_owner owner, __u64 link_address)
{
	struct cgrp_cset_link *link = (void *)link_address - bpf_core_field_offset(struct cgrp_cset_link, cgrp_link);
	struct kernfs_node *node = BPF_CORE_READ(link, cgrp, kn);
	struct scratch *scratch = scratch_of(owner);
	__u32 hash = hash_cgroup((__u64)node);

	if (scratch && hash && !was_sent(scratch, hash) && append(scratch, (const unsigned char *)""))
		walk_cgroup(owner, (__u64)node);
	return (__u64)BPF_CORE_READ(link, cgrp_link.next);
}

/* The same of all hierarchies behind a link. */
ROUND_ONCE int append_other_cgroups(enum scratch_owner owner, __u64 link_address, __u64 head)
{
	__u64 link = link_address;

	for (int i = 0; i < CGROUP_HIERARCHIES && link && link != head; i++)
		link = append_next_cgroup(owner, link);
	return 0;
}

/* Appends the paths; gives the number of bytes they took. */
static __always_inline __u32 append_cgroups(enum scratch_owner owner, struct scratch *scratch, struct task_struct *task)
{
	struct css_set *set = BPF_CORE_READ(task, cgroups);
	__u64 unified = (__u64)BPF_CORE_READ(set, dfl_cgrp, kn);
	__u64 head = (__u64)set + bpf_core_field_offset(struct css_set, cgrp_links);
	__u64 link = (__u64)BPF_CORE_READ(set, cgrp_links.next);
	__u32 before = scratch->text_end;

	scratch->cgroup_count = 1;
	scratch->cgroup_hashes[0] = hash_cgroup(unified);
	scratch->text_limit = before + FIRST_CGROUP_BYTES - NAME_BYTES;
	walk_cgroup(owner, unified);
	scratch->text_limit = before + CGROUP_TEXT_BYTES - NAME_BYTES;
	append_other_cgroups(owner, link, head);
	return scratch->text_end - before;
}
