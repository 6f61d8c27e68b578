/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * System calls that come by another way than the one the kernel was built for: int $0x80, which a
 * 64-bit program may execute as well as a 32-bit one, and those of x32. The syscall tracepoints leave
 * them out, and their functions are others. Nothing is noted at their entry; at their exit the
 * registers still say what they were asked for, and bpf_find_vma which file is there now. So each is a
 * tentative record: sent at once, and the process is read. docs/decisions/0024-what-the-hooks-did-not-see.md.
 */
#pragma once

#include "calls.bpf.h"

#if defined(__TARGET_ARCH_x86)

/* arch/x86/entry/syscalls/syscall_32.tbl; ipc(2) is shmat and shmdt, too. */
enum compat_call {
	COMPAT_OLD_MMAP = 90, /* its arguments are in memory */
	COMPAT_MUNMAP = 91,
	COMPAT_IPC = 117,
	COMPAT_MPROTECT = 125,
	COMPAT_MREMAP = 163,
	COMPAT_MMAP2 = 192,
	COMPAT_PKEY_MPROTECT = 380,
	COMPAT_SHMAT = 397,
	COMPAT_SHMDT = 398,
};

/* syscall_64.tbl; x32 has the same, with a bit more. */
enum x32_call {
	X32_MMAP = 9,
	X32_MPROTECT = 10,
	X32_MUNMAP = 11,
	X32_MREMAP = 25,
	X32_SHMAT = 30,
	X32_SHMDT = 67,
	X32_PKEY_MPROTECT = 329,
};

enum ipc_call { IPC_SHMAT = 21, IPC_SHMDT = 22 };

/* The kernel takes the lower halves of the registers, whatever stands above. */
#define NARROW(regs, register) ((__u32)READ(regs, register))

static __always_inline void ask_mmap(struct pending *call, __u64 start, __u64 length, __u64 protection, __u64 flags)
{
	call->start = start;
	call->length = length;
	if (!(flags & MAP_ANONYMOUS) && makes_executable(protection))
		call->kind |= PENDING_MAP | PENDING_ASK | PENDING_UNSURE_FD;
	else if (flags & MAP_SHARED && makes_executable(protection))
		call->kind |= PENDING_REREAD | PENDING_COUNTED;
	if (flags & MAP_FIXED)
		call->kind |= PENDING_UNMAP;
}

static __always_inline void ask_range(struct pending *call, __u64 start, __u64 length, enum pending_kind kind)
{
	call->start = start;
	call->length = length;
	call->kind = kind;
}

static __always_inline void ask_mprotect(struct pending *call, __u64 start, __u64 length, __u64 protection)
{
	ask_range(call, start, length, makes_executable(protection) ? PENDING_MPROTECT_EXEC : PENDING_UNMAP);
}

/* What only a scan can determine; and whether that may be of a process that is not tracked yet. */
static __always_inline void ask_rescan(struct pending *call, bool may_map)
{
	call->kind = PENDING_REREAD | (may_map ? PENDING_COUNTED : 0);
}

static __always_inline void read_compat_call(struct pt_regs *regs, __u32 number, struct pending *call)
{
	__u64 first = NARROW(regs, bx), second = NARROW(regs, cx), third = NARROW(regs, dx);

	if (number == COMPAT_MMAP2)
		ask_mmap(call, first, second, third, NARROW(regs, si));
	else if (number == COMPAT_OLD_MMAP)
		ask_rescan(call, true);
	else if (number == COMPAT_MUNMAP)
		ask_range(call, first, second, PENDING_UNMAP);
	else if (number == COMPAT_MPROTECT || number == COMPAT_PKEY_MPROTECT)
		ask_mprotect(call, first, second, third);
	else if (number == COMPAT_SHMAT || (number == COMPAT_IPC && (first & 0xffff) == IPC_SHMAT))
		ask_rescan(call, third & SHM_EXEC);
	else if (number == COMPAT_MREMAP || number == COMPAT_SHMDT ||
		 (number == COMPAT_IPC && (first & 0xffff) == IPC_SHMDT))
		ask_rescan(call, false);
}

static __always_inline void read_x32_call(struct pt_regs *regs, __u32 number, struct pending *call)
{
	__u64 first = READ(regs, di), second = READ(regs, si), third = READ(regs, dx);

	if (number == X32_MMAP)
		ask_mmap(call, first, second, third, READ(regs, r10));
	else if (number == X32_MUNMAP)
		ask_range(call, first, second, PENDING_UNMAP);
	else if (number == X32_MPROTECT || number == X32_PKEY_MPROTECT)
		ask_mprotect(call, first, second, third);
	else if (number == X32_SHMAT)
		ask_rescan(call, third & SHM_EXEC);
	else if (number == X32_MREMAP || number == X32_SHMDT)
		ask_rescan(call, false);
}

/* The call has been made; what it was asked for is reported as if it had been noted. */
static __always_inline int report_unnoted(struct pending *call, long ret)
{
	struct task_struct *task = current_task();
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;

	call->length = whole_pages(call->length);
	if (call->kind & PENDING_UNMAP && !matters(find_process(tgid), call->start, call->length))
		call->kind &= ~PENDING_UNMAP;
	if (call->kind & PENDING_COUNTED) {
		call->kind &= ~PENDING_COUNTED;
		if (!is_error(ret))
			count_activity(task);
	}
	if (!call->kind)
		return 0;
	call->kind |= PENDING_SHARED_MM;
	if (BPF_CORE_READ(task, signal, nr_threads) > 1)
		call->kind |= PENDING_AMONG_THREADS;
	report_call(task, call, ret, ANY_CALL);
	return 0;
}

