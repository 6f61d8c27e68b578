"""How mappings come and go beyond ``test_programs``, ``test_races`` and ``test_identity``: fork, exec, exit.

Each test has the whole story of its processes by the events, and then asks the audit, which reads ``/proc``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Config, Rule
from sowatch.model.events import LibraryEvent
from support.hostile import compile_c
from support.kernel import Ledger, executable_inodes
from support.lifecycle import (
    COMMON,
    NewLibrary,
    Start,
    events_of,
    inode,
    is_right,
    line,
    program_of,
    wait_story,
)

#: Of one parent, each of which has to be scanned.
CHILDREN = 12

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


@pytest.mark.parametrize("strategy", ["core", "prebuilt"])
@pytest.mark.parametrize("rights", ["", "PROT_READ | PROT_WRITE | PROT_EXEC"])
def test_a_child_is_not_left_with_a_file_that_its_parent_kept_from_fork(
    open_ledger: Callable[..., Ledger], run: Any, library: NewLibrary, rights: str, strategy: str
) -> None:
    # Many children: one that is scanned for another reason, as for a reader of its maps, shows nothing.
    ledger = open_ledger(Rule(r"/lib(kept|copied)\.so$"), config=Config(strategy=strategy))
    kept, copied = library("libkept.so"), library("libcopied.so")
    source = f"""int main(int c, char **v) {{
        pid_t children[{CHILDREN}];
        void *at = map(v[1]); (void)c; map(v[2]);
        if ({f"mprotect(at, 4096, {rights}) || " * bool(rights)}madvise(at, 4096, MADV_DONTFORK)) return 1;
        say(1); getchar();
        for (int i = 0; i < {CHILDREN}; i++) {{
            children[i] = fork(); if (!children[i]) {{ pause(); _exit(0); }} say(children[i]); }}
        stay(); for (int i = 0; i < {CHILDREN}; i++) kill(children[i], SIGKILL); return 0; }}"""
    parent = run(source, kept, copied)
    line(parent)
    # What is known of the parent is certain: no child is scanned for its sake.
    ledger.wait_load(parent.pid, inode(kept))
    is_right(ledger, parent.pid)
    parent.stdin.write(b"\n")
    parent.stdin.flush()
    children = [line(parent) for _ in range(CHILDREN)]
    for child in children:
        ledger.wait_load(child, inode(copied))
    for child in children:
        ledger.wait_for(lambda child=child: inode(kept) not in ledger.inodes(child), "it has what fork did not copy")
        assert inode(copied) in ledger.inodes(child)
    assert ledger.inodes(parent.pid) >= {inode(kept), inode(copied)}
    is_right(ledger, *children)


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


@pytest.mark.alone
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
