/* hostile: works against whoever watches, as nobody, until its input ends.
 *
 *   hostile ranges FILE    maps FILE executable and takes the right from every second page, again and again
 *   hostile flood FILE     two threads map and unmap FILE as fast as they can, beside 2,000 mappings of it
 *   hostile forks FILE     three threads map and unmap FILE, and each forks children that do so and end
 *   hostile spawns FILE    starts programs (posix_spawn of this one with "end") one after the other, FILE mapped
 *   hostile shares FILE    children that share the address space (CLONE_VM) map FILE and end, one after the other
 *
 * Answers "on" when it has begun, and ends with all its children when its input does.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define NOBODY 65534
#define PAGE 4096
#define PAGES 20000

extern char **environ;

static const char *file;
static int fd;

static void *map_file(size_t pages)
{
	return mmap(NULL, pages * PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
}

static void map_and_unmap(int times)
{
	for (int i = 0; i < times; i++) {
		void *got = map_file(1);

		if (got != MAP_FAILED)
			munmap(got, PAGE);
	}
}

static void *ranges(void *unused)
{
	(void)unused;
	for (;;) {
		char *got = map_file(PAGES);

		for (size_t i = 0; got != MAP_FAILED && i < PAGES; i += 2)
			mprotect(got + i * PAGE, PAGE, PROT_READ);
		if (got != MAP_FAILED)
			munmap(got, PAGES * PAGE);
	}
	return NULL;
}

static void *flood(void *unused)
{
	(void)unused;
	for (;;)
		map_and_unmap(1000);
	return NULL;
}

static void *forks(void *unused)
{
	(void)unused;
	for (;;) {
		pid_t child = fork();

		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			map_and_unmap(20);
			_exit(0);
		}
		map_and_unmap(20);
		if (child > 0)
			waitpid(child, NULL, 0);
	}
	return NULL;
}

static void *spawns(void *unused)
{
	char *words[] = {"hostile", "end", "-", NULL};
	pid_t child;

	(void)unused;
	for (;;)
		if (!posix_spawn(&child, "/proc/self/exe", NULL, NULL, words, environ))
			waitpid(child, NULL, 0);
	return NULL;
}

static int share(void *unused)
{
	void *got = map_file(1);

	(void)unused;
	if (got != MAP_FAILED)
		munmap(got, PAGE);
	return 0;
}

static void *shares(void *unused)
{
	char *stack = malloc(1 << 16);

	(void)unused;
	for (;;) {
		pid_t child = clone(share, stack + (1 << 16), CLONE_VM | SIGCHLD, NULL);

		if (child > 0)
			waitpid(child, NULL, 0);
	}
	return NULL;
}

static const struct {
	const char *name;
	void *(*run)(void *);
	int threads;
	int mappings;
} ways[] = {
	{"ranges", ranges, 1, 0}, {"flood", flood, 2, 2000}, {"forks", forks, 3, 1},
	{"spawns", spawns, 1, 1}, {"shares", shares, 1, 1},
};

int main(int count, char **words)
{
	pthread_t thread;
	char byte;

	if (count != 3)
		return 1;
	if (!strcmp(words[1], "end"))
		return 0;
	file = words[2];
	if (getuid() == 0 && (setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY)))
		return 1;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 1;
	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		if (strcmp(words[1], ways[i].name))
			continue;
		for (int k = 0; k < ways[i].mappings; k++)
			map_file(1);
		for (int k = 0; k < ways[i].threads; k++)
			if (pthread_create(&thread, NULL, ways[i].run, NULL))
				return 1;
		if (write(1, "on\n", 3) != 3)
			return 1;
		while (read(0, &byte, 1) == 1)
			;
		_exit(0);
	}
	return 1;
}
