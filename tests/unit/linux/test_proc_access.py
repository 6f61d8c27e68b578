"""procfs: who may look, and at which proc mount."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import Link
from support.own_maps import create, mapped, my_row

ME = os.getpid()
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user or mounts: needs root")


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
