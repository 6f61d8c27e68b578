/* hang: a small FUSE file system of its own that stops to answer, and who waits for it.
 *
 *   hang lock DIRECTORY LIBRARY [COUNT]
 *     COUNT processes (one if it is not given), each nobody in a user and mount namespace of its own. Each
 *     maps LIBRARY executable and a page of a file of the file system on DIRECTORY; a child shares its
 *     address space (CLONE_VM). Answers "pid PID" for each. Obeys lines on standard input:
 *       hang   each touches its page, whose read fails twice and is not answered the third time: the page
 *              fault holds mmap_lock for reading. Then a second thread waits for the lock to write, and
 *              whoever reads waits behind it. Answers "hung" once all of them do
 *       free   what waits is answered, and everything from now on. Answers "free"
 *
 *   hang maps DIRECTORY LIBRARY [COUNT]
 *     The same, but the lock is held for writing, and so is that of one executable mapping: the page that one
 *     thread reads without the lock is not answered, and another maps the file without its cache (FOPEN_DIRECT_IO)
 *     over a second mapping of LIBRARY, for which the kernel waits for that page. Then /proc/PID/maps waits, too,
 *     which since 6.17 takes the locks of single mappings first.
 *
 *   hang files DIRECTORY LIBRARY COUNT
 *     COUNT file systems on DIRECTORY/0, DIRECTORY/1, ..., in a mount namespace of its own, each with
 *     a copy of LIBRARY as lib.so. One process maps all of them executable ("pid PID"); an open or a read by
 *     anybody else is not answered until
 *       free   from now on everything is. Answers "free"
 *
 * The end of its input, a signal and the death of whoever started it end it and all its processes, for the
 * kernel aborts a file system whose /dev/fuse is closed: nothing waits longer than this process is there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define NOBODY 65534
#define MOST 300
#define ROOT 1
#define FILE_NODE 2
#define MAX_KEPT 64

/* Reads that fail before one is not answered: the fault gives up the lock while it waits, and tries again. */
#define FAILURES 2

struct mounted {
	int fd;
	int reads;
	int opens;
	pid_t owner; /* who is answered; 0: nobody and everybody */
	pid_t victim;
	int kept_count;
	char *kept[MAX_KEPT]; /* requests that are not answered yet */
};

static struct mounted mounts[MOST];
static int count;
static int is_free, is_lock, is_maps, must_hang;
static char *content;
static size_t content_size;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		exit(2);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail(path);
	close(fd);
}

static void load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat status;

	if (fd < 0 || fstat(fd, &status))
		fail(path);
	content_size = status.st_size;
	content = malloc(content_size);
	if (!content || read(fd, content, content_size) != (ssize_t)content_size)
		fail(path);
	close(fd);
}

static void answer(struct mounted *one, __u64 unique, int error, const void *data, size_t size)
{
	struct fuse_out_header head = {.len = sizeof(head) + size, .error = error, .unique = unique};
	char buffer[sizeof(head) + (1 << 17)];

	memcpy(buffer, &head, sizeof(head));
	if (size)
		memcpy(buffer + sizeof(head), data, size);
	if (write(one->fd, buffer, head.len) < 0 && errno != ENOENT)
		perror("hang: answer");
}

static void fill(struct fuse_attr *attr, __u64 node)
{
	attr->ino = node;
	attr->mode = node == ROOT ? S_IFDIR | 0755 : S_IFREG | 0755;
	attr->nlink = 1;
	attr->size = node == ROOT ? 0 : content_size;
	attr->blksize = PAGE;
}

static int is_kept(const struct mounted *one, const struct fuse_in_header *head)
{
	if (is_free)
		return 0;
	if (is_lock)
		return head->opcode == FUSE_READ && must_hang && (is_maps || one->reads > FAILURES);
	return (pid_t)head->pid != one->owner && (head->opcode == FUSE_OPEN || head->opcode == FUSE_READ);
}

