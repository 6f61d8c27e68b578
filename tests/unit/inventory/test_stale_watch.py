"""The comparison with the disk again and again: what it reports, and how little it looks at."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory import stale_watch, staleness
from sowatch.inventory.stale_watch import StaleChange, StaleWatch, file_key
from sowatch.inventory.staleness import Disk, StaleAnswer, Staleness
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from support.programs import Mapper
from support.silent_fs import SilentFileSystem


class Map:
    """A watched map that a test changes."""

    def __init__(self, *mapped: Mapped) -> None:
        self.mapped = list(mapped)

    def snapshot(self, *, with_ranges: bool = True) -> Sequence[Mapped]:
        return list(self.mapped)


@pytest.fixture
def mapper(programs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapper]:
    with Mapper(programs["mapper"], tmp_path_factory.mktemp("s")) as running:
        yield running


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories show each change, however short a time after another."""
    monkeypatch.setattr(stale_watch, "_UNSETTLED_NS", 0)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The base names of the files that are looked at."""
    found: list[str] = []
    real = Disk.staleness

    def answer(disk: Disk, process: Process, library: Library, *args: Any, **options: Any) -> StaleAnswer:
        found.append(os.path.basename(library.path))
        return real(disk, process, library, *args, **options)

    monkeypatch.setattr(Disk, "staleness", answer)
    return found


def mapped(pid: int, path: Path) -> Mapped:
    """A mapping as the watcher would report it, read from the process's maps."""
    rows = ProcFs().executable_maps(pid)
    assert isinstance(rows, list)
    [row] = [row for row in rows if row.path == os.fsencode(path)]
    stats = ProcFs().stat(pid)
    assert stats
    library = Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode))
    return Mapped(Process(pid, stats.start_ns), library, "all", ((row.start, row.end),), "mmap", time.time_ns())


def reported(changes: Sequence[StaleChange]) -> list[tuple[str, str | None]]:
    return [
        (change.cause or str(change.answer.stale), os.path.basename(change.mapped.library.path)) for change in changes
    ]


def test_each_change_is_reported_once(mapper: Mapper, make_library: Any) -> None:
    library = make_library("libours.so")
    other = library.with_name("kept")
    os.link(library, other)
    mapper.map(library)
    one = mapped(mapper.pid, library)
    changes: list[StaleChange] = []
    watched = Map(one)
    watch = StaleWatch(watched, on_change=changes.extend)

    watch.compare()
    assert (reported(changes), watch.answers, watch.stale()) == ([], {}, [])
    make_library("libours.so.new").rename(library)
    watch.compare()
    watch.compare()
    assert reported(changes) == [("replaced", "libours.so")]
    assert watch.answers[one.process.id, file_key(one)].stale is Staleness.REPLACED
    other.rename(library)
    watch.compare()
    assert (reported(changes)[1:], watch.answers) == ([("restored", "libours.so")], {})
    library.unlink()
    watch.compare()
    watched.mapped.clear()
    watch.compare()
    assert reported(changes)[2:] == [("deleted", "libours.so"), ("unmapped", "libours.so")]
    watch.close()


def test_one_that_ends_during_a_pass_is_unmapped_and_not_restored(
    programs: Mapping[str, Path], make_library: Any, tmp_path: Path
) -> None:
    library = make_library("libours.so")
    changes: list[StaleChange] = []
    with Mapper(programs["mapper"], tmp_path) as running:
        running.map(library)
        watched = Map(mapped(running.pid, library))
        library.unlink()
        watch = StaleWatch(watched, on_change=changes.extend)
        watch.compare()
    watch.compare()  # the map has it still
    assert reported(changes) == [("deleted", "libours.so")]
    watched.mapped.clear()
    watch.compare()
    assert reported(changes)[1:] == [("unmapped", "libours.so")]
    watch.close()


@pytest.mark.usefixtures("settled")
def test_a_file_is_looked_at_again_only_when_its_directory_has_changed(
    mapper: Mapper, make_library: Any, looks: list[str]
) -> None:
    here, there = make_library("libours.so"), make_library("dir/libother.so")
    for library in (here, there):
        mapper.map(library)
    watch = StaleWatch(Map(mapped(mapper.pid, here), mapped(mapper.pid, there)))

    watch.compare()
    watch.compare()
    assert looks == ["libours.so", "libother.so"]
    there.with_name("another").touch()
    watch.compare()
    assert looks[2:] == ["libother.so"]
    there.parent.rename(there.parent.with_name("elsewhere"))
    make_library("dir/libother.so")
    watch.compare()
    assert sorted(looks[3:]) == ["libother.so", "libours.so"]  # the name of the directory is in that of the other
    watch.close()


