// SPDX-License-Identifier: Apache-2.0
/* Uprobes, one link at a time, and what programs of others need: their programs, maps, constants and rings. */
#include "shim_object.h"

#include <bpf/bpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define TRACE_UPROBE_MULTI 48 /* enum bpf_attach_type, 6.6; newer than the headers of Debian 12 */
#define UPROBE_MULTI_RETURN 1 /* BPF_F_UPROBE_MULTI_RETURN */
#define UPROBE_MULTI_FD 2     /* BPF_F_UPROBE_MULTI_PATH_FD, 7.2 */
#define PERF_UPROBE_RETURN 1  /* /sys/bus/event_source/devices/uprobe/format/retprobe: config:0 */
#define PERF_FLAG_FD_CLOEXEC 8UL
#define PERF_EVENT_IOC_ENABLE _IO('$', 0)
#define PERF_EVENT_IOC_SET_BPF _IOW('$', 8, __u32)

/* union bpf_attr for BPF_LINK_CREATE with uprobe_multi, as in 6.6's linux/bpf.h; path_fd as in 7.2's. */
struct link_create {
	__u32 prog_fd, target_fd, attach_type, flags;
	__u64 path, offsets, ref_ctr_offsets, cookies;
	__u32 count, multi_flags, pid;
	__s32 path_fd;
};

static struct bpf_program *find_program(sow_object *self, const char *name)
{
	return bpf_object__find_program_by_name(self->object, name);
}

int sow_set_uprobe(sow_object *self, const char *name, int is_multi)
{
	struct bpf_program *program = find_program(self, name);
	int error;

	if (!program)
		return -ENOENT;
	error = bpf_program__set_type(program, BPF_PROG_TYPE_KPROBE);
	if (error)
		return error;
	return bpf_program__set_expected_attach_type(program, is_multi ? (enum bpf_attach_type)TRACE_UPROBE_MULTI : 0);
}

static int create_link(struct link_create *attribute)
{
	int fd = syscall(SYS_bpf, BPF_LINK_CREATE, attribute, sizeof(*attribute));

	return fd < 0 ? -errno : fd;
}

/* The path by which the kernel finds what a descriptor is open on, whatever has become of its name. */
struct fd_path {
	char text[32];
};

static struct fd_path path_of(int fd)
{
	struct fd_path path;

	snprintf(path.text, sizeof(path.text), "/proc/self/fd/%d", fd);
	return path;
}

int sow_link_uprobe_multi(sow_object *self, const char *name, int file_fd, int is_by_fd, int is_return,
			  const unsigned long *offsets, const unsigned long long *cookies, unsigned int count)
{
	struct bpf_program *program = find_program(self, name);
	const struct fd_path path = path_of(file_fd);
	struct link_create attribute = {.attach_type = TRACE_UPROBE_MULTI,
					.offsets = (__u64)(unsigned long)offsets,
					.cookies = (__u64)(unsigned long)cookies,
					.count = count,
					.multi_flags = is_return ? UPROBE_MULTI_RETURN : 0};

	if (!program)
		return -ENOENT;
	if (is_by_fd) {
		attribute.path_fd = file_fd;
		attribute.multi_flags |= UPROBE_MULTI_FD;
	} else {
		attribute.path = (__u64)(unsigned long)path.text;
	}
	attribute.prog_fd = bpf_program__fd(program);
	return create_link(&attribute);
}

/* What the kernel answers to a uprobe.multi link of a program that does nothing; -ENOTSUP: no such program. */
static int try_link(struct link_create attribute)
{
	const struct bpf_insn nothing[] = {{.code = 0xb7 /* r0 = 0 */}, {.code = 0x95 /* exit */}};
	LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = (enum bpf_attach_type)TRACE_UPROBE_MULTI);
	int fd = bpf_prog_load(BPF_PROG_TYPE_KPROBE, "probe", "GPL", nothing, 2, &options);
	const unsigned long offset = 0;
	int link;

	if (fd < 0)
		return fd == -EINVAL ? -ENOTSUP : fd;
	attribute.attach_type = TRACE_UPROBE_MULTI;
	attribute.offsets = (__u64)(unsigned long)&offset;
	attribute.count = 1;
	attribute.prog_fd = fd;
	link = create_link(&attribute);
	close(fd);
	if (link >= 0)
		close(link);
	return link;
}

