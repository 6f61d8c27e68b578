/* stall: one thread is held inside a system call, after its work is done and before it returns,
 * while a second thread changes the mappings and perhaps leaves. No luck is needed: a userfaultfd
 * of the process asks to be told of munmap and fork, and the kernel keeps the caller waiting, with
 * no lock held, until somebody has read that word.
 *
 *   stall unmap|fixed|fork|file X Y
 *
 * maps X executable (but for "file") and answers "ADDR FD": where, and its userfaultfd. Each line on
 * standard input is then obeyed and answered with a line:
 *   go     the first thread makes its call: unmaps X, maps anonymous memory over it, forks, or maps
 *          X only now. From here the second thread obeys; no answer
 *   map    the second thread maps Y where X is or was; elsewhere for "file"    -> "ok"
 *   drop   it unmaps what is in that place                    -> "ok"
 *   leave  it ends                                            -> "ok"
 * Once the test has read the event the first thread answers "done [CHILD]" and waits for the end
 * of its input. The child waits to be killed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

static char *base;
static const char *other;
static int is_file;

static void *map(void *at, int protection, int flags, const char *path)
{
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *got = mmap(at, PAGE, protection, MAP_PRIVATE | flags | (path ? 0 : MAP_ANONYMOUS), fd, 0);

	if (got == MAP_FAILED) {
		perror("stall: mmap");
		exit(1);
	}
	if (path)
		close(fd);
	return got;
}

static void say(const char *text)
{
	if (write(1, text, strlen(text)) < 0)
		exit(2);
}

/* Reads a byte at a time, so that no thread takes another's line. */
static int read_line(char *line, int size)
{
	int length = 0;

	while (length < size - 1 && read(0, line + length, 1) == 1) {
		if (line[length] == '\n') {
			line[length] = 0;
			return 1;
		}
		length++;
	}
	return 0;
}

static void *second_thread(void *unused)
{
	char line[64];

	(void)unused;
	while (read_line(line, sizeof(line))) {
		if (!strcmp(line, "map")) {
			map(is_file ? NULL : base, PROT_READ | PROT_EXEC, is_file ? 0 : MAP_FIXED, other);
		} else if (!strcmp(line, "drop")) {
			munmap(base, is_file ? 2 * PAGE : PAGE);
		} else if (!strcmp(line, "leave")) {
			say("ok\n");
			return NULL;
		}
		say("ok\n");
	}
	return NULL;
}

static int watch_page(void *at)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_UNMAP};
	struct uffdio_register area = {.range = {(unsigned long)at, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &area)) {
		perror("stall: userfaultfd");
		exit(1);
	}
	return fd;
}

int main(int count, char **words)
{
	char line[64], text[64];
	pthread_t thread;
	pid_t child = 0;
	int fd;

	if (count != 4)
		return 1;
	other = words[3];
	is_file = !strcmp(words[1], "file");
	base = mmap(NULL, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!is_file)
		map(base, PROT_READ | PROT_EXEC, MAP_FIXED, words[2]);
	map(base + PAGE, PROT_READ | PROT_WRITE, MAP_FIXED, NULL);
	fd = watch_page(base + PAGE);
	snprintf(text, sizeof(text), "%lx %d\n", (unsigned long)base, fd);
	say(text);
	if (!read_line(line, sizeof(line)))
		return 0;
	if (pthread_create(&thread, NULL, second_thread, NULL))
		return 1;
	if (!strcmp(words[1], "unmap"))
		munmap(base, 2 * PAGE);
	else if (!strcmp(words[1], "fixed"))
		mmap(base, 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	else if (is_file)
		mmap(base, 2 * PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, open(words[2], O_RDONLY), 0);
	else
		child = fork();
	if (child == 0 && !strcmp(words[1], "fork")) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	snprintf(text, sizeof(text), "done %d\n", child);
	say(text);
	/* The second thread goes on to obey, unless it has left. */
	pthread_join(thread, NULL);
	while (read_line(line, sizeof(line)))
		;
	return 0;
}
