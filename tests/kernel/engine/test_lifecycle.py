"""The ways a mapping comes and goes that ``test_programs``, ``test_races`` and ``test_identity`` do not have.

Each test tells the whole story of its processes by the events, and then asks the audit, which reads ``/proc``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.events import LibraryEvent
from sowatch.model.literals import KINDS
from support import bpfsys
from support.hostile import compile_c
from support.kernel import IN_OWN_MOUNTS, Ledger, executable_inodes, host_pid, with_prelude
from support.programs import Mapper

PAGE = 4096
PYTHON = "/usr/bin/python3"
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
Story = list[tuple[str, str | None]]

#: In the path of every file here, and of nobody else's: what other suites do at the same time is not watched.
OURS = f"sow-life-{os.getpid()}-"

#: What a program says and hears: a word when it got there, then nothing until it may go on.
COMMON = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static inline void *map(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	void *at = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	if (at == MAP_FAILED)
		_exit(9);
	close(fd);
	return at;
}
static inline void stay(void)
{
	char byte;
	while (read(0, &byte, 1) > 0)
		;
}
static inline void say(long number)
{
	char text[32];
	int length = snprintf(text, sizeof(text), "%ld\n", number);
	if (write(1, text, length) != length)
		_exit(8);
}
"""


def inode(path: Path) -> int:
    return path.stat().st_ino


def wait_story(ledger: Ledger, pid: int, number: int, expected: Story) -> None:
    """Waits for exactly this story of a file in a process."""
    ledger.wait_for(
        lambda: ledger.story(pid, number) == expected,
        lambda: f"the story of inode {number} in {pid} is {ledger.story(pid, number)}, not {expected}",
    )


def events_of(ledger: Ledger, pid: int, path: Path) -> list[LibraryEvent]:
    """Loads and unloads, in every process, of the file that this process had at ``path``; inode numbers come again."""
    file_id = next(one.library.id for one in ledger.of(pid) if one.library.id.inode == inode(path))
    reported = [one for one in ledger.events if isinstance(one, LibraryEvent) and one.library.id == file_id]
    return [one for one in reported if one.event in ("load", "unload")]


def is_right(ledger: Ledger, *pids: int) -> None:
    """The map and ``/proc`` agree on these processes."""
    assert [one for one in ledger.watcher.audit().differences if one.pid in pids] == []


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=OURS, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def long_ledger(schema: Any, deadline: Any) -> Iterator[Ledger]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    rule = Rule(f"{OURS}|^/memfd:in memory$", kind=KINDS, name="ours")
    with Ledger(rule, timeout_s=deadline(10), check=schema) as ledger:
        yield ledger
        ledger.stop()


