/* disguise ROLE LIBRARY [EXE]: maps LIBRARY executable, and then says of itself what is not so; says
 * "ok" and waits for the end of its standard input. Needs no capability but where it is said.
 *
 *   interpreter LIBRARY   its auxiliary vector says that LIBRARY is the interpreter (AT_BASE), its
 *                         stat that the code is there, its name and arguments that it is another one
 *   over LIBRARY          maps LIBRARY where the interpreter was, which AT_BASE says rightly
 *   executable LIBRARY    unmaps its own program and makes LIBRARY its exe link, in a user namespace
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

/* linux/prctl.h, which cannot be included beside sys/prctl.h everywhere. */
struct mm_map {
	unsigned long long start_code, end_code, start_data, end_data, start_brk, brk, start_stack;
	unsigned long long arg_start, arg_end, env_start, env_end;
	unsigned long long *auxv;
	unsigned int auxv_size, exe_fd;
};

static void check(int is_fine, const char *what)
{
	if (!is_fine) {
		printf("error %s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static void read_map(struct mm_map *map)
{
	unsigned long long fields[52] = {0};
	char text[4096], *at;
	FILE *file = fopen("/proc/self/stat", "r");

	check(file && fgets(text, sizeof(text), file), "stat");
	fclose(file);
	at = strrchr(text, ')') + 2;
	for (int field = 3; field < 52 && at; field++) {
		fields[field] = strtoull(at, NULL, 10);
		at = strchr(at, ' ');
		at = at ? at + 1 : NULL;
	}
	map->start_code = fields[26];
	map->end_code = fields[27];
	map->start_stack = fields[28];
	map->start_data = fields[45];
	map->end_data = fields[46];
	map->start_brk = fields[47];
	map->brk = (unsigned long long)sbrk(0);
	map->arg_start = fields[48];
	map->arg_end = fields[49];
	map->env_start = fields[50];
	map->env_end = fields[51];
	map->exe_fd = -1;
}

static unsigned long long vector[64];

static void read_auxv(struct mm_map *map)
{
	int fd = open("/proc/self/auxv", O_RDONLY);
	ssize_t size = read(fd, vector, sizeof(vector));

	check(fd >= 0 && size > 0, "auxv");
	close(fd);
	map->auxv = vector;
	map->auxv_size = size;
}

static void disguise(struct mm_map *map, char *library)
{
	read_auxv(map);
	for (unsigned int i = 0; i < map->auxv_size / sizeof(*vector); i += 2)
		if (vector[i] == AT_BASE)
			vector[i + 1] = (unsigned long long)library;
	map->start_code = (unsigned long long)library;
	map->end_code = map->start_code + PAGE;
	check(!prctl(PR_SET_MM, PR_SET_MM_MAP, map, sizeof(*map), 0), "PR_SET_MM_MAP");
	prctl(PR_SET_NAME, "ld.so");
	memcpy((char *)map->arg_start, "ld.so", 6);
}

#ifdef __x86_64__

/* Nothing of this program may be mapped any more when the kernel is asked, so this stands alone. */
__attribute__((noinline, noclone, section(".alone"), optimize("no-stack-protector"))) static long
leave(struct mm_map *map, char *from, unsigned long length, char *library, unsigned long page)
{
	long ret;

	(void)library;
	(void)page;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(SYS_munmap), "D"(from), "S"(length) : "rcx", "r11", "memory");
	__asm__ volatile("xor %%r8d, %%r8d; mov %2, %%r10; syscall"
			 : "=a"(ret)
			 : "a"(SYS_prctl), "r"((long)sizeof(*map)), "D"(PR_SET_MM), "S"(PR_SET_MM_MAP), "d"(map)
			 : "rcx", "r8", "r10", "r11", "memory");
	/* "ok\n", or the number of the error. */
	*(volatile char *)page = ret ? 'e' : 'o';
	*(volatile char *)(page + 1) = ret ? '0' + (char)(-ret / 10) : 'k';
	*(volatile char *)(page + 2) = ret ? '0' + (char)(-ret % 10) : '\n';
	*(volatile char *)(page + 3) = '\n';
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(SYS_write), "D"(1), "S"(page), "d"(ret ? 4 : 3)
			 : "rcx", "r11", "memory");
	__asm__ volatile("syscall" : "=a"(ret) : "a"(SYS_read), "D"(0), "S"(page), "d"(1) : "rcx", "r11", "memory");
	__asm__ volatile("syscall" : "=a"(ret) : "a"(SYS_exit_group), "D"(0) : "rcx", "r11", "memory");
	return ret;
}

#else

static long leave(struct mm_map *map, char *from, unsigned long length, char *library, unsigned long page)
{
	(void)map, (void)from, (void)length, (void)library, (void)page;
	errno = ENOSYS;
	check(0, "leaving the program, which is written for x86-64");
	return 0;
}

#endif

static int program_of(struct dl_phdr_info *info, size_t size, void *found)
{
	unsigned long *range = found, low = ~0UL, high = 0;

	(void)size;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		if (info->dlpi_phdr[i].p_type != PT_LOAD)
			continue;
		unsigned long start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;

		low = start < low ? start : low;
		high = start + info->dlpi_phdr[i].p_memsz > high ? start + info->dlpi_phdr[i].p_memsz : high;
	}
	range[0] = low & ~(PAGE - 1UL);
	range[1] = (high + PAGE - 1) & ~(PAGE - 1UL);
	return 1; /* the first is the program */
}

int main(int count, char **words)
{
	struct mm_map *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const char *role = count > 2 ? words[1] : "";
	int fd = count > 2 ? open(words[2], O_RDONLY | O_CLOEXEC) : -1;
	char *library, rest;

	setvbuf(stdout, NULL, _IOLBF, 0);
	check(fd >= 0, "open");
	if (!strcmp(role, "over")) {
		/* The rest of ld.so is not needed any more: this program binds at its start. */
		char *base = (char *)getauxval(AT_BASE);

		library = mmap(base, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, 0);
		check(library != MAP_FAILED, role);
	} else {
		library = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
		check(library != MAP_FAILED, role);
		read_map(map);
		if (!strcmp(role, "executable")) {
			unsigned long program[2];
			char *copy = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS,
					  -1, 0);
			char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			char *more;

			check(!unshare(CLONE_NEWUSER), "unshare");
			read_auxv(map);
			more = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			memcpy(more, vector, sizeof(vector));
			map->auxv = (void *)more;
			map->exe_fd = fd;
			dl_iterate_phdr(program_of, program);
			memcpy(copy, (void *)leave, 1024);
			((long (*)(struct mm_map *, char *, unsigned long, char *, unsigned long))copy)(
				map, (char *)program[0], program[1] - program[0], library, (unsigned long)page);
		}
		disguise(map, library);
	}
	printf("ok\n");
	if (read(STDIN_FILENO, &rest, 1) < 0)
		return 1;
	_exit(0);
}
