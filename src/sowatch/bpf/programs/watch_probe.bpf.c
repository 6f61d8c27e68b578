// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The same programs for kernels without bpf_rdonly_cast (before 6.2). */
#define PROBE_READS
#include "watch.bpf.c"
