/* The threads of mapper: those that map and unmap beside its main thread, and the dup2 race. */
#define _GNU_SOURCE
#include "mapper.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_THREADS 64

static _Atomic int stopping;
static _Atomic long rounds;
static pthread_t threads[MAX_THREADS];
static int thread_count;

/* A forked child has none of its parent's threads. */
void forget_threads(void)
{
	thread_count = 0;
}

static void *thread_loop(void *path)
{
	while (!stopping && !map_and_unmap(path))
		rounds++;
	return NULL;
}

static void *thread_anon(void *unused)
{
	(void)unused;
	while (!stopping) {
		char *at = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (at == MAP_FAILED)
			break;
		memset(at, 1, 65536);
		munmap(at, 65536);
		rounds++;
	}
	return NULL;
}

static void *thread_idle(void *unused)
{
	(void)unused;
	while (!stopping)
		usleep(1000);
	return NULL;
}

static void thread_stop(void)
{
	stopping = 1;
	while (thread_count)
		pthread_join(threads[--thread_count], NULL);
	stopping = 0;
	answer("ok %ld", atomic_exchange(&rounds, 0));
}

void do_thread(char **words)
{
	void *(*body)(void *) = !strcmp(words[1], "loop")   ? thread_loop
				: !strcmp(words[1], "anon") ? thread_anon
							    : thread_idle;

	if (!strcmp(words[1], "stop")) {
		thread_stop();
		return;
	}
	if (thread_count == MAX_THREADS) {
		answer("error too many threads");
		return;
	}
	/* The path must outlive this command; a test starts few threads, so it is never freed. */
	errno = pthread_create(&threads[thread_count], NULL, body, words[2] ? strdup(words[2]) : NULL);
	if (errno) {
		refuse("thread");
		return;
	}
	thread_count++;
	answer("ok");
}

struct dup2_race {
	int source[2], target;
	_Atomic int over;
};

static void *dup2_over(void *given)
{
	struct dup2_race *race = given;

	for (unsigned i = 0; !race->over; i++)
		dup2(race->source[i & 1], race->target);
	return NULL;
}

/* Which file a mapping really came from is read from its bytes, which no race can change. */
void do_dup2race(char **words)
{
	struct dup2_race race = {{open(words[1], O_RDONLY), open(words[2], O_RDONLY)}, -1, 0};
	size_t length = length_of(race.source[0]);
	long times[2] = {0, 0}, count = number(words[3]);
	int last = 0;
	void *at = NULL, *first;
	pthread_t other;

	if (race.source[0] < 0 || race.source[1] < 0 || length_of(race.source[1]) != length) {
		answer("error the two files must exist and be of one length");
		return;
	}
	race.target = dup(race.source[0]);
	first = mmap(NULL, length, PROT_READ, MAP_PRIVATE, race.source[0], 0);
	pthread_create(&other, NULL, dup2_over, &race);
	for (long i = 0; i < count; i++) {
		if (at)
			munmap(at, length);
		at = mmap(NULL, length, PROT_READ | PROT_EXEC, MAP_PRIVATE, race.target, 0);
		if (at == MAP_FAILED)
			break;
		last = memcmp(at, first, length) != 0;
		times[last]++;
	}
	race.over = 1;
	pthread_join(other, NULL);
	munmap(first, length);
	close(race.source[0]);
	close(race.source[1]);
	close(race.target);
	answer("ok %s %lx %zu %ld %ld", last ? "b" : "a", (unsigned long)at, length, times[0], times[1]);
}
