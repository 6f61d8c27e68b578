/* storm WORKERS COUNT PROGRAM [ARGS...]
 * Runs COUNT copies of PROGRAM as fast as WORKERS processes can fork, exec and wait for them;
 * worker i keeps to CPU i (modulo the CPUs there are). Prints one JSON object: wall seconds,
 * and the CPU seconds of everything it ran. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now_s(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static double seconds(struct timeval spent)
{
	return spent.tv_sec + spent.tv_usec / 1e6;
}

static void keep_to_cpu(long number)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(number % sysconf(_SC_NPROCESSORS_ONLN), &cpus);
	sched_setaffinity(0, sizeof(cpus), &cpus);
}

static int work(long count, char **command)
{
	for (long i = 0; i < count; i++) {
		int status;
		pid_t child = fork();

		if (child < 0) {
			perror("fork");
			return 1;
		}
		if (child == 0) {
			execv(command[0], command);
			perror(command[0]);
			_exit(127);
		}
		if (waitpid(child, &status, 0) < 0 || status != 0) {
			fprintf(stderr, "storm: a child ended with status %d\n", status);
			return 1;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct rusage used;
	int failed = 0, status;

	if (argc < 4) {
		fprintf(stderr, "usage: storm WORKERS COUNT PROGRAM [ARGS...]\n");
		return 2;
	}
	long workers = atol(argv[1]), count = atol(argv[2]);
	double start = now_s();

	for (long i = 0; i < workers; i++) {
		pid_t worker = fork();

		if (worker < 0) {
			perror("fork");
			return 1;
		}
		if (worker == 0) {
			keep_to_cpu(i);
			_exit(work(count / workers + (i < count % workers), argv + 3));
		}
	}
	while (wait(&status) > 0)
		failed |= status;
	double wall = now_s() - start;

	getrusage(RUSAGE_CHILDREN, &used);
	printf("{\"processes\":%ld,\"seconds\":%.4f,\"user_s\":%.4f,\"system_s\":%.4f}\n", count, wall,
	       seconds(used.ru_utime), seconds(used.ru_stime));
	return failed != 0;
}
