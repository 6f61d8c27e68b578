/* actor: one packet on fd 0 (a SOCK_SEQPACKET socket) is one command, answered with one packet:
 * "ok [RESULT...]" or "error REASON". Unlike mapper it places mappings where it is told, has threads
 * that map at a gentle pace, and makes every kind of child controllable: a command that makes one
 * comes with a descriptor, which becomes the child's fd 0. As packets are never buffered, several
 * commands may be sent ahead, an exec among them.
 *
 * Words are separated by blanks, numbers are as strtoull takes them, protections are r, rx or none.
 * A process greets with "ok PID TID START END", the last two the executable part of its program.
 *
 *   map FILE PROT AT PAGES SKIP shared|private    AT 0: anywhere, else MAP_FIXED        -> AT
 *   memfd NAME FILE AT PAGES      maps a memfd that holds a copy of FILE                -> AT MAJOR MINOR INODE
 *   anon AT PAGES                 MAP_FIXED
 *   unmap AT PAGES
 *   protect AT PAGES PROT         pkeyprotect AT PAGES PROT
 *   remap AT PAGES NEW_PAGES TO|0 move|keep       keep: MREMAP_DONTUNMAP                -> AT
 *   dlopen FILE -> HANDLE START END (of its executable part)     dlclose HANDLE
 *   fork, clonevm, spawn          a child                                               -> PID
 *   orphan                        a grandchild whose parent has ended                   -> PID
 *   vfork FILE|-                  a child that executes this program; maps FILE before  -> PID AT
 *   brief FILE COUNT              children that map FILE and end, one after the other   -> PID...
 *   exec, execthread              this program anew, in place; the greeting is the answer
 *   leaderexit                    the main thread ends, another one goes on             -> TID
 *   loop map|fixed|protect FILE PAUSE_US          a thread that maps and unmaps FILE until told to stop
 *   stop                          ends all of those                                     -> ROUNDS
 *   exit
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MAX_WORDS 16
#define MAX_PACKET 1024
#define MAX_LOOPS 8
#define CLONE_STACK (256 * 1024)
/* Where threads of `loop fixed` work, far from everything. */
#define LOOP_BASE 0x200000000000ul

extern char **environ;

/* What a process has for itself even if it shares its memory: passed along, never global. */
struct actor {
	int received; /* the descriptor that came with the command, or -1 */
	int count;
	pthread_t threads[MAX_LOOPS];
	_Atomic int stopping;
	_Atomic long rounds;
};

/* ---- packets ----------------------------------------------------------------------------------- */

static void __attribute__((format(printf, 1, 2))) answer(const char *format, ...)
{
	char packet[MAX_PACKET];
	va_list rest;

	va_start(rest, format);
	int length = vsnprintf(packet, sizeof(packet), format, rest);
	va_end(rest);
	if (send(0, packet, length, MSG_NOSIGNAL) != length)
		_exit(3);
}

static void refuse(const char *what)
{
	answer("error %s: %s", what, strerror(errno));
}

static void plain(int failed, const char *what)
{
	if (failed)
		refuse(what);
	else
		answer("ok");
}

static int receive(struct actor *me, char *packet)
{
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec text = {packet, MAX_PACKET - 1};
	struct msghdr message = {
		.msg_iov = &text, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
	ssize_t length = recvmsg(0, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *extra = CMSG_FIRSTHDR(&message);

	if (length <= 0)
		return 0;
	packet[length] = 0;
	me->received = -1;
	if (extra && extra->cmsg_type == SCM_RIGHTS)
		memcpy(&me->received, CMSG_DATA(extra), sizeof(int));
	return 1;
}

static int greet_about_program(struct dl_phdr_info *info, size_t size, void *unused)
{
	(void)size, (void)unused;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];
		unsigned long start = info->dlpi_addr + part->p_vaddr;

		if (part->p_type == PT_LOAD && part->p_flags & PF_X)
			answer("ok %d %d %#lx %#lx", getpid(), gettid(), start & -PAGE,
			       (start + part->p_memsz + PAGE - 1) & -PAGE);
	}
	return 1; /* the program comes first, and nothing else is asked for */
}

