/* crowd COUNT [LIBRARY...]
 * COUNT processes that open the libraries and then sleep, for as long as standard input of the
 * first one stays open. Each is executed anew, as a service would be, not just forked. Prints
 * "ready" once every process has opened everything. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Child: fd 0 is a pipe that ends when the first process does, fd 1 takes one byte at readiness. */
static int stay(char **libraries)
{
	char nothing;

	for (; *libraries; libraries++) {
		if (!dlopen(*libraries, RTLD_NOW)) {
			fprintf(stderr, "crowd: %s\n", dlerror());
			return 1;
		}
	}
	if (write(1, "r", 1) != 1)
		return 1;
	close(1);
	return read(0, &nothing, 1) != 0;
}

int main(int argc, char **argv)
{
	int life[2], readiness[2];
	char byte;

	if (argc >= 2 && !strcmp(argv[1], "--member"))
		return stay(argv + 2);
	if (argc < 2) {
		fprintf(stderr, "usage: crowd COUNT [LIBRARY...]\n");
		return 2;
	}
	long count = atol(argv[1]);

	argv[1] = "--member";
	if (pipe2(life, O_CLOEXEC) || pipe2(readiness, O_CLOEXEC)) {
		perror("pipe");
		return 1;
	}
	for (long i = 0; i < count; i++) {
		pid_t child = fork();

		if (child < 0) {
			perror("fork");
			return 1;
		}
		if (child == 0) {
			dup2(life[0], 0);
			dup2(readiness[1], 1);
			execv("/proc/self/exe", argv);
			_exit(127);
		}
	}
	close(life[0]);
	close(readiness[1]);
	for (long i = 0; i < count; i++) {
		if (read(readiness[0], &byte, 1) != 1) {
			fprintf(stderr, "crowd: %ld processes ended before they were ready\n", count - i);
			return 1;
		}
	}
	puts("ready");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	close(life[1]);
	while (wait(NULL) > 0)
		;
	return 0;
}
