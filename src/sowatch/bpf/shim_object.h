/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the shim share: the object behind the handle. */
#pragma once

#include "shim.h"

#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <stddef.h>

/* Enough for the links of every program of our own; sow_attach refuses more. Uprobes have links of their own. */
#define MAX_LINKS 64
#define MAX_SECTIONS 4

struct sow_object {
	struct bpf_object *object;
	struct bpf_link *links[MAX_LINKS];
	unsigned int link_count;
	/* A BPF_MAP_TYPE_PERF_EVENT_ARRAY that holds the perf events of links as well; 0: none. See keep_event. */
	int events_fd;
	unsigned int event_count;
	struct {
		int fd;
		char *memory;
		size_t bytes;
	} sections[MAX_SECTIONS];
	unsigned int section_count;
	struct sow_record_ring *ring;
	int ring_fd; /* the map's, which polls readable while there is something */
	char *btf_path;
	struct btf *kernel_btf; /* parsed when it is first asked for */
};

/* The ring of records. NULL with errno. */
struct sow_record_ring *sow_record_ring_new(int fd);
void sow_record_ring_free(struct sow_record_ring *ring);
int sow_record_ring_drain(struct sow_record_ring *ring, char *buffer, unsigned int capacity);

/* A global variable's place in its data section, NULL if there is none. */
const struct btf_var_secinfo *sow_find_variable(const struct btf *btf, const char *section, const char *name);
