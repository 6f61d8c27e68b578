/* loadloop FILE [CPU]
 * Measures system calls of one thread. Each line on standard input, "MODE BATCHES PAIRS", is one
 * measurement, so that one process (one layout of memory, which matters more than what is being
 * measured) serves all that are compared. MODE:
 *   exec     mmap(PROT_READ|PROT_EXEC) of FILE and munmap
 *   file     mmap(PROT_READ) of FILE and munmap
 *   anon     anonymous mmap and munmap
 *   open     open of FILE and close
 *   getppid  one getppid
 * Answers each with one JSON object; times are ns for each pair (or call), CLOCK_MONOTONIC, of
 * the least and of the middle batch. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1e9 + at.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void map_pairs(int fd, int prot, int flags, long count)
{
	for (long i = 0; i < count; i++) {
		void *at = mmap(NULL, 4096, prot, flags, fd, 0);

		if (at == MAP_FAILED)
			fail("mmap");
		munmap(at, 4096);
	}
}

static void open_and_close(const char *path, long count)
{
	for (long i = 0; i < count; i++) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			fail("open");
		close(fd);
	}
}

static void run(const char *mode, const char *path, int fd, long count)
{
	if (!strcmp(mode, "exec"))
		map_pairs(fd, PROT_READ | PROT_EXEC, MAP_PRIVATE, count);
	else if (!strcmp(mode, "file"))
		map_pairs(fd, PROT_READ, MAP_PRIVATE, count);
	else if (!strcmp(mode, "anon"))
		map_pairs(-1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, count);
	else if (!strcmp(mode, "open"))
		open_and_close(path, count);
	else
		for (long i = 0; i < count; i++)
			syscall(SYS_getppid);
}

static void measure(const char *mode, const char *path, int fd, long batches, long pairs)
{
	double *spent = calloc(batches, sizeof(*spent));

	run(mode, path, fd, pairs);
	for (long i = 0; i < batches; i++) {
		double start = now_ns();

		run(mode, path, fd, pairs);
		spent[i] = (now_ns() - start) / pairs;
	}
	qsort(spent, batches, sizeof(*spent), by_value);
	printf("{\"mode\":\"%s\",\"batches\":%ld,\"pairs\":%ld,\"min_ns\":%.2f,\"median_ns\":%.2f}\n", mode, batches,
	       pairs, spent[0], spent[batches / 2]);
	fflush(stdout);
	free(spent);
}

int main(int argc, char **argv)
{
	long batches, pairs;
	char mode[16];

	if (argc < 2) {
		fprintf(stderr, "usage: loadloop FILE [CPU]\n");
		return 2;
	}
	int fd = open(argv[1], O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail(argv[1]);
	if (argc > 2) {
		cpu_set_t cpus;

		CPU_ZERO(&cpus);
		CPU_SET(atoi(argv[2]), &cpus);
		if (sched_setaffinity(0, sizeof(cpus), &cpus))
			fail("sched_setaffinity");
	}
	while (scanf("%15s %ld %ld", mode, &batches, &pairs) == 3) {
		if (!strstr("exec file anon open getppid", mode) || batches < 1 || pairs < 1) {
			fprintf(stderr, "loadloop: not a measurement: %s %ld %ld\n", mode, batches, pairs);
			return 2;
		}
		measure(mode, argv[1], fd, batches, pairs);
	}
	return 0;
}