static void serve(struct mounted *one, char *request, size_t size)
{
	struct fuse_in_header *head = (struct fuse_in_header *)request;
	struct fuse_init_out init = {.major = 7, .minor = 31, .max_readahead = PAGE, .max_write = PAGE};
	struct fuse_entry_out entry = {.nodeid = FILE_NODE, .attr_valid = 3600, .entry_valid = 3600};
	struct fuse_attr_out attr = {.attr_valid = 3600};
	struct fuse_open_out opened = {};
	struct fuse_read_in *wanted = (struct fuse_read_in *)(head + 1);

	if (head->opcode == FUSE_READ)
		one->reads++;
	if (is_kept(one, head) && one->kept_count < MAX_KEPT) {
		char *copy = malloc(size);

		memcpy(copy, request, size);
		one->kept[one->kept_count++] = copy;
		return;
	}
	switch (head->opcode) {
	case FUSE_INIT:
		answer(one, head->unique, 0, &init, sizeof(init));
		break;
	case FUSE_LOOKUP:
		fill(&entry.attr, FILE_NODE);
		answer(one, head->unique, strcmp((char *)(head + 1), "lib.so") ? -ENOENT : 0, &entry,
		       strcmp((char *)(head + 1), "lib.so") ? 0 : sizeof(entry));
		break;
	case FUSE_GETATTR:
		fill(&attr.attr, head->nodeid);
		answer(one, head->unique, 0, &attr, sizeof(attr));
		break;
	case FUSE_OPEN:
		opened.open_flags = FOPEN_KEEP_CACHE | (is_maps && one->opens++ ? FOPEN_DIRECT_IO : 0);
		answer(one, head->unique, 0, &opened, sizeof(opened));
		break;
	case FUSE_READ:
		if (is_lock && must_hang && !is_free) {
			answer(one, head->unique, -EIO, NULL, 0);
		} else {
			size_t at = wanted->offset < content_size ? wanted->offset : content_size;
			size_t left = content_size - at;

			answer(one, head->unique, 0, content + at, left < wanted->size ? left : wanted->size);
		}
		break;
	case FUSE_FLUSH:
	case FUSE_RELEASE:
		answer(one, head->unique, 0, NULL, 0);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		break;
	default:
		answer(one, head->unique, -ENOSYS, NULL, 0);
	}
}

static void mount_at(const char *directory, int fd, int owner)
{
	char options[128];

	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other", fd, owner, owner);
	if (mount("hang", directory, "fuse", MS_NOSUID | MS_NODEV, options))
		fail("hang: mount");
}

/* ---- processes ---- */

static char *page, *second;
static int uncached; /* the same file, open without its cache */
static void *volatile sink;

static void *writer(void *unused)
{
	(void)unused;
	usleep(100000); /* the fault has the lock by now, or has had it */
	if (is_maps) {
		sink = mmap(second, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, uncached, 0);
		return NULL;
	}
	for (;;) {
		sink = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		munmap(sink, PAGE);
		usleep(1000);
	}
	return NULL;
}

static int stay(void *unused)
{
	(void)unused;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;)
		pause();
	return 0;
}

static void become_nobody(void)
{
	/* Without this the kernel forgets who dies with whom. */
	if (setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
		fail("hang: setuid");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void *map_library(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	void *got = fd < 0 ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);

	if (got == MAP_FAILED)
		fail(path);
	close(fd);
	return got;
}

static void be_locked(const char *file, const char *library, int go, int done)
{
	static char stack[1 << 16];
	pthread_t thread;
	char byte;
	int fd;

	become_nobody();
	map_library(library);
	second = map_library(library);
	fd = open(file, O_RDONLY | O_CLOEXEC);
	uncached = open(file, O_RDONLY | O_CLOEXEC);
	page = fd < 0 ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		fail(file);
	if (clone(stay, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL) < 0)
		fail("hang: clone");
	if (write(done, "m", 1) != 1 || read(go, &byte, 1) != 1)
		exit(0);
	if (pthread_create(&thread, NULL, writer, NULL))
		exit(1);
	sink = (void *)(long)*(volatile char *)page;
	for (;;)
		pause();
}

static void be_mapped(const char *directory, int done)
{
	char path[4096];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (int i = 0; i < count; i++) {
		snprintf(path, sizeof(path), "%s/%d/lib.so", directory, i);
		map_library(path);
	}
	if (write(done, "m", 1) != 1)
		exit(1);
	for (;;)
		pause();
}

static void close_mounts(void)
{
	for (int i = 0; i < count; i++)
		if (mounts[i].fd >= 0)
			close(mounts[i].fd);
}

/* A user namespace in which the owner of /dev/fuse and nobody are known. */
static void enter_namespaces(void)
{
	int pipes[2];
	pid_t child, self = getpid();
	char byte, path[64];

	if (pipe(pipes))
		fail("pipe");
	child = fork();
	if (child == 0) {
		if (read(pipes[0], &byte, 1) != 1)
			_exit(1);
		snprintf(path, sizeof(path), "/proc/%d/uid_map", self);
		write_file(path, "0 0 1\n65534 65534 1\n");
		snprintf(path, sizeof(path), "/proc/%d/gid_map", self);
		write_file(path, "0 0 1\n65534 65534 1\n");
		_exit(0);
	}
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS))
		fail("hang: unshare");
	if (write(pipes[1], "g", 1) != 1)
		exit(1);
	waitpid(child, NULL, 0);
	close(pipes[0]);
	close(pipes[1]);
	if (setresgid(0, 0, 0) || setresuid(0, 0, 0))
		fail("hang: uid 0");
}

