"""A file system may answer any question with any error: FUSE servers do, and whoever aborts their connection."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from sowatch.linux import mapped_file
from sowatch.linux.mapped_file import find_mapped
from sowatch.linux.proc import ProcFs
from sowatch.model.identity import FileId


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EIO, errno.ENOTCONN])
def test_a_file_whose_status_is_refused_is_not_found_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"\0" * mmap.PAGESIZE)
    status = path.stat()
    file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    tries: list[object] = []

    def refuse(fd: int) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC):
        rows = [row for row in ProcFs().executable_maps(os.getpid()) or () if row.path.endswith(b"/lib.so")]
        ranges = tuple((row.start, row.end) for row in rows)
        assert ranges
        before = set(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(mapped_file.os, "fstat", refuse)
        found = find_mapped(
            ProcFs(),
            os.getpid(),
            file_id,
            str(path),
            ranges,
            is_own_view=True,
            is_deleted=False,
            on_try=lambda _place, _path, why: tries.append(why),
        )
        monkeypatch.undo()
        assert found is None
        assert set(os.listdir("/proc/self/fd")) == before
    assert {one.errno for one in tries if isinstance(one, OSError)} == {number}
