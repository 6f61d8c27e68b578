// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What passes TLS libraries in the clear, by connection and direction: sowatch http.
 *
 * A call is entered (tls_write*, tls_read*, tls_handshake) and returns (tls_returned). Between the two the thread has an
 * entry in `under_way`: calls within it are of the library itself (AWS-LC and LibreSSL call SSL_read in SSL_read_ex) and
 * report nothing, and the socket that the thread uses meanwhile is the connection's. What counts is what the call says
 * that it has moved: a write that is to be tried again has moved nothing.
 *
 * A function may be left without a return (longjmp, an exception). The stack grows down: an entry whose stack pointer is
 * not above that of a later call is of a call that is over.
 */
#include "tls_taps.h"

#define COUNTERS TLS_COUNTERS
#include "probe.bpf.h"

#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Of one call; set before loading. */
const volatile __u32 capture_bytes = MAX_CAPTURE;
const volatile bool sees_sockets; /* tp_btf/sock_send_length, 6.3+; else sockets are found by their descriptors */

#define MSG_PEEK 2

enum result {
	RESULT_BYTES,   /* the call gives how many */
	RESULT_POINTER, /* the call gives success, and how many through a pointer */
	RESULT_ALL,     /* the call gives 0 once it has moved all of them */
};

/* NSPR reads and writes files and sockets by the functions that TLS has, too: those that encrypt meanwhile are TLS. */
enum proof {
	PROOF_NOT_NEEDED,
	PROOF_NEEDED,
	PROOF_GIVEN,
};

/* A call that a thread is in. */
struct call {
	__u64 stack;
	__u64 pointer;
	__u64 buffer;
	__u64 moved; /* RESULT_POINTER: where the call writes how many bytes it moved; RESULT_ALL: how many */
	__u64 begin_ns;
	__u64 site;
	__u64 thread_start_ns; /* with it and exec_id the number of a thread is one thread's in one program */
	__u64 exec_id;
	__u32 direction;
	__u32 result;
	__u32 proof;
	__u32 vectors;    /* not 0: the buffer is so many struct user_iovec */
	__u32 rest;       /* of the bytes that it moved: are still to be reported */
	__u32 left;       /* of the bytes that may be captured */
	__u64 vector;     /* where the next struct user_iovec is */
	__u64 moves_data; /* a handshake that calls functions which move data, too */
};

/* What of a call is sent. */
struct span {
	__u64 offset;
	__u32 length;
	__u32 skipped;
	__u32 captured;
	__u32 unused;
};

/*
 * Why a socket is the connection's. A handshake calls back into the program, which may use any socket meanwhile: what is
 * used there is believed once a call that moves data uses it, too. Over memory no call uses the connection's.
 */
enum socket_proof {
	SOCKET_OF_HANDSHAKE,
	SOCKET_OF_CALL,
	SOCKET_OF_MEMORY, /* it was sent what the library had encrypted */
};

struct connection {
	__u64 offsets[2]; /* by direction */
	__u64 born_ns;
	__u64 exec_id; /* exec keeps the process and its start; the new program may have an object at the same address */
	__u64 socket;  /* its address in the kernel: shows that it is another one */
	__u16 family;
	__u16 peer_port;
	__u16 local_port;
	__u16 proof; /* enum socket_proof */
	__u8 peer[16];
	__u8 local[16];
};

/* Least recently used ones go: a thread may end inside, an object may never be freed. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct call);
} under_way SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct tls_connection_key);
	__type(value, struct connection);
} connections SEC(".maps");

/*
 * Memory BIOs: what the library has encrypted and the program sends later, by the first bytes of it. They are a record's
 * header and ciphertext, so no two are alike.
 */
#define PREFIX_BYTES 32
#define PREFIX_AGE_NS 1000000000ULL

struct prefix {
	__u32 tgid;
	__u8 bytes[PREFIX_BYTES];
};

/* When the last of them was encrypted: writes of the host are compared only for a while after that. */
__u64 encrypted_ns = 0;

/* Set when nothing more is wanted: detaching may take seconds, and what is counted has to agree with what was taken. */
__u32 is_over = 0;

