// SPDX-License-Identifier: Apache-2.0
#include "shim_object.h"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#if LIBBPF_MAJOR_VERSION < 1 || (LIBBPF_MAJOR_VERSION == 1 && LIBBPF_MINOR_VERSION < 1)
#error "sowatch needs libbpf 1.1 or newer"
#endif

#define TRACEFS_MAGIC 0x74726163
#define LOG_BYTES (1 << 20)

static __thread char *log_text;
static __thread size_t log_used;
static pthread_key_t log_key; /* frees the log of a thread that ends */
static pthread_once_t log_once = PTHREAD_ONCE_INIT;

static void make_log_key(void)
{
	pthread_key_create(&log_key, free);
}

static int keep_log(enum libbpf_print_level level, const char *format, va_list args)
{
	int added;

	if (level == LIBBPF_DEBUG)
		return 0;
	if (!log_text) {
		log_text = malloc(LOG_BYTES);
		if (!log_text)
			return 0;
		log_used = 0;
		pthread_once(&log_once, make_log_key);
		pthread_setspecific(log_key, log_text);
	}
	added = vsnprintf(log_text + log_used, LOG_BYTES - log_used, format, args);
	if (added > 0)
		log_used += (size_t)added < LOG_BYTES - log_used ? (size_t)added : LOG_BYTES - log_used - 1;
	return added;
}

const char *sow_take_log(void)
{
	if (!log_text || !log_used)
		return "";
	log_used = 0;
	return log_text;
}

unsigned int sow_libbpf_major(void)
{
	return libbpf_major_version();
}

unsigned int sow_libbpf_minor(void)
{
	return libbpf_minor_version();
}

sow_object *sow_open(const char *path, const char *btf_path, int *error)
{
	LIBBPF_OPTS(bpf_object_open_opts, options, .btf_custom_path = btf_path);
	struct sow_object *self = calloc(1, sizeof(*self));

	if (!self) {
		*error = -ENOMEM;
		return NULL;
	}
	libbpf_set_print(keep_log);
	self->object = bpf_object__open_file(path, &options);
	if (!self->object) {
		*error = -errno;
		free(self);
		return NULL;
	}
	self->btf_path = btf_path ? strdup(btf_path) : NULL;
	return self;
}

static void *destroy_link(void *link)
{
	bpf_link__destroy(link);
	return NULL;
}

/*
 * All at once: to detach a program from a perf event waits for an RCU grace period (6.13+), some 40 ms, which they
 * share.
 */
static void destroy_links(sow_object *self)
{
	pthread_t threads[MAX_LINKS];
	unsigned int started = 0;

	for (unsigned int i = 0; i < self->link_count; i++)
		if (!pthread_create(&threads[started], NULL, destroy_link, self->links[i]))
			started++;
		else
			destroy_link(self->links[i]);
	for (unsigned int i = 0; i < started; i++)
		pthread_join(threads[i], NULL);
	self->link_count = 0;
}

void sow_close(sow_object *self)
{
	if (!self)
		return;
	destroy_links(self);
	if (self->events_fd > 0)
		close(self->events_fd);
	for (unsigned int i = 0; i < self->section_count; i++)
		munmap(self->sections[i].memory, self->sections[i].bytes);
	sow_record_ring_free(self->ring);
	bpf_object__close(self->object);
	btf__free(self->kernel_btf);
	free(self->btf_path);
	free(self);
}

int sow_set_max_entries(sow_object *self, const char *name, unsigned int entries)
{
	struct bpf_map *map = bpf_object__find_map_by_name(self->object, name);

	return map ? bpf_map__set_max_entries(map, entries) : -ENOENT;
}

int sow_set_autoload(sow_object *self, const char *name, int is_loaded)
{
	struct bpf_program *program = bpf_object__find_program_by_name(self->object, name);

	return program ? bpf_program__set_autoload(program, is_loaded) : -ENOENT;
}

#define KERNEL_BTF "/sys/kernel/btf/vmlinux"

/*
 * Whether a name may stand in a BTF file: 0 if not. To search its strings takes a tenth of the time that parsing takes
 * (5 MB, 127,000 types). The kernel's own can be mapped from 6.16 on.
 */
