/* mapper: does one thing to its own mappings for each line on standard input, and answers each
 * with one line on standard output: "ok [RESULT...]" or "error REASON". Tests drive it step by
 * step, so that they know what is mapped at every moment.
 *
 * Words are separated by tabs; \t, \n and \\ stand for those bytes in a word. Addresses are
 * hexadecimal, lengths decimal or 0x.... Commands:
 *
 *   map FILE [exec|noexec|write] [shared] [at ADDR] [len N] [offset N]    -> ADDR LEN
 *                        (default exec and private; "at" replaces what is there: MAP_FIXED)
 *   anon LEN [exec] [at ADDR]                                    -> ADDR LEN
 *   memfd NAME FILE      maps a memfd holding a copy of FILE     -> ADDR LEN
 *   shm LEN              attaches SysV memory with SHM_EXEC      -> ADDR LEN
 *   unmap ADDR LEN
 *   protect ADDR LEN r|rx|rw|rwx        pkeyprotect ADDR LEN r|rx|rw|rwx
 *   remap ADDR OLD_LEN NEW_LEN [TO]                              -> ADDR NEW_LEN
 *   shmdt ADDR
 *   dlopen FILE -> HANDLE               dlclose HANDLE
 *   fork SOCKET          a child that takes commands from the unix socket  -> PID
 *   clonevm SOCKET       the same, sharing this address space (CLONE_VM)   -> PID
 *   vfork FILE [ARGS]    vfork and exec                          -> PID
 *   spawn FILE [ARGS]    posix_spawn                             -> PID
 *   wait PID                                                     -> STATUS
 *   exec FILE [ARGS]     in place; "ok" comes before it
 *   execthread FILE [ARGS]   in place, from a thread that is not the leader
 *   loop FILE COUNT [PAUSE_US]   maps FILE executable and unmaps it, COUNT times
 *   thread loop FILE     a thread that does that until told to stop
 *   thread anon FILE     a thread that maps, touches and unmaps anonymous memory
 *   thread idle FILE     a thread that sleeps
 *   thread stop          ends all of them                        -> ROUNDS
 *   dup2race A B COUNT   maps an fd COUNT times while a thread dup2s A and B over it; keeps
 *                        the last mapping      -> a|b ADDR LEN, TIMES_A TIMES_B
 *   leaderexit           the main thread ends, another one goes on answering
 *   exit CODE
 */
#define _GNU_SOURCE
#include "mapper.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_WORDS 64
#define MAX_LINE 16384
#define CLONE_STACK (256 * 1024)

extern char **environ;

/* A CLONE_VM child shares every variable, so input and output go through no buffer but the
 * caller's stack, and each process has its own socket as fd 0 and 1. */

void answer(const char *format, ...)
{
	char line[512];
	va_list rest;

	va_start(rest, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, rest);
	va_end(rest);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (write(1, line, length) != length)
		_exit(3);
}

void refuse(const char *what)
{
	answer("error %s: %s", what, strerror(errno));
}

static int read_line(char *line)
{
	int length = 0;

	while (length < MAX_LINE - 1) {
		if (read(0, line + length, 1) != 1)
			return -1;
		if (line[length] == '\n')
			break;
		length++;
	}
	line[length] = 0;
	return length;
}

static void unescape(char *word)
{
	char *to = word;

	for (; *word; word++) {
		if (*word == '\\' && word[1]) {
			word++;
			*to++ = *word == 't' ? '\t' : *word == 'n' ? '\n' : *word;
		} else {
			*to++ = *word;
		}
	}
	*to = 0;
}

static int split(char *line, char **words)
{
	int count = 0;
	char *rest = line;

	while (count < MAX_WORDS - 1 && (words[count] = strsep(&rest, "\t")))
		unescape(words[count++]);
	words[count] = NULL;
	return count;
}

static void *address(const char *word)
{
	return (void *)strtoull(word, NULL, 16);
}

size_t number(const char *word)
{
	return strtoull(word, NULL, 0);
}

static int protection(const char *word)
{
	return (strchr(word, 'r') ? PROT_READ : 0) | (strchr(word, 'w') ? PROT_WRITE : 0) |
	       (strchr(word, 'x') ? PROT_EXEC : 0);
}

/* --- mappings --------------------------------------------------------------------------- */

static void told_mapping(void *at, size_t length)
{
	if (at == MAP_FAILED)
		refuse("mmap");
	else
		answer("ok %lx %zu", (unsigned long)at, length);
}

size_t length_of(int fd)
{
	struct stat about;

	return fstat(fd, &about) ? 0 : (size_t)about.st_size;
}

