"""Inspector: which file is read, how often, what is kept of it, and what a read that hangs holds up.

Files are real ones in this process's own view. The clock is the test's, and where a read has to hang, `find_mapped`
waits for the test before it goes on to the real one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sowatch.engine import file_inspector
from sowatch.engine.file_inspector import FileFacts
from sowatch.linux.elf_symbols import ExportSearch
from sowatch.linux.proc import ProcReadError
from support.elf_files import Made
from support.inspections import BUILD_ID, ME, Clock, Gate, Reader, count_parsed, name_of


def open_files() -> set[str]:
    """The paths of all descriptors of this process."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


NAMES = Any


# ---- what a file says ---------------------------------------------------------------------------


def test_a_library_says_its_build_id_and_soname_and_where_it_was_found(reader: Reader, file: NAMES) -> None:
    name = file()
    facts = reader.read(name)
    assert (facts.is_elf, facts.build_id, facts.soname, facts.place) == (True, BUILD_ID, "libmade.so.1", "own")
    assert (facts.is_partial, facts.exports) == (False, None)
    assert name.path not in open_files()


def test_a_file_that_is_no_elf_file_says_that_it_is_none(reader: Reader, file: NAMES) -> None:
    facts = reader.read(file(content=b"#!/bin/sh\n"))
    assert (facts.is_elf, facts.build_id) == (False, None)


@pytest.mark.parametrize("way", ["gone", "another file", "a FIFO"])
def test_what_is_not_that_very_file_is_not_read(reader: Reader, file: NAMES, tmp_path: Path, way: str) -> None:
    if way == "gone":
        name = file()
        (tmp_path / "lib.so").unlink()
    elif way == "another file":
        name = file(inode=1)
    else:
        os.mkfifo(tmp_path / "lib.so")
        name = name_of(tmp_path / "lib.so")
    # Nobody writes to the FIFO: who opened it to read would wait for ever.
    assert reader.read(name) == FileFacts()
    assert reader.inspector.known(name) is None


def test_only_the_exports_that_rules_ask_for_are_looked_up(reader: Reader, file: NAMES) -> None:
    reader.make("made_read", "made_missing")
    assert reader.read(file()).exports == frozenset({"made_read"})


@pytest.mark.parametrize("content", [b"text", Made().data()[:100]], ids=["no ELF file", "a header alone"])
def test_exports_of_what_has_none_are_not_made_up(reader: Reader, file: NAMES, content: bytes) -> None:
    reader.make("made_read")
    assert not reader.read(file(content=content)).exports