int sow_probe_uprobe_multi(void)
{
	int link = try_link((struct link_create){.path = (__u64)(unsigned long)"/"});

	/* A directory is no file to probe: EBADF from who knows this link, EINVAL or EOPNOTSUPP from who does not. */
	return link >= 0 || link == -EBADF ? 1 : link == -EINVAL || link == -EOPNOTSUPP ? 0 : link;
}

int sow_probe_uprobe_fd(void)
{
	int link = try_link((struct link_create){.path_fd = -1, .multi_flags = UPROBE_MULTI_FD});

	/* EBADF from a kernel that reads the descriptor, EINVAL from one that does not know the flag. */
	return link == -EBADF ? 1 : link == -EINVAL || link == -EOPNOTSUPP ? 0 : link < 0 ? link : -EINVAL;
}

#ifdef __x86_64__
#define NR_URETPROBE 335   /* arch/x86/entry/syscalls/syscall_64.tbl, 6.11 */
#define FILTER_ERRNO 77    /* EBADFD: no system call that does not exist gives it */
#define DIED_OF_SIGILL 200 /* no errno */

/* In a child of its own: the errno of uretprobe called from where no probe is, or DIED_OF_SIGILL. */
static int call_uretprobe(int is_filtered)
{
	struct sock_filter instructions[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, NR_URETPROBE, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | FILTER_ERRNO),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = {.len = sizeof(instructions) / sizeof(instructions[0]), .filter = instructions};
	/* Like fork, but no signal when it ends, so that nobody else waits for it; only system calls in the child. */
	long child = syscall(SYS_clone, 0UL, NULL, NULL, NULL, 0UL);
	int status = 0;

	if (child < 0)
		return -errno;
	if (!child) {
		sigset_t none;

		/* faulthandler has a handler for SIGILL. */
		signal(SIGILL, SIG_DFL);
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) ||
		    (is_filtered && (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
				     prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0))))
			syscall(SYS_exit_group, 0);
		syscall(NR_URETPROBE);
		syscall(SYS_exit_group, errno);
	}
	while (waitpid((pid_t)child, &status, __WALL) < 0)
		if (errno != EINTR)
			return -errno;
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGILL)
		return DIED_OF_SIGILL;
	return WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : -ECHILD;
}

int sow_probe_return_call(void)
{
	/* Not from the kernel's trampoline the call ends in SIGILL, if the kernel has it and no filter is asked. */
	int filtered = call_uretprobe(1), plain;

	if (filtered < 0)
		return filtered;
	if (filtered == DIED_OF_SIGILL)
		return 0;
	plain = call_uretprobe(0);
	if (plain < 0)
		return plain;
	if (plain == DIED_OF_SIGILL)
		return filtered == FILTER_ERRNO ? 1 : -EINVAL;
	/* ENOSYS from a filter that we are below is no answer of the kernel. */
	return plain == ENOSYS && prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0 ? 0 : -EPERM;
}
#else
int sow_probe_return_call(void)
{
	return 0; /* the breakpoint is all there is */
}
#endif

__attribute__((noinline)) void sow_self_test(void)
{
	__asm__ volatile("" ::: "memory");
}

unsigned long sow_self_test_address(void)
{
	return (unsigned long)&sow_self_test;
}

