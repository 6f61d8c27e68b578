"""procfs: its readers, against real processes and real proc mounts. The parsers: test_procfs_parsing.py."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux import proc as procfs
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.linux.proc_parse import Link, MapRow, parse_maps
from sowatch.model.errors import ProcRootError
from sowatch.model.identity import TICK_NS
from support.programs import Mapper

ME = os.getpid()
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user or mounts: needs root")


# -- maps, of real processes -----------------------------------------------------------------


@contextlib.contextmanager
def mapped(fd: int) -> Iterator[None]:
    """The first page of a file mapped executable into this process; closes the fd."""
    os.ftruncate(fd, mmap.PAGESIZE)
    try:
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC):
            yield
    finally:
        os.close(fd)


def create(path: bytes) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o700)


def my_row(inode: int) -> MapRow:
    rows = ProcFs().executable_maps(ME)
    assert isinstance(rows, list)
    found = [row for row in rows if row.inode == inode]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    "name",
    [b"lib x.so", b" edge ", b"two\nlines.so", b"x (deleted).so", b"n" * 200, b"\xff\x1b[31m\r", b"back\\slash"],
)
def test_the_kernel_shows_a_mapped_file_by_its_exact_name(tmp_path: Path, name: bytes) -> None:
    path = bytes(tmp_path) + b"/" + name
    with mapped(fd := create(path)):
        info = os.fstat(fd)
        row = my_row(info.st_ino)

    assert (row.path, row.is_deleted, row.perms, row.offset_bytes) == (path, False, "r-xp", 0)


def test_a_file_deleted_while_it_is_mapped_keeps_its_name_and_is_marked(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/gone \n.so"
    with mapped(fd := create(path)):
        os.unlink(path)
        row = my_row(os.fstat(fd).st_ino)

        assert (row.path, row.is_deleted) == (path, True)
        assert ProcFs().resolve(ME, [row]) == [row]


def test_a_file_whose_name_ends_like_the_mark_is_settled_by_looking_for_it(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/real (deleted)"
    with mapped(fd := create(path)):
        row = my_row(os.fstat(fd).st_ino)

        assert (row.path, row.is_deleted) == (bytes(tmp_path) + b"/real", True)
        assert ProcFs().resolve(ME, [row]) == [row._replace(path=path, is_deleted=False)]


def test_another_file_by_the_marked_name_does_not_unmark_a_deleted_one(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/x"
    with mapped(fd := create(path)):
        os.unlink(path)
        os.close(create(path + b" (deleted)"))
        row = my_row(os.fstat(fd).st_ino)

        assert ProcFs().resolve(ME, [row]) == [row]


@pytest.mark.parametrize("name", [b"a\\012b.so", b"a\nb.so", b"\\012\n", b"\\012 (deleted)"])
def test_a_backslash_and_three_digits_in_a_name_are_told_from_a_newline(tmp_path: Path, name: bytes) -> None:
    path = bytes(tmp_path) + b"/" + name
    with mapped(fd := create(path)):
        row = my_row(os.fstat(fd).st_ino)
        assert ProcFs().resolve(ME, [row]) == [row._replace(path=path, is_deleted=False)]
        os.unlink(path)
        row = my_row(os.fstat(fd).st_ino)
        assert ProcFs().resolve(ME, [row]) == [row._replace(path=path, is_deleted=True)]


def test_the_same_where_the_kernels_link_cannot_be_read(tmp_path: Path) -> None:
    path = bytes(tmp_path) + b"/a\\012b"
    with mapped(fd := create(path)):
        row = my_row(os.fstat(fd).st_ino)._replace(start=0)
        assert ProcFs().resolve(ME, [row]) == [row._replace(path=path)]
        os.rename(path, bytes(tmp_path) + b"/a\nb")
        assert ProcFs().resolve(ME, [row]) == [row]


def test_a_program_whose_name_ends_like_the_mark_has_its_whole_name(spawn: Any, tmp_path: Path) -> None:
    program = tmp_path / "sleep (deleted)"
    shutil.copy(shutil.which("sleep") or "", program)
    child = spawn([program, "60"])
    assert ProcFs().exe(child.pid) == Link(str(program), False)
    program.rename(tmp_path / "other")
    (tmp_path / "other").unlink()
    assert ProcFs().exe(child.pid) == Link(str(tmp_path / "other"), True)


def test_a_memfd_is_shown_by_its_name_and_as_deleted() -> None:
    with mapped(fd := os.memfd_create("jit cache")):
        row = my_row(os.fstat(fd).st_ino)

        assert (row.path, row.is_deleted) == (b"/memfd:jit cache", True)


def test_a_path_of_more_than_4000_bytes_is_whole(tmp_path: Path) -> None:
    # Made step by step: no single call takes a path that long.
    where = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    path = bytes(tmp_path)
    for _ in range(40):
        part = b"d" * 120
        os.mkdir(part, dir_fd=where)
        deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY, dir_fd=where)
        os.close(where)
        where, path = deeper, path + b"/" + part
    fd = os.open(b"lib.so", os.O_RDWR | os.O_CREAT, 0o700, dir_fd=where)
    os.close(where)
    with mapped(fd):
        row = my_row(os.fstat(fd).st_ino)

    assert len(row.path) > 4800
    assert row.path == path + b"/lib.so"


def test_maps_too_large_for_one_batch_have_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_BATCH_BYTES", 1)
    monkeypatch.setattr(procfs, "_READ_BYTES", 100)  # shorter than a row
    # Executable rows of a file stand still while this runs; the heap does not.
    pieces = ProcFs().executable_maps(ME)
    monkeypatch.undo()

    assert pieces == ProcFs().executable_maps(ME)
    assert len(pieces) > 3


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


# -- who may look ----------------------------------------------------------------------------


def as_nobody(look: Callable[[], object]) -> str:
    """``repr`` of what ``look`` gives in a forked child without any right."""
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        said = "it did not get that far"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = repr(look())
        except Exception as error:  # noqa: BLE001 - the parent shows it
            said = repr(error)
        finally:
            os.write(outside, said.encode())
            os._exit(0)
    os.close(outside)
    with os.fdopen(inside) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@needs_root
def test_nobody_is_denied_maps_and_exe_and_may_read_the_rest() -> None:
    def look() -> object:
        proc = ProcFs()
        denied = {reader(ME) for reader in (proc.maps, proc.executable_maps, proc.exe, proc.is_32bit, proc.live_thread)}
        found = proc.process(ME)
        assert found is not None
        return denied, found.exe, found.uid, found.cgroup == proc.cgroup(ME), ME in proc.pids()

    assert as_nobody(look) == repr(({Miss.DENIED}, None, 0, True, True))


@needs_root
def test_nobody_may_read_its_own_maps() -> None:
    assert as_nobody(lambda: len(ProcFs().executable_maps(os.getpid()) or ()) > 3) == "True"


@needs_root
def test_nobody_tells_a_name_that_ends_like_the_mark_by_inode_and_device() -> None:
    # Nobody may not follow the links in map_files, so numbers are all there is to compare.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        path = f"{place}/x (deleted)".encode()
        with mapped(fd := create(path)):
            row = my_row(os.fstat(fd).st_ino)
            rows = [row, row._replace(minor=row.minor + 1), row._replace(inode=row.inode + 1)]
            answer = as_nobody(lambda: ProcFs().resolve(os.getpid(), rows))
    assert answer == repr([row._replace(path=path, is_deleted=False), *rows[1:]])


def mounted_proc(options: str, code: str) -> str:
    """What ``code`` prints with a proc of these mount options on /proc, in a mount namespace of its own."""
    script = 'mount -t proc -o "$1" proc /proc && exec "$2" -c "$3"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", options, sys.executable, code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace or no such mount option: {done.stderr.strip()}")
    assert done.stderr == ""
    return done.stdout.strip()


@needs_root
def test_a_proc_that_shows_processes_only_is_a_proc_root_without_a_boot_id() -> None:
    code = (
        "import os; from sowatch.linux.proc import ProcFs; proc = ProcFs();"
        " print(proc.boot_id(), proc.stat(os.getpid()).pid == os.getpid())"
    )

    assert mounted_proc("subset=pid", code) == "None True"


@needs_root
def test_processes_hidden_from_nobody_are_gone_for_it() -> None:
    code = (
        "import os; from sowatch.linux.proc import ProcFs; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        " proc = ProcFs(); print(proc.pids() == [os.getpid()], proc.stat(1), proc.process(1))"
    )

    assert mounted_proc("hidepid=2", code) == "True Miss.GONE None"


@needs_root
def test_a_proc_that_lists_what_it_does_not_let_nobody_read_is_a_proc_root() -> None:
    code = (
        "import os; from sowatch.linux.proc import ProcFs; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        " proc = ProcFs(); print(1 in proc.pids(), proc.stat(1), proc.process(1))"
    )

    assert mounted_proc("hidepid=1", code) == "True Miss.DENIED None"


@needs_root
def test_the_proc_of_another_pid_namespace_can_be_read_and_pids_are_told_apart(spawn: Any) -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", "echo $$; read line"]
    child = spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if child.stdout.readline() != b"1\n":
        pytest.skip(f"no pid namespace: {child.stderr.read()!r}")
    outer = ProcFs()
    (inside,) = [pid for pid in outer.pids() if getattr(outer.stat(pid), "ppid", 0) == child.pid]

    status = outer.status(inside)
    assert status
    assert (status.tgid, status.ns_pid) == (inside, 1)
    inner = ProcFs(f"/proc/{inside}/root/proc")  # its link `self` leads nowhere for us
    assert inner.pids() == [1]
    assert inner.stat(1) == outer.stat(inside)._replace(pid=1, ppid=0, pgrp=0, session=0)  # type: ignore[union-attr]


@needs_root
def test_a_chrooted_process_is_told_by_the_path_it_sees(spawn: Any, tmp_path: Path) -> None:
    # A static program needs nothing in its root.
    (tmp_path / "bin").mkdir()
    source = tmp_path / "wait.c"
    source.write_text('#include <unistd.h>\nint main(void) { char c; return write(1, "", 1) + read(0, &c, 1) < 0; }\n')
    subprocess.run(["cc", "-static", "-o", tmp_path / "bin/wait", source], check=True)
    child = spawn(["chroot", tmp_path, "/bin/wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.read(1) == b"\0"

    assert ProcFs().exe(child.pid) == Link(str(tmp_path / "bin/wait"), False)
    found = ProcFs().process(child.pid)
    assert found is not None
    assert found.exe == "/bin/wait"


def test_a_32_bit_process_is_told(spawn: Any, tmp_path: Path) -> None:
    source = tmp_path / "wait32.c"
    source.write_text(
        "static int call(int number, int a, const void *b, int c) {\n"
        "    int result;\n"
        '    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");\n'
        "    return result;\n}\n"
        "void _start(void) { char c = 'x'; call(4, 1, &c, 1); call(3, 0, &c, 1); call(1, 0, 0, 0); }\n"
    )
    program = tmp_path / "wait32"
    flags = ["-m32", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector"]
    built = subprocess.run(["cc", *flags, "-o", program, source], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"no compiler for 32-bit programs: {built.stderr.splitlines()[0]}")
    try:
        child = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    assert child.stdout.read(1) == b"x"

    assert ProcFs().is_32bit(child.pid) is True
    assert [row.path for row in ProcFs().executable_maps(child.pid) or ()] == [bytes(program)]


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


def test_a_pid_of_a_thread_that_maps_and_unmaps_is_never_torn(spawn: Any, tmp_path: Path) -> None:
    # Readings of a process that changes its maps all the time: every row must be whole and rows in order.
    code = (
        "import mmap, sys, threading; sys.stdout.write('x'); sys.stdout.flush()\n"
        "def churn():\n"
        "    while True:\n"
        "        some = [mmap.mmap(-1, 4096 * (n % 7 + 1)) for n in range(50)]\n"
        "threading.Thread(target=churn, daemon=True).start(); sys.stdin.read()"
    )
    child = spawn([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.read(1) == b"x"
    proc = ProcFs()
    for _ in range(100):
        rows = proc.maps(child.pid)
        assert isinstance(rows, list)
        edges = [edge for row in rows for edge in (row.start, row.end)]
        assert edges == sorted(edges)
        assert b"[stack]" in [row.path for row in rows]


def test_ctypes_finds_the_page_of_a_function_in_an_executable_row() -> None:
    address = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    rows = ProcFs().executable_maps(ME)
    assert isinstance(rows, list)

    assert [b"libc" in row.path for row in rows if row.start <= address < row.end] == [True]