/* Not on the stack: what sends it needs most of that. Hooks run with preemption off. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pending);
} rare_call SEC(".maps");

static __always_inline struct pending *take_rare_call(void)
{
	__u32 zero = 0;
	struct pending *call = bpf_map_lookup_elem(&rare_call, &zero);

	if (call)
		__builtin_memset(call, 0, sizeof(*call));
	return call;
}

static __always_inline int leave_compat_call(struct pt_regs *regs, __u32 number, long ret)
{
	struct pending *call = take_rare_call();

	if (!call)
		return 0;
	read_compat_call(regs, number, call);
	return call->kind ? report_unnoted(call, ret) : 0;
}

static __noinline int leave_rare_call(struct pt_regs *regs, bool is_compat, long ret)
{
	struct pending *call = take_rare_call();

	if (!regs || !call)
		return 0;
	if (is_compat)
		read_compat_call(regs, READ(regs, orig_ax), call);
	else
		read_x32_call(regs, READ(regs, orig_ax) & ~X32_SYSCALL_BIT, call);
	return call->kind ? report_unnoted(call, ret) : 0;
}

__u32 has_x32 = 0; /* the kernel takes calls of x32; written by user space */

/* Of an exception orig_ax is -1. */
static __always_inline bool is_x32(__u64 number)
{
	return (number & ~0xfffULL) == X32_SYSCALL_BIT;
}

/* Runs at the end of every system call of the host, so it reads as little as possible. */
SEC("?tp_btf/sys_exit")
int BPF_PROG(tp_compat, struct pt_regs *regs, long ret)
{
	bool is_compat = READ(current_task(), thread_info.status) & TS_COMPAT;

	if (!is_compat && !is_x32(READ(regs, orig_ax)))
		return 0;
	return leave_rare_call(regs, is_compat, ret);
}

#ifndef OLD_KERNEL
/* The call is not over, and nobody knows its result; whatever it has changed, a scan that comes now shows. */
static __noinline int note_rare_call(struct task_struct *task, struct pt_regs *regs, bool is_compat)
{
	struct process *process = find_process(bpf_get_current_pid_tgid() >> 32);
	struct pending call = {};

	if (!regs)
		return 0;
	if (is_compat)
		read_compat_call(regs, READ(regs, orig_ax), &call);
	else
		read_x32_call(regs, READ(regs, orig_ax) & ~X32_SYSCALL_BIT, &call);
	if (call.kind & (PENDING_MAP | PENDING_MPROTECT_EXEC | PENDING_COUNTED))
		process = count_activity(task);
	else if (call.kind & PENDING_UNMAP && !matters(process, call.start, whole_pages(call.length)))
		return 0;
	else if (call.kind && !process && report & REPORT_RANGES)
		process = count_activity(task);
	if (call.kind)
		send_needs_rescan(task, process);
	return 0;
}

/*
 * The one that changes mappings holds the lock of the mappings, and gives it back before anybody else can
 * read them: for reading only, if it was downgraded. What is no system call that changes mappings
 * leaves at once. Only where the tracepoint is cheap, see hooks.py.
 */
SEC("?tp_btf/mmap_lock_released")
int BPF_PROG(tp_lock, struct mm_struct *mm, bool is_writer)
{
	struct task_struct *task = bpf_get_current_task_btf();
	bool is_compat = task->thread_info.status & TS_COMPAT;
	struct pt_regs *regs;

	if (!is_compat && !has_x32)
		return 0;
	regs = (struct pt_regs *)bpf_task_pt_regs(task);
	if (!is_compat && !is_x32(READ(regs, orig_ax)))
		return 0;
	return note_rare_call(task, regs, is_compat);
}
#endif

/* Where there are trampolines, each on the function of its call; x32 has the functions of the others. */
#define COMPAT_HOOK(name, function, number)                               \
	SEC("?fexit/__ia32_" function)                                    \
	int BPF_PROG(fexit_compat_##name, struct pt_regs *regs, long ret) \
	{                                                                 \
		return leave_compat_call(regs, number, ret);              \
	}

COMPAT_HOOK(mmap2, "sys_mmap_pgoff", COMPAT_MMAP2)
COMPAT_HOOK(mmap, "compat_sys_ia32_mmap", COMPAT_OLD_MMAP)
COMPAT_HOOK(munmap, "sys_munmap", COMPAT_MUNMAP)
COMPAT_HOOK(mprotect, "sys_mprotect", COMPAT_MPROTECT)
COMPAT_HOOK(pkey_mprotect, "sys_pkey_mprotect", COMPAT_PKEY_MPROTECT)
COMPAT_HOOK(mremap, "sys_mremap", COMPAT_MREMAP)
COMPAT_HOOK(ipc, "compat_sys_ipc", COMPAT_IPC)
COMPAT_HOOK(shmat, "compat_sys_shmat", COMPAT_SHMAT)
COMPAT_HOOK(shmdt, "sys_shmdt", COMPAT_SHMDT)

#endif
