/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All that Python may ask of libbpf: one object, its maps, its programs, its ring, its iterator.
 * Functions that return int give 0 or more on success and -errno on failure. Not for use by two
 * threads at once on one object, but for what takes a file descriptor.
 */
#pragma once

typedef struct sow_object sow_object;

/* "major.minor" of the libbpf that is loaded. */
unsigned int sow_libbpf_major(void);
unsigned int sow_libbpf_minor(void);

/* What libbpf wrote on this thread since the last call; the pointer is good until the next call. */
const char *sow_take_log(void);

/* Parses an object file. btf_path: NULL for the running kernel's own BTF. NULL on failure, *error = -errno. */
sow_object *sow_open(const char *path, const char *btf_path, int *error);
/* Detaches and frees everything; the pointer is dead afterwards. */
void sow_close(sow_object *object);

/* Before loading. */
int sow_set_max_entries(sow_object *object, const char *map, unsigned int entries);
int sow_set_autoload(sow_object *object, const char *program, int is_loaded);
/* Whether the kernel's BTF has a function of this name. */
int sow_has_function(sow_object *object, const char *name);
int sow_load(sow_object *object);
/* After loading and attaching: gives back what only that needed, the kernel's BTF first, which is 10 MB. */
void sow_trim(sow_object *object);

/* After loading. Links live until sow_close. */
int sow_attach(sow_object *object, const char *program);
int sow_attach_tracepoint(sow_object *object, const char *program, unsigned long long id);

/* Runs of its programs that the kernel left out because another was under way on that CPU (5.12+). */
unsigned long long sow_skipped_runs(sow_object *object);

int sow_map_fd(sow_object *object, const char *map);
/* Address of a global variable in a mapped data section, NULL if there is none. */
void *sow_variable(sow_object *object, const char *section, const char *name, unsigned int *size);

/*
 * Bytes of a key, and of a value as one look-up reads it: of a per-CPU map, that of all CPUs together. 0 or a
 * negative errno.
 */
int sow_map_sizes(int fd, unsigned int *key_bytes, unsigned int *value_bytes);
int sow_map_update(int fd, const void *key, const void *value);
int sow_map_update_many(int fd, const void *keys, unsigned int key_bytes, const void *values, unsigned int value_bytes,
			unsigned int count);
int sow_map_lookup(int fd, const void *key, void *value);
int sow_map_delete(int fd, const void *key);
int sow_map_next_key(int fd, const void *key, void *next_key);
int sow_possible_cpus(void);

/* The ring: drain copies whole records, gives the bytes copied; it stops when the buffer is nearly full. */
int sow_ring_open(sow_object *object, const char *map);
int sow_ring_fd(sow_object *object);
int sow_ring_drain(sow_object *object, void *buffer, unsigned int capacity);

/* Runs a raw_tp program once with these arguments; gives what it returned. */
int sow_run(sow_object *object, const char *program, const unsigned long long *arguments, unsigned int count);

/* A file descriptor to read a program's iteration from: over one process (tgid), or all (0). */
int sow_iterate(sow_object *object, const char *program, unsigned int tgid);

/* 1 works, 0 does not, -errno unknown. Types and helpers by their numbers in linux/bpf.h. */
int sow_probe_helper(int program_type, int helper);
int sow_probe_map(int map_type);
int sow_probe_program(int program_type);
/* Whether programs on functions (fentry, fexit) may be loaded at all. */
int sow_probe_trampoline(void);

/* A directory descriptor of tracefs: where it is mounted, else of a private mount nobody else sees. */
int sow_tracefs(void);

/*
 * Uprobes: a descriptor each, attached until it is closed. Offsets are those of the file, not addresses.
 * file_fd: open on the file; a link binds to its inode (below overlayfs to the real one).
 */

/* Before loading: what kind of link the program is for. is_multi: one link for many offsets (6.6+). */
int sow_set_uprobe(sow_object *object, const char *program, int is_multi);
int sow_link_uprobe_multi(sow_object *object, const char *program, int file_fd, int is_by_fd, int is_return,
			  const unsigned long *offsets, const unsigned long long *cookies, unsigned int count);
/* is_by_fd: give the kernel the descriptor itself (7.2+), not /proc/self/fd/N; see sow_probe_uprobe_fd. */
/* perf_type: the number in /sys/bus/event_source/devices/uprobe/type. has_cookie: bpf_get_attach_cookie (5.15+). */
int sow_link_uprobe(sow_object *object, const char *program, int file_fd, unsigned int perf_type, int is_return,
		    unsigned long offset, int has_cookie, unsigned long long cookie);
/* 1 if the kernel has uprobe.multi, 0 if not, -errno unknown. */
int sow_probe_uprobe_multi(void);
/* The same for uprobe.multi links by descriptor (7.2+). */
int sow_probe_uprobe_fd(void);
/*
 * Whether a return probe can end a process below a seccomp filter: the kernel makes a system call for it (uretprobe,
 * x86-64, 6.11+) and lets the filter judge it. 1 it can, 0 it cannot, -errno unknown. Tried in a child.
 */
int sow_probe_return_call(void);

/* Where a probe of our own is tried: does nothing. */
void sow_self_test(void);
unsigned long sow_self_test_address(void);

struct sow_link_info {
	unsigned int type; /* enum bpf_link_type */
	unsigned int id;
	unsigned int program_id;
};
int sow_link_info(int fd, struct sow_link_info *info);
/*
 * Where a uprobe link is, as the kernel has it: fills in up to capacity offsets, gives how many there are; 0: it does
 * not say (uprobe.multi before 6.8, perf events before 6.6). path: of the file as this process sees it, empty for a
 * perf event, of which the kernel only remembers the name that it was given.
 */
int sow_link_place(int fd, unsigned long *offsets, unsigned int capacity, char *path, unsigned int path_bytes);

/* The programs and maps of an object, by index; -ENOENT behind the last one. The texts live as long as the object. */
struct sow_program_info {
	const char *name;
	const char *section;
	int type; /* enum bpf_prog_type as libbpf takes it from the section, 0: it does not know the section */
};
int sow_program_info(sow_object *object, unsigned int index, struct sow_program_info *info);
struct sow_map_info {
	const char *name;
	int type; /* enum bpf_map_type */
	int fd;   /* -1 before loading */
	unsigned int key_bytes, value_bytes, max_entries;
	int is_internal; /* a data section */
};
int sow_map_info(sow_object *object, unsigned int index, struct sow_map_info *info);
/* Before loading: the value of a `const volatile` variable; -ENOENT: no such variable, -EMSGSIZE: another size. */
int sow_set_constant(sow_object *object, const char *name, const void *value, unsigned int bytes);

/* Rings of any map of type BPF_MAP_TYPE_RINGBUF. Records are copied as u32 length, 4 bytes of 0, data padded to 8. */
typedef struct sow_ring sow_ring;
sow_ring *sow_ring_new(int map_fd, int *error);
void sow_ring_free(sow_ring *ring);
int sow_ring_epoll_fd(sow_ring *ring);
/* capacity: at least twice the ring's size, so that any record fits. */
int sow_ring_take(sow_ring *ring, void *buffer, unsigned int capacity);
