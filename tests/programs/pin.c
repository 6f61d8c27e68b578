/* pin PID ADDRESS: holds the address space of a process, as whoever reads /proc/PID/maps does for a
 * moment, for as long as the test wants. No luck is needed: it reads /proc/PID/mem into a page that
 * a userfaultfd of its own never fills, and the kernel lets go of the address space only after that.
 *
 * Answers "ok" once it holds, and lets go when its input ends.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

static char *page;
static const char *pid, *address;

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static void *read_memory(void *unused)
{
	char path[64];
	int fd;

	(void)unused;
	snprintf(path, sizeof(path), "/proc/%s/mem", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || pread(fd, page, 1, strtoul(address, NULL, 16)) != 1)
		fail("pin: read");
	return NULL;
}

int main(int count, char **words)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register area = {.mode = UFFDIO_REGISTER_MODE_MISSING};
	struct pollfd faults = {.events = POLLIN};
	pthread_t thread;
	char byte;

	if (count != 3)
		return 1;
	pid = words[1];
	address = words[2];
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	area.range.start = (unsigned long)page;
	area.range.len = PAGE;
	faults.fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (faults.fd < 0 || ioctl(faults.fd, UFFDIO_API, &api) || ioctl(faults.fd, UFFDIO_REGISTER, &area))
		fail("pin: userfaultfd");
	if (pthread_create(&thread, NULL, read_memory, NULL) || poll(&faults, 1, -1) != 1)
		fail("pin: thread");
	if (write(1, "ok\n", 3) != 3 || read(0, &byte, 1) < 0)
		return 2;
	_exit(0);
}
