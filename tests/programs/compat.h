/*
 * Given with -include: from then on every change of the mappings is made by int $0x80, as a 32-bit program
 * makes it, in a program that is 64-bit. What is mapped lies below 4 GiB.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/shm.h>

static inline long compat_call(long number, long one, long two, long three, long four, long five, long six)
{
	register long sixth __asm__("r12") = six;
	long result;

	/* The sixth argument goes in rbp, which the compiler may be using. */
	__asm__ volatile("xchg %%rbp, %1\n\tint $0x80\n\txchg %%rbp, %1"
			 : "=a"(result), "+r"(sixth)
			 : "a"(number), "b"(one), "c"(two), "d"(three), "S"(four), "D"(five)
			 : "memory", "cc", "r8", "r9", "r10", "r11");
	result = (int32_t)result;
	if (result < 0 && result > -4096) {
		errno = -result;
		return -1;
	}
	return (uint32_t)result;
}

static inline void *compat_place(long result)
{
	return result == -1 ? MAP_FAILED : (void *)result;
}

static inline void *compat_mmap(void *at, size_t length, int protection, int flags, int fd, long offset)
{
	return compat_place(compat_call(192, (long)at, length, protection, flags, fd, offset >> 12));
}

static inline int compat_munmap(void *at, size_t length)
{
	return compat_call(91, (long)at, length, 0, 0, 0, 0);
}

static inline int compat_mprotect(void *at, size_t length, int protection)
{
	return compat_call(125, (long)at, length, protection, 0, 0, 0);
}

static inline void *compat_mremap(void *at, size_t length, size_t new_length, int flags, ...)
{
	__builtin_va_list rest;
	void *target = 0;

	__builtin_va_start(rest, flags);
	if (flags & MREMAP_FIXED)
		target = __builtin_va_arg(rest, void *);
	__builtin_va_end(rest);
	return compat_place(compat_call(163, (long)at, length, new_length, flags, (long)target, 0));
}

static inline void *compat_shmat(int id, const void *at, int flags)
{
	return compat_place(compat_call(397, id, (long)at, flags, 0, 0, 0));
}

static inline int compat_shmdt(const void *at)
{
	return compat_call(398, (long)at, 0, 0, 0, 0, 0);
}

#define mmap compat_mmap
#define munmap compat_munmap
#define mprotect compat_mprotect
#define mremap compat_mremap
#define shmat compat_shmat
#define shmdt compat_shmdt
