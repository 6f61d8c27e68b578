/* ranges: a process whose mappings of a file fall into very many ranges, all within its own rights.
 *
 *   ranges split FILE COUNT          maps FILE executable and takes PROT_EXEC from every second page, so
 *                                    that COUNT executable ranges are left
 *   ranges files DIRECTORY COUNT     maps COUNT files of its own, one range each
 *   ranges churn FILE COUNT FILE2    as split, then two threads map and unmap FILE2 about 1,000 times a second
 *   ranges churnfiles DIRECTORY COUNT FILE2  the same after files
 *   ranges weave FILE COUNT FILE2    maps pages of the two by turns, COUNT of each
 *   ranges fork FILE COUNT CHILDREN  as split, then that many children that stay
 *
 * FILE is made, and made long enough, where it has to be. Prints "ready COUNT" and then waits for the end
 * of its standard input; "toggle" there makes the last range inexecutable, "drop" unmaps everything, and
 * each is answered with "done".
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int open_of(const char *path, unsigned long pages)
{
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0755);
	struct stat status;

	if (fd < 0 && (fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
		fail(path);
	if (fstat(fd, &status))
		fail(path);
	if ((unsigned long)status.st_size < pages * PAGE && ftruncate(fd, pages * PAGE))
		fail("ftruncate");
	return fd;
}

static char *split(const char *path, unsigned long count)
{
	int fd = open_of(path, 2 * count);
	char *at = mmap(NULL, 2 * count * PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	close(fd);
	for (unsigned long page = 1; page < 2 * count; page += 2)
		if (mprotect(at + page * PAGE, PAGE, PROT_READ))
			fail("mprotect");
	return at;
}

static void weave(const char *first, unsigned long count, const char *second)
{
	int fds[2] = {open_of(first, 2 * count), open_of(second, 2 * count)};
	char *at = mmap(NULL, 2 * count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	for (unsigned long page = 0; page < 2 * count; page++)
		if (mmap(at + page * PAGE, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fds[page % 2],
			 page * PAGE) == MAP_FAILED)
			fail("mmap");
}

static void map_files(const char *directory, unsigned long count)
{
	char path[4096];

	for (unsigned long number = 0; number < count; number++) {
		int fd;

		snprintf(path, sizeof(path), "%s/lib%lu.so", directory, number);
		fd = open_of(path, 1);
		if (mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED)
			fail("mmap");
		close(fd);
	}
}

static void *churn(void *argument)
{
	const struct timespec pause = {.tv_nsec = 1000000};
	int fd = open_of(argument, 1);

	for (;;) {
		void *at = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);

		if (at != MAP_FAILED)
			munmap(at, PAGE);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned long count = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
	const char *how = argc > 3 ? argv[1] : "";
	char line[64], *at = NULL;

	signal(SIGCHLD, SIG_IGN);
	if (!strcmp(how, "files") || (argc > 4 && !strcmp(how, "churnfiles"))) {
		map_files(argv[2], count);
	} else if (argc > 4 && !strcmp(how, "weave")) {
		weave(argv[2], count, argv[4]);
	} else if (!strcmp(how, "split") || (argc > 4 && (!strcmp(how, "churn") || !strcmp(how, "fork")))) {
		at = split(argv[2], count);
	} else {
		fprintf(stderr, "usage: see the head of ranges.c\n");
		return 2;
	}
	for (int thread = 0; !strncmp(how, "churn", 5) && thread < 2; thread++) {
		pthread_t id;

		if (pthread_create(&id, NULL, churn, argv[4]))
			fail("pthread_create");
	}
	for (long child = 0; !strcmp(how, "fork") && child < strtol(argv[4], NULL, 10); child++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (!pid) {
			/* Until the parent's end of standard input: all hold the same pipe. */
			while (read(0, line, sizeof(line)) > 0)
				;
			_exit(0);
		}
	}
	printf("ready %lu\n", count);
	fflush(stdout);
	if (!strcmp(how, "fork"))
		for (;;)
			if (read(0, line, sizeof(line)) <= 0)
				return 0;
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "toggle\n")) {
			if (!at || mprotect(at + 2 * (count - 1) * PAGE, PAGE, PROT_READ))
				fail("toggle");
		} else if (!strcmp(line, "drop\n")) {
			if (!at || munmap(at, 2 * count * PAGE))
				fail("drop");
		}
		puts("done");
		fflush(stdout);
	}
	return 0;
}
