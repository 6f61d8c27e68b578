/* callloop LIBRARY FUNCTION: calls int FUNCTION(const char *) of a library as it is told, one command a line.
 *   run N          calls it N times; answers with the ns of one call
 *   pace N RATE    calls it N times, RATE times a second; answers with the ns of one call
 * Prints its pid and the address of the function first.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000L + now.tv_nsec;
}

int main(int argc, char **argv)
{
	int (*function)(const char *);
	long count, rate, since;
	char line[128];
	void *library;

	if (argc != 3)
		return 2;
	library = dlopen(argv[1], RTLD_NOW);
	function = library ? (int (*)(const char *))dlsym(library, argv[2]) : NULL;
	if (!function) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("%d %lu\n", getpid(), (unsigned long)function);
	while (fgets(line, sizeof(line), stdin)) {
		since = now_ns();
		if (sscanf(line, "run %ld", &count) == 1) {
			for (long i = 0; i < count; i++)
				function("GET /index.html HTTP/1.1");
		} else if (sscanf(line, "pace %ld %ld", &count, &rate) == 2) {
			for (long i = 0; i < count; i++) {
				while (now_ns() - since < i * 1000000000L / rate)
					;
				function("GET /index.html HTTP/1.1");
			}
		} else {
			return 2;
		}
		printf("%ld\n", count ? (now_ns() - since) / count : 0);
	}
	return 0;
}