static void do_map(char **words)
{
	int prot = PROT_READ | PROT_EXEC, flags = MAP_PRIVATE;
	size_t length = 0, offset = 0;
	void *at = NULL;

	for (char **word = words + 2; *word; word++) {
		if (!strcmp(*word, "noexec")) {
			prot = PROT_READ;
		} else if (!strcmp(*word, "write")) {
			prot = PROT_READ | PROT_WRITE;
		} else if (!strcmp(*word, "shared")) {
			flags = (flags & ~MAP_PRIVATE) | MAP_SHARED;
		} else if (!strcmp(*word, "at") && word[1]) {
			at = address(*++word);
			flags |= MAP_FIXED;
		} else if (!strcmp(*word, "len") && word[1]) {
			length = number(*++word);
		} else if (!strcmp(*word, "offset") && word[1]) {
			offset = number(*++word);
		} else if (strcmp(*word, "exec")) {
			answer("error unknown word %s", *word);
			return;
		}
	}
	int fd = open(words[1], O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		refuse(words[1]);
		return;
	}
	if (!length)
		length = length_of(fd) - offset;
	told_mapping(mmap(at, length, prot, flags, fd, offset), length);
	close(fd);
}

static void do_anon(char **words)
{
	int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	size_t length = number(words[1]);
	void *at = NULL;

	for (char **word = words + 2; *word; word++) {
		if (!strcmp(*word, "exec")) {
			prot |= PROT_EXEC;
		} else if (!strcmp(*word, "at") && word[1]) {
			at = address(*++word);
			flags |= MAP_FIXED;
		}
	}
	told_mapping(mmap(at, length, prot, flags, -1, 0), length);
}

static void do_memfd(char **words)
{
	int from = open(words[2], O_RDONLY | O_CLOEXEC);
	int fd = memfd_create(words[1], MFD_CLOEXEC);
	size_t length = from < 0 ? 0 : length_of(from);

	if (from < 0 || fd < 0 || sendfile(fd, from, NULL, length) != (ssize_t)length)
		refuse("memfd");
	else
		told_mapping(mmap(NULL, length, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0), length);
	close(from);
	close(fd);
}

static void do_shm(char **words)
{
	size_t length = number(words[1]);
	int id = shmget(IPC_PRIVATE, length, IPC_CREAT | 0700);
	void *at = id < 0 ? MAP_FAILED : shmat(id, NULL, SHM_EXEC);

	if (id >= 0)
		shmctl(id, IPC_RMID, NULL); /* goes with the last one attached */
	told_mapping(at, length);
}

static void do_protect(char **words, int with_key)
{
	void *at = address(words[1]);
	size_t length = number(words[2]);
	int prot = protection(words[3]);
	long failed = with_key ? syscall(SYS_pkey_mprotect, at, length, prot, -1) : mprotect(at, length, prot);

	if (failed)
		refuse(words[0]);
	else
		answer("ok");
}

static void do_remap(char **words)
{
	size_t length = number(words[3]);
	void *at = words[4] ? mremap(address(words[1]), number(words[2]), length, MREMAP_MAYMOVE | MREMAP_FIXED,
				     address(words[4]))
			    : mremap(address(words[1]), number(words[2]), length, MREMAP_MAYMOVE);

	told_mapping(at, length);
}

int map_and_unmap(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	void *at = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);

	close(fd);
	return at == MAP_FAILED || munmap(at, 4096);
}

/* --- processes -------------------------------------------------------------------------- */

static void serve(void);

static int connect_to(const char *path)
{
	struct sockaddr_un where = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	strncpy(where.sun_path, path, sizeof(where.sun_path) - 1);
	if (fd < 0 || connect(fd, (struct sockaddr *)&where, sizeof(where)))
		return -1;
	return fd;
}

static int child(void *path)
{
	int fd = connect_to(path);

	if (fd < 0)
		_exit(4);
	dup2(fd, 0);
	dup2(fd, 1);
	close(fd);
	answer("ok %d", getpid());
	serve();
	return 0;
}

static void do_fork(char **words)
{
	pid_t pid = fork();

	if (pid == 0) {
		forget_threads();
		_exit(child(words[1]));
	}
	if (pid < 0)
		refuse("fork");
	else
		answer("ok %d", pid);
}

static void do_clonevm(char **words)
{
	char *stack = malloc(CLONE_STACK); /* lives as long as the child may: never freed */
	pid_t pid = clone(child, stack + CLONE_STACK, CLONE_VM | SIGCHLD, strdup(words[1]));

	if (pid < 0)
		refuse("clone");
	else
		answer("ok %d", pid);
}

