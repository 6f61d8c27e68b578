// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs that do nothing, on the hooks that sowatch uses for mappings: what they cost is what
 * any program there must cost. */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#define EMPTY(hook)                       \
	SEC("tracepoint/syscalls/" #hook) \
	int hook(void *context)           \
	{                                 \
		(void)context;            \
		return 0;                 \
	}

EMPTY(sys_enter_mmap)
EMPTY(sys_exit_mmap)
EMPTY(sys_enter_munmap)
EMPTY(sys_exit_munmap)

char LICENSE[] SEC("license") = "Dual BSD/GPL";
