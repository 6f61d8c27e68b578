// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs that do nothing: whether they load and attach shows what this kernel can do. */
#include "kernel_types.h"

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("fentry/" SYSCALL_FUNCTION "munmap")
int trampoline(void *context)
{
	return 0;
}

SEC("tp_btf/sched_process_fork")
int typed_tracepoint(void *context)
{
	return 0;
}

SEC("iter/task_vma")
int mapping_iterator(struct bpf_iter__task_vma *context)
{
	return 0;
}

__u64 self_test_runs;

/* On a function of our own that does nothing: sowatch/uprobes/self_test.py. */
SEC("?uprobe")
int self_test(void *context)
{
	__sync_fetch_and_add(&self_test_runs, 1);
	return 0;
}