static int may_name(const char *path, const char *name)
{
	const struct btf_header *header;
	char *content = MAP_FAILED;
	struct stat info;
	int fd = open(path, O_RDONLY | O_CLOEXEC), found = 1;

	if (fd < 0)
		return 1;
	if (!fstat(fd, &info) && info.st_size >= (off_t)sizeof(*header))
		content = mmap(NULL, info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	if (content == MAP_FAILED)
		return 1;
	header = (const void *)content;
	if (header->magic == BTF_MAGIC && (off_t)header->hdr_len + header->str_off + header->str_len <= info.st_size)
		found = memmem(content + header->hdr_len + header->str_off, header->str_len, name, strlen(name) + 1) !=
			NULL;
	munmap(content, info.st_size);
	return found;
}

int sow_has_function(sow_object *self, const char *name)
{
	if (!self->kernel_btf && !may_name(self->btf_path ?: KERNEL_BTF, name))
		return 0;
	if (!self->kernel_btf)
		self->kernel_btf = self->btf_path ? btf__parse(self->btf_path, NULL) : btf__load_vmlinux_btf();
	if (!self->kernel_btf)
		return -errno;
	return btf__find_by_name_kind(self->kernel_btf, name, BTF_KIND_FUNC) > 0;
}

int sow_load(sow_object *self)
{
	return bpf_object__load(self->object);
}

void sow_trim(sow_object *self)
{
	btf__free(self->kernel_btf);
	self->kernel_btf = NULL;
#ifdef __GLIBC__
	malloc_trim(0);
#endif
}

static int keep_link(sow_object *self, struct bpf_link *link)
{
	if (!link)
		return -errno;
	self->links[self->link_count++] = link;
	return 0;
}

int sow_attach(sow_object *self, const char *name)
{
	struct bpf_program *program = bpf_object__find_program_by_name(self->object, name);

	if (!program)
		return -ENOENT;
	if (self->link_count == MAX_LINKS)
		return -ENOSPC;
	return keep_link(self, bpf_program__attach(program));
}

/*
 * The last reference to the perf event of a tracepoint unregisters it, and waits for two more grace periods below a lock
 * that all such events have in common: 14 of them took a second. So the kernel holds each event of a link in a map too,
 * and lets go of them in a worker of its own once the map is closed, by a process that was killed as well. By then
 * the link has disabled the event and taken the program off it. docs/decisions/0046-ending.md.
 */
static void keep_event(sow_object *self, const struct bpf_link *link, int fd)
{
	if (bpf_link__fd(link) == fd)
		return; /* before 5.15 there is no link: the program stays until the event goes */
	if (!self->events_fd) {
		self->events_fd = bpf_map_create(BPF_MAP_TYPE_PERF_EVENT_ARRAY, "perf_events", sizeof(__u32),
						 sizeof(__u32), MAX_LINKS, NULL);
		if (self->events_fd < 0)
			self->events_fd = 0;
	}
	/* Without the map, the close waits. */
	if (self->events_fd && !bpf_map_update_elem(self->events_fd, &self->event_count, &fd, BPF_ANY))
		self->event_count++;
}

/* libbpf finds a tracepoint's id by path, which fails where tracefs is not mounted; see sow_tracefs. */
int sow_attach_tracepoint(sow_object *self, const char *name, unsigned long long id)
{
	struct bpf_program *program = bpf_object__find_program_by_name(self->object, name);
	struct perf_event_attr {
		__u32 type, size;
		__u64 config, sample_period, sample_type, read_format, flags;
		__u32 wakeup_events, bp_type;
		__u64 config1;
	} attribute = {.type = 2 /* PERF_TYPE_TRACEPOINT */,
		       .size = 64 /* PERF_ATTR_SIZE_VER0 */,
		       .config = id,
		       .sample_period = 1};
	struct bpf_link *link;
	int fd, error;

	if (!program)
		return -ENOENT;
	if (self->link_count == MAX_LINKS)
		return -ENOSPC;
	/* Any one CPU will do: a BPF program on a tracepoint runs on all of them. */
	fd = syscall(SYS_perf_event_open, &attribute, -1, 0, -1, 8UL /* PERF_FLAG_FD_CLOEXEC */);
	if (fd < 0)
		return -errno;
	link = bpf_program__attach_perf_event(program, fd);
	if (!link) {
		error = -errno;
		close(fd);
		return error;
	}
	keep_event(self, link, fd);
	return keep_link(self, link);
}

int sow_map_fd(sow_object *self, const char *name)
{
	return bpf_object__find_map_fd_by_name(self->object, name);
}

const struct btf_var_secinfo *sow_find_variable(const struct btf *btf, const char *section, const char *name)
{
	int id = btf__find_by_name_kind(btf, section, BTF_KIND_DATASEC);
	const struct btf_type *type;

	if (id < 0)
		return NULL;
	type = btf__type_by_id(btf, id);
	for (int i = 0; i < btf_vlen(type); i++) {
		const struct btf_var_secinfo *info = btf_var_secinfos(type) + i;
		const struct btf_type *variable = btf__type_by_id(btf, info->type);

		if (!strcmp(btf__name_by_offset(btf, variable->name_off), name))
			return info;
	}
	return NULL;
}

/* The section's memory, shared with the programs. libbpf itself maps it only for skeletons. */
static char *section_memory(sow_object *self, struct bpf_map *map, size_t bytes)
{
	int fd = bpf_map__fd(map);
	void *memory;

	for (unsigned int i = 0; i < self->section_count; i++)
		if (self->sections[i].fd == fd)
			return self->sections[i].memory;
	if (fd < 0 || self->section_count == MAX_SECTIONS)
		return NULL;
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		return NULL;
	self->sections[self->section_count].fd = fd;
	self->sections[self->section_count].memory = memory;
	self->sections[self->section_count++].bytes = bytes;
	return memory;
}

void *sow_variable(sow_object *self, const char *section, const char *name, unsigned int *size)
{
	const struct btf_var_secinfo *info = sow_find_variable(bpf_object__btf(self->object), section, name);
	struct bpf_map *map;

	if (!info)
		return NULL;
	bpf_object__for_each_map(map, self->object)
	{
		const char *map_name = bpf_map__name(map);
		size_t length = strlen(map_name), wanted = strlen(section);
		char *memory;

		/* libbpf names the map of a section after the object and the section. */
		if (length < wanted || strcmp(map_name + length - wanted, section))
			continue;
		if (info->offset + info->size > bpf_map__value_size(map))
			return NULL;
		memory = section_memory(self, map, bpf_map__value_size(map));
		if (!memory)
			return NULL;
		*size = info->size;
		return memory + info->offset;
	}
	return NULL;
}

int sow_map_update(int fd, const void *key, const void *value)
{
	return bpf_map_update_elem(fd, key, value, BPF_ANY);
}

int sow_map_update_many(int fd, const void *keys, unsigned int key_bytes, const void *values, unsigned int value_bytes,
			unsigned int count)
{
	for (unsigned int i = 0; i < count; i++) {
		int error = bpf_map_update_elem(fd, (const char *)keys + (size_t)i * key_bytes,
						(const char *)values + (size_t)i * value_bytes, BPF_ANY);

		if (error)
			return error;
	}
	return 0;
}

int sow_map_sizes(int fd, unsigned int *key_bytes, unsigned int *value_bytes)
{
	struct bpf_map_info info = {};
	__u32 length = sizeof(info);
	int error = bpf_obj_get_info_by_fd(fd, &info, &length);

	if (error)
		return error;
	*key_bytes = info.key_size;
	*value_bytes = info.value_size;
	if (info.type == BPF_MAP_TYPE_PERCPU_HASH || info.type == BPF_MAP_TYPE_PERCPU_ARRAY ||
	    info.type == BPF_MAP_TYPE_LRU_PERCPU_HASH)
		*value_bytes = (info.value_size + 7) / 8 * 8 * libbpf_num_possible_cpus();
	return 0;
}

int sow_map_lookup(int fd, const void *key, void *value)
{
	return bpf_map_lookup_elem(fd, key, value);
}

int sow_map_delete(int fd, const void *key)
{
	return bpf_map_delete_elem(fd, key);
}

int sow_map_next_key(int fd, const void *key, void *next_key)
{
	return bpf_map_get_next_key(fd, key, next_key);
}

int sow_possible_cpus(void)
{
	return libbpf_num_possible_cpus();
}

int sow_ring_open(sow_object *self, const char *map)
{
	int fd = bpf_object__find_map_fd_by_name(self->object, map);

	if (fd < 0)
		return fd;
	self->ring = sow_record_ring_new(fd);
	self->ring_fd = fd;
	return self->ring ? 0 : -errno;
}

int sow_ring_fd(sow_object *self)
{
	return self->ring_fd;
}

int sow_ring_drain(sow_object *self, void *buffer, unsigned int capacity)
{
	return sow_record_ring_drain(self->ring, buffer, capacity);
}

unsigned long long sow_skipped_runs(sow_object *self)
{
	unsigned long long skipped = 0;
	struct bpf_program *program;

	bpf_object__for_each_program(program, self->object)
	{
		struct bpf_prog_info info = {0};
		__u32 bytes = sizeof(info);
		int fd = bpf_program__fd(program);

		if (fd >= 0 && !bpf_obj_get_info_by_fd(fd, &info, &bytes))
			skipped += info.recursion_misses;
	}
	return skipped;
}

int sow_run(sow_object *self, const char *name, const unsigned long long *arguments, unsigned int count)
{
	struct bpf_program *program = bpf_object__find_program_by_name(self->object, name);
	LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = arguments, .ctx_size_in = count * sizeof(*arguments));
	int error;

	if (!program)
		return -ENOENT;
	error = bpf_prog_test_run_opts(bpf_program__fd(program), &options);
	return error ? error : (int)options.retval;
}

