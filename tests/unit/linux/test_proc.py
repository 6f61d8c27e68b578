"""procfs: its readers and its root, against real processes. The parsers: test_proc_parsing.py.

Rows of maps: test_proc_rows.py; rights and other mounts of proc: test_proc_access.py.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.linux.proc_parse import Link, parse_maps
from sowatch.model.errors import ProcRootError
from sowatch.model.identity import TICK_NS
from support.programs import Mapper

ME = os.getpid()


# -- readers ---------------------------------------------------------------------------------


def test_this_process_is_read_as_python_knows_it() -> None:
    found = ProcFs().process(ME, container_of=lambda cgroup: f"box of {cgroup}")

    assert found is not None
    assert (found.pid, found.ppid, found.uid) == (ME, os.getppid(), os.getuid())
    assert found.comm == Path("/proc/self/comm").read_text().rstrip("\n")
    assert found.exe == str(Path(sys.executable).resolve())
    assert found.container == f"box of {found.cgroup}"
    assert found.start_ns % TICK_NS == 0
    assert ProcFs().is_32bit(ME) is (sys.maxsize < 2**32)
    assert ProcFs().threads(ME) == sorted(map(int, os.listdir("/proc/self/task")))
    assert ProcFs().boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_program_whose_name_ends_like_the_mark_has_its_whole_name(spawn: Any, tmp_path: Path) -> None:
    program = tmp_path / "sleep (deleted)"
    shutil.copy(shutil.which("sleep") or "", program)
    child = spawn([program, "60"])
    assert ProcFs().exe(child.pid) == Link(str(program), False)
    program.rename(tmp_path / "other")
    (tmp_path / "other").unlink()
    assert ProcFs().exe(child.pid) == Link(str(tmp_path / "other"), True)


def test_every_reader_answers_for_every_live_pid() -> None:
    proc = ProcFs()
    pids = proc.pids()

    assert pids == sorted(pids)
    assert ME in pids
    for pid in pids:
        known = proc.stat(pid)
        if isinstance(known, Miss):
            assert known is Miss.GONE
            continue
        process, rows, found = proc.process(pid), proc.maps(pid), proc.executable_maps(pid)
        answers = [proc.exe(pid), proc.status(pid), proc.cgroup(pid), proc.is_32bit(pid), proc.map_files_dir(pid)]
        if proc.stat(pid) is Miss.GONE:
            continue
        assert process is not None
        assert process.start_ns == known.start_ns
        assert Miss.GONE not in answers
        if known.is_kernel_thread:
            assert (rows, found, process.exe) == ([], [], None)
        elif isinstance(rows, list) and isinstance(found, list):
            assert {row.perms[2] for row in found} <= {"x"}


def test_a_process_that_ended_is_gone_for_every_reader() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    proc = ProcFs()

    readers = [proc.maps, proc.executable_maps, proc.threads, proc.stat, proc.status, proc.cgroup, proc.exe]
    readers += [proc.is_32bit, proc.live_thread, proc.map_files_dir, proc.root_dir]
    assert {reader(child.pid) for reader in readers} == {Miss.GONE}
    assert proc.process(child.pid) is None
    assert not Miss.GONE


def test_a_zombie_has_no_maps_and_no_exe_but_is_there(wait_until: Callable[..., Any]) -> None:
    proc = ProcFs()
    child = subprocess.Popen(["true"])
    try:
        wait_until(lambda: getattr(proc.stat(child.pid), "state", "") == "Z", what="the child becoming a zombie")

        assert proc.maps(child.pid) == []
        assert proc.exe(child.pid) is Miss.ABSENT
        assert proc.is_32bit(child.pid) is Miss.ABSENT
        assert proc.map_files_dir(child.pid) is Miss.ABSENT
        found = proc.process(child.pid)
        assert found is not None
        assert (found.comm, found.exe, found.ppid) == ("true", None, ME)
    finally:
        child.wait()


DEAD_LEADER = """
import ctypes, os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0))).start()
ctypes.CDLL(None).syscall({exit}, 0)
"""
EXIT = {"x86_64": 60, "aarch64": 93, "riscv64": 93, "s390x": 1, "ppc64le": 1}


def test_a_process_whose_other_thread_executes_a_program_while_it_is_looked_at_has_a_live_thread(
    programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Mapper(programs["mapper"], tmp_path) as mapper:
        mapper.emit("leaderexit")
        list_threads = ProcFs.threads

        def then_execute(self: ProcFs, pid: int) -> list[int] | Miss:
            tids = list_threads(self, pid)
            mapper.exec()
            return tids

        monkeypatch.setattr(ProcFs, "threads", then_execute)
        assert ProcFs().live_thread(mapper.pid) == mapper.pid


@pytest.mark.skipif(os.uname().machine not in EXIT, reason="the number of the exit system call is not known here")
def test_a_process_whose_leader_is_dead_is_read_through_a_live_thread(
    spawn: Any, wait_until: Callable[..., Any]
) -> None:
    code = DEAD_LEADER.format(exit=EXIT[os.uname().machine])
    child = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE)
    proc = ProcFs()
    wait_until(lambda: getattr(proc.stat(child.pid), "state", "") == "Z", what="the leader ending")

    tids = proc.threads(child.pid)
    assert isinstance(tids, list)
    assert tids[0] == child.pid
    assert len(tids) == 2
    assert Path(f"/proc/{child.pid}/maps").read_bytes() == b""

    rows = proc.maps(child.pid)
    assert rows == parse_maps(Path(f"/proc/{child.pid}/task/{tids[1]}/maps").read_bytes())
    assert proc.executable_maps(child.pid) == [row for row in rows if row.perms[2] == "x" and row.inode]
    assert proc.live_thread(child.pid) == tids[1]
    assert proc.map_files_dir(child.pid) == f"/proc/{tids[1]}/map_files"
    assert proc.exe(child.pid) == Link(str(Path(sys.executable).resolve()), False)
    assert proc.is_32bit(child.pid) is False
    assert proc.cgroup(child.pid) == proc.cgroup(ME)
    root = proc.root_dir(child.pid)
    assert isinstance(root, str)
    assert Path(root).samefile("/")
    found = proc.process(child.pid)
    assert found is not None
    assert (found.exe, found.cgroup) == (str(Path(sys.executable).resolve()), proc.cgroup(ME))


def test_a_thread_is_no_process(spawn: Any) -> None:
    code = (
        "import os, sys, threading; t = threading.Thread(target=lambda: sys.stdin.read()); t.start();"
        " print(t.native_id, flush=True)"
    )
    child = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    tid = int(child.stdout.readline())

    assert ProcFs().process(tid) is None
    assert tid not in ProcFs().pids()


def test_a_process_that_ends_while_it_is_read_gives_what_its_stat_said(spawn: Any) -> None:
    child = spawn(["cat"], stdin=subprocess.PIPE)

    class Late(ProcFs):
        def status(self, pid: int) -> Any:
            found = super().status(pid)
            spawn.end(child)
            return found

    found = Late().process(child.pid)
    assert found is not None
    assert (found.pid, found.ppid, found.comm) == (child.pid, ME, "cat")
    assert (found.uid, found.ns_pid, found.exe, found.cgroup, found.container) == (None,) * 5


def test_a_hostile_comm_reaches_the_record_unharmed(spawn: Any, tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (\n x"
    shutil.copy(shutil.which("cat") or "", program)
    child = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdin.write(b"x")
    child.stdin.flush()
    assert child.stdout.read(1) == b"x"

    found = ProcFs().process(child.pid)

    assert found is not None
    assert (found.comm, found.ppid, found.exe) == (") R 1 (\n x", ME, str(program))


def test_the_exe_of_an_upgraded_program_is_marked_not_renamed(spawn: Any, tmp_path: Path) -> None:
    program = tmp_path / "cat"
    shutil.copy(shutil.which("cat") or "", program)
    child = spawn([program], stdin=subprocess.PIPE)
    program.unlink()

    assert ProcFs().exe(child.pid) == Link(str(program), True)


def test_a_file_that_cannot_be_opened_for_lack_of_descriptors_is_an_error_not_a_death() -> None:
    proc = ProcFs()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ProcReadError) as caught:
            proc.stat(ME)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert caught.value.errno == errno.EMFILE
    assert caught.value.path == f"/proc/{ME}/stat"
    assert "ulimit -n" in str(caught.value)


def test_readers_leave_no_descriptor_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    proc = ProcFs()
    for pid in [ME, 2, 2**22 + 1]:
        proc.process(pid)
        proc.maps(pid)
        proc.map_files_dir(pid)

    assert set(os.listdir("/proc/self/fd")) == before


# -- the proc root ---------------------------------------------------------------------------


def made(tmp_path: Path, what: str) -> Path:
    path = tmp_path / "root"
    if what == "file":
        path.write_text("")
    elif what != "missing":
        path.mkdir()
    if what == "pretender":
        (path / "1").mkdir()
        (path / "1" / "stat").write_bytes(b"17 (x) S" + b" 1" * 30)
        (path / "self").symlink_to("1")
    return path


@pytest.mark.parametrize(
    ("what", "reason"),
    [("missing", "No such file or directory"), ("file", "it is not a directory"), ("empty", "it (is on|has no link)"),
     ("pretender", "(it is on|1/stat is not the stat of process 1)")],
)  # fmt: skip
def test_a_directory_that_is_no_proc_is_refused_with_the_reason(tmp_path: Path, what: str, reason: str) -> None:
    path = made(tmp_path, what)
    with pytest.raises(
        ProcRootError, match=rf"^'{re.escape(str(path))}' is not a proc file system: {reason}"
    ) as caught:
        ProcFs(path)

    assert caught.value.exit_code == 2
    assert str(caught.value).endswith("usually /proc.")


def test_a_copy_of_proc_on_disk_is_refused_by_its_file_system(tmp_path: Path) -> None:
    (tmp_path / str(ME)).mkdir()
    (tmp_path / str(ME) / "stat").write_bytes(Path("/proc/self/stat").read_bytes())
    (tmp_path / "self").symlink_to(str(ME))
    device = os.stat(tmp_path).st_dev
    if f" {os.major(device)}:{os.minor(device)} " not in Path("/proc/self/mountinfo").read_text():
        pytest.skip("btrfs: stat and the mount table name different devices")

    with pytest.raises(ProcRootError, match=r"it is on [a-z0-9.]+\. "):
        ProcFs(tmp_path)


@pytest.mark.parametrize("path", ["/sys", "/proc/self", "/proc/sys", "a\0b", ""])
def test_other_places_are_refused_as_proc_root(path: str) -> None:
    with pytest.raises(ProcRootError):
        ProcFs(path)


def test_a_proc_root_that_shows_nobody_any_more_is_no_news_of_deaths(tmp_path: Path) -> None:
    proc = ProcFs()
    proc.root = str(tmp_path)  # what an unmounted proc leaves is an empty directory
    with pytest.raises(ProcRootError, match="it shows no process"):
        proc.pids()
    proc.root = str(tmp_path / "gone")
    with pytest.raises(ProcRootError, match="No such file or directory"):
        proc.pids()


def test_a_relative_proc_root_is_the_same_after_a_change_of_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    proc = ProcFs("proc")
    monkeypatch.chdir("/tmp")

    assert proc.stat(ME)
    assert stat.S_ISDIR(os.stat(proc.root).st_mode)
