"""Addresses have the names of what was mapped there, also when it is unmapped, deleted or the process is gone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sowatch.engine.workers import ActiveFile
from sowatch.linux.function_table import function_table
from sowatch.linux.symbols import list_functions
from sowatch.model.events import Event, Library, Load, Process, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.uprobes.address_book import AddressBook, process_key
from support.programs import build

START = 0x7F0000000000


@pytest.fixture
def library(tmp_path: Path) -> Library:
    path = build("probed", tmp_path, flags=["-shared", "-fPIC", "-O1", "-g0"], output="libbook.so")
    status = os.stat(path)
    return Library(str(path), FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino), str(path))


@pytest.fixture
def book() -> Iterator[AddressBook]:
    made = AddressBook()
    yield made
    made.close()


def ranges_of(path: str) -> tuple[tuple[int, int], ...]:
    """Where ld.so would map the code of the file, were it mapped at START."""
    lines = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout.splitlines()
    loads = [line.split() for line in lines if line.split()[:1] == ["LOAD"] and " E " in line]
    return tuple(
        (START + (int(one[2], 16) & ~0xFFF), START + ((int(one[2], 16) + int(one[5], 16) + 0xFFF) & ~0xFFF))
        for one in loads
    )


def load(library: Library, pid: int) -> Event:
    process = Process(pid=pid, start_ns=5_000_000_000)
    return Load("r", library, process, "mmap", 1, 1, ranges_of(library.path))


def unload(library: Library, pid: int, cause: str) -> Event:
    return Unload("r", library, Process(pid=pid, start_ns=5_000_000_000), cause, 2, 2)  # type: ignore[arg-type]


def place_of(library: Library, name: str) -> int:
    fd = os.open(library.path, os.O_RDONLY)
    try:
        (one,) = [one for one in list_functions(fd) if one.name == name]
    finally:
        os.close(fd)
    return START + one.offset


def test_an_address_is_in_the_function_that_its_call_is_in(book: AddressBook, library: Library) -> None:
    book.note(load(library, 7))
    (frame,) = book.frames(ProcessId(7, 5_000_000_000), [place_of(library, "nested") + 5])
    assert frame.library == library
    assert frame.place is not None
    assert (frame.place.symbol, frame.place.inside) == ("nested", 5)
    # The call was the last instruction of a function that never goes on: it returns to where the next one begins.
    (end,) = book.frames(ProcessId(7, 5_000_000_000), [place_of(library, "nested")])
    assert end.place is not None
    assert end.place.symbol != "nested"


def test_an_address_of_a_process_that_is_gone_and_a_file_that_is_deleted_has_its_name(
    book: AddressBook, library: Library
) -> None:
    address = place_of(library, "plain") + 1
    fd = os.open(library.path, os.O_RDONLY)
    file = ActiveFile(library, fd)
    book.hold(file)
    file.close()
    book.note(load(library, 7))
    book.note(unload(library, 7, "exit"))
    Path(library.path).unlink()
    (frame,) = book.frames(ProcessId(7, 5_000_000_000), [address])
    assert frame.place is not None
    assert (frame.place.symbol, frame.place.inside) == ("plain", 1)


def test_what_is_mapped_nowhere_or_by_others_has_no_name(book: AddressBook, library: Library) -> None:
    book.note(load(library, 7))
    address = place_of(library, "plain") + 1
    assert [frame.library for frame in book.frames(ProcessId(8, 5_000_000_000), [address])] == [None]
    assert [frame.library for frame in book.frames(ProcessId(7, 5_000_000_000), [16])] == [None]
    # The clock of /proc counts in ticks; that of another process with this pid differs by more.
    assert book.frames(ProcessId(7, 5_000_123_456), [address])[0].library == library
    assert book.frames(ProcessId(7, 5_010_000_000), [address])[0].library is None


def test_processes_that_are_gone_and_files_that_are_kept_are_bounded(
    book: AddressBook, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sowatch.uprobes.address_book._MAX_GONE", 2)
    for pid in (7, 8, 9):
        book.note(load(library, pid))
        book.note(unload(library, pid, "exit"))
    address = place_of(library, "plain") + 1
    known = [book.frames(ProcessId(pid, 5_000_000_000), [address])[0].library for pid in (7, 8, 9)]
    assert known == [None, library, library]
    before = len(os.listdir("/proc/self/fd"))
    book._max_files = 3
    for number in range(10):
        fd = os.open(library.path, os.O_RDONLY)
        file = ActiveFile(Library(library.path, library.id._replace(inode=number)), fd)
        book.hold(file)
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_a_table_of_functions_is_made_once_for_files_that_have_the_same(library: Library, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    copy.write_bytes(Path(library.path).read_bytes())
    tables = []
    for path in (library.path, copy):
        fd = os.open(path, os.O_RDONLY)
        tables.append(function_table(fd))
        os.close(fd)
    assert tables[0] is tables[1]
    fd = os.open(os.devnull, os.O_RDONLY)
    assert function_table(fd) is None
    os.close(fd)


def test_the_key_of_a_process_is_the_same_by_both_clocks() -> None:
    assert process_key(ProcessId(7, 5_009_999_999)) == process_key(ProcessId(7, 5_000_000_000))
