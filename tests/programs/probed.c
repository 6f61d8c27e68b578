/* A library with functions of the kinds that probes stumble over. */
#include <setjmp.h>

#define EXPORT __attribute__((visibility("default"), noinline))

static jmp_buf way_out;

EXPORT int plain(int value)
{
	__asm__ volatile("" ::: "memory");
	return value + 1;
}

/* Calls itself `depth` times: each call is one entry and one return. */
EXPORT int recursive(int depth)
{
	__asm__ volatile("" ::: "memory");
	return depth <= 0 ? 0 : 1 + recursive(depth - 1);
}

EXPORT int nested(int value)
{
	int inner = plain(value);

	__asm__ volatile("" ::: "memory");
	return inner + 1;
}

/* One instruction. */
__asm__(".globl only_return\n.type only_return, @function\nonly_return:\n\tret\n.size only_return, 1\n");

#ifdef __x86_64__
/* nop; mov $7,%eax; ret: an instruction begins at 0, 1 and 6. */
__asm__(".globl two_steps\n.type two_steps, @function\ntwo_steps:\n\tnop\n\tmov $7, %eax\n\tret\n"
	".size two_steps, .-two_steps\n");
/* Leaves by a jump, as compilers make a call that comes last. */
__asm__(".globl jumps_away\n.type jumps_away, @function\njumps_away:\n\tnop\n\tjmp only_return\n"
	".size jumps_away, .-jumps_away\n");
__asm__(".globl locked\n.type locked, @function\nlocked:\n\tlock addl $0, -4(%rsp)\n\tret\n"
	".size locked, .-locked\n");
#endif

EXPORT int jumps(int value)
{
	__asm__ volatile("" ::: "memory");
	if (value)
		longjmp(way_out, 1);
	return value;
}

/* Leaves `jumps` by longjmp each time. */
EXPORT int leaves(int times)
{
	volatile int left = times;

	if (setjmp(way_out) || left)
		while (left) {
			left--;
			if (!setjmp(way_out))
				jumps(1);
		}
	return 0;
}

static int resolved(void)
{
	return 7;
}

static int (*resolver(void))(void)
{
	return resolved;
}

EXPORT int indirect(void) __attribute__((ifunc("resolver")));
int data = 3;

/* Two hundred functions: many_000 to many_199. */
#define ONE(name)                                  \
	EXPORT int name(int value)                 \
	{                                          \
		__asm__ volatile("" ::: "memory"); \
		return value;                      \
	}
#define TEN(name)    \
	ONE(name##0) \
	ONE(name##1) \
	ONE(name##2) ONE(name##3) ONE(name##4) ONE(name##5) ONE(name##6) ONE(name##7) ONE(name##8) ONE(name##9)
#define HUNDRED(name) \
	TEN(name##0)  \
	TEN(name##1)  \
	TEN(name##2) TEN(name##3) TEN(name##4) TEN(name##5) TEN(name##6) TEN(name##7) TEN(name##8) TEN(name##9)
HUNDRED(many_0)
HUNDRED(many_1)

/* For .symtab only. */
__attribute__((noinline, used)) static int hidden(int value)
{
	__asm__ volatile("" ::: "memory");
	return value;
}

EXPORT int calls_hidden(int value)
{
	return hidden(value) + 1;
}
