/* churn THREADS ROUNDS LIBRARY...
 * Threads that open and close libraries at once, each starting with another one. Every open is
 * paired with a close, so at the end none of the libraries is mapped. Prints the number of
 * opens. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static int library_count;
static char **libraries;
static long rounds;

static void *churn(void *number)
{
	long first = (long)number;

	for (long i = 0; i < rounds; i++) {
		const char *path = libraries[(first + i) % library_count];
		void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);

		if (!handle) {
			fprintf(stderr, "churn: %s\n", dlerror());
			exit(1);
		}
		dlclose(handle);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: churn THREADS ROUNDS LIBRARY...\n");
		return 2;
	}
	long threads = atol(argv[1]);
	pthread_t *running = calloc(threads, sizeof(*running));

	rounds = atol(argv[2]);
	library_count = argc - 3;
	libraries = argv + 3;
	for (long i = 0; i < threads; i++) {
		if (pthread_create(&running[i], NULL, churn, (void *)i)) {
			perror("pthread_create");
			return 1;
		}
	}
	for (long i = 0; i < threads; i++)
		pthread_join(running[i], NULL);
	printf("%ld\n", threads * rounds);
	return 0;
}
