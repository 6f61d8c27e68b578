/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A part of prebuilt.bpf.c: system calls that come by another way, int $0x80 and x32; see compat.bpf.h. */
#pragma once

#if defined(__TARGET_ARCH_x86)

/* arch/x86/include/uapi/asm/ptrace.h */
struct registers {
	__u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, number;
};

/* arch/x86/entry/syscalls/syscall_32.tbl, syscall_64.tbl, and linux/ipc.h; see compat.bpf.h. */
#define COMPAT_OLD_MMAP 90
#define COMPAT_MUNMAP 91
#define COMPAT_IPC 117
#define COMPAT_MPROTECT 125
#define COMPAT_MREMAP 163
#define COMPAT_MMAP2 192
#define COMPAT_PKEY_MPROTECT 380
#define COMPAT_SHMAT 397
#define COMPAT_SHMDT 398
#define X32_SYSCALL_BIT 0x40000000
#define X32_MMAP (X32_SYSCALL_BIT | 9)
#define X32_MPROTECT (X32_SYSCALL_BIT | 10)
#define X32_MUNMAP (X32_SYSCALL_BIT | 11)
#define X32_MREMAP (X32_SYSCALL_BIT | 25)
#define X32_SHMAT (X32_SYSCALL_BIT | 30)
#define X32_SHMDT (X32_SYSCALL_BIT | 67)
#define X32_PKEY_MPROTECT (X32_SYSCALL_BIT | 329)
#define IPC_SHMAT 21
#define IPC_SHMDT 22
#define ENOMEM 12
#define EACCES 13

static __always_inline void may_have_mapped(__u64 start, __u64 length)
{
	struct seen *process = count_activity(bpf_get_current_pid_tgid() >> 32);

	length = whole_pages(length);
	if (process)
		add_range(process, start, start + length);
	send(SEEN_COMPAT, FLAG_NEEDS_RESCAN, start, start + length);
}

static __always_inline void may_have_unmapped(__u64 start, __u64 length)
{
	if (matters(find_process(bpf_get_current_pid_tgid() >> 32), start, whole_pages(length)))
		send(SEEN_NEEDS_RESCAN, FLAG_NEEDS_RESCAN, 0, 0);
}

static __always_inline void may_have_moved(void)
{
	if (find_process(bpf_get_current_pid_tgid() >> 32) || report & REPORT_RANGES)
		send(SEEN_NEEDS_RESCAN, FLAG_NEEDS_RESCAN, 0, 0);
}

static __always_inline void mapped(__u64 at, __u64 length, __u64 protection, __u64 flags)
{
	if ((!(flags & MAP_ANONYMOUS) || flags & MAP_SHARED) && protection & PROT_EXEC)
		may_have_mapped(at, length);
	else if (flags & MAP_FIXED)
		may_have_unmapped(at, length);
}

static __always_inline void protected(__u64 at, __u64 length, __u64 protection)
{
	if (protection & PROT_EXEC)
		may_have_mapped(at, length);
	else
		may_have_unmapped(at, length);
}

/*
 * Without kernel types nothing distinguishes a compat call from one of the same number; what the registers and
 * the result say of the one is hardly ever true of the other (192: mmap2 and lgetxattr, 125: mprotect
 * and capget), and then costs a needless read that process.
 */
SEC("?raw_tp/sys_exit")
int leave_compat(struct bpf_raw_tracepoint_args *context)
{
	const struct registers *from = (const void *)context->args[0];
	__u64 ret = context->args[1], number = 0;
	bool failed = ret > -4096UL;
	bool is_place = !failed && ret && !(ret & PAGE_MASK_LOW);
	/* mprotect may do a part and then fail. */
	bool may_be_done = !failed || ret == -(__u64)ENOMEM || ret == -(__u64)EACCES;
	struct registers regs;
	__u32 first, second, third;

	bpf_probe_read_kernel(&number, sizeof(number), &from->number);
	if (!(number & X32_SYSCALL_BIT) && number != COMPAT_OLD_MMAP && number != COMPAT_MUNMAP &&
	    number != COMPAT_IPC && number != COMPAT_MPROTECT && number != COMPAT_MREMAP && number != COMPAT_MMAP2 &&
	    number != COMPAT_PKEY_MPROTECT && number != COMPAT_SHMAT && number != COMPAT_SHMDT)
		return 0;
	if (bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return 0;
	first = regs.bx;
	second = regs.cx;
	third = regs.dx;
	if (number == COMPAT_MMAP2 && is_place)
		mapped(ret, second, third, regs.si);
	else if (number == COMPAT_OLD_MMAP && is_place)
		may_have_mapped(ret, 1); /* how long it is is in memory; it is read, whatever is found there */
	else if (number == COMPAT_MUNMAP && first)
		may_have_unmapped(first, second);
	else if ((number == COMPAT_MPROTECT || number == COMPAT_PKEY_MPROTECT) && may_be_done && first &&
		 !(first & PAGE_MASK_LOW))
	protected(first, second, third);
	else if (number == COMPAT_SHMAT || (number == COMPAT_IPC && (first & 0xffff) == IPC_SHMAT))
	{
		if (third & SHM_EXEC && !failed)
			may_have_mapped(0, 0);
		else
			may_have_moved();
	}
	else if ((number == COMPAT_MREMAP && is_place) || number == COMPAT_SHMDT ||
		 (number == COMPAT_IPC && (first & 0xffff) == IPC_SHMDT)) may_have_moved();
	else if (number == X32_MMAP && is_place) mapped(ret, regs.si, regs.dx, regs.r10);
	else if (number == X32_MUNMAP) may_have_unmapped(regs.di, regs.si);
	else if ((number == X32_MPROTECT || number == X32_PKEY_MPROTECT) && may_be_done) protected(regs.di, regs.si,
												   regs.dx);
	else if (number == X32_SHMAT && regs.dx & SHM_EXEC && !failed) may_have_mapped(0, 0);
	else if (number == X32_MREMAP || number == X32_SHMDT || number == X32_SHMAT) may_have_moved();
	return 0;
}

#endif