/* By which object, and in which life of it: it may be gone by the time that the bytes are sent. */
struct encrypted {
	__u64 pointer;
	__u64 born_ns;
	__u64 time_ns;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct prefix);
	__type(value, struct encrypted);
} encrypted SEC(".maps");

/* Threads within a system call that sends such bytes: to which socket, and of which connection they are. */
struct sent {
	__u64 pointer;
	__u64 born_ns;
	__u64 socket;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct sent);
} sending SEC(".maps");

/* Up to which offset user space needs nothing: bytes of a body. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct tls_connection_key);
	__type(value, __u64);
} spare SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} records SEC(".maps");

static __always_inline struct tls_connection_key key_of(__u64 pointer, __u32 direction)
{
	struct tls_connection_key key = {.pointer = pointer, .direction = direction};

	key.tgid = bpf_get_current_pid_tgid() >> 32;
	key.start_ns = process_start();
	return key;
}

static __always_inline __u64 thread_start(void)
{
	return BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), start_boottime);
}

static __always_inline __u64 exec_id_of_current(void)
{
	return BPF_CORE_READ((struct task_struct *)bpf_get_current_task(), self_exec_id);
}

/* The call that this thread is in. A thread that was ended within one leaves its entry to the next of its number. */
static __always_inline struct call *call_of(__u64 thread)
{
	struct call *found = bpf_map_lookup_elem(&under_way, &thread);

	if (!found || found->thread_start_ns != thread_start() || found->exec_id != exec_id_of_current())
		return 0;
	return found;
}

static __always_inline void forget(struct tls_connection_key *key, const struct connection *connection)
{
	__u64 born_ns = connection->born_ns;

	bpf_map_delete_elem(&connections, key);
	key->born_ns = born_ns;
	bpf_map_delete_elem(&spare, key); /* TLS_READ is 0 */
	key->direction = TLS_WRITE;
	bpf_map_delete_elem(&spare, key);
	key->direction = 0;
	key->born_ns = 0;
}

/* With `is_tls` one that is new, too; else only what was TLS before. */
static __always_inline struct connection *connection_of(struct tls_connection_key *key, bool is_tls)
{
	struct connection *found = bpf_map_lookup_elem(&connections, key);
	struct connection none = {.exec_id = exec_id_of_current()};

	if (found) {
		if (found->exec_id == none.exec_id)
			return found;
		forget(key, found);
	}
	if (!is_tls)
		return 0;
	none.born_ns = bpf_ktime_get_ns();
	/* Another thread may be first: then this one finds what that put. */
	bpf_map_update_elem(&connections, key, &none, BPF_NOEXIST);
	return bpf_map_lookup_elem(&connections, key);
}

/* How far above the stack pointer the return address is, as sowatch.uprobes.records.Site has it. */
static __always_inline __s64 stack_bytes(struct pt_regs *context, __s64 without_cookies)
{
	return has_cookies ? (__s32)(bpf_get_attach_cookie(context) >> 32) : without_cookies;
}

static __always_inline int enter(struct pt_regs *context, struct call call)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *outer;

	if (is_over || !is_wanted(thread >> 32))
		return 0;
	call.stack = STACK(context) + stack_bytes(context, 0);
	outer = call_of(thread);
	/* But for GnuTLS no library moves data by its own functions in a handshake: that one was left without a return. */
	if (outer && outer->stack > call.stack &&
	    (outer->direction != TLS_NONE || outer->moves_data || call.direction == TLS_NONE))
		return 0;
	call.pointer = ARGUMENT1(context);
	call.begin_ns = bpf_ktime_get_ns();
	call.site = has_cookies ? (__u32)bpf_get_attach_cookie(context) : 0;
	call.thread_start_ns = thread_start();
	call.exec_id = exec_id_of_current();
	if (bpf_map_update_elem(&under_way, &thread, &call, BPF_ANY)) {
		count(TLS_NO_ROOM);
		count(TLS_PASSED); /* It may have moved some. */
	}
	return 0;
}

#define CALL(...) ((struct call){.buffer = ARGUMENT2(context), __VA_ARGS__})

/* int SSL_write(SSL *, const void *, int); ssize_t gnutls_record_send(session, const void *, size_t) */
SEC("uprobe")
int tls_write(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_WRITE));
}

