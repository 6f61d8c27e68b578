/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whose socket a connection has: the one that its thread uses within a call, seen by the tracepoints of sockets (6.3+) or by
 * the descriptors of system calls; or the one that what was encrypted into memory is sent to. The last part of
 * tls_taps.bpf.c, with whose maps it works.
 */
#pragma once

#define AF_INET 2
#define AF_INET6 10
#define S_IFMT 00170000
#define S_IFSOCK 0140000

struct in6_addr {
	__u8 bytes[16];
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
} __attribute__((preserve_access_index));

/* From a descriptor to its socket; the names and types are those of the kernel. */
struct inode {
	unsigned short i_mode;
} __attribute__((preserve_access_index));

struct file {
	struct inode *f_inode;
	void *private_data;
} __attribute__((preserve_access_index));

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
} __attribute__((preserve_access_index));

struct files_struct {
	struct fdtable *fdt;
} __attribute__((preserve_access_index));

struct socket {
	struct sock *sk;
} __attribute__((preserve_access_index));

/* Whether these bytes begin a TLS record (RFC 8446, section 5.1): types 20 to 23, and a version that begins with 3. */
static __always_inline bool begins_record(const struct prefix *prefix)
{
	return prefix->bytes[0] >= 20 && prefix->bytes[0] <= 23 && prefix->bytes[1] == 3;
}

/* int BIO_write(BIO *, const void *, int), by the library itself: within one of its calls */
SEC("uprobe")
int tls_bio_write(struct pt_regs *context)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *call = call_of(thread);
	struct encrypted value = {};
	struct connection *connection;
	struct tls_connection_key key;
	struct prefix prefix = {};

	if (!call || (__s32)ARGUMENT3(context) < PREFIX_BYTES)
		return 0;
	key = key_of(call->pointer, 0);
	connection = connection_of(&key, call->proof != PROOF_NEEDED);
	if (!connection || connection->proof != SOCKET_OF_HANDSHAKE)
		return 0;
	if (bpf_probe_read_user(prefix.bytes, PREFIX_BYTES, (void *)ARGUMENT2(context)) || !begins_record(&prefix))
		return 0;
	prefix.tgid = key.tgid;
	value.pointer = call->pointer;
	value.born_ns = connection->born_ns;
	value.time_ns = bpf_ktime_get_ns();
	bpf_map_update_elem(&encrypted, &prefix, &value, BPF_ANY);
	encrypted_ns = value.time_ns;
	return 0;
}

/* A system call of a tracepoint syscalls/sys_enter_*, as its format file has it. */
struct system_call {
	__u64 head;
	__s64 number;
	__u64 arguments[6];
};

/* The socket is that of the connection from now on. One that is not connected has no other end. */
static __always_inline int note_peer(struct connection *connection, struct sock *socket, enum socket_proof proof)
{
	__u16 family, port;

	if (!connection || connection->proof > proof)
		return 0;
	if (connection->socket == (__u64)socket) {
		if (connection->proof < proof)
			connection->proof = proof;
		return 0;
	}
	family = BPF_CORE_READ(socket, __sk_common.skc_family);
	port = BPF_CORE_READ(socket, __sk_common.skc_dport);
	if (!port)
		return 0;
	if (family == AF_INET) {
		*(__u32 *)connection->peer = BPF_CORE_READ(socket, __sk_common.skc_daddr);
		*(__u32 *)connection->local = BPF_CORE_READ(socket, __sk_common.skc_rcv_saddr);
	} else if (family == AF_INET6) {
		BPF_CORE_READ_INTO(&connection->peer, socket, __sk_common.skc_v6_daddr);
		BPF_CORE_READ_INTO(&connection->local, socket, __sk_common.skc_v6_rcv_saddr);
	} else {
		return 0;
	}
	connection->peer_port = __builtin_bswap16(port);
	connection->local_port = BPF_CORE_READ(socket, __sk_common.skc_num);
	connection->family = family;
	connection->socket = (__u64)socket;
	connection->proof = proof;
	return 0;
}

/* A thread within a call uses a socket. */
static __always_inline int note_use(const struct call *call, struct sock *socket)
{
	struct tls_connection_key key = key_of(call->pointer, 0);
	struct connection *connection = connection_of(&key, call->proof != PROOF_NEEDED);

	return note_peer(connection, socket, call->direction == TLS_NONE ? SOCKET_OF_HANDSHAKE : SOCKET_OF_CALL);
}

/* What a connection encrypted is sent to a socket. */
static __always_inline int note_sent(const struct sent *sent, struct sock *socket, enum socket_proof proof)
{
	struct tls_connection_key key = key_of(sent->pointer, 0);
	struct connection *connection = connection_of(&key, false);

	if (!connection || connection->born_ns != sent->born_ns)
		return 0;
	return note_peer(connection, socket, proof);
}

