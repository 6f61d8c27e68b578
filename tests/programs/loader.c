/* loader LIBRARY...
 * Opens each library and exits: the shortest life of a process that a watcher has to see.
 * Compiled with -DLINKED against tiny_library it needs no argument: ld.so maps the library
 * before main. */
#include <dlfcn.h>
#include <stdio.h>

#ifdef LINKED
int tiny_answer(void);
#endif

int main(int argc, char **argv)
{
#ifdef LINKED
	if (tiny_answer() != 42)
		return 1;
#endif
	for (int i = 1; i < argc; i++) {
		if (!dlopen(argv[i], RTLD_NOW)) {
			fprintf(stderr, "loader: %s\n", dlerror());
			return 1;
		}
	}
	return 0;
}
