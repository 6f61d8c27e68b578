/* speaker: calls functions of its own for each line it reads, and answers each with `ok`.
 *   say TEXT       say(TEXT, its length, a pointer that leads nowhere)
 *   literal        the same with a string of the program's that nothing has touched before
 *   title N        gives a string
 *   leave          calls a function that never returns, and ends
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline, noclone, visibility("default")))

/* Alone on pages of the file that nobody has read. */
static const char untouched[16384] __attribute__((aligned(4096))) = {[8192] = 'l', 'a', 't', 'e'};

NOINLINE int say(const char *text, long size, const char *nowhere)
{
	__asm__ volatile("" : : "r"(nowhere) : "memory");
	return (int)size + (text[0] == 'l');
}

NOINLINE const char *title(int number)
{
	__asm__ volatile("" ::: "memory");
	return number ? "one" : NULL;
}

NOINLINE void leave(int code)
{
	__asm__ volatile("" ::: "memory");
	_exit(code);
}

NOINLINE int relay(const char *text)
{
	int result = say(text, (long)strlen(text), (const char *)16);

	__asm__ volatile("" ::: "memory");
	return result;
}

int main(void)
{
	char line[512];

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("ok %d\n", getpid());
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		if (!strncmp(line, "say ", 4))
			relay(line + 4);
		else if (!strcmp(line, "literal"))
			say(untouched + 8192, -1, NULL);
		else if (!strncmp(line, "title ", 6))
			title(atoi(line + 6));
		else
			leave(3);
		printf("ok %d\n", getpid());
	}
	return 0;
}