def test_a_directory_that_has_just_changed_may_change_again_within_one_tick(
    mapper: Mapper, make_library: Any, looks: list[str]
) -> None:
    library = make_library("libours.so")
    mapper.map(library)
    watch = StaleWatch(Map(mapped(mapper.pid, library)))

    watch.compare()
    watch.compare()
    assert looks == ["libours.so", "libours.so"]
    watch.close()


@pytest.mark.usefixtures("settled")
def test_everything_is_looked_at_again_after_a_while(
    mapper: Mapper, make_library: Any, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library("libours.so")
    mapper.map(library)
    watch = StaleWatch(Map(mapped(mapper.pid, library)))

    watch.compare()
    monkeypatch.setattr(stale_watch, "LOOK_EVERY_S", 0.0)
    watch.compare()
    assert looks == ["libours.so", "libours.so"]
    watch.close()


@pytest.mark.usefixtures("settled")
def test_a_pass_looks_at_so_many_and_the_next_ones_at_the_rest(
    mapper: Mapper, make_library: Any, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [make_library(f"lib{number}.so") for number in range(3)]
    for library in libraries:
        mapper.map(library)
        library.unlink()
    monkeypatch.setattr(stale_watch, "MAX_LOOKS", 2)
    found = [
        Mapped(one.process, one.library, "all", one.ranges, "mmap", time.time_ns())
        for library in libraries
        for one in [mapped_deleted(mapper.pid, library)]
    ]
    watch = StaleWatch(Map(*found))

    watch.compare()
    assert (len(watch.stale()), watch.is_complete) == (2, False)
    watch.compare()
    assert (len(watch.stale()), watch.is_complete, sorted(looks)) == (3, True, ["lib0.so", "lib1.so", "lib2.so"])
    watch.close()


def mapped_deleted(pid: int, path: Path) -> Mapped:
    """The same of a file whose name is gone."""
    rows = ProcFs().executable_maps(pid)
    stats = ProcFs().stat(pid)
    assert isinstance(rows, list)
    assert stats
    [row] = [row for row in rows if row.path == os.fsencode(path)]
    library = Library(os.fsdecode(row.path), FileId(row.major, row.minor, row.inode), deleted=row.is_deleted)
    return Mapped(Process(pid, stats.start_ns), library, "all", ((row.start, row.end),), "mmap", time.time_ns())


def test_a_file_system_that_does_not_answer_costs_one_thread_however_often_it_is_asked(
    make_library: Any, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    honest = make_library("libhonest.so")
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so"), honest) as silent:
        served, fresh = mapped(silent.pid, silent.path), mapped(silent.pid, honest)
        changes: list[StaleChange] = []
        watch = StaleWatch(Map(served, fresh), on_change=changes.extend)
        watch.compare()
        silent.fall_silent()
        watch.compare()
        assert watch.answers[served.process.id, file_key(served)].stale is Staleness.UNKNOWN
        threads = threading.active_count()
        for _ in range(3):
            watch.compare()
        assert threading.active_count() == threads
        make_library("libhonest.so.new").rename(honest)
        watch.compare()
        assert reported(changes) == [("replaced", "libhonest.so")]
        watch.close()


def test_the_thread_compares_while_somebody_asks_and_ends_with_close(
    mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    library = make_library("libours.so")
    mapper.map(library)
    one = mapped(mapper.pid, library)
    library.unlink()
    with StaleWatch(Map(one)) as watch:
        assert watch.compared_ns is None
        watch.ask()
        wait_until(watch.stale)
    assert "sowatch-stale" not in {thread.name for thread in threading.enumerate()}


def test_another_interval_takes_effect_at_once(wait_until: Any) -> None:
    with StaleWatch(Map(), interval_s=86_400) as watch:
        wait_until(lambda: watch.compared_ns is not None)
        first = watch.compared_ns
        watch.interval_s = 1
        wait_until(lambda: watch.compared_ns != first)


def test_files_in_a_directory_that_keeps_changing_do_not_keep_others_from_being_looked_at(
    mapper: Mapper, make_library: Any, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each has just been made: its directory may change again without showing it, and so counts as changed each time.
    libraries = [make_library(f"lib{number}.so") for number in range(3)]
    for library in libraries:
        mapper.map(library)
    monkeypatch.setattr(stale_watch, "MAX_LOOKS", 1)
    monkeypatch.setattr(stale_watch, "_UNSETTLED_NS", 1 << 62)
    watch = StaleWatch(Map(*(mapped(mapper.pid, library) for library in libraries)))

    for _ in range(6):
        watch.compare()
    assert looks == ["lib0.so", "lib1.so", "lib2.so"] * 2
    watch.close()


@pytest.mark.usefixtures("settled")
def test_a_file_that_cannot_be_compared_is_unknown_and_keeps_no_other_from_being_compared(
    mapper: Mapper, make_library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    libraries = [make_library(f"lib{number}.so") for number in range(3)]
    for library in libraries:
        mapper.map(library)
    found = [mapped(mapper.pid, library) for library in libraries]
    libraries[2].unlink()
    real = Disk.staleness

    def answer(disk: Disk, process: Process, library: Library, *args: Any, **options: Any) -> StaleAnswer:
        if not library.path.endswith("lib2.so"):
            raise OSError(5, "Input/output error")
        return real(disk, process, library, *args, **options)

    monkeypatch.setattr(Disk, "staleness", answer)
    watch = StaleWatch(Map(*found))
    watch.compare()
    assert [watch.answers[one.process.id, file_key(one)].stale for one in found] == ["unknown", "unknown", "deleted"]
    assert watch.is_complete
    assert [record.message for record in caplog.records] == [
        f"{libraries[0]} of process {mapper.pid}: it could not be compared: [Errno 5] Input/output error"
    ]
    watch.close()


def test_of_more_mappings_than_are_compared_stale_ones_stay_stale_and_the_pass_is_not_complete(
    mapper: Mapper, make_library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, other = make_library("libours.so"), make_library("libother.so")
    for path in (library, other):
        mapper.map(path)
    ours, others = mapped(mapper.pid, library), mapped(mapper.pid, other)
    monkeypatch.setattr(stale_watch, "MAX_MAPPINGS", 1)
    changes: list[StaleChange] = []
    watched = Map(ours)
    watch = StaleWatch(watched, on_change=changes.extend)
    library.unlink()
    watch.compare()
    assert (reported(changes), watch.is_complete) == ([("deleted", "libours.so")], True)
    watched.mapped[:] = [others, ours]
    watch.compare()
    assert (reported(changes)[1:], watch.is_complete, watch.stale()[0][0].library) == ([], False, ours.library)
    watched.mapped[:] = [others]
    watch.compare()
    assert (reported(changes)[1:], watch.is_complete, watch.stale()) == ([("unmapped", "libours.so")], True, [])
    watch.close()


def test_what_was_read_of_processes_is_kept_of_the_last_few_and_of_none_after_the_pass(
    programs: Mapping[str, Path], make_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [make_library("libone.so"), make_library("libtwo.so")]
    monkeypatch.setattr(staleness, "MAX_SIGHTS", 1, raising=False)
    held: list[int] = []
    read: list[int] = []
    real, maps = Disk.staleness, ProcFs.executable_maps

    def compared(disk: Disk, *args: Any, **options: Any) -> StaleAnswer:
        answer = real(disk, *args, **options)
        held.append(len(disk._sights))
        return answer

    def maps_of(proc: ProcFs, pid: int) -> Any:
        read.append(pid)
        return maps(proc, pid)

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with (
        Mapper(programs["mapper"], tmp_path / "first") as first,
        Mapper(programs["mapper"], tmp_path / "second") as second,
    ):
        pids = [first.pid, second.pid]
        for library in libraries:
            first.map(library)
            second.map(library)
        watch = StaleWatch(Map(*(mapped(pid, library) for library in libraries for pid in pids)))
        monkeypatch.setattr(Disk, "staleness", compared)
        monkeypatch.setattr(ProcFs, "executable_maps", maps_of)
        watch.compare()
        watch.close()
    assert (held, read, len(watch._disk._sights)) == ([1, 1, 1, 1], pids, 0)
