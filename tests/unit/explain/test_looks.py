"""Looks at the files themselves, some of which hang."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.explain import FileLook
from sowatch.explain.looks import MAX_STUCK, Subject, TimeoutWorker, look_at, look_at_place
from sowatch.linux.proc import ProcFs
from sowatch.model.identity import FileId
from support.elf_files import Made

# ---- looks at files -----------------------------------------------------------------------------


def subject(path: Path | str, **changes: Any) -> Subject:
    about = os.stat(path) if os.path.exists(path) else None
    file_id = FileId(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino) if about else FileId(0, 0, 0)
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "path": str(path),
        "file_id": file_id,
        "ranges": (),
        "is_own_view": False,
        "is_deleted": False,
    }
    return Subject(**(facts | changes))


def tries(look: FileLook) -> list[tuple[str, str | None]]:
    return [(one.by, one.error) for one in look.tries]


def test_a_file_is_opened_below_the_root_of_its_process(make_library: Callable[..., Path]) -> None:
    made = make_library("libx.so", ["one", "two"])
    look = look_at(ProcFs(), subject(made), {"one", "three"})
    assert (look.elf, look.opened_by, look.soname) == ("elf", "root", "libx.so")
    assert look.exports == {"one"}
    assert tries(look) == [("map_files", "nothing is mapped any more"), ("root", None)]


def test_another_file_under_the_name_is_not_taken_for_it(make_library: Callable[..., Path]) -> None:
    look = look_at(ProcFs(), subject(make_library(), file_id=FileId(0, 0, 1), is_own_view=True), ())
    assert (look.elf, look.opened_by) == ("gone", None)
    assert tries(look)[1:] == [
        ("own_view", "another file has that name now"),
        ("root", "another file has that name now"),
    ]


def test_a_deleted_file_is_not_looked_for_by_its_name(make_library: Callable[..., Path]) -> None:
    look = look_at(ProcFs(), subject(make_library(), is_deleted=True), ())
    assert (look.elf, tries(look)[1:]) == ("gone", [("root", "its name is gone")])


def test_a_fifo_is_never_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert look_at(ProcFs(), subject(fifo), ()).elf == "not_regular"


def test_a_process_that_is_gone_leaves_no_way_to_the_file(tmp_path: Path) -> None:
    look = look_at(ProcFs(), subject(tmp_path / "x.so", pid=(1 << 22) - 1), ())
    assert (look.elf, {error for _, error in tries(look)}) == ("gone", {"the process is gone"})


def test_a_file_that_is_no_elf_says_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\n")
    look = look_at(ProcFs(), subject(tmp_path / "text"), {"one"})
    assert (look.elf, look.exports) == ("not_elf", frozenset())


def test_a_file_that_lies_says_what_about(tmp_path: Path) -> None:
    lying = tmp_path / "lying.so"
    made = Made()
    made.gnu["values"] = [1 << 30] * 3
    lying.write_bytes(made.data())
    place = os.open(lying, os.O_PATH)
    try:
        look = look_at_place(place, str(lying), {"made_read"})
    finally:
        os.close(place)
    assert (look.elf, look.soname, look.exports) == ("partial", "libmade.so.1", frozenset())
    assert (look.reason, look.gave_up_exports) == ("its hash table ends outside the file", True)


def test_a_file_that_takes_the_name_of_another_before_it_is_read_is_not_opened(
    tmp_path: Path, make_library: Callable[..., Path]
) -> None:
    first, name = make_library(), tmp_path / "name"
    name.symlink_to(first)
    place = os.open(name, os.O_PATH)
    try:
        name.unlink()
        os.mkfifo(name)
        look = look_at_place(place, str(name), ())
    finally:
        os.close(place)
    assert (look.elf, look.soname) == ("elf", "libtiny.so")


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_regular_file_is_not_opened_by_its_descriptor(tmp_path: Path, kind: str) -> None:
    name = tmp_path / kind
    os.mkfifo(name) if kind == "fifo" else name.mkdir()
    place = os.open(name, os.O_PATH)
    try:
        assert look_at_place(place, str(name), ()).elf == "not_regular"
    finally:
        os.close(place)


# ---- what hangs ---------------------------------------------------------------------------------


def test_what_hangs_is_left_behind_and_the_rest_goes_on(dam: threading.Event) -> None:
    with TimeoutWorker(patience_s=0.05) as worker:
        assert worker.run(lambda: 1) == 1
        assert worker.run(dam.wait) is None
        assert worker.run(lambda: 2) == 2


def test_after_a_few_that_hang_nothing_more_is_tried(dam: threading.Event) -> None:
    with TimeoutWorker(patience_s=0.01) as worker:
        for _ in range(MAX_STUCK):
            assert worker.run(dam.wait) is None
        assert worker.run(lambda: 1) is None


def test_what_a_look_raises_comes_out() -> None:
    def fail() -> None:
        raise TimeoutError("of its own")

    with TimeoutWorker() as worker, pytest.raises(TimeoutError, match="of its own"):
        worker.run(fail)


def test_no_thread_is_left() -> None:
    # Threads of the tests before that were let go may still end.
    before = set(threading.enumerate())
    with TimeoutWorker() as worker:
        worker.run(lambda: 1)
    assert set(threading.enumerate()) <= before
