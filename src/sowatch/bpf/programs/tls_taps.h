/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What tls_taps.bpf.c reports, as user space reads it; sowatch.http.records has the same layouts. */
#pragma once

#include <linux/types.h>

/* A record of the ring has at most so many bytes, as one of TLS. */
#define PIECE_BYTES 16384
/* Of one call; what it moves beyond them is counted and not sent. */
#define MAX_CAPTURE (16 * PIECE_BYTES)

enum tls_kind {
	TLS_DATA = 1, /* bytes passed */
	TLS_END = 2,  /* the connection's object was freed, or given another socket */
	TLS_SHUT = 3, /* nothing is written any more */
};

enum tls_direction {
	TLS_READ,
	TLS_WRITE,
	TLS_NONE, /* a handshake: moves no data, but its socket is the connection's */
};

enum tls_counter {
	TLS_LOST,       /* calls that did not fit into the ring */
	TLS_UNREADABLE, /* calls whose buffer could not be read */
	TLS_SPARED,     /* calls of which user space needed nothing */
	TLS_NO_ROOM,    /* calls without an entry in a map */
	TLS_LOST_ENDS,  /* ends of connections that did not fit into the ring */
	TLS_PASSED,     /* calls that moved bytes: each is sent, or counted as lost, spared, or without an entry */
	TLS_COUNTERS,
};

/* 32 bytes */
struct tls_connection_key {
	__u64 pointer;  /* of the SSL object, the session, the PRFileDesc */
	__u64 start_ns; /* of the process */
	__u32 tgid;
	/* Of `spare` only: what user space puts there may come once the pointer is another connection's. */
	__u32 direction;
	__u64 born_ns;
};

/* 120 bytes, then the captured bytes */
struct tls_record {
	__u64 pointer;
	__u64 start_ns;
	__u64 site; /* attach cookie of the probe that saw it; 0 where the kernel has none */
	__u64 begin_ns;
	__u64 end_ns;
	__u64 offset;  /* bytes of this direction that passed before */
	__u64 born_ns; /* when the connection was first seen: a pointer is used again */
	__u32 tgid;
	__u32 tid;
	__u32 length;   /* that the call moved */
	__u32 skipped;  /* of those, at the beginning, not captured */
	__u32 captured; /* that follow */
	__u8 kind;
	__u8 direction;
	__u16 family;    /* of the socket; 0: not seen */
	__u16 peer_port; /* in host order */
	__u16 local_port;
	__u32 unused;
	__u8 peer[16]; /* the first four for AF_INET */
	__u8 local[16];
	char bytes[];
};

_Static_assert(sizeof(struct tls_connection_key) == 32, "sowatch.http.records.CONNECTION");
_Static_assert(sizeof(struct tls_record) == 120, "sowatch.http.records.HEAD");