int sow_iterate(sow_object *self, const char *name, unsigned int tgid)
{
	struct bpf_program *program = bpf_object__find_program_by_name(self->object, name);
	union bpf_iter_link_info info = {.task.pid = tgid};
	LIBBPF_OPTS(bpf_iter_attach_opts, options, .link_info = &info, .link_info_len = sizeof(info));
	struct bpf_link *link;
	int fd;

	if (!program)
		return -ENOENT;
	link = bpf_program__attach_iter(program, tgid ? &options : NULL);
	if (!link)
		return -errno;
	fd = bpf_iter_create(bpf_link__fd(link));
	if (fd < 0)
		fd = -errno;
	bpf_link__destroy(link); /* the iterator holds what it needs */
	return fd;
}

int sow_probe_helper(int program_type, int helper)
{
	return libbpf_probe_bpf_helper(program_type, helper, NULL);
}

int sow_probe_map(int map_type)
{
	return libbpf_probe_bpf_map_type(map_type, NULL);
}

int sow_probe_trampoline(void)
{
	const struct bpf_insn nothing[] = {{.code = 0xb7 /* r0 = 0 */}, {.code = 0x95 /* exit */}};
	/* No function has this type id: a caller that may learns that it is wrong. */
	LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_TRACE_FENTRY, .attach_btf_id = 1);
	int fd = bpf_prog_load(BPF_PROG_TYPE_TRACING, "probe", "GPL", nothing, 2, &options);

	if (fd >= 0) {
		close(fd);
		return 1;
	}
	return fd != -EPERM;
}

int sow_probe_program(int program_type)
{
	return libbpf_probe_bpf_prog_type(program_type, NULL);
}

static int open_if_tracefs(const char *path)
{
	struct statfs info;
	int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	if (fstatfs(fd, &info) || info.f_type != TRACEFS_MAGIC) {
		close(fd);
		return -ENOENT;
	}
	return fd;
}

int sow_tracefs(void)
{
	int fd = open_if_tracefs("/sys/kernel/tracing");
	int context;

	if (fd >= 0)
		return fd;
	fd = open_if_tracefs("/sys/kernel/debug/tracing");
	if (fd >= 0)
		return fd;
	/* A mount that is attached nowhere and ends with its descriptor (5.2+). */
	context = syscall(SYS_fsopen, "tracefs", 1U /* FSOPEN_CLOEXEC */);
	if (context < 0)
		return -errno;
	if (syscall(SYS_fsconfig, context, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0))
		fd = -errno;
	else
		fd = syscall(SYS_fsmount, context, 1U /* FSMOUNT_CLOEXEC */, 0);
	if (fd == -1)
		fd = -errno;
	close(context);
	return fd;
}
