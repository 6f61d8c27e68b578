/* SPDX-License-Identifier: Apache-2.0 */
/* Waits for a signal. With a file: maps its first page executable before. */
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int count, char **words)
{
	if (count > 1) {
		int fd = open(words[1], O_RDONLY | O_CLOEXEC);

		if (fd < 0 || mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED)
			return 1;
		close(fd);
	}
	/* Of a container it is process 1, which no signal ends without a handler. */
	for (;;)
		pause();
}
