/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The registers at a probe: arguments of a C function, its result, the stack, its caller. System V and AAPCS64. */
#pragma once

#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#if defined(__TARGET_ARCH_x86)

struct pt_regs {
	unsigned long di, si, dx, cx, r8, r9, ax, sp;
} __attribute__((preserve_access_index));

#define ARGUMENT1(context) ((context)->di)
#define ARGUMENT2(context) ((context)->si)
#define ARGUMENT3(context) ((context)->dx)
#define ARGUMENT4(context) ((context)->cx)
#define ARGUMENT5(context) ((context)->r8)
#define ARGUMENT6(context) ((context)->r9)
#define RESULT(context) ((context)->ax)
#define RETURN_ADDRESS_BYTES 8 /* of the stack that a return takes */

/* Where a call returns to: at an entry it is on top of the stack. */
static __always_inline __u64 caller_of(struct pt_regs *context)
{
	__u64 address = 0;

	bpf_probe_read_user(&address, sizeof(address), (void *)context->sp);
	return address;
}

#elif defined(__TARGET_ARCH_arm64)

struct pt_regs {
	__u64 regs[31];
	__u64 sp;
} __attribute__((preserve_access_index));

#define ARGUMENT1(context) ((context)->regs[0])
#define ARGUMENT2(context) ((context)->regs[1])
#define ARGUMENT3(context) ((context)->regs[2])
#define ARGUMENT4(context) ((context)->regs[3])
#define ARGUMENT5(context) ((context)->regs[4])
#define ARGUMENT6(context) ((context)->regs[5])
#define RESULT(context) ((context)->regs[0])
#define RETURN_ADDRESS_BYTES 0

static __always_inline __u64 caller_of(struct pt_regs *context)
{
	return context->regs[30];
}

#endif

#define STACK(context) ((context)->sp)
