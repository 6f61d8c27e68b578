"""What the public function says of mapped files: real files and processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sowatch import Library, Mapped, Process, Staleness, facts_of
from sowatch.linux.proc import ProcFs
from sowatch.model.identity import FileId
from support.programs import Mapper


def test_mapped_files_are_compared_with_the_disk_and_have_a_unit_and_a_package(
    programs: Mapping[str, Path], make_library: Any, tmp_path: Path
) -> None:
    fresh, replaced = make_library("libfresh.so"), make_library("libreplaced.so")
    with Mapper(programs["mapper"], tmp_path) as mapper:
        mapper.map(fresh)
        mapper.map(replaced)
        rows = ProcFs().executable_maps(mapper.pid)
        stat = ProcFs().stat(mapper.pid)
        assert isinstance(rows, list)
        assert stat
        process = Process(mapper.pid, stat.start_ns, cgroup="/system.slice/ours.service")
        mapped = [
            Mapped(
                process,
                Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode)),
                "all",
                ((row.start, row.end),),
                "mmap",
                time.time_ns(),
            )
            for row in rows
            if row.path.endswith((b"libfresh.so", b"libreplaced.so", b"/libc.so.6"))
        ]
        make_library("new.so").rename(replaced)
        found = {os.path.basename(one.mapped.library.path): one for one in facts_of(mapped, packages=True)}

    assert {name: one.stale.stale for name, one in found.items()} == {
        "libfresh.so": None,
        "libreplaced.so": Staleness.REPLACED,
        "libc.so.6": None,
    }
    assert found["libreplaced.so"].restart.command == "systemctl restart ours.service"
    assert found["libfresh.so"].package is None
    assert found["libc.so.6"].package is not None