/* A child takes its own socket, and has none of its parent's threads. */
static void begin_child(struct actor *me)
{
	dup2(me->received, 0);
	close(me->received);
	me->received = -1;
	me->count = 0;
	me->rounds = 0;
	dl_iterate_phdr(greet_about_program, NULL);
}

/* ---- mappings ---------------------------------------------------------------------------------- */

static unsigned long number(const char *word)
{
	return strtoull(word, NULL, 0);
}

static void *address(const char *word)
{
	return (void *)number(word);
}

static int protection(const char *word)
{
	return !strcmp(word, "rx") ? PROT_READ | PROT_EXEC : !strcmp(word, "r") ? PROT_READ : PROT_NONE;
}

static void *map_file(int fd, int prot, const char *at, const char *pages, const char *skip, int sharing)
{
	void *where = address(at);

	return mmap(where, number(pages) * PAGE, prot, sharing | (where ? MAP_FIXED : 0), fd, number(skip) * PAGE);
}

static void do_map(char **words)
{
	int fd = open(words[1], O_RDONLY | O_CLOEXEC);
	int sharing = !strcmp(words[6], "shared") ? MAP_SHARED : MAP_PRIVATE;
	void *at = map_file(fd, protection(words[2]), words[3], words[4], words[5], sharing);

	if (at == MAP_FAILED)
		refuse("map");
	else
		answer("ok %p", at);
	close(fd);
}

static void do_memfd(char **words)
{
	int from = open(words[2], O_RDONLY | O_CLOEXEC);
	int fd = memfd_create(words[1], MFD_CLOEXEC);
	struct stat about;
	void *at;

	if (fstat(from, &about) || sendfile(fd, from, NULL, about.st_size) != about.st_size || fstat(fd, &about)) {
		refuse("memfd");
	} else {
		at = map_file(fd, PROT_READ | PROT_EXEC, words[3], words[4], "0", MAP_PRIVATE);
		if (at == MAP_FAILED)
			refuse("mmap");
		else
			answer("ok %p %u %u %lu", at, major(about.st_dev), minor(about.st_dev), about.st_ino);
	}
	close(from);
	close(fd);
}

static void do_anon(char **words)
{
	void *at = mmap(address(words[1]), number(words[2]) * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	plain(at == MAP_FAILED, "anon");
}

static void do_protect(char **words, int with_key)
{
	void *at = address(words[1]);
	size_t length = number(words[2]) * PAGE;
	int prot = protection(words[3]);

	plain(with_key ? syscall(SYS_pkey_mprotect, at, length, prot, -1) : mprotect(at, length, prot), words[0]);
}

static void do_remap(char **words)
{
	int flags = MREMAP_MAYMOVE | (number(words[4]) ? MREMAP_FIXED : 0);
	void *at;

	if (!strcmp(words[5], "keep"))
		flags |= MREMAP_DONTUNMAP;
	at = mremap(address(words[1]), number(words[2]) * PAGE, number(words[3]) * PAGE, flags, address(words[4]));
	if (at == MAP_FAILED)
		refuse("remap");
	else
		answer("ok %p", at);
}

struct wanted_part {
	const struct link_map *library;
	unsigned long start, end;
};

static int find_part(struct dl_phdr_info *info, size_t size, void *given)
{
	struct wanted_part *wanted = given;

	(void)size;
	if (info->dlpi_addr != wanted->library->l_addr)
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];

		if (part->p_type != PT_LOAD || !(part->p_flags & PF_X))
			continue;
		wanted->start = (info->dlpi_addr + part->p_vaddr) & -PAGE;
		wanted->end = (info->dlpi_addr + part->p_vaddr + part->p_filesz + PAGE - 1) & -PAGE;
	}
	return 1;
}

static void do_dlopen(char **words)
{
	void *handle = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
	struct wanted_part part = {handle, 0, 0};

	if (!handle) {
		answer("error %s", dlerror());
		return;
	}
	dl_iterate_phdr(find_part, &part);
	answer("ok %p %#lx %#lx", handle, part.start, part.end);
}

/* ---- processes --------------------------------------------------------------------------------- */

static void serve(struct actor *me);

