// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Which process has which file mapped executable: the hooks.
 *
 * The story: a call enters; if it may change an executable mapping of a file that user space has
 * not answered to ignore, we note it (pending_calls) and track its process (processes). When it
 * leaves and has succeeded, we report it (calls.bpf.h). Fork, exec and exit keep `processes` true
 * (processes.bpf.h). The iterator reads what there is: all of it at the start and after a loss,
 * one process that needs a rescan (reader.bpf.h).
 *
 * A process with a single-user mm gives authoritative records, by which user space changes its map as
 * they stand. Where other threads may interfere the record is tentative and the process needs a rescan: one
 * record carries FLAG_NEEDS_RESCAN, user space clears the bit by starting a
 * scan, and what happens later sets it again. docs/decisions/0002-facts-and-claims.md.
 *
 * Why at the exit of a call and not at its entry: a record is true once the call has succeeded and
 * nobody else can have changed it in between; a tentative record only has to come after the change, so that
 * the scan after it sees the change.
 *
 * Two sets of hooks, of which user space loads one: syscall tracepoints, which every kernel has
 * and every system call pays for, and trampolines on the system calls' own functions, which cost
 * the others nothing. docs/decisions/0009-trampolines.md.
 */
#include "compat.bpf.h"
#include "processes.bpf.h"
#include "reader.bpf.h"
#ifdef OLD_KERNEL
#include "lookup.bpf.h"
#endif

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* ---- hook set syscall ------------------------------------------------------------------------- */

SEC("?tp/syscalls/sys_enter_mmap")
int tp_mmap(struct syscall_enter *context)
{
	return enter_mmap(context->args[0], context->args[1], context->args[2], context->args[3], context->args[4],
			  context->args[5]);
}

SEC("?tp/syscalls/sys_enter_munmap")
int tp_munmap(struct syscall_enter *context)
{
	return enter_munmap(context->args[0], context->args[1]);
}

/* Also on pkey_mprotect, whose key comes after the arguments that matter. */
SEC("?tp/syscalls/sys_enter_mprotect")
int tp_mprotect(struct syscall_enter *context)
{
	return enter_mprotect(context->args[0], context->args[1], context->args[2]);
}

SEC("?tp/syscalls/sys_enter_mremap")
int tp_mremap(struct syscall_enter *context)
{
	return enter_mremap(context->args[0], context->args[1], context->args[2], context->args[3], context->args[4]);
}

SEC("?tp/syscalls/sys_enter_shmat")
int tp_shmat(struct syscall_enter *context)
{
	return enter_shmat(context->args[2]);
}

SEC("?tp/syscalls/sys_enter_shmdt")
int tp_shmdt(struct syscall_enter *context)
{
	return enter_shmdt(context->args[0]);
}

/* One program on the exits of all of them. */
SEC("?tp/syscalls/sys_exit_mmap")
int tp_leave(struct syscall_exit *context)
{
	return leave_call(context->ret, ANY_CALL);
}

/* ---- hook set trampoline ---------------------------------------------------------------------- */

SEC("?fentry/" SYSCALL_FUNCTION "mmap")
int BPF_PROG(fentry_mmap, const struct pt_regs *regs)
{
	return enter_mmap(ARGUMENT(regs, 0), ARGUMENT(regs, 1), ARGUMENT(regs, 2), ARGUMENT(regs, 3), ARGUMENT(regs, 4),
			  ARGUMENT(regs, 5));
}

SEC("?fexit/" SYSCALL_FUNCTION "mmap")
int BPF_PROG(fexit_mmap, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_MAP | PENDING_UNMAP | PENDING_REREAD);
}

SEC("?fentry/" SYSCALL_FUNCTION "munmap")
int BPF_PROG(fentry_munmap, const struct pt_regs *regs)
{
	return enter_munmap(ARGUMENT(regs, 0), ARGUMENT(regs, 1));
}

SEC("?fexit/" SYSCALL_FUNCTION "munmap")
int BPF_PROG(fexit_munmap, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_UNMAP);
}

SEC("?fentry/" SYSCALL_FUNCTION "mprotect")
int BPF_PROG(fentry_mprotect, const struct pt_regs *regs)
{
	return enter_mprotect(ARGUMENT(regs, 0), ARGUMENT(regs, 1), ARGUMENT(regs, 2));
}

SEC("?fexit/" SYSCALL_FUNCTION "mprotect")
int BPF_PROG(fexit_mprotect, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_MPROTECT_EXEC | PENDING_UNMAP);
}

SEC("?fentry/" SYSCALL_FUNCTION "pkey_mprotect")
int BPF_PROG(fentry_pkey_mprotect, const struct pt_regs *regs)
{
	return enter_mprotect(ARGUMENT(regs, 0), ARGUMENT(regs, 1), ARGUMENT(regs, 2));
}

SEC("?fexit/" SYSCALL_FUNCTION "pkey_mprotect")
int BPF_PROG(fexit_pkey_mprotect, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_MPROTECT_EXEC | PENDING_UNMAP);
}

SEC("?fentry/" SYSCALL_FUNCTION "mremap")
int BPF_PROG(fentry_mremap, const struct pt_regs *regs)
{
	return enter_mremap(ARGUMENT(regs, 0), ARGUMENT(regs, 1), ARGUMENT(regs, 2), ARGUMENT(regs, 3),
			    ARGUMENT(regs, 4));
}

SEC("?fexit/" SYSCALL_FUNCTION "mremap")
int BPF_PROG(fexit_mremap, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_REREAD);
}

SEC("?fentry/" SYSCALL_FUNCTION "shmat")
int BPF_PROG(fentry_shmat, const struct pt_regs *regs)
{
	return enter_shmat(ARGUMENT(regs, 2));
}

SEC("?fexit/" SYSCALL_FUNCTION "shmat")
int BPF_PROG(fexit_shmat, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_REREAD);
}

SEC("?fentry/" SYSCALL_FUNCTION "shmdt")
int BPF_PROG(fentry_shmdt, const struct pt_regs *regs)
{
	return enter_shmdt(ARGUMENT(regs, 0));
}

SEC("?fexit/" SYSCALL_FUNCTION "shmdt")
int BPF_PROG(fexit_shmdt, const struct pt_regs *regs, long ret)
{
	return leave_call(ret, PENDING_REREAD);
}