static void do_vfork(char **words)
{
	pid_t pid = vfork();

	if (pid == 0) {
		execv(words[1], words + 1);
		_exit(127);
	}
	if (pid < 0)
		refuse("vfork");
	else
		answer("ok %d", pid);
}

static void do_spawn(char **words)
{
	pid_t pid;

	errno = posix_spawn(&pid, words[1], NULL, NULL, words + 1, environ);
	if (errno)
		refuse("posix_spawn");
	else
		answer("ok %d", pid);
}

static void do_wait(char **words)
{
	int status;

	if (waitpid(number(words[1]), &status, 0) < 0)
		refuse("waitpid");
	else
		answer("ok %d", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

static void do_exec(char **words)
{
	answer("ok");
	execv(words[1], words + 1);
	refuse("exec");
}

static void *exec_in_thread(void *words)
{
	do_exec(words);
	return NULL;
}

static void do_execthread(char **words)
{
	pthread_t other;

	pthread_create(&other, NULL, exec_in_thread, words);
	pthread_join(other, NULL);
}

static void *serve_in_thread(void *leader)
{
	char path[64], state = 0;

	/* Only once the leader is a zombie is its /proc entry what the test wants to look at. */
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)(intptr_t)leader);
	while (state != 'Z') {
		char text[256] = "";
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		char *end;

		if (fd < 0)
			break;
		if (read(fd, text, sizeof(text) - 1) < 0)
			text[0] = 0;
		close(fd);
		end = strrchr(text, ')');
		state = end && end[1] ? end[2] : 0;
	}
	answer("ok %d", (int)syscall(SYS_gettid));
	serve();
	exit(0);
}

static void do_leaderexit(void)
{
	pthread_t other;

	errno = pthread_create(&other, NULL, serve_in_thread, (void *)(intptr_t)getpid());
	if (errno) {
		refuse("thread");
		return;
	}
	syscall(SYS_exit, 0);
}

/* --- commands --------------------------------------------------------------------------- */

static void do_dlopen(char **words)
{
	void *handle = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);

	if (handle)
		answer("ok %lx", (unsigned long)handle);
	else
		answer("error %s", dlerror());
}

static void do_dlclose(char **words)
{
	if (dlclose(address(words[1])))
		answer("error %s", dlerror());
	else
		answer("ok");
}

static void do_loop(char **words)
{
	long count = number(words[2]);
	useconds_t pause_us = words[3] ? number(words[3]) : 0;

	for (long i = 0; i < count; i++) {
		if (map_and_unmap(words[1])) {
			refuse(words[1]);
			return;
		}
		if (pause_us)
			usleep(pause_us);
	}
	answer("ok");
}

static void plain(int failed, const char *what)
{
	if (failed)
		refuse(what);
	else
		answer("ok");
}

static void obey(char **words, int count)
{
#define IS(name, least) (!strcmp(words[0], name) && count > (least))
	if (IS("map", 1))
		do_map(words);
	else if (IS("anon", 1))
		do_anon(words);
	else if (IS("memfd", 2))
		do_memfd(words);
	else if (IS("shm", 1))
		do_shm(words);
	else if (IS("unmap", 2))
		plain(munmap(address(words[1]), number(words[2])), "munmap");
	else if (IS("shmdt", 1))
		plain(shmdt(address(words[1])), "shmdt");
	else if (IS("protect", 3))
		do_protect(words, 0);
	else if (IS("pkeyprotect", 3))
		do_protect(words, 1);
	else if (IS("remap", 3))
		do_remap(words);
	else if (IS("dlopen", 1))
		do_dlopen(words);
	else if (IS("dlclose", 1))
		do_dlclose(words);
	else if (IS("fork", 1))
		do_fork(words);
	else if (IS("clonevm", 1))
		do_clonevm(words);
	else if (IS("vfork", 1))
		do_vfork(words);
	else if (IS("spawn", 1))
		do_spawn(words);
	else if (IS("wait", 1))
		do_wait(words);
	else if (IS("exec", 1))
		do_exec(words);
	else if (IS("execthread", 1))
		do_execthread(words);
	else if (IS("loop", 2))
		do_loop(words);
	else if (IS("thread", 1))
		do_thread(words);
	else if (IS("dup2race", 3))
		do_dup2race(words);
	else if (IS("leaderexit", 0))
		do_leaderexit();
	else if (IS("exit", 1))
		_exit(number(words[1]));
	else
		answer("error unknown command, or too few words: %s", words[0]);
#undef IS
}

static void serve(void)
{
	char line[MAX_LINE], *words[MAX_WORDS];

	while (read_line(line) >= 0)
		obey(words, split(line, words));
	_exit(0);
}

int main(void)
{
	answer("ok %d", getpid());
	serve();
}
