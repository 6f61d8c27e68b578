/* oneshot LIBRARY NAME: loads a library, calls int NAME(int) of it once, and ends: a process that lives a millisecond. */
#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char **argv)
{
	int (*function)(int);
	void *library;

	if (argc != 3)
		return 2;
	library = dlopen(argv[1], RTLD_NOW);
	function = library ? (int (*)(int))dlsym(library, argv[2]) : NULL;
	if (!function) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	function(1);
	return 0;
}
