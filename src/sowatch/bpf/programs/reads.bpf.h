/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Reads kernel structures on the way that every executable mmap takes. A probe read is a call of
 * some 10 ns; a load through a typed pointer is one instruction, which the kernel makes safe by
 * itself. bpf_rdonly_cast (6.2) gives a pointer its type; where it is missing,
 * watch_probe.bpf.c builds the same programs with probe reads.
 */
#pragma once

#include "kernel_types.h"

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#ifdef PROBE_READS

#define READ BPF_CORE_READ
#define TYPED(type, pointer) ((type *)(pointer))

static __always_inline void *load_pointer(const void *from)
{
	void *value = NULL;

	bpf_probe_read_kernel(&value, sizeof(value), from);
	return value;
}

static __always_inline struct task_struct *current_task(void)
{
	return (struct task_struct *)bpf_get_current_task();
}

#else

extern void *bpf_rdonly_cast(const void *object, __u32 btf_id) __ksym;

#define READ(source, field, ...) ___arrow(source, field, ##__VA_ARGS__)
/*
 * Also for a pointer out of a task that the kernel vouches for (bpf_get_current_task_btf): to see whether it
 * vouches for that pointer, too, the verifier searches the names of all types, four times whenever it passes there.
 */
#define TYPED(type, pointer) ((type *)bpf_rdonly_cast(pointer, bpf_core_type_id_kernel(type)))

/* A pointer out of an array of them: any structure that begins with a pointer will do. */
static __always_inline void *load_pointer(const void *from)
{
	return TYPED(struct list_head, from)->next;
}

static __always_inline struct task_struct *current_task(void)
{
	return bpf_get_current_task_btf();
}

#endif