/* int SSL_write_ex(SSL *, const void *, size_t, size_t *written); SSL_write_early_data */
SEC("uprobe")
int tls_write_ex(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_WRITE, .result = RESULT_POINTER, .moved = ARGUMENT4(context)));
}

/* int SSL_write_ex2(SSL *, const void *, size_t, uint64_t flags, size_t *written) */
SEC("uprobe")
int tls_write_ex2(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_WRITE, .result = RESULT_POINTER, .moved = ARGUMENT5(context)));
}

/* ssize_t gnutls_record_send_early_data(session, const void *, size_t): 0 is success */
SEC("uprobe")
int tls_write_all(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_WRITE, .result = RESULT_ALL, .moved = ARGUMENT3(context)));
}

/* int SSL_read(SSL *, void *, int); ssize_t gnutls_record_recv(session, void *, size_t) */
SEC("uprobe")
int tls_read(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_READ));
}

/* int SSL_read_ex(SSL *, void *, size_t, size_t *readbytes); SSL_read_early_data */
SEC("uprobe")
int tls_read_ex(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_READ, .result = RESULT_POINTER, .moved = ARGUMENT4(context)));
}

/* ssize_t gnutls_record_recv_packet(session, gnutls_packet_t *): how many bytes is known, where they are is not */
SEC("uprobe")
int tls_read_unseen(struct pt_regs *context)
{
	return enter(context, (struct call){.direction = TLS_READ});
}

/* int32_t PR_Write(PRFileDesc *, const void *, int32_t); PR_Send has flags and a timeout behind it */
SEC("uprobe")
int tls_nspr_write(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_WRITE, .proof = PROOF_NEEDED));
}

/* int32_t PR_Writev(PRFileDesc *, const PRIOVec *, int32_t, PRIntervalTime) */
SEC("uprobe")
int tls_nspr_writev(struct pt_regs *context)
{
	return enter(context,
		     CALL(.direction = TLS_WRITE, .proof = PROOF_NEEDED, .vectors = (__u32)ARGUMENT3(context)));
}

/* int32_t PR_Read(PRFileDesc *, void *, int32_t) */
SEC("uprobe")
int tls_nspr_read(struct pt_regs *context)
{
	return enter(context, CALL(.direction = TLS_READ, .proof = PROOF_NEEDED));
}

/* int32_t PR_Recv(PRFileDesc *, void *, int32_t, int flags, PRIntervalTime) */
SEC("uprobe")
int tls_nspr_recv(struct pt_regs *context)
{
	__u32 direction = (__u32)ARGUMENT4(context) & MSG_PEEK ? TLS_NONE : TLS_READ;

	return enter(context, CALL(.direction = direction, .proof = PROOF_NEEDED));
}

/* PK11_AEADOp and others: NSS encrypts or decrypts */
SEC("uprobe")
int tls_nss_encrypts(struct pt_regs *context)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *call = call_of(thread);

	if (call && call->proof == PROOF_NEEDED)
		call->proof = PROOF_GIVEN;
	return 0;
}

/* A call that moves no data; SSL_peek, too: what it reads comes once more. */
SEC("uprobe")
int tls_handshake(struct pt_regs *context)
{
	return enter(context, (struct call){.direction = TLS_NONE});
}

/* int gnutls_handshake(session): sends early data by gnutls_record_send; its bytes were taken when they were handed over */
SEC("uprobe")
int tls_gnutls_handshake(struct pt_regs *context)
{
	return enter(context, (struct call){.direction = TLS_NONE, .moves_data = 1});
}

static __always_inline __u64 bytes_moved(const struct call *call, __s64 given)
{
	__u64 moved = 0;

	if (call->direction == TLS_NONE)
		return 0;
	if (call->result == RESULT_BYTES)
		return given > 0 && given < 1LL << 31 ? given : 0;
	if (call->result == RESULT_ALL)
		return !given && call->moved < 1ULL << 31 ? call->moved : 0;
	if (given <= 0 || bpf_probe_read_user(&moved, sizeof(moved), (void *)call->moved))
		return 0;
	return moved < 1ULL << 31 ? moved : 0;
}

