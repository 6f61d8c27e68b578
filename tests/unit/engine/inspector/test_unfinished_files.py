"""Files that are being written, or may be: they are read again, more and more rarely, until they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sowatch.engine import file_inspector
from sowatch.engine.file_inspector import host_path
from sowatch.linux.elf_symbols import ExportSearch
from support.inspections import BUILD_ID, ME, Clock, Reader, count_parsed

NAMES = Any


@pytest.mark.parametrize(
    ("age_s", "content", "is_unfinished"),
    [
        (0.01, None, True),
        (1.0, None, True),
        (3.0, None, False),
        (3.0, b"\x7fELF and the rest is still to come", True),
        (59.0, b"\x7fELF and the rest is still to come", True),
        (61.0, b"\x7fELF and the rest is still to come", False),
    ],
)
def test_a_file_that_changed_just_now_or_is_not_whole_yet_is_read_again(
    reader: Reader, clock: Clock, file: NAMES, age_s: float, content: bytes | None, is_unfinished: bool
) -> None:
    clock.file_age_s = age_s
    name = file(content=content)
    reader.read(name)
    assert reader.inspector.take_recovered() == set()
    clock.now_s += file_inspector.FIRST_RECHECK_S
    assert reader.inspector.take_recovered() == ({name.file_id} if is_unfinished else set())
    if is_unfinished:
        assert reader.inspector.known(name) is None


def test_pauses_between_rereads_double_until_a_minute_has_passed(reader: Reader, clock: Clock, file: NAMES) -> None:
    clock.file_age_s = 0.01  # so that each read parses it
    name = file()
    reader.read(name)
    begun_s, due = clock.now_s, []
    for _ in range(4 * 200):
        clock.now_s += 0.25
        if reader.inspector.take_recovered():
            due.append(clock.now_s - begun_s)
            reader.read(name)  # and does not begin anew with that
    assert due == [0.25, 0.75, 1.75, 3.75, 7.75, 15.75, 31.75, 63.75]


def test_a_file_that_has_not_changed_for_long_enough_is_checked_once_more_and_then_known(
    reader: Reader, clock: Clock, file: NAMES
) -> None:
    clock.file_age_s = 1.0
    name = file()
    first = reader.read(name)
    assert reader.inspector.known(name) is None
    clock.file_age_s = file_inspector.WRITTEN_S + 1
    assert reader.read(name) == first
    assert reader.inspector.known(name) == first
    assert reader.inspector.take_recovered() == {name.file_id}
    clock.now_s += 100
    assert reader.inspector.take_recovered() == set()


def test_what_is_known_of_a_file_has_the_path_that_led_to_it(reader: Reader, clock: Clock, file: NAMES) -> None:
    clock.file_age_s = 3.0
    name = file()
    known = (reader.read(name), reader.inspector.known(name))
    assert [host_path("/proc", ME, name, facts) for facts in known] == [name.path, name.path]


def test_what_is_at_hand_goes_when_the_file_is_read_anew(reader: Reader, clock: Clock, file: NAMES) -> None:
    name, other = file(), file("other.so", content=b"\x7fELF and the rest is still to come")
    clock.file_age_s = 3.0
    first = reader.read(name)
    assert reader.inspector.known(name) is reader.inspector.known(name) == first
    # Another file with the same id of an object: the entry is of the name itself.
    reader.inspector._at_hand[id(other)] = name, first
    assert reader.inspector.known(other) is None
    clock.file_age_s = 1.0
    reader.inspector._read.clear()
    reader.read(name)
    assert reader.inspector.known(name) is None


@pytest.mark.parametrize(("age_s", "is_sure"), [(0.01, False), (1.0, True)])
def test_what_was_read_within_a_tick_of_its_change_may_be_old(
    reader: Reader, clock: Clock, file: NAMES, monkeypatch: pytest.MonkeyPatch, age_s: float, is_sure: bool
) -> None:
    parsed = count_parsed(monkeypatch)
    clock.file_age_s = age_s
    name = file()
    reader.read(name)
    reader.read(name)
    assert len(parsed) == (1 if is_sure else 2)
    while reader.inspector._unfinished:
        clock.now_s += 100
        reader.inspector.take_recovered()
    assert (reader.inspector.known(name) is not None) == is_sure


def test_a_file_that_changes_while_it_is_read_is_read_again(
    reader: Reader, clock: Clock, file: NAMES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = file_inspector.read_facts

    def read_slowly(fd: int) -> Any:
        facts = real(fd)
        with open(tmp_path / "lib.so", "ab") as more:
            more.write(b"more")
        return facts

    monkeypatch.setattr(file_inspector, "read_facts", read_slowly)
    name = file()
    reader.read(name)
    assert reader.inspector.known(name) is None
    clock.now_s += file_inspector.FIRST_RECHECK_S
    assert reader.inspector.take_recovered() == {name.file_id}


def test_a_file_whose_facts_are_partial_may_not_be_whole_yet(
    reader: Reader, clock: Clock, file: NAMES, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = ExportSearch(frozenset(), "its symbols end behind its last byte")
    monkeypatch.setattr(file_inspector, "search_exports", lambda _fd, _names: spent)
    clock.file_age_s = 3.0
    reader.make("made_read")
    name = file()
    reader.read(name)
    clock.now_s += file_inspector.FIRST_RECHECK_S
    assert reader.inspector.take_recovered() == {name.file_id}


def test_no_more_files_than_the_limit_are_read_again(
    reader: Reader, clock: Clock, file: NAMES, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_inspector, "MAX_UNFINISHED", 2)
    clock.file_age_s = 1.0
    names = [file(name) for name in ("a.so", "b.so", "c.so")]
    for name in names:
        assert reader.read(name).build_id == BUILD_ID
    clock.now_s += 1
    assert reader.inspector.take_recovered() == {names[0].file_id, names[1].file_id}
