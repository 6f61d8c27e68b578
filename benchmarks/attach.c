/* attach OBJECT PROGRAM...
 * Loads the named programs of a BPF object, attaches each where its section says, prints
 * "ready", and detaches when standard input ends. libbpf finds tracepoints through tracefs; where
 * that is not mounted it is, in a mount namespace of this process. */
#define _GNU_SOURCE
#include <bpf/libbpf.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

static int have_tracefs(void)
{
	if (!access("/sys/kernel/tracing/events", F_OK))
		return 1;
	return !unshare(CLONE_NEWNS) && !mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	       !mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, NULL);
}

static int is_wanted(const char *name, char **wanted)
{
	for (; *wanted; wanted++)
		if (!strcmp(name, *wanted))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	struct bpf_program *program;
	struct bpf_object *object;
	char nothing;

	if (argc < 3) {
		fprintf(stderr, "usage: attach OBJECT PROGRAM...\n");
		return 2;
	}
	if (!have_tracefs()) {
		perror("tracefs");
		return 1;
	}
	object = bpf_object__open(argv[1]);
	if (!object) {
		perror(argv[1]);
		return 1;
	}
	bpf_object__for_each_program(program, object)
		bpf_program__set_autoload(program, is_wanted(bpf_program__name(program), argv + 2));
	if (bpf_object__load(object)) {
		perror("load");
		return 1;
	}
	bpf_object__for_each_program(program, object)
	{
		if (bpf_program__autoload(program) && !bpf_program__attach(program)) {
			perror(bpf_program__name(program));
			return 1;
		}
	}
	puts("ready");
	fflush(stdout);
	while (read(0, &nothing, 1) > 0)
		;
	return 0; /* the kernel closes the links, and with them goes everything */
}
