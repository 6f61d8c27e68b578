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

/* What libbpf said on this thread since the last call; the pointer is good until the next call. */
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

/* After loading. Links live until sow_close. */
int sow_attach(sow_object *object, const char *program);
int sow_attach_tracepoint(sow_object *object, const char *program, unsigned long long id);

/* Runs of its programs that the kernel left out because another was under way on that CPU (5.12+). */
unsigned long long sow_skipped_runs(sow_object *object);

int sow_map_fd(sow_object *object, const char *map);
/* Address of a global variable in a mapped data section, NULL if there is none. */
void *sow_variable(sow_object *object, const char *section, const char *name, unsigned int *size);

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

/* 1 works, 0 does not, -errno could not tell. Types and helpers by their numbers in linux/bpf.h. */
int sow_probe_helper(int program_type, int helper);
int sow_probe_map(int map_type);
int sow_probe_program(int program_type);
/* Whether programs on functions (fentry, fexit) may be loaded at all. */
int sow_probe_trampoline(void);

/* A directory descriptor of tracefs: where it is mounted, else of a private mount nobody else sees. */
int sow_tracefs(void);