static __always_inline void fill(struct tls_record *record, const struct tls_connection_key *key,
				 const struct connection *connection)
{
	record->pointer = key->pointer;
	record->start_ns = key->start_ns;
	record->born_ns = connection->born_ns;
	record->tgid = key->tgid;
	record->tid = bpf_get_current_pid_tgid();
	record->family = connection->proof == SOCKET_OF_HANDSHAKE ? 0 : connection->family;
	record->peer_port = connection->peer_port;
	record->local_port = connection->local_port;
	__builtin_memcpy(record->peer, connection->peer, sizeof(record->peer));
	__builtin_memcpy(record->local, connection->local, sizeof(record->local));
}

/* Sends one call with space for that many bytes: the size of a reservation is a constant. */
#define SEND(room)                                                                                                   \
	static __noinline int send_##room(const struct tls_connection_key *key, const struct connection *connection, \
					  const struct call *call, struct span *span)                                \
	{                                                                                                            \
		struct tls_record *record;                                                                           \
		__u32 captured;                                                                                      \
                                                                                                                     \
		if (!key || !connection || !call || !span)                                                           \
			return 0;                                                                                    \
		record = bpf_ringbuf_reserve(&records, sizeof(*record) + (room), 0);                                 \
		if (!record) {                                                                                       \
			count(TLS_LOST);                                                                             \
			return 0;                                                                                    \
		}                                                                                                    \
		fill(record, key, connection);                                                                       \
		record->kind = TLS_DATA;                                                                             \
		record->direction = call->direction;                                                                 \
		record->site = call->site;                                                                           \
		record->begin_ns = call->begin_ns;                                                                   \
		record->end_ns = bpf_ktime_get_ns();                                                                 \
		record->offset = span->offset;                                                                       \
		record->length = span->length;                                                                       \
		record->skipped = span->skipped;                                                                     \
		captured = span->captured;                                                                           \
		if (captured > (room))                                                                               \
			captured = (room);                                                                           \
		if (captured &&                                                                                      \
		    bpf_probe_read_user(record->bytes, captured, (void *)(call->buffer + span->skipped))) {          \
			count(TLS_UNREADABLE);                                                                       \
			captured = 0;                                                                                \
		}                                                                                                    \
		record->captured = captured;                                                                         \
		bpf_ringbuf_submit(record, 0);                                                                       \
		return 0;                                                                                            \
	}

SEND(256)
SEND(1024)
SEND(4096)
SEND(16384)

/* Reports bytes at the beginning of the buffer of a call, without those that user space needs not see. */
static __always_inline int report(struct call *call, __u32 length)
{
	struct tls_connection_key key = key_of(call->pointer, 0);
	struct connection *connection = connection_of(&key, call->proof != PROOF_NEEDED);
	struct span span = {.length = length};
	__u64 *spared;

	if (is_over || (!connection && call->proof == PROOF_NEEDED))
		return 0;
	count(TLS_PASSED);
	if (!connection) {
		count(TLS_NO_ROOM);
		return 0;
	}
	/* Calls of one direction of one connection come one after the other: the libraries want that. */
	span.offset = connection->offsets[call->direction & 1];
	connection->offsets[call->direction & 1] = span.offset + length;
	key.direction = call->direction;
	key.born_ns = connection->born_ns;
	spared = bpf_map_lookup_elem(&spare, &key);
	if (spared && *spared > span.offset) {
		if (*spared > span.offset + length) {
			count(TLS_SPARED);
			return 0;
		}
		span.skipped = *spared - span.offset;
	}
	span.captured = span.length - span.skipped;
	if (span.captured > PIECE_BYTES)
		span.captured = PIECE_BYTES;
	if (span.captured > call->left)
		span.captured = call->left;
	call->left -= span.captured;
	if (span.captured <= 256)
		send_256(&key, connection, call, &span);
	else if (span.captured <= 1024)
		send_1024(&key, connection, call, &span);
	else if (span.captured <= 4096)
		send_4096(&key, connection, call, &span);
	else
		send_16384(&key, connection, call, &span);
	return 0;
}

struct user_iovec {
	const void *base;
	__u64 length;
};

/*
 * Programs write any number of bytes by one call, and the frames of HTTP/2 and the chunks of HTTP/1 stand anywhere in
 * them. So calls are sent in pieces: of PR_Writev each of its buffers (at most 16, PR_MAX_IOVECTOR_SIZE), of others as
 * many bytes as one record has; the last has the rest.
 */
