/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What every program on a function costs at least. */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("uprobe")
int entered(void *context)
{
	return 0;
}

SEC("uretprobe")
int returned(void *context)
{
	return 0;
}
