// SPDX-License-Identifier: Apache-2.0
/* A program that the verifier refuses: it reads through a pointer that may be null. */
#include <linux/bpf.h>
#include <linux/ptrace.h>

#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} numbers SEC(".maps");

SEC("uprobe/plain")
int unchecked(struct pt_regs *context)
{
	__u32 key = 0;
	__u64 *number = bpf_map_lookup_elem(&numbers, &key);

	(void)context;
	return (int)*number;
}