def test_a_search_for_exports_that_passed_its_budget_makes_the_facts_partial(
    reader: Reader, file: NAMES, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = ExportSearch(frozenset({"made_read"}), "more than 1 MB would have to be read")
    monkeypatch.setattr(file_inspector, "search_exports", lambda _fd, _names: spent)
    reader.make("made_read", "made_write")
    facts = reader.read(file())
    assert (facts.is_partial, facts.exports, facts.build_id) == (True, frozenset({"made_read"}), BUILD_ID)


@pytest.mark.parametrize("step", ["read_facts", "search_exports"])
def test_what_the_kernel_could_not_read_is_unknown_and_may_be_read_again(
    reader: Reader, file: NAMES, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise file_inspector.ElfError("an error of the disk")

    reader.make("made_read")
    with monkeypatch.context() as broken:
        broken.setattr(file_inspector, step, fail)
        facts = reader.read(file())
        assert (facts.is_elf, facts.exports) == ({"read_facts": None, "search_exports": True}[step], None)
    if step == "read_facts":
        assert reader.read(file()).exports == frozenset({"made_read"})


def test_a_file_that_cannot_be_opened_is_unknown_and_the_next_one_is_read(
    reader: Reader, file: NAMES, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as broken:
        broken.setattr(file_inspector, "reopen", fail)
        assert reader.read(file()) == FileFacts()
    assert reader.read(file()).build_id == BUILD_ID


@pytest.mark.parametrize("step", ["find_mapped", "reopen"])
def test_a_file_that_descriptors_were_lacking_for_is_read_again_by_the_same_thread(
    reader: Reader, clock: Clock, file: NAMES, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ProcReadError("/proc/1/root", errno.EMFILE) if step == "find_mapped" else OSError(errno.EMFILE, "none")

    clock.file_age_s = 3.0
    name = file()
    with monkeypatch.context() as broken:
        broken.setattr(file_inspector, step, fail)
        assert reader.read(name) == FileFacts()
    clock.now_s += file_inspector.FIRST_RECHECK_S
    assert reader.inspector.take_recovered() == {name.file_id}
    assert reader.read(name).build_id == BUILD_ID


def test_a_file_found_by_its_process_s_link_is_looked_for_anew_in_the_next_process(
    reader: Reader, gate: Gate, file: NAMES
) -> None:
    gate.link = "/proc/7/map_files/1-2"
    name = file()
    facts = reader.read(name)
    assert (facts.place, facts.link, facts.build_id) == ("link", "/proc/7/map_files/1-2", BUILD_ID)
    assert reader.inspector.known(name) is None


# ---- what is kept -------------------------------------------------------------------------------


def test_a_file_is_read_once_for_all_its_names_and_known_from_then_on(
    reader: Reader, file: NAMES, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = count_parsed(monkeypatch)
    file()
    os.link(tmp_path / "lib.so", tmp_path / "again.so")
    names = [name_of(tmp_path / "lib.so"), name_of(tmp_path / "again.so")]
    assert [reader.inspector.known(name) for name in names] == [None, None]

    facts = [reader.read(name) for name in names]

    assert facts[0].build_id == facts[1].build_id == BUILD_ID
    assert len(parsed) == 1
    assert [reader.inspector.known(name).build_id for name in names] == [BUILD_ID] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("changed_ns", [0, -3, 12345], ids=["unknown", "of a scan of maps", "another"])
def test_facts_are_not_kept_for_a_version_that_may_be_another_one(
    reader: Reader, file: NAMES, tmp_path: Path, changed_ns: int
) -> None:
    file()
    name = name_of(tmp_path / "lib.so", changed_ns=changed_ns)
    assert reader.read(name).build_id == BUILD_ID
    assert reader.inspector.known(name) is None


def test_a_file_with_other_content_is_read_anew(reader: Reader, file: NAMES) -> None:
    first = file()
    assert reader.read(first).build_id == BUILD_ID
    made = Made()
    made.build_id = b"\xaa" * 20
    made.soname = b"libmade.so.2-longer"
    second = file(content=made.data())
    assert first.file_id == second.file_id
    assert reader.inspector.known(second) is None
    assert reader.read(second).build_id == "aa" * 20


def test_one_read_serves_all_who_wait_for_that_file(reader: Reader, gate: Gate, file: NAMES) -> None:
    goes_on = gate.hold("lib.so")
    first = reader.ask(file())
    reader.wait_held()
    second = reader.ask(file(), pid=ME + 1)
    assert first is second
    assert (first.facts, reader.inspector.take_finished()) == (None, [])
    goes_on.set()
    reader.wait_done()
    assert reader.inspector.take_finished() == [first]
    assert reader.inspector.take_finished() == []
    assert len(gate.calls) == 1
    # It is over: who asks now has it read once more.
    assert reader.ask(file()) is not first
    reader.wait_done()


def test_files_are_read_in_the_order_they_were_asked_for(reader: Reader, gate: Gate, file: NAMES) -> None:
    for name in ("a.so", "b.so", "c.so"):
        reader.ask(file(name))
    reader.wait_done(3)
    assert [name for name, _ in gate.calls] == ["a.so", "b.so", "c.so"]


def test_the_file_of_one_process_does_not_wait_behind_all_files_of_another_one(
    reader: Reader, gate: Gate, file: NAMES
) -> None:
    goes_on = gate.hold("first.so")
    reader.ask(file("first.so"))
    reader.wait_held()
    for name in ("many1.so", "many2.so", "many3.so"):
        reader.ask(file(name))
    reader.ask(file("honest.so"), pid=ME + 1)
    shared = reader.ask(file("many3.so"), pid=ME + 2)
    goes_on.set()
    reader.wait_done(5)
    assert [name for name, _ in gate.calls] == ["first.so", "many1.so", "honest.so", "many3.so", "many2.so"]
    assert reader.inspector.take_finished().count(shared) == 1


# ---- reads that hang ----------------------------------------------------------------------------


def test_while_a_read_waits_for_its_process_others_of_it_are_given_up_and_read_when_it_returns(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES
) -> None:
    goes_on = gate.hold("hangs.so")
    hangs, given_up, other = file("hangs.so"), file("a.so"), file("b.so")
    given_up.file_id = given_up.file_id._replace(major=given_up.file_id.major + 1)  # on another device
    reader.ask(hangs, pid=ME, is_own_view=False)
    reader.wait_held()
    refused = reader.ask(given_up, pid=ME, is_own_view=False)
    served = reader.ask(other, pid=ME + 1)
    clock.now_s += 2 * file_inspector.STUCK_S
    reader.inspector.relieve(clock.now_s)
    reader.wait_done(2)

    # What is not asked for costs no thread: it was not tried.
    assert refused.facts == FileFacts()
    assert served.facts is not None
    assert served.facts.build_id == BUILD_ID
    assert "a.so" not in [name for name, _ in gate.calls]
    assert reader.inspector.take_recovered() == set()

    goes_on.set()
    reader.wait_done()
    assert reader.inspector.take_recovered() == {hangs.file_id, given_up.file_id}
    assert reader.inspector.take_recovered() == set()
    assert reader.inspector._given_up == {}


def test_while_a_read_waits_for_its_file_system_files_of_that_are_given_up_of_whatever_process(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES
) -> None:
    gate.at_file.add("hangs.so")
    goes_on = gate.hold("hangs.so")
    hangs, given_up = file("hangs.so"), file("a.so")
    reader.ask(hangs, pid=ME)
    reader.wait_held()
    refused = reader.ask(given_up, pid=ME + 1)
    clock.now_s += 2 * file_inspector.STUCK_S
    reader.inspector.relieve(clock.now_s)
    reader.wait_done()
    assert refused.facts == FileFacts()
    assert [name for name, _ in gate.calls] == ["hangs.so"]
    goes_on.set()
    reader.wait_done()
    assert reader.inspector.take_recovered() == {hangs.file_id, given_up.file_id}


def test_a_read_that_is_slow_gives_nobody_up(reader: Reader, gate: Gate, clock: Clock, file: NAMES) -> None:
    goes_on = gate.hold("slow.so")
    slow, waits = file("slow.so"), file("a.so")
    reader.ask(slow)
    reader.wait_held()
    inspection = reader.ask(waits)
    clock.now_s += file_inspector.STUCK_S  # not longer than that
    goes_on.set()
    reader.wait_done(2)
    assert inspection.facts is not None
    assert inspection.facts.build_id == BUILD_ID
    assert reader.inspector.take_recovered() == set()


def test_what_is_given_up_is_bounded(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_inspector, "MAX_GIVEN_UP", 1)
    goes_on = gate.hold("hangs.so")
    hangs = file("hangs.so")
    reader.ask(hangs, is_own_view=False)
    reader.wait_held()
    first, second = file("a.so"), file("b.so")
    reader.ask(first, is_own_view=False)
    reader.ask(second, is_own_view=False)
    clock.now_s += 2 * file_inspector.STUCK_S
    reader.inspector.relieve(clock.now_s)
    reader.wait_done(2)
    goes_on.set()
    reader.wait_done()
    recovered = reader.inspector.take_recovered()
    assert len(recovered) == 2
    assert hangs.file_id in recovered


@pytest.mark.parametrize("age_s", [2 * file_inspector.BUSY_S, 2 * file_inspector.STUCK_S])
def test_a_file_in_our_own_view_is_read_without_the_process_that_does_not_answer(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES, age_s: float
) -> None:
    gate.hold("lib.so")
    inspection = reader.ask(file(), is_own_view=True)
    reader.wait_held()
    clock.now_s += age_s
    reader.ask(file("other.so"), pid=ME + 1)  # so that there is a second thread
    reader.inspector.relieve(clock.now_s)
    reader.inspector.relieve(clock.now_s)  # asks no second time
    reader.wait_done(2)
    assert inspection.facts is not None
    assert inspection.facts.build_id == BUILD_ID
    assert sorted(gate.calls) == [("lib.so", False), ("lib.so", True), ("other.so", False)]
    facts = inspection.facts
    # The read that hung has nothing to add when it returns.
    gate.open_all()
    reader.wait_done()
    assert inspection.facts is facts


@pytest.mark.parametrize(
    ("busy_s", "waiting", "threads"),
    [(2 * file_inspector.BUSY_S, 3, 4), (file_inspector.BUSY_S / 2, 3, 1), (2 * file_inspector.BUSY_S, 0, 1)],
    ids=["all are busy", "not for long", "nobody waits"],
)
def test_further_threads_come_for_those_that_wait_behind_busy_ones(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES, busy_s: float, waiting: int, threads: int
) -> None:
    names = ["first.so", *(f"{n}.so" for n in range(waiting))]
    for name in names:
        gate.hold(name)
    reader.ask(file(names[0]), is_own_view=False)
    reader.wait_held()
    for name in names[1:]:
        reader.ask(file(name), is_own_view=False)
    clock.now_s += busy_s
    reader.inspector.relieve(clock.now_s)
    assert len(reader.inspector._threads) == threads
    if threads > 1:
        # The new ones have only begun: no reason for still more.
        reader.wait_held(waiting)
        reader.inspector.relieve(clock.now_s)
        assert len(reader.inspector._threads) == threads


@pytest.mark.parametrize(("limit", "value", "threads"), [("MORE_THREADS", 2, [3, 3, 5]), ("MAX_THREADS", 3, [3, 3, 3])])
def test_threads_are_bounded_at_a_time_and_in_all(
    reader: Reader,
    gate: Gate,
    clock: Clock,
    file: NAMES,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
    threads: list[int],
) -> None:
    monkeypatch.setattr(file_inspector, limit, value)
    names = [f"{n}.so" for n in range(6)]
    for name in names:
        gate.hold(name)
        reader.ask(file(name), is_own_view=False)
    reader.wait_held()
    found = []
    clock.now_s += 2 * file_inspector.BUSY_S
    reader.inspector.relieve(clock.now_s)
    found.append(len(reader.inspector._threads))
    # Three wait, but two threads have only begun.
    reader.wait_held(2)
    reader.inspector.relieve(clock.now_s)
    found.append(len(reader.inspector._threads))
    clock.now_s += 2 * file_inspector.BUSY_S
    reader.inspector.relieve(clock.now_s)
    found.append(len(reader.inspector._threads))
    assert found == threads


def test_a_thread_that_hung_ends_when_another_one_has_taken_its_place(
    reader: Reader, gate: Gate, clock: Clock, file: NAMES, wait_until: Any
) -> None:
    goes_on = gate.hold("hangs.so")
    reader.ask(file("hangs.so"), is_own_view=False)
    reader.wait_held()
    (first,) = reader.inspector._threads
    reader.ask(file("a.so"), pid=ME + 1)
    clock.now_s += 2 * file_inspector.STUCK_S
    reader.inspector.relieve(clock.now_s)
    reader.wait_done()
    goes_on.set()
    reader.wait_done()
    wait_until(lambda: not first.is_alive())
    assert first not in reader.inspector._threads
    assert reader.read(file("b.so")).build_id == BUILD_ID


def test_the_only_thread_goes_on_after_it_hung(reader: Reader, gate: Gate, clock: Clock, file: NAMES) -> None:
    goes_on = gate.hold("hangs.so")
    reader.ask(file("hangs.so"))
    reader.wait_held()
    clock.now_s += 2 * file_inspector.STUCK_S
    goes_on.set()
    reader.wait_done()
    assert reader.read(file("a.so")).build_id == BUILD_ID


# ---- the end ------------------------------------------------------------------------------------


def test_close_ends_all_threads_and_may_come_again(reader: Reader, gate: Gate, clock: Clock, file: NAMES) -> None:
    gate.hold("a.so")
    reader.ask(file("a.so"))
    reader.wait_held()
    reader.ask(file("b.so"))
    clock.now_s += 2 * file_inspector.BUSY_S
    reader.inspector.relieve(clock.now_s)
    threads = list(reader.inspector._threads)
    assert len(threads) == 2
    reader.inspector.close(0.0)  # does not wait for what hangs
    assert threads[0].is_alive()
    reader.end()
    assert not any(one.is_alive() for one in threads)
    reader.inspector.close(0.0)