#define MAX_PIECES 24

/*
 * Reports the next piece of the call that this thread is in; 0: there is none. Not static, and it finds the call by
 * itself: so the verifier takes it once, not for each piece (before 5.13 such a function can be given numbers only).
 */
__noinline int report_piece(__u32 number)
{
	__u64 thread = bpf_get_current_pid_tgid();
	struct call *call = bpf_map_lookup_elem(&under_way, &thread);
	struct user_iovec vector;
	__u32 piece;

	if (!call || !call->rest)
		return 0;
	piece = call->rest;
	if (number < call->vectors) {
		/* PRIOVec: a pointer and an int. Where they cannot be read, the bytes cannot be, either. */
		if (bpf_probe_read_user(&vector, sizeof(vector), (void *)call->vector))
			vector = (struct user_iovec){.length = piece};
		call->vector += sizeof(vector);
		call->buffer = (__u64)vector.base;
		if (piece > (__u32)vector.length)
			piece = vector.length;
	} else if (piece > PIECE_BYTES && number < MAX_PIECES - 1) {
		piece = PIECE_BYTES;
	}
	if (piece)
		report(call, piece);
	call->buffer += piece;
	call->rest -= piece;
	return 1;
}

SEC("uretprobe")
int tls_returned(struct pt_regs *context)
{
	__u64 thread = bpf_get_current_pid_tgid();
	/* x86 has popped the return address by now, if the return is seen by a return probe. */
	__u64 stack = STACK(context) + stack_bytes(context, -RETURN_ADDRESS_BYTES);
	struct call *call = call_of(thread);

	if (!call || call->stack != stack)
		return 0;
	call->rest = bytes_moved(call, RESULT(context));
	call->left = capture_bytes;
	call->vector = call->buffer;
	for (__u32 number = 0; number < MAX_PIECES; number++) {
		if (!report_piece(number))
			break;
	}
	bpf_map_delete_elem(&under_way, &thread);
	return 0;
}

static __always_inline void send_end(const struct tls_connection_key *key, const struct connection *connection,
				     __u8 kind)
{
	struct tls_record *record = bpf_ringbuf_reserve(&records, sizeof(*record), 0);

	if (!record) {
		count(TLS_LOST_ENDS);
		return;
	}
	__builtin_memset(record, 0, sizeof(*record));
	fill(record, key, connection);
	record->kind = kind;
	record->begin_ns = record->end_ns = bpf_ktime_get_ns();
	bpf_ringbuf_submit(record, 0);
}

static __always_inline int end(struct tls_connection_key *key, const struct connection *connection)
{
	send_end(key, connection, TLS_END);
	forget(key, connection);
	return 0;
}

/* int SSL_shutdown(SSL *); int gnutls_bye(session, how): nothing is written any more, but what the peer sends is read */
SEC("uprobe")
int tls_shut(struct pt_regs *context)
{
	struct tls_connection_key key = key_of(ARGUMENT1(context), 0);
	struct connection *connection = bpf_map_lookup_elem(&connections, &key);

	if (connection)
		send_end(&key, connection, TLS_SHUT);
	return 0;
}

/* void SSL_free(SSL *); int SSL_clear(SSL *); PR_Close(PRFileDesc *) */
SEC("uprobe")
int tls_end(struct pt_regs *context)
{
	struct tls_connection_key key = key_of(ARGUMENT1(context), 0);
	struct connection *connection = bpf_map_lookup_elem(&connections, &key);

	return connection ? end(&key, connection) : 0;
}

/*
 * int SSL_set_fd(SSL *, int); SSL_set_bio; gnutls_transport_set_int2: the object is a new connection's, unless nothing but
 * early data was written to it, which waits for the socket.
 */
SEC("uprobe")
int tls_transport(struct pt_regs *context)
{
	struct tls_connection_key key = key_of(ARGUMENT1(context), 0);
	struct connection *connection = bpf_map_lookup_elem(&connections, &key);

	if (!connection || (!connection->socket && !connection->offsets[TLS_READ]))
		return 0;
	return end(&key, connection);
}

#include "tls_sockets.bpf.h"