int sow_link_uprobe(sow_object *self, const char *name, int file_fd, unsigned int perf_type, int is_return,
		    unsigned long offset, int has_cookie, unsigned long long cookie)
{
	struct bpf_program *program = find_program(self, name);
	const struct fd_path path = path_of(file_fd);
	struct perf_event_attr {
		__u32 type, size;
		__u64 config, sample_period, sample_type, read_format, flags;
		__u32 wakeup_events, bp_type;
		__u64 config1, config2;
	} attribute = {.type = perf_type,
		       .size = 72 /* PERF_ATTR_SIZE_VER1 */,
		       .config = is_return ? PERF_UPROBE_RETURN : 0,
		       .config1 = (__u64)(unsigned long)path.text,
		       .config2 = offset};
	LIBBPF_OPTS(bpf_link_create_opts, options, .perf_event.bpf_cookie = cookie);
	int event, link, error;

	if (!program)
		return -ENOENT;
	/* Any one CPU will do: a BPF program on a uprobe of all processes runs on all of them. */
	event = syscall(SYS_perf_event_open, &attribute, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);
	if (event < 0)
		return -errno;
	if (has_cookie) {
		link = bpf_link_create(bpf_program__fd(program), event, BPF_PERF_EVENT, &options);
		error = link < 0 ? link : ioctl(event, PERF_EVENT_IOC_ENABLE, 0) ? -errno : 0;
		close(event); /* the link holds it */
		if (error && link >= 0)
			close(link);
		return error ? error : link;
	}
	/* Before 5.15 the event itself is what is attached. */
	if (ioctl(event, PERF_EVENT_IOC_SET_BPF, bpf_program__fd(program)) || ioctl(event, PERF_EVENT_IOC_ENABLE, 0)) {
		error = -errno;
		close(event);
		return error;
	}
	return event;
}

/* struct bpf_link_info, as far as uprobes go. */
struct link_info {
	__u32 type, id, prog_id, unused;
	union {
		struct { /* 6.8 */
			__u64 path, offsets, ref_ctr_offsets, cookies;
			__u32 path_bytes, count, flags, pid;
		} multi;
		struct {
			__u32 type, unused;
			__u64 file_name; /* from here on 6.6 */
			__u32 name_bytes, offset;
		} perf;
	};
};

#define LINK_PERF_EVENT 7    /* enum bpf_link_type */
#define LINK_UPROBE_MULTI 12 /* 6.6 */
#define PERF_IS_UPROBE 1     /* enum bpf_perf_event_type, 6.6; BPF_PERF_EVENT_URETPROBE is 2 */

static int read_link_info(int fd, struct link_info *info)
{
	__u32 bytes = sizeof(*info);

	return bpf_obj_get_info_by_fd(fd, info, &bytes);
}

int sow_link_info(int fd, struct sow_link_info *info)
{
	struct link_info known = {0};
	int error = read_link_info(fd, &known);

	if (error)
		return error;
	info->type = known.type;
	info->id = known.id;
	info->program_id = known.prog_id;
	return 0;
}

int sow_link_place(int fd, unsigned long *offsets, unsigned int capacity, char *path, unsigned int path_bytes)
{
	struct link_info info = {0};
	int error = read_link_info(fd, &info);
	unsigned int type = info.type;

	path[0] = 0;
	if (error)
		return error;
	memset(&info, 0, sizeof(info));
	if (type == LINK_UPROBE_MULTI) {
		info.multi.path = (__u64)(unsigned long)path;
		info.multi.path_bytes = path_bytes;
		info.multi.offsets = (__u64)(unsigned long)offsets;
		info.multi.count = capacity;
		error = read_link_info(fd, &info);
		/* Who has more than fit in says so with ENOSPC, and how many. Untouched is all of it before 6.8. */
		if (error && error != -ENOSPC)
			return error;
		return path[0] ? (int)info.multi.count : 0;
	}
	if (type == LINK_PERF_EVENT && capacity) {
		error = read_link_info(fd, &info);
		if (error)
			return error;
		if (info.perf.type != PERF_IS_UPROBE && info.perf.type != PERF_IS_UPROBE + 1)
			return 0;
		offsets[0] = info.perf.offset;
		return 1;
	}
	return 0;
}

