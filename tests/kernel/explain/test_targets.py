"""Processes that are special, paths, and the command."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule, Watcher
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import SowatchError, UsageError
from support import strict
from support.asked import OTHER, WANTED, NewLibrary, Start, Watch, mapping, pages, path_of, process, reported
from support.hostile import Opens
from support.kernel import IN_OWN_MOUNTS, TAG, executable_ranges, host_pid, id_by_stat, with_prelude

# ---- processes that are special -------------------------------------------------------------------


def test_a_process_that_does_not_exist_is_an_error(watcher: Watcher, start: Start) -> None:
    mapper = start()
    mapper.exit()
    with pytest.raises(SowatchError, match=rf"^there is no process {mapper.pid} in /proc\. ") as caught:
        watcher.explain(mapper.pid)
    assert caught.value.exit_code == 1


def test_the_id_of_a_thread_is_wrong_usage(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.emit("thread", "idle", library(OTHER))
    (thread,) = {int(name) for name in os.listdir(f"/proc/{mapper.pid}/task")} - {mapper.pid}
    with pytest.raises(UsageError, match=f"{thread} is a thread of process {mapper.pid}"):
        watcher.explain(thread)


def test_a_zombie_says_that_it_has_ended(watcher: Watcher, spawn: Any, wait_until: Any) -> None:
    ended = spawn(["true"])
    report = wait_until(
        lambda: next((r for r in [process(watcher, ended.pid)] if r.state == "zombie"), None), what="its end"
    )
    assert (report.mappings, report.notes) == ((), ("zombie",))


def test_a_kernel_thread_says_that_it_is_one(watcher: Watcher) -> None:
    proc = ProcFs()
    kernel_threads = [pid for pid in proc.pids() if (about := proc.stat(pid)) and about.is_kernel_thread]
    if not kernel_threads:
        pytest.skip("this pid namespace shows no kernel thread")
    report = process(watcher, kernel_threads[0])
    assert (report.state, report.mappings, report.notes) == ("kernel_thread", (), ("kernel_thread",))


def test_a_program_without_a_dynamic_loader_says_what_that_means(watch: Watch, programs: Any, spawn: Any) -> None:
    program = programs.variant("mapper", "-static", "-Wno-error")
    running = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout.readline()
    report = process(watch(), running.pid)
    assert report.notes == ("static", "nothing_wanted")
    assert [one.library.kind for one in report.mappings] == ["executable"]


def test_a_process_in_its_own_root_is_explained_with_the_paths_that_it_sees(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, programs: Any, wait_until: Any
) -> None:
    library(f"jail/{WANTED}")
    library(f"jail/{OTHER}")
    static = programs.variant("mapper", "-static", "-Wno-error")
    (scratch / "jail/mapper").write_bytes(static.read_bytes())
    (scratch / "jail/mapper").chmod(0o755)
    mapper = start(with_prelude(scratch, static, f'exec chroot {scratch}/jail /mapper # "$0"'))
    mapper.map(f"/{WANTED}")
    mapper.map(f"/{OTHER}")
    wanted = reported(watcher, mapper.pid, f"/{WANTED}", wait_until)
    assert (wanted.library.kind, wanted.look.elf) == ("library", "elf")
    other = mapping(process(watcher, mapper.pid), f"/{OTHER}")
    assert (other.untold, other.verdict.verdict) == ("no_rule", "ignore")


def test_below_an_overlay_the_identity_is_the_kernels(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    library(f"lower/{WANTED}")
    library(f"lower/{OTHER}")
    commands = f"""
    mkdir {scratch}/up {scratch}/tmpfs {scratch}/seen
    mount -t tmpfs none {scratch}/tmpfs
    mkdir {scratch}/tmpfs/up {scratch}/tmpfs/work
    mount -t overlay none -o lowerdir={scratch}/lower,upperdir={scratch}/tmpfs/up,workdir={scratch}/tmpfs/work \\
        {scratch}/seen
    """
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    for name in (WANTED, OTHER):
        mapper.map(scratch / "seen" / name)
    wanted = reported(watcher, mapper.pid, scratch / "seen" / WANTED, wait_until)
    other = mapping(process(watcher, mapper.pid), scratch / "seen" / OTHER)
    assert wanted.library.id[:3] == id_by_stat(scratch / "lower" / WANTED)[:3]
    assert (wanted.id_from, wanted.differences) == ("map", ())
    assert (other.verdict.verdict, other.untold) == ("ignore", "no_rule")
    lower = path_of(watcher, scratch / "lower" / WANTED)
    assert [(one.process.pid, one.relation) for one in lower.mapped] == [(mapper.pid, "other_name")]


def test_a_process_in_a_pid_namespace_of_its_own_has_both_numbers(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    program = start()._program
    mapper = start(with_prelude(scratch, program, "", launcher="unshare --pid --fork sh -c"))
    new = library(WANTED)
    mapper.map(new)
    pid = host_pid(mapper)
    assert reported(watcher, pid, new, wait_until).seen
    report = process(watcher, pid)
    assert (report.process.pid, report.process.ns_pid) == (pid, 1)


# ---- paths ----------------------------------------------------------------------------------------


def test_a_path_says_who_has_it_mapped(watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any) -> None:
    first, second, new = start(), start(), library(WANTED)
    at, length = first.map(new)
    second.map(new)
    reported(watcher, first.pid, new, wait_until)
    reported(watcher, second.pid, new, wait_until)
    report = path_of(watcher, new)
    assert (report.file_type, report.rule, report.notes) == ("regular file", "wanted", ())
    assert [(one.id[:3], one.id_from) for one in report.ids] == [(id_by_stat(new)[:3], "map")]
    assert sorted((one.process.pid, one.relation, one.in_map) for one in report.mapped) == sorted(
        (mapper.pid, "same", True) for mapper in (first, second)
    )
    assert next(one for one in report.mapped if one.process.pid == first.pid).ranges == ((at, at + pages(length)),)
    assert all(one.seen and one.seen.rule == "wanted" for one in report.mapped)
    assert report.verdict.verdict == "match"


def test_a_path_that_nobody_maps_says_so(watcher: Watcher, library: NewLibrary) -> None:
    new = library(WANTED)
    report = path_of(watcher, new)
    assert (report.mapped, report.notes) == ((), ("not_mapped",))
    assert (report.rule, report.look.elf, report.verdict.verdict) == ("wanted", "elf", "none")
    assert [one.id_from for one in report.ids] == ["proc"]


def test_a_path_that_no_rule_wants_is_found_in_proc_alone(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(OTHER)
    mapper.map(new)
    report = path_of(watcher, new)
    assert [(one.process.pid, one.relation, one.in_map, one.seen) for one in report.mapped] == [
        (mapper.pid, "same", False, None)
    ]
    assert report.notes == ("nothing_wants",)
    assert report.verdict.verdict == "ignore"


def test_a_symbolic_link_leads_to_the_file(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    link = new.with_name("link.so")
    link.symlink_to(new.name)
    report = path_of(watcher, link)
    assert (report.path, report.resolved) == (str(link), str(new))
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "same")]


def test_a_hard_link_is_the_same_file_by_another_name(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    link = new.with_name("hard.so")
    link.hardlink_to(new)
    (found,) = path_of(watcher, link).mapped
    assert (found.process.pid, found.path, found.relation) == (mapper.pid, str(new), "other_name")


def test_after_an_upgrade_the_path_shows_who_still_runs_on_the_deleted_file(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    old, young, new = start(), start(), library(WANTED)
    old.map(new)
    library("fresh.so").rename(new)
    young.map(new)
    report = path_of(watcher, new)
    assert sorted((one.process.pid, one.relation) for one in report.mapped) == sorted(
        [(old.pid, "deleted"), (young.pid, "same")]
    )


@pytest.mark.parametrize("name", [WANTED, OTHER], ids=["wanted", "other"])
def test_a_path_whose_file_is_gone_is_explained_while_it_is_mapped(
    watcher: Watcher, start: Start, library: NewLibrary, name: str
) -> None:
    mapper, new = start(), library(name)
    mapper.map(new)
    new.unlink()
    report = path_of(watcher, new)
    assert (report.file_type, report.error) == (None, "No such file or directory")
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "deleted")]
    mapper.exit()
    with pytest.raises(SowatchError, match="No such file or directory; and no process has a file of that name") as err:
        watcher.explain(new)
    assert err.value.exit_code == 1


def test_a_file_in_another_mount_namespace_is_found_through_its_process(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    source = library(OTHER)
    commands = f"mkdir {scratch}/t; mount -t tmpfs none {scratch}/t; cp {source} {scratch}/t/{WANTED}"
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "t" / WANTED
    mapper.map(path)
    reported(watcher, mapper.pid, path, wait_until)
    report = path_of(watcher, f"/proc/{mapper.pid}/root{path}")
    assert [(one.process.pid, one.path) for one in report.mapped] == [(mapper.pid, str(path))]
    assert report.notes == ()


def test_a_memfd_is_explained_by_its_name_as_memory_that_is_mapped(
    watch: Watch, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    watcher = watch(Rule(f"^/memfd:{TAG}$", name="jit"))
    mapper = start()
    mapper.emit("memfd", TAG, library(WANTED))
    reported(watcher, mapper.pid, f"/memfd:{TAG}", wait_until)
    report = path_of(watcher, f"/memfd:{TAG}")
    assert (report.file_type, report.error, report.look.elf) == ("memory", None, "elf")
    assert [(one.process.pid, one.relation, one.in_map) for one in report.mapped] == [(mapper.pid, "same", True)]
    assert (report.rule, report.notes) == ("jit", ())
    assert report.ids


def test_another_file_under_the_same_path_elsewhere_is_told_apart(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary
) -> None:
    here = library(f"t/{WANTED}")
    commands = f"cp {here} {scratch}/copy; mount -t tmpfs none {scratch}/t; cp {scratch}/copy {here}"
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    mapper.map(here)
    report = path_of(watcher, here)
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "other_file")]
    assert "not_mapped" in report.notes


@pytest.mark.parametrize(("make", "file_type"), [(os.mkdir, "directory"), (os.mkfifo, "FIFO")])
def test_what_is_no_file_is_looked_at_without_being_opened(
    watcher: Watcher, scratch: Path, make: Callable[[Path], None], file_type: str
) -> None:
    make(scratch / "thing")
    report = path_of(watcher, scratch / "thing")
    assert (report.file_type, report.look.elf) == (file_type, "not_regular")
    assert report.notes == ("not_regular", "not_mapped", "nothing_wants")


def test_a_name_that_leads_to_a_fifo_every_other_moment_never_opens_it(
    watcher: Watcher, library: NewLibrary, scratch: Path
) -> None:
    """The type is looked at, and the file opened, through one descriptor."""
    fifo, name, made = scratch / "fifo", scratch / "name", scratch / "made"
    os.mkfifo(fifo)
    targets = itertools.cycle([library(), fifo])
    is_over = threading.Event()

    def swap() -> None:
        while not is_over.is_set():
            made.symlink_to(next(targets))
            made.rename(name)

    swapper = threading.Thread(target=swap)
    with Opens(fifo) as opened:
        os.close(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
        assert opened.by(os.getpid()) == ["fifo"]
        name.symlink_to(fifo)
        swapper.start()
        try:
            types = {path_of(watcher, name).file_type for _ in range(60)}
        finally:
            is_over.set()
            swapper.join()
        assert opened.by(os.getpid()) == []
    assert types == {"regular file", "FIFO"}


def test_a_watch_that_has_ended_explains_nothing(watch: Watch) -> None:
    watcher = watch(Rule(TAG))
    watcher.stop()
    with pytest.raises(SowatchError, match="the watch is not running"):
        watcher.explain(os.getpid())


# ---- the command ----------------------------------------------------------------------------------


def sowatch_explain(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sowatch", "explain", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_the_command_explains_a_process_as_one_object(start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    done = sowatch_explain("--json", "--rule", TAG, str(mapper.pid))
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = strict.loads(done.stdout)
    assert (found["event"], found["target"], found["process"]["pid"]) == ("explain", "process", mapper.pid)
    (one,) = [one for one in found["mappings"] if one["library"]["path"] == str(new)]
    assert (one["seen"]["cause"], one["rule"], one["verdict"]["verdict"]) == ("snapshot", TAG, "match")
    assert one["ranges"] == [
        [f"{first:x}", f"{end:x}"] for first, end in executable_ranges(mapper.pid, new.stat().st_ino)
    ]


def test_the_command_explains_a_path_to_people_without_letting_it_steer_their_terminal(
    start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(f"lib\x1b[31m\n{TAG}.so")
    mapper.map(new)
    done = sowatch_explain("--format", "text", new)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"lib\\x1b[31m\\n{TAG}.so" in done.stdout
    assert "\x1b" not in done.stdout
    assert re.search(rf"^ *{mapper.pid}  mapper\b.*  this file  snapshot at ", done.stdout, re.MULTILINE)


def test_the_command_takes_a_path_of_digits_after_its_directory(scratch: Path, library: NewLibrary) -> None:
    new = library("12345")
    done = sowatch_explain("--json", new)
    assert strict.loads(done.stdout)["path"] == str(new)


@pytest.mark.parametrize("word", ["/no/such/file", "4194303"])
def test_the_command_ends_with_one_line_and_1_where_there_is_nothing(word: str) -> None:
    done = sowatch_explain(word)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
