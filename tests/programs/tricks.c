/* tricks: gets a file mapped executable, or rid of, by a way that is easy to overlook; says
 * "ok ADDR LEN" and waits for the end of its standard input. One argument names the way:
 *
 *   implied FILE        mmap without PROT_EXEC under personality(READ_IMPLIES_EXEC)
 *   implied-protect FILE    mprotect to PROT_READ, the same
 *   hole FILE           mprotect over FILE and the hole after it: fails, but not before FILE
 *   behind FILE         mprotect over anonymous memory and FILE after it
 *   second FIRST FILE   mprotect over two files at once
 *   double FILE         mremap of a shared mapping from length 0 makes a second one; the first goes
 *   shmdt               SysV memory with SHM_EXEC comes and goes
 *   shmdt-implied       the same without SHM_EXEC, under personality(READ_IMPLIES_EXEC)
 *   device              a shared mapping of /dev/zero, which the kernel gives a file of its own
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/shm.h>
#include <unistd.h>

#define PAGE 4096

static void check(int is_fine, const char *what)
{
	if (!is_fine) {
		printf("error %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static char *map(void *at, int protection, int flags, const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	char *got = mmap(at, PAGE, protection, flags, fd, 0);

	check(fd >= 0 && got != MAP_FAILED, path);
	close(fd);
	return got;
}

/* Three pages that nothing else uses; the third stays a hole. */
static char *room(void)
{
	char *at = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(at != MAP_FAILED, "room");
	munmap(at + PAGE, 2 * PAGE);
	return at;
}

int main(int count, char **words)
{
	const char *way = count > 1 ? words[1] : "";
	const char *file = count > 2 ? words[count - 1] : "/dev/null";
	char *at = room();
	char rest;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(way, "implied")) {
		check(personality(READ_IMPLIES_EXEC) >= 0, way);
		map(at, PROT_READ, MAP_PRIVATE | MAP_FIXED, file);
	} else if (!strcmp(way, "implied-protect")) {
		map(at, PROT_NONE, MAP_PRIVATE | MAP_FIXED, file);
		check(personality(READ_IMPLIES_EXEC) >= 0, way);
		check(!mprotect(at, PAGE, PROT_READ), way);
	} else if (!strcmp(way, "hole")) {
		map(at, PROT_READ, MAP_PRIVATE | MAP_FIXED, file);
		check(mprotect(at, 2 * PAGE, PROT_READ | PROT_EXEC) && errno == ENOMEM, way);
	} else if (!strcmp(way, "behind")) {
		map(at + PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file);
		check(!mprotect(at, 2 * PAGE, PROT_READ | PROT_EXEC), way);
		at += PAGE;
	} else if (!strcmp(way, "second")) {
		map(at, PROT_READ, MAP_PRIVATE | MAP_FIXED, words[2]);
		map(at + PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, file);
		check(!mprotect(at, 2 * PAGE, PROT_READ | PROT_EXEC), way);
		at += PAGE;
	} else if (!strcmp(way, "double")) {
		char *first = map(at, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, file);

		at = mremap(first, 0, PAGE, MREMAP_MAYMOVE);
		check(at != MAP_FAILED, way);
		munmap(first, PAGE);
	} else if (!strncmp(way, "shmdt", 5)) {
		int is_implied = way[5], id = shmget(IPC_PRIVATE, PAGE, IPC_CREAT | 0700);

		check(!is_implied || personality(READ_IMPLIES_EXEC) >= 0, way);
		at = id < 0 ? (void *)-1 : shmat(id, NULL, is_implied ? 0 : SHM_EXEC);
		shmctl(id, IPC_RMID, NULL);
		check(at != (void *)-1, way);
		printf("ok %lx %d\n", (unsigned long)at, PAGE);
		check(read(0, &rest, 1) == 1 && !shmdt(at), way);
	} else if (!strcmp(way, "device")) {
		at = map(NULL, PROT_READ | PROT_EXEC, MAP_SHARED, "/dev/zero");
	} else {
		check(0, "no such way");
	}
	printf("ok %lx %d\n", (unsigned long)at, PAGE);
	return read(0, &rest, 1) < 0;
}
