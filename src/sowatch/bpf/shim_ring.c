// SPDX-License-Identifier: Apache-2.0
/*
 * Reads the ring of records through a window. libbpf maps all of it, and that twice, so that a record that goes on at its
 * beginning is in one piece: of a ring of 8 MiB these are 16 MiB of the resident memory of the process. A window needs
 * one remap for each MiB of records.
 */
#include "shim_object.h"

#include <bpf/bpf.h>
#include <errno.h>
#include <linux/bpf.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The largest record: records.h's longest, with its text. */
#define MAX_RECORD_BYTES 8192
#define WINDOW_BYTES (1UL << 20)

struct sow_record_ring {
	int fd;
	unsigned long page, size; /* of a page, of the ring */
	unsigned long *consumed;  /* written by us, read by the kernel */
	unsigned long *produced;
	char *window;
	unsigned long from, bytes; /* what of the ring the window shows */
};

static void unmap(void *memory, unsigned long bytes)
{
	if (memory && memory != MAP_FAILED)
		munmap(memory, bytes);
}

void sow_record_ring_free(struct sow_record_ring *ring)
{
	if (!ring)
		return;
	unmap(ring->consumed, ring->page);
	unmap(ring->produced, ring->page);
	unmap(ring->window, ring->bytes);
	free(ring);
}

struct sow_record_ring *sow_record_ring_new(int fd)
{
	struct sow_record_ring *ring;
	struct bpf_map_info info = {0};
	unsigned int size = sizeof(info);

	if (bpf_obj_get_info_by_fd(fd, &info, &size))
		return NULL;
	ring = calloc(1, sizeof(*ring));
	if (!ring)
		return NULL;
	ring->fd = fd;
	ring->size = info.max_entries;
	ring->page = sysconf(_SC_PAGESIZE);
	ring->consumed = mmap(NULL, ring->page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ring->produced = mmap(NULL, ring->page, PROT_READ, MAP_SHARED, fd, ring->page);
	if (ring->consumed == MAP_FAILED || ring->produced == MAP_FAILED) {
		int error = errno;

		sow_record_ring_free(ring);
		errno = error;
		return NULL;
	}
	return ring;
}

/* Where the record at a position is mapped, all of it; NULL with errno. The kernel shows the ring twice, in a row. */
static char *show(struct sow_record_ring *ring, unsigned long position)
{
	unsigned long at = position & (ring->size - 1), from, bytes;
	char *window;

	if (ring->window && at >= ring->from && at + BPF_RINGBUF_HDR_SZ + MAX_RECORD_BYTES <= ring->from + ring->bytes)
		return ring->window + (at - ring->from);
	from = ring->size > WINDOW_BYTES ? at & ~(ring->page - 1) : 0;
	bytes = ring->size > WINDOW_BYTES ? WINDOW_BYTES : 2 * ring->size;
	if (!ring->window || from != ring->from) {
		window = mmap(NULL, bytes, PROT_READ, MAP_SHARED, ring->fd, 2 * ring->page + from);
		if (window == MAP_FAILED)
			return NULL;
		unmap(ring->window, ring->bytes);
		ring->window = window;
		ring->from = from;
		ring->bytes = bytes;
	}
	return ring->window + (at - ring->from);
}

int sow_record_ring_drain(struct sow_record_ring *ring, char *buffer, unsigned int capacity)
{
	unsigned long consumed, produced;
	unsigned int used = 0;

	if (capacity < MAX_RECORD_BYTES)
		return -EINVAL;
	consumed = *ring->consumed;
	do {
		produced = __atomic_load_n(ring->produced, __ATOMIC_ACQUIRE);
		while (consumed < produced && used + MAX_RECORD_BYTES <= capacity) {
			char *record = show(ring, consumed);
			unsigned int length, bytes;

			if (!record)
				return used ? (int)used : -errno;
			length = __atomic_load_n((unsigned int *)record, __ATOMIC_ACQUIRE);
			if (length & BPF_RINGBUF_BUSY_BIT)
				return used; /* it is being written; who does so wakes us */
			bytes = length & ~BPF_RINGBUF_DISCARD_BIT;
			if (!(length & BPF_RINGBUF_DISCARD_BIT) && bytes <= MAX_RECORD_BYTES) {
				memcpy(buffer + used, record + BPF_RINGBUF_HDR_SZ, bytes);
				used += bytes;
			}
			consumed += (bytes + BPF_RINGBUF_HDR_SZ + 7) / 8 * 8;
			__atomic_store_n(ring->consumed, consumed, __ATOMIC_RELEASE);
		}
	} while (used + MAX_RECORD_BYTES <= capacity && consumed < __atomic_load_n(ring->produced, __ATOMIC_ACQUIRE));
	return used;
}
