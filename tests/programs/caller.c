/* caller: calls functions of libraries as it is told, one command a line, and answers each with `ok`.
 *   open PATH          dlopen
 *   call NAME N COUNT  calls int NAME(int) of the library opened last COUNT times with N
 *   threads NAME COUNT THREADS   each of so many threads calls it so often
 *   close              dlclose
 *   fork               goes on in a child; the parent exits
 *   sandbox            from now on only a few system calls are allowed; any other one ends the process
 */
#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef int function(int);

static function *target;
static long rounds;

static void *work(void *unused)
{
	(void)unused;
	for (long i = 0; i < rounds; i++)
		target(0);
	return NULL;
}

/* A filter as services have them: what is not on the list ends the process. */
static int enter_sandbox(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getpid, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};

	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

int main(void)
{
	char line[8192], name[4096];
	void *library = NULL;
	long value, count;
	int threads;

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("ok %d\n", getpid());
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "open %4095[^\n]", name) == 1) {
			library = dlopen(name, RTLD_NOW);
			if (!library) {
				printf("error %s\n", dlerror());
				continue;
			}
		} else if (sscanf(line, "call %4095s %ld %ld", name, &value, &count) == 3) {
			target = (function *)dlsym(library, name);
			for (long i = 0; i < count; i++)
				target((int)value);
		} else if (sscanf(line, "threads %4095s %ld %d", name, &count, &threads) == 3) {
			pthread_t made[64];

			target = (function *)dlsym(library, name);
			rounds = count;
			for (int i = 0; i < threads; i++)
				pthread_create(&made[i], NULL, work, NULL);
			for (int i = 0; i < threads; i++)
				pthread_join(made[i], NULL);
		} else if (!strncmp(line, "close", 5)) {
			dlclose(library);
		} else if (!strncmp(line, "sandbox", 7)) {
			if (enter_sandbox()) {
				printf("error no filter\n");
				continue;
			}
		} else if (!strncmp(line, "fork", 4)) {
			if (fork())
				_exit(0);
			setsid();
		} else {
			printf("error %s", line);
			continue;
		}
		printf("ok %d\n", getpid());
	}
	return 0;
}
