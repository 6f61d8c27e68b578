"""Files that are mapped into this process, and their rows in its /proc/PID/maps."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from sowatch.linux.proc import ProcFs
from sowatch.linux.proc_parse import MapRow

ME = os.getpid()


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
