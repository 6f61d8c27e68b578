/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The ring that records go through, what is counted of it, and how much of it one process may fill. */
#pragma once

#include "records.h"
#include "counters.bpf.h"

#include <linux/bpf.h>
#include <stdbool.h>

#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} ring SEC(".maps");

/*
 * Written by user space: so many records of one process may wait in the ring while it holds less than
 * busy_bytes, an eighth of them when it holds more. 0: any number.
 */
__u32 max_waiting = 0;
__u32 busy_bytes = 0;

/* What `waiting` is once a record was dropped in this window, and how often in a row the bound is halved for that. */
#define WAS_DROPPED 0xffff
#define MAX_STRIKES 5

/*
 * Whether as many records of a process wait to be read as may. They are counted in windows: the next
 * one begins when all that was in the ring at the beginning of this one was read, so what waits is of
 * two windows at the most. After a window in which something was dropped the bound is half as
 * much, after one in which nothing was it is twice as much. No clock is read: a process is as fast as its reader.
 *
 * The three are of its entry; two threads that count at once may count one record, which lets few through.
 */
static __always_inline bool has_too_many_waiting(__u64 *window, __u16 *waiting, __u16 *strikes)
{
	__u32 allowed = max_waiting >> (*strikes & 7);

	if (!max_waiting)
		return false;
	if (*waiting != WAS_DROPPED)
		++*waiting;
	if (*waiting <= allowed / 8)
		return false;
	if (*waiting <= allowed && bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) < busy_bytes)
		return false;
	if (bpf_ringbuf_query(&ring, BPF_RB_CONS_POS) < *window) {
		*waiting = WAS_DROPPED;
		return true;
	}
	if (*waiting == WAS_DROPPED && *strikes < MAX_STRIKES)
		++*strikes;
	else if (*waiting != WAS_DROPPED && *strikes)
		--*strikes;
	*window = bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);
	*waiting = 1;
	return false;
}
