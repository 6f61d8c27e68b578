"""procfs: the rows of maps, of real processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux import proc as procfs
from sowatch.linux.proc import ProcFs
from support.own_maps import create, mapped, my_row

ME = os.getpid()


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