static void told_child(struct actor *me, pid_t pid, const char *how)
{
	close(me->received);
	if (pid < 0)
		refuse(how);
	else
		answer("ok %d", pid);
}

static void do_fork(struct actor *me)
{
	pid_t pid = fork();

	if (pid == 0)
		begin_child(me);
	else
		told_child(me, pid, "fork");
}

static void do_orphan(struct actor *me)
{
	pid_t *told = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t middle = fork();

	if (middle == 0) {
		pid_t pid = fork();

		if (pid == 0) {
			munmap(told, PAGE);
			begin_child(me);
			return;
		}
		*told = pid;
		_exit(0);
	}
	waitpid(middle, NULL, 0);
	told_child(me, *told, "fork");
	munmap(told, PAGE);
}

static int clone_main(void *received)
{
	/* The stack is all that is its own. */
	struct actor me = {.received = *(int *)received};

	begin_child(&me);
	serve(&me);
	return 0;
}

static void do_clonevm(struct actor *me)
{
	char *stack = malloc(CLONE_STACK); /* lives as long as the child may: never freed */
	int *received = (int *)stack;

	*received = me->received;
	told_child(me, clone(clone_main, stack + CLONE_STACK, CLONE_VM | SIGCHLD, received), "clone");
}

static void execute(void)
{
	/* /proc/self leads nowhere once the leader is dead. */
	execl("/proc/thread-self/exe", "actor", NULL);
	refuse("exec");
}

static void do_vfork(struct actor *me, const char *path)
{
	void *volatile at = NULL;
	pid_t pid = vfork();

	if (pid == 0) {
		if (strcmp(path, "-")) {
			int fd = open(path, O_RDONLY | O_CLOEXEC);

			at = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
		}
		dup2(me->received, 0);
		execute();
		_exit(127);
	}
	close(me->received);
	if (pid < 0)
		refuse("vfork");
	else
		answer("ok %d %p", pid, at);
}

static void do_spawn(struct actor *me)
{
	char *words[] = {"actor", NULL};
	posix_spawn_file_actions_t actions;
	pid_t pid;

	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, me->received, 0);
	errno = posix_spawn(&pid, "/proc/thread-self/exe", &actions, NULL, words, environ);
	posix_spawn_file_actions_destroy(&actions);
	told_child(me, errno ? -1 : pid, "posix_spawn");
}

static void do_brief(const char *path, int count)
{
	char pids[MAX_PACKET] = "";

	for (int i = 0; i < count; i++) {
		pid_t pid = fork();

		if (pid == 0) {
			int fd = open(path, O_RDONLY | O_CLOEXEC);

			mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
			_exit(0);
		}
		waitpid(pid, NULL, 0);
		sprintf(pids + strlen(pids), " %d", pid);
	}
	answer("ok%s", pids);
}

static void *execute_in_thread(void *unused)
{
	execute();
	return unused;
}

static void do_execthread(void)
{
	pthread_t other;

	pthread_create(&other, NULL, execute_in_thread, NULL);
	pthread_join(other, NULL);
}

static void *serve_in_thread(void *given)
{
	struct actor *me = given; /* its threads go on with it */
	char path[64], text[256], state = 0;

	/* Only once the leader is a zombie is its /proc entry what the test wants to look at. */
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", getpid());
	while (state != 'Z') {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t length = read(fd, text, sizeof(text) - 1);

		close(fd);
		text[length > 0 ? length : 0] = 0;
		state = strrchr(text, ')') ? strrchr(text, ')')[2] : 'Z';
	}
	answer("ok %d", gettid());
	serve(me);
	return NULL;
}

static void do_leaderexit(struct actor *me)
{
	pthread_t other;

	errno = pthread_create(&other, NULL, serve_in_thread, me);
	if (errno)
		refuse("thread");
	else
		syscall(SYS_exit, 0);
}

/* ---- threads that map and unmap ---------------------------------------------------------------- */

enum loop_kind { LOOP_MAP, LOOP_FIXED, LOOP_PROTECT };

struct loop {
	struct actor *me;
	enum loop_kind kind;
	int fd;
	useconds_t pause_us;
	void *at;
};