static void release_kept(void)
{
	is_free = 1;
	for (int i = 0; i < count; i++) {
		for (int k = 0; k < mounts[i].kept_count; k++) {
			serve(&mounts[i], mounts[i].kept[k], 0);
			free(mounts[i].kept[k]);
		}
		mounts[i].kept_count = 0;
	}
}

static int all_hang(void)
{
	for (int i = 0; i < count; i++)
		if (!mounts[i].kept_count)
			return 0;
	return 1;
}

static void turn(int timeout_ms)
{
	static char request[1 << 18];
	struct pollfd polled[MOST];
	ssize_t got;

	for (int i = 0; i < count; i++)
		polled[i] = (struct pollfd){.fd = mounts[i].fd, .events = POLLIN};
	if (poll(polled, count, timeout_ms) <= 0)
		return;
	for (int i = 0; i < count; i++) {
		if (!polled[i].revents)
			continue;
		got = read(mounts[i].fd, request, sizeof(request));
		if (got >= (ssize_t)sizeof(struct fuse_in_header))
			serve(&mounts[i], request, got);
	}
}

/* Whether a byte or the end of a pipe is there; the file systems are served meanwhile. */
static int wait_byte(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};
	char byte;

	while (poll(&polled, 1, 0) == 0)
		turn(1);
	return read(fd, &byte, 1) == 1;
}

static void obey(const int *go)
{
	struct pollfd polled = {.fd = 0, .events = POLLIN};
	char line[64];
	int length = 0;
	int waits = 0;

	for (;;) {
		turn(1);
		if (waits && all_hang()) {
			usleep(300000); /* until the second thread waits for the lock, too */
			say("hung\n");
			waits = 0;
		}
		if (poll(&polled, 1, 0) <= 0)
			continue;
		if (read(0, line + length, 1) != 1)
			exit(0);
		if (line[length++] != '\n')
			continue;
		line[length - 1] = 0;
		length = 0;
		if (!strcmp(line, "hang")) {
			must_hang = waits = 1;
			for (int i = 0; i < count; i++)
				if (write(go[i], "g", 1) != 1)
					exit(1);
		} else if (!strcmp(line, "free")) {
			release_kept();
			say("free\n");
		}
	}
}

int main(int argc, char **words)
{
	char path[4096], text[64];
	int go[MOST], pipes[2], done[2];
	pid_t child;

	if (argc < 4)
		return 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	is_maps = !strcmp(words[1], "maps");
	is_lock = is_maps || !strcmp(words[1], "lock");
	load(words[3]);
	count = argc > 4 ? atoi(words[4]) : 1;
	if (count < 1 || count > MOST || pipe2(done, O_CLOEXEC))
		return 1;
	for (int i = 0; i < MOST; i++)
		mounts[i].fd = -1;
	if (is_lock)
		enter_namespaces();
	else if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
		fail("hang: own mounts");
	for (int i = 0; i < count; i++) {
		snprintf(path, sizeof(path), "%s/%d", words[2], i);
		if (mkdir(path, 0755) && errno != EEXIST)
			fail(path);
		mounts[i].fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
		if (mounts[i].fd < 0)
			fail("/dev/fuse");
		mount_at(path, mounts[i].fd, is_lock ? NOBODY : 0);
	}
	for (int i = 0; i < (is_lock ? count : 1); i++) {
		if (pipe2(pipes, O_CLOEXEC))
			fail("pipe");
		child = fork();
		if (child == 0) {
			close_mounts();
			close(pipes[1]);
			snprintf(path, sizeof(path), "%s/%d/lib.so", words[2], i);
			if (is_lock)
				be_locked(path, words[3], pipes[0], done[1]);
			else
				be_mapped(words[2], done[1]);
		}
		close(pipes[0]);
		go[i] = pipes[1];
		for (int k = 0; k < count; k++)
			mounts[k].owner = child;
		if (!wait_byte(done[0]))
			return 1;
		snprintf(text, sizeof(text), "pid %d\n", child);
		say(text);
	}
	obey(go);
}
