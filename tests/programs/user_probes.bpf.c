// SPDX-License-Identifier: Apache-2.0
/* What a user brings: programs that say by section or name where they go, a ring, a counter, a constant. */
#include <linux/bpf.h>
#include <linux/ptrace.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

const volatile __u32 add;

struct event {
	__u64 cookie;
	__u32 tgid;
	__u32 argument;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, __u64);
} returns SEC(".maps");

SEC("uprobe/plain")
int by_section(struct pt_regs *context)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event)
		return 0;
	event->cookie = bpf_get_attach_cookie(context);
	event->tgid = bpf_get_current_pid_tgid() >> 32;
	event->argument = (__u32)PT_REGS_PARM1(context) + add;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEC("uretprobe")
int uretprobe__nested(struct pt_regs *context)
{
	__u32 key = (__u32)PT_REGS_RC(context);
	__u64 one = 1, *count = bpf_map_lookup_elem(&returns, &key);

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&returns, &key, &one, BPF_ANY);
	return 0;
}