int sow_program_info(sow_object *self, unsigned int index, struct sow_program_info *info)
{
	struct bpf_program *program;

	bpf_object__for_each_program(program, self->object)
	{
		if (index--)
			continue;
		info->name = bpf_program__name(program);
		info->section = bpf_program__section_name(program);
		info->type = bpf_program__type(program);
		return 0;
	}
	return -ENOENT;
}

int sow_map_info(sow_object *self, unsigned int index, struct sow_map_info *info)
{
	struct bpf_map *map;

	bpf_object__for_each_map(map, self->object)
	{
		if (index--)
			continue;
		info->name = bpf_map__name(map);
		info->type = bpf_map__type(map);
		info->fd = bpf_map__fd(map);
		info->key_bytes = bpf_map__key_size(map);
		info->value_bytes = bpf_map__value_size(map);
		info->max_entries = bpf_map__max_entries(map);
		info->is_internal = bpf_map__is_internal(map);
		return 0;
	}
	return -ENOENT;
}

int sow_set_constant(sow_object *self, const char *name, const void *value, unsigned int bytes)
{
	const struct btf_var_secinfo *info = sow_find_variable(bpf_object__btf(self->object), ".rodata", name);
	struct bpf_map *map;

	if (!info)
		return -ENOENT;
	if (info->size != bytes)
		return -EMSGSIZE;
	bpf_object__for_each_map(map, self->object)
	{
		const char *map_name = bpf_map__name(map);
		size_t length = strlen(map_name), total = 0;
		char *memory;

		if (length < 7 || strcmp(map_name + length - 7, ".rodata"))
			continue;
		memory = (char *)bpf_map__initial_value(map, &total);
		if (!memory || info->offset + info->size > total)
			return -ENOENT;
		memcpy(memory + info->offset, value, bytes);
		return 0;
	}
	return -ENOENT;
}

struct sow_ring {
	struct ring_buffer *ring;
	unsigned int bytes; /* of the ring: no record is larger */
	char *buffer;
	unsigned int used, capacity;
};

static int copy_framed(void *context, void *data, size_t size)
{
	struct sow_ring *self = context;
	__u32 head[2] = {size, 0};

	memcpy(self->buffer + self->used, head, sizeof(head));
	memcpy(self->buffer + self->used + sizeof(head), data, size);
	self->used += sizeof(head) + ((size + 7) & ~7UL);
	/* libbpf counts this record as consumed even if it is to stop here. */
	return self->used + self->bytes > self->capacity ? -ENOSPC : 0;
}

sow_ring *sow_ring_new(int map_fd, int *error)
{
	struct bpf_map_info info = {0};
	__u32 bytes = sizeof(info);
	struct sow_ring *self = calloc(1, sizeof(*self));

	if (!self) {
		*error = -ENOMEM;
		return NULL;
	}
	if (bpf_obj_get_info_by_fd(map_fd, &info, &bytes) || info.type != BPF_MAP_TYPE_RINGBUF) {
		*error = -EINVAL;
		free(self);
		return NULL;
	}
	self->bytes = info.max_entries;
	self->ring = ring_buffer__new(map_fd, copy_framed, self, NULL);
	if (!self->ring) {
		*error = -errno;
		free(self);
		return NULL;
	}
	return self;
}

void sow_ring_free(sow_ring *self)
{
	if (!self)
		return;
	ring_buffer__free(self->ring);
	free(self);
}

int sow_ring_epoll_fd(sow_ring *self)
{
	return ring_buffer__epoll_fd(self->ring);
}

int sow_ring_take(sow_ring *self, void *buffer, unsigned int capacity)
{
	int error;

	if (capacity < 2 * self->bytes)
		return -EINVAL;
	self->buffer = buffer;
	self->used = 0;
	self->capacity = capacity;
	error = ring_buffer__consume(self->ring);
	self->buffer = NULL;
	if (error < 0 && error != -ENOSPC)
		return error;
	return self->used;
}