static void one_round(const struct loop *loop)
{
	int flags = MAP_PRIVATE | (loop->kind == LOOP_FIXED ? MAP_FIXED : 0);
	char *at =
		mmap(loop->kind == LOOP_FIXED ? loop->at : NULL, 3 * PAGE, PROT_READ | PROT_EXEC, flags, loop->fd, 0);

	if (loop->kind == LOOP_FIXED)
		mmap(at + PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (loop->kind == LOOP_PROTECT) {
		mprotect(at, 2 * PAGE, PROT_READ);
		mprotect(at, PAGE, PROT_READ | PROT_EXEC);
	}
	munmap(at, 3 * PAGE);
}

static void *run_loop(void *given)
{
	struct loop *loop = given;

	while (!loop->me->stopping) {
		one_round(loop);
		loop->me->rounds++;
		usleep(loop->pause_us);
	}
	close(loop->fd);
	free(loop);
	return NULL;
}

static void do_loop(struct actor *me, char **words)
{
	struct loop *loop = malloc(sizeof(*loop));

	loop->me = me;
	loop->kind = !strcmp(words[1], "map") ? LOOP_MAP : !strcmp(words[1], "fixed") ? LOOP_FIXED : LOOP_PROTECT;
	loop->fd = open(words[2], O_RDONLY | O_CLOEXEC);
	loop->pause_us = number(words[3]);
	/* Each thread of each process that may share this memory has a place of its own. */
	loop->at = (void *)(LOOP_BASE + ((unsigned long)getpid() * MAX_LOOPS + me->count) * 16 * PAGE);
	errno = me->count < MAX_LOOPS ? pthread_create(&me->threads[me->count], NULL, run_loop, loop) : EAGAIN;
	if (!errno)
		me->count++;
	plain(errno, "loop");
}

static void do_stop(struct actor *me)
{
	me->stopping = 1;
	while (me->count)
		pthread_join(me->threads[--me->count], NULL);
	me->stopping = 0;
	answer("ok %ld", atomic_exchange(&me->rounds, 0));
}

/* ---- commands ---------------------------------------------------------------------------------- */

static void obey(struct actor *me, char **words, int count)
{
#define IS(name, wanted) (!strcmp(words[0], name) && count == (wanted) + 1)
	if (IS("map", 6))
		do_map(words);
	else if (IS("memfd", 4))
		do_memfd(words);
	else if (IS("anon", 2))
		do_anon(words);
	else if (IS("unmap", 2))
		plain(munmap(address(words[1]), number(words[2]) * PAGE), "unmap");
	else if (IS("protect", 3))
		do_protect(words, 0);
	else if (IS("pkeyprotect", 3))
		do_protect(words, 1);
	else if (IS("remap", 5))
		do_remap(words);
	else if (IS("dlopen", 1))
		do_dlopen(words);
	else if (IS("dlclose", 1))
		plain(dlclose(address(words[1])), "dlclose");
	else if (IS("fork", 0))
		do_fork(me);
	else if (IS("orphan", 0))
		do_orphan(me);
	else if (IS("clonevm", 0))
		do_clonevm(me);
	else if (IS("vfork", 1))
		do_vfork(me, words[1]);
	else if (IS("spawn", 0))
		do_spawn(me);
	else if (IS("brief", 2))
		do_brief(words[1], number(words[2]));
	else if (IS("exec", 0))
		execute();
	else if (IS("execthread", 0))
		do_execthread();
	else if (IS("leaderexit", 0))
		do_leaderexit(me);
	else if (IS("loop", 3))
		do_loop(me, words);
	else if (IS("stop", 0))
		do_stop(me);
	else if (IS("exit", 0))
		_exit(0);
	else
		answer("error not a command, or not so many words: %s", words[0]);
#undef IS
}

static void serve(struct actor *me)
{
	char packet[MAX_PACKET], *words[MAX_WORDS];

	while (receive(me, packet)) {
		char *rest = packet;
		int count = 0;

		while (count < MAX_WORDS && (words[count] = strsep(&rest, " ")))
			count++;
		obey(me, words, count);
	}
	_exit(0);
}

int main(void)
{
	static struct actor me;

	dl_iterate_phdr(greet_about_program, NULL);
	serve(&me);
}