/* The socket that a descriptor of this process stands for at this moment; 0: it is none. */
static __always_inline struct sock *socket_of(__u64 descriptor)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file *file = 0, **files;
	struct socket *socket;

	if ((__u32)descriptor >= BPF_CORE_READ(table, max_fds))
		return 0;
	files = BPF_CORE_READ(table, fd);
	if (bpf_probe_read_kernel(&file, sizeof(file), files + (__u32)descriptor) || !file)
		return 0;
	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

/* read, write, recv*, send*, readv, writev: before 6.3, the descriptor that a thread uses within a call */
SEC("tracepoint")
int tls_uses_descriptor(struct system_call *context)
{
	struct call *call = call_of(bpf_get_current_pid_tgid());
	struct sock *socket;

	if (!call)
		return 0;
	socket = socket_of(context->arguments[0]);
	return socket ? note_use(call, socket) : 0;
}

static __always_inline int note_sending(__u64 descriptor, const void *buffer, __u64 length)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct prefix prefix = {};
	struct encrypted *found;
	struct sent sent = {};
	struct sock *socket;

	if (length < PREFIX_BYTES || bpf_ktime_get_ns() - encrypted_ns > PREFIX_AGE_NS)
		return 0;
	if (bpf_probe_read_user(prefix.bytes, PREFIX_BYTES, buffer) || !begins_record(&prefix))
		return 0;
	prefix.tgid = thread >> 32;
	found = bpf_map_lookup_elem(&encrypted, &prefix);
	if (!found || bpf_ktime_get_ns() - found->time_ns >= PREFIX_AGE_NS)
		return 0;
	/* Into a pipe: who sends it on is not known. */
	socket = socket_of(descriptor);
	if (!socket)
		return 0;
	sent.pointer = found->pointer;
	sent.born_ns = found->born_ns;
	/* Within a call the library sends by itself: the handshake, mostly. */
	if (call_of(thread))
		return note_sent(&sent, socket, SOCKET_OF_CALL);
	if (!sees_sockets)
		return note_sent(&sent, socket, SOCKET_OF_MEMORY);
	/* It is compared with what the system call uses in the end: another thread may exchange the descriptor. */
	sent.socket = (__u64)socket;
	bpf_map_update_elem(&sending, &thread, &sent, BPF_ANY);
	return 0;
}

static __always_inline int note_sending_vector(__u64 descriptor, const void *vector)
{
	struct user_iovec first;

	if (bpf_probe_read_user(&first, sizeof(first), vector))
		return 0;
	return note_sending(descriptor, first.base, first.length);
}

/* write(fd, buffer, length) and sendto(fd, buffer, length, ...) */
SEC("tracepoint")
int tls_sends_buffer(struct system_call *context)
{
	return note_sending(context->arguments[0], (void *)context->arguments[1], context->arguments[2]);
}

/* writev(fd, vector, count) */
SEC("tracepoint")
int tls_sends_vector(struct system_call *context)
{
	return note_sending_vector(context->arguments[0], (void *)context->arguments[1]);
}

/* sendmsg(fd, struct user_msghdr *, flags): name, its length, vector */
SEC("tracepoint")
int tls_sends_message(struct system_call *context)
{
	const void *vector;

	if (bpf_probe_read_user(&vector, sizeof(vector), (void *)(context->arguments[1] + 16)))
		return 0;
	return note_sending_vector(context->arguments[0], vector);
}

/* The socket that a thread uses within a call is the connection's; so is the one that sends what the call encrypted. */
static __always_inline int note_socket(struct sock *socket, int result, int flags)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *call = call_of(thread);
	struct sent *found, sent;

	if (call) {
		struct pt_regs *registers = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());

		/* A call that was left without a return: what the thread does above its stack is not of it. */
		if (STACK(registers) > call->stack || result <= 0 || flags & MSG_PEEK)
			return 0;
		return note_use(call, socket);
	}
	found = bpf_map_lookup_elem(&sending, &thread);
	if (!found)
		return 0;
	sent = *found;
	bpf_map_delete_elem(&sending, &thread);
	if (result <= 0 || sent.socket != (__u64)socket)
		return 0;
	return note_sent(&sent, socket, SOCKET_OF_MEMORY);
}

SEC("tp_btf/sock_send_length")
int BPF_PROG(tls_socket_sent, struct sock *socket, int result, int flags)
{
	return note_socket(socket, result, flags);
}

SEC("tp_btf/sock_recv_length")
int BPF_PROG(tls_socket_received, struct sock *socket, int result, int flags)
{
	return note_socket(socket, result, flags);
}