@pytest.fixture
def run(scratch: Path, spawn: Any) -> Callable[..., subprocess.Popen[bytes]]:
    """``run(source, *words)`` compiles and starts a C program that says a line and waits on standard input."""
    made = 0

    def start_one(source: str, *words: object, flags: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        nonlocal made
        made += 1
        program = compile_c(COMMON + source, scratch / f"program{made}", *flags)
        return spawn([program, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    return start_one


def program_of(process: subprocess.Popen[bytes]) -> Path:
    """The file that the process runs."""
    return Path(os.readlink(f"/proc/{process.pid}/exe"))


def line(process: subprocess.Popen[bytes]) -> int:
    """The next number that the program says."""
    assert process.stdout
    said = process.stdout.readline()
    assert said, f"the program ended with {process.wait()}"
    return int(said)


# ---- fork, exec, exit ---------------------------------------------------------------------------


def test_a_daemon_that_forks_twice_while_its_parents_leave_keeps_what_they_mapped(
    ledger: Ledger, run: Any, library: NewLibrary
) -> None:
    new = library()
    first = run("int main(int c, char **v) { (void)c; map(v[1]); if (fork()) return 0; setsid(); if (fork()) return 0;"
                " say(getpid()); stay(); return 0; }", new)  # fmt: skip
    daemon = line(first)
    assert first.wait() == 0
    wait_story(ledger, first.pid, inode(new), [("load", "mmap"), ("unload", "exit")])
    wait_story(ledger, daemon, inode(new), [("load", "fork")])
    (middle,) = {one.process.pid for one in events_of(ledger, daemon, new)} - {first.pid, daemon}
    assert ledger.story(middle, inode(new)) == [("load", "fork"), ("unload", "exit")]
    is_right(ledger, daemon)
    first.stdin.close()
    wait_story(ledger, daemon, inode(new), [("load", "fork"), ("unload", "exit")])


@pytest.mark.parametrize("rights", ["PROT_READ | PROT_EXEC", "PROT_READ | PROT_WRITE | PROT_EXEC"])
def test_a_child_is_not_left_with_a_file_that_its_parent_kept_from_fork(
    ledger: Ledger, run: Any, library: NewLibrary, rights: str
) -> None:
    kept, copied = library("libkept.so"), library("libcopied.so")
    source = f"""int main(int c, char **v) {{
        void *at = map(v[1]); (void)c; map(v[2]);
        if (mprotect(at, 4096, {rights}) || madvise(at, 4096, MADV_DONTFORK)) return 1;
        pid_t child = fork(); if (!child) {{ pause(); _exit(0); }}
        say(child); stay(); kill(child, SIGKILL); return 0; }}"""
    parent = run(source, kept, copied)
    child = line(parent)
    ledger.wait_load(child, inode(copied))
    ledger.wait_for(lambda: inode(kept) not in ledger.inodes(child), "the child has a file that fork did not copy")
    assert inode(copied) in ledger.inodes(child)
    assert ledger.inodes(parent.pid) >= {inode(kept), inode(copied)}
    is_right(ledger, child)


def test_a_file_that_brk_took_away_is_found_by_the_audit_and_unloaded_by_the_next_scan(
    ledger: Ledger, run: Any, library: NewLibrary
) -> None:
    new = library()
    source = """int main(int c, char **v) {
        (void)c; say(1); getchar();
        char *top = sbrk(0); top += -(unsigned long)top & 4095; brk(top + 8192);
        int fd = open(v[1], O_RDONLY);
        if (mmap(top, 8192, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd, 0) != top) return 1;
        say(2); getchar(); if (brk(top)) return 2; say(3); getchar();
        mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_ANONYMOUS, -1, 0); stay(); return 0; }"""
    process = run(source, new)
    line(process)
    process.stdin.write(b"\n")
    process.stdin.flush()
    line(process)
    ledger.wait_load(process.pid, inode(new))
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert line(process) == 3

    def is_found() -> bool:
        """By the audit, which leaves out who is being scanned, or by a scan that had another reason."""
        found = [one.kind for one in ledger.watcher.audit().differences if one.pid == process.pid]
        return found == ["extra"] or inode(new) not in ledger.inodes(process.pid)

    ledger.wait_for(is_found, "the audit does not say that the file is gone")
    process.stdin.write(b"\n")
    process.stdin.flush()
    ledger.wait_unload(process.pid, inode(new))
    is_right(ledger, process.pid)


@pytest.mark.parametrize("how", ["exec", "execthread"])
def test_exec_from_any_thread_unloads_what_was_mapped_and_keeps_the_process(
    ledger: Ledger, start: Start, library: NewLibrary, how: str
) -> None:
    mapper, before, after = start(), library("libbefore.so"), library("libafter.so")
    mapper.map(before)
    if how == "execthread":
        mapper.emit("thread", "idle", "-")
    mapper.exec(how=how)
    mapper.map(after)
    wait_story(ledger, mapper.pid, inode(after), [("load", "mmap")])
    assert ledger.story(mapper.pid, inode(before)) == [("load", "mmap"), ("unload", "exec")]
    assert len({one.process.id for one in ledger.of(mapper.pid) if one.process}) == 1
    is_right(ledger, mapper.pid)


def test_a_process_that_has_ended_but_was_not_waited_for_has_nothing_mapped(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    parent, new = start(), library()
    with parent.fork() as child:
        child.map(new)
        child.exit()
        wait_story(ledger, child.pid, inode(new), [("load", "mmap"), ("unload", "exit")])
        assert Path(f"/proc/{child.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
        is_right(ledger, child.pid)


def test_children_that_are_gone_in_less_than_a_millisecond_are_told_whole(
    ledger: Ledger, run: Any, library: NewLibrary, deadline: Any
) -> None:
    new = library()
    source = """int main(int c, char **v) { (void)c; for (int i = 0; i < 300; i++) {
        pid_t pid = fork(); if (!pid) { map(v[1]); _exit(0); } waitpid(pid, NULL, 0); say(pid); } return 0; }"""
    parent = run(source, new, flags=("-static",))
    pids = [line(parent) for _ in range(300)]
    wait_story(ledger, pids[-1], inode(new), [("load", "mmap"), ("unload", "exit")])
    reported = events_of(ledger, pids[-1], new)
    loads = {one.process.id: one.t_ns for one in reported if one.event == "load"}
    unloads = {one.process.id: one.t_ns for one in reported if one.event == "unload"}
    assert sorted(one.pid for one in loads) == sorted(one.pid for one in unloads) == sorted(pids)
    assert min(unloads[one] - loads[one] for one in loads) < deadline(1_000_000), "none lived so short"


def test_what_a_vfork_child_maps_stays_mapped_in_its_parent(ledger: Ledger, run: Any, library: NewLibrary) -> None:
    new = library()
    parent = run("int main(int c, char **v) { (void)c; if (!vfork()) { map(v[1]); _exit(0); } say(1); stay(); }", new)
    line(parent)
    ledger.wait_load(parent.pid, inode(new))
    is_right(ledger, parent.pid)


def test_a_process_that_shares_only_the_descriptors_cannot_swap_the_file_of_a_mapping(
    ledger: Ledger, run: Any, library: NewLibrary
) -> None:
    first, second = library("liba.so"), library("libb.so")
    source = """int main(int c, char **v) {
        int a = open(v[1], O_RDONLY), b = open(v[2], O_RDONLY), target = dup(a); void *at = NULL; (void)c;
        pid_t child = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL);
        if (!child) for (unsigned i = 0;; i++) dup2(i & 1 ? a : b, target);
        for (int i = 0; i < 3000; i++) {
            if (at) munmap(at, 4096);
            at = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, target, 0); }
        kill(child, SIGKILL); waitpid(child, NULL, 0); say(1); stay(); return 0; }"""
    process = run(source, first, second)
    line(process)
    is_right(ledger, process.pid)
    mapped = executable_inodes(process.pid) & {inode(first), inode(second)}
    assert len(mapped) == 1
    ledger.wait_for(
        lambda: ledger.inodes(process.pid) - {inode(program_of(process))} == mapped,
        lambda: f"the map has {ledger.inodes(process.pid)}, the process {mapped}",
    )


def test_a_pid_that_is_used_again_at_once_is_another_process(ledger: Ledger, run: Any, library: NewLibrary) -> None:
    first, second = library("libfirst.so"), library("libsecond.so")
    # clone3 with a chosen pid (5.5+). Somebody else may take the number in between: then once more.
    source = """struct arguments { unsigned long long flags, pidfd, child_tid, parent_tid, exit_signal, stack,
            stack_size, tls, set_tid, set_tid_size, cgroup; };
        int main(int c, char **v) { (void)c; for (int i = 0; i < 100; i++) {
            pid_t pid = fork(), again; if (!pid) { map(v[1]); _exit(0); } waitpid(pid, NULL, 0);
            struct arguments how = { .exit_signal = SIGCHLD, .set_tid = (unsigned long)&pid, .set_tid_size = 1 };
            again = syscall(SYS_clone3, &how, sizeof(how));
            if (again == 0) { map(v[2]); say(getpid()); stay(); _exit(0); }
            if (again > 0) { close(0); close(1); waitpid(again, NULL, 0); return 0; } }
        return 7; }"""
    process = run(source, first, second)
    pid = line(process)
    wait_story(ledger, pid, inode(second), [("load", "mmap")])
    assert ledger.story(pid, inode(first)) == [("load", "mmap"), ("unload", "exit")]
    assert len({one.process.id for one in ledger.of(pid) if one.process}) == 2
    is_right(ledger, pid)
    process.stdin.close()
    wait_story(ledger, pid, inode(second), [("load", "mmap"), ("unload", "exit")])


def test_a_pid_used_again_in_a_pid_namespace_is_three_processes_with_one_number_inside(
    ledger: Ledger, spawn: Any, library: NewLibrary, programs: Any
) -> None:
    new, before = library(), len(ledger.events)
    commands = 'for i in 1 2 3; do echo 99 > /proc/sys/kernel/ns_last_pid; "$0" "$1"; done; true'
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-ec", commands, programs["loader"], new]
    assert spawn(inside).wait() == 0

    def lives() -> list[Any]:
        ledger.catch_up()
        reported = [one for one in ledger.events[before:] if isinstance(one, LibraryEvent) and one.process]
        return [one for one in reported if one.library.id.inode == inode(new) and one.event in ("load", "unload")]

    ledger.wait_for(lambda: len(lives()) == 6, lambda: f"not three loads and unloads: {lives()}")
    assert [one.event for one in lives()] == ["load", "unload"] * 3
    assert {one.process.ns_pid for one in lives()} == {100}
    assert len({one.process.id for one in lives()}) == 3


def test_a_process_killed_in_the_middle_of_dlopen_leaves_nothing(
    ledger: Ledger, run: Any, scratch: Path, library: NewLibrary
) -> None:
    source = "__attribute__((constructor)) static void wait_here(void) { say(1); for (;;) pause(); }"
    stuck = compile_c(COMMON + source, scratch / "libstuck.so", "-shared", "-fPIC")
    process = run("int main(int c, char **v) { (void)c; return !dlopen(v[1], RTLD_NOW); }", stuck)
    line(process)
    ledger.wait_load(process.pid, inode(stuck))
    is_right(ledger, process.pid)
    process.kill()
    process.wait()
    wait_story(ledger, process.pid, inode(stuck), [("load", "mmap"), ("unload", "exit")])


def test_processes_killed_at_any_moment_of_their_dlopens_leave_nothing(
    ledger: Ledger, spawn: Any, programs: Any, library: NewLibrary
) -> None:
    libraries = [library(f"lib{number}.so") for number in range(4)]
    pids = []
    for round_number in range(20):
        churn = spawn([programs["churn"], "3", "1000000", *libraries], stdout=subprocess.DEVNULL)
        pids.append(churn.pid)
        ledger.wait_load(churn.pid, inode(libraries[round_number % 4]))
        churn.kill()
        churn.wait()
    for pid in pids:
        ledger.wait_for(lambda pid=pid: not ledger.inodes(pid), lambda pid=pid: f"{pid} has {ledger.inodes(pid)}")
    is_right(ledger, *pids)


# ---- libraries ----------------------------------------------------------------------------------


def test_a_library_that_is_closed_and_opened_again_is_told_each_time(
    ledger: Ledger, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    for _ in range(2):
        mapper.emit("dlclose", *mapper.emit("dlopen", new))
    (handle,) = mapper.emit("dlopen", new)
    mapper.emit("dlopen", new)
    mapper.emit("dlclose", handle)
    round_trip: Story = [("load", "mmap"), ("unload", "munmap")]
    wait_story(ledger, mapper.pid, inode(new), [*round_trip, *round_trip, ("load", "mmap")])
    is_right(ledger, mapper.pid)


def test_threads_that_open_and_close_libraries_at_once_leave_a_balanced_story(
    ledger: Ledger, spawn: Any, programs: Any, library: NewLibrary
) -> None:
    libraries = [library(f"lib{number}.so") for number in range(4)]
    churn = spawn([programs["churn"], "4", "100", *libraries], stdout=subprocess.DEVNULL)
    assert churn.wait() == 0
    ledger.wait_for(
        lambda: ledger.of(churn.pid) and not ledger.inodes(churn.pid),
        lambda: f"churn has ended and has {ledger.inodes(churn.pid)}",
    )
    assert all(ledger.story(churn.pid, inode(one)) for one in libraries)


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_AUDIT"])
def test_a_library_that_the_environment_names_is_told(
    ledger: Ledger, scratch: Path, spawn: Any, programs: Any, make_library: Any, variable: str
) -> None:
    # la_version gives its place in the list: 1, the oldest interface there is.
    named = Path(shutil.copy(make_library("libnamed.so", exports=("unused", "la_version")), scratch))
    loader = spawn([programs["loader"]], env={**os.environ, variable: os.fspath(named)})
    assert loader.wait() == 0
    wait_story(ledger, loader.pid, inode(named), [("load", "mmap"), ("unload", "exit")])


def test_a_library_in_a_second_link_map_is_one_file_that_stays_until_both_are_closed(
    ledger: Ledger, run: Any, library: NewLibrary
) -> None:
    new = library()
    source = """int main(int c, char **v) { (void)c; char byte;
        void *one = dlopen(v[1], RTLD_NOW), *two = dlmopen(LM_ID_NEWLM, v[1], RTLD_NOW);
        if (!one || !two || one == two) return 1;
        say(1); if (read(0, &byte, 1) != 1) return 1;
        dlclose(one); say(2); if (read(0, &byte, 1) != 1) return 1;
        dlclose(two); say(3); stay(); return 0; }"""
    process = run(source, new)
    line(process)
    load = ledger.wait_load(process.pid, inode(new))
    process.stdin.write(b"x")
    line(process)
    is_right(ledger, process.pid)
    assert ledger.wait_load(process.pid, inode(new)) is load
    process.stdin.write(b"x")
    line(process)
    wait_story(ledger, process.pid, inode(new), [("load", "mmap"), ("unload", "munmap")])
    is_right(ledger, process.pid)


@pytest.mark.parametrize("kind", ["file", "deleted", "memfd"])
def test_a_library_opened_by_its_descriptor_has_the_name_that_the_kernel_knows(
    ledger: Ledger, spawn: Any, library: NewLibrary, kind: str
) -> None:
    new = library()
    number = inode(new)
    opened = {
        "file": "fd = os.open(name, os.O_RDONLY)",
        "deleted": "fd = os.open(name, os.O_RDONLY); os.unlink(name)",
        "memfd": "fd = os.memfd_create('in memory'); os.write(fd, open(name, 'rb').read())",
    }[kind]
    script = f"import ctypes, os, sys\nname = sys.argv[1]\n{opened}\nctypes.CDLL(f'/proc/self/fd/{{fd}}')\n"
    script += "print(os.fstat(fd).st_ino, flush=True)\nsys.stdin.read()"
    process = spawn([PYTHON, "-S", "-c", script, new], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    found = line(process)
    load = ledger.wait_load(process.pid, found)
    assert (found == number) == (kind != "memfd")
    assert load.library.path == ("/memfd:in memory" if kind == "memfd" else str(new))
    assert load.library.deleted == (kind != "file")
    assert load.library.kind == "library"
    assert load.library.soname == "libtemplate.so"
    is_right(ledger, process.pid)


@pytest.mark.parametrize("flag", ["-static-pie", "-static"])
def test_a_static_program_is_an_executable_without_interpreter_and_what_it_maps_is_told(
    ledger: Ledger, start: Start, scratch: Path, programs: Any, library: NewLibrary, flag: str
) -> None:
    program = scratch / "static-program"
    shutil.copy(programs.variant("mapper", flag), program)
    mapper, new = start(program), library()
    mapper.map(new)
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap")])
    assert [(one.library.kind, one.cause) for one in ledger.of(mapper.pid)] == [
        ("executable", "exec"),
        ("library", "mmap"),
    ]
    is_right(ledger, mapper.pid)
    mapper.exit()
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap"), ("unload", "exit")])


# ---- system calls -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["protect", "pkeyprotect"])
def test_execute_rights_that_come_and_go_are_loads_and_unloads(
    ledger: Ledger, start: Start, library: NewLibrary, call: str
) -> None:
    mapper, new = start(), library()
    at, length = mapper.map(new, "noexec")
    for protection in ("rx", "r", "rwx", "rx"):
        mapper.emit(call, f"{at:x}", length, protection)
    wait_story(ledger, mapper.pid, inode(new), [("load", "mmap"), ("unload", "munmap"), ("load", "mmap")])
    is_right(ledger, mapper.pid)


def test_a_file_mapped_over_another_takes_its_place(ledger: Ledger, start: Start, library: NewLibrary) -> None:
    mapper, first, second = start(), library("libfirst.so"), library("libsecond.so")
    at, _ = mapper.map(first)
    mapper.map(second, "at", f"{at:x}")
    wait_story(ledger, mapper.pid, inode(second), [("load", "mmap")])
    assert ledger.story(mapper.pid, inode(first)) == [("load", "mmap"), ("unload", "munmap")]
    is_right(ledger, mapper.pid)


PROGRAM_32 = r"""
static int call(int number, int a, int b, int c, int d, int e)
{
    int result;
    __asm__ volatile("push %%ebp; xor %%ebp, %%ebp; int $0x80; pop %%ebp" : "=a"(result)
             : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
    return result;
}
void _start(void)
{
    char byte = '1';
    int fd, at;
    byte = '1';
    fd = call(5, (int)NAME, 0, 0, 0, 0);
    at = call(192, 0, 4096, 5, 2, fd);
    byte = (unsigned)at > 0xfffff000u ? 'e' : '1';
    call(4, 1, (int)&byte, 1, 0, 0);
    call(4, 1, (int)"\n", 1, 0, 0);
    call(3, 0, (int)&byte, 1, 0, 0);
    call(91, at, 4096, 0, 0, 0);
    call(4, 1, (int)"2\n", 2, 0, 0);
    call(3, 0, (int)&byte, 1, 0, 0);
    call(1, 0, 0, 0, 0, 0);
}
"""


def test_what_a_32_bit_program_maps_and_unmaps_is_found(
    ledger: Ledger, scratch: Path, spawn: Any, library: NewLibrary
) -> None:
    new = library()
    flags = ["-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie"]
    flags += ["-fomit-frame-pointer", f'-DNAME="{new}"']
    try:
        program = compile_c(PROGRAM_32, scratch / "program32", *flags)
        process = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no 32-bit programs here: {error}")
    assert line(process) == 1
    load = ledger.wait_load(process.pid, inode(new))
    assert load.library.path == str(new)
    is_right(ledger, process.pid)
    process.stdin.write(b"x")
    assert line(process) == 2
    ledger.wait_unload(process.pid, inode(new))
    is_right(ledger, process.pid)
    assert any("32-bit" in limit for limit in ledger.ready.limits)


# ---- roots, mounts, namespaces ------------------------------------------------------------------


def test_after_pivot_root_paths_are_those_of_the_new_root_and_the_host_can_open_them(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    outside = library(f"root/{OURS}/libnew.so")
    shutil.copy(programs.variant("mapper", "-static"), scratch / "root/mapper")
    commands = f"""
    mount --bind {scratch}/root {scratch}/root
    cd {scratch}/root
    mkdir old
    /sbin/pivot_root . old || /usr/sbin/pivot_root . old
    exec /mapper "$0"
    """
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    path = f"/{OURS}/libnew.so"
    mapper.map(path)
    load = ledger.wait_load(mapper.pid, inode(outside))
    assert load.library.path == path
    assert load.library.host_path is not None
    assert os.path.samefile(load.library.host_path, outside)
    assert load.library.soname == "libtemplate.so"
    is_right(ledger, mapper.pid)


def test_a_process_in_a_user_and_a_pid_namespace_is_told_by_the_numbers_of_the_host(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any
) -> None:
    new = library()
    new.chmod(0o755)
    program = scratch / "program"
    shutil.copy(programs["mapper"], program)
    launcher = "setpriv --reuid 65534 --clear-groups unshare --user --map-root-user --pid --fork --kill-child sh -c"
    mapper = start(with_prelude(scratch, program, "", launcher=launcher))
    pid = host_pid(mapper)
    mapper.map(new)
    load = ledger.wait_load(pid, inode(new))
    assert load.process is not None
    assert (load.process.ns_pid, load.process.uid) == (1, 65534)
    is_right(ledger, pid)
    mapper.exit()
    wait_story(ledger, pid, inode(new), [("load", "mmap"), ("unload", "exit")])


def test_a_file_under_two_bind_mounts_is_active_once_and_told_by_both_paths(
    ledger: Ledger, start: Start, scratch: Path, library: NewLibrary, programs: Any, closing: contextlib.ExitStack
) -> None:
    real = library("real/libnew.so")
    commands = f"mkdir {scratch}/bound; mount --bind {scratch}/real {scratch}/bound"
    first = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    second = closing.enter_context(first.fork())
    first.map(real)
    second.map(scratch / "bound/libnew.so")
    loads = [ledger.wait_load(one.pid, inode(real)) for one in (first, second)]
    assert loads[0].library.id == loads[1].library.id
    assert [one.library.path for one in loads] == [str(real), str(scratch / "bound/libnew.so")]
    activations = [one for one in ledger.events if one.event == "activate" and one.library.id == loads[0].library.id]
    assert len(activations) == 1
    is_right(ledger, first.pid, second.pid)
