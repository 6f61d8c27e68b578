// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The same programs for kernels from 5.10 on, without what came after it: callbacks (bpf_loop and
 * bpf_find_vma, 5.17), the iterator over mappings (5.12), atomic operations that give a value (5.12).
 * Goes when no kernel before 5.17 is left. docs/decisions/0011-old-kernels.md.
 */
#define OLD_KERNEL
#define PROBE_READS
#include "watch.bpf.c"
