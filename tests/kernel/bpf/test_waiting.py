"""Of one process, and what it forks, a bounded number of records waits to be read, in every strategy with a ring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.records import FLAG_THROTTLED, Record, RecordType, parse
from sowatch.model.config import NO_GUARD, Config
from sowatch.sources.core import MAX_WAITING, BpfSource
from sowatch.sources.legacy import OldKernelSource
from sowatch.sources.prebuilt import SEEN_MAP, PrebuiltSource
from support.kernel import type_of_core
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
Source = BpfSource | PrebuiltSource

#: They flood.
pytestmark = pytest.mark.alone

#: Pairs of a load and an unload, more than may wait.
PAIRS = 9_000
MAPS = (RecordType.MAP, SEEN_MAP)
#: So large that what the rest of the host does meanwhile leaves most of it free.
RING_BYTES = 64 << 20


@pytest.fixture(params=["core", "old", "prebuilt"])
def open_source(request: pytest.FixtureRequest, closing: contextlib.ExitStack) -> Callable[..., Source]:
    kinds = {"core": type_of_core, "old": lambda: OldKernelSource, "prebuilt": lambda: PrebuiltSource}
    kind = kinds[request.param]()

    def open_it(**settings: Any) -> Source:
        source: Source = kind(Config(**{"ring_bytes": RING_BYTES, **settings}))
        closing.callback(source.close)
        return source

    return open_it


def waiting(source: Source) -> Iterator[Record]:
    """What is in the ring, as the programs wrote it."""
    while data := source._object.drain():
        yield from parse(data)


def maps_of(source: Source, *pids: int) -> list[Record]:
    return [one for one in waiting(source) if one.tgid in pids and one.type in MAPS]


def test_a_flood_that_nobody_reads_leaves_the_ring_to_others(
    open_source: Callable[..., Source], start: Start, library: NewLibrary
) -> None:
    flooder, honest, new = start(), start(), library()
    source = open_source()
    flooder.emit("loop", new, PAIRS)
    honest.map(new)
    records = list(waiting(source))
    ours = [one for one in records if one.tgid == flooder.pid]
    # At least one window, at most two, and introductions.
    assert MAX_WAITING <= len(ours) <= 2 * MAX_WAITING + 32
    # The last one asks for a scan, once.
    assert [one.flags & FLAG_THROTTLED for one in ours] == [0] * (len(ours) - 1) + [FLAG_THROTTLED]
    assert [one.tgid for one in records if one.type in MAPS and one.tgid == honest.pid] == [honest.pid]
    assert source.losses().throttled >= 2 * PAIRS - len(ours)
    # What was read makes space again.
    flooder.emit("loop", new, 100)
    assert len(maps_of(source, flooder.pid)) == 100


def test_a_start_that_loads_a_thousand_libraries_is_within_the_bound(
    open_source: Callable[..., Source], start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library()
    source = open_source()
    for _ in range(1000):
        mapper.map(new)
    assert len(maps_of(source, mapper.pid)) == 1000


def test_what_a_process_forks_has_no_bound_of_its_own(
    open_source: Callable[..., Source], start: Start, library: NewLibrary, closing: contextlib.ExitStack
) -> None:
    parent, new = start(), library()
    source = open_source()
    parent.map(new)
    children = [closing.enter_context(parent.fork()) for _ in range(4)]
    for child in children:
        child.emit("loop", new, PAIRS // 2)
    assert len(maps_of(source, *(child.pid for child in children))) <= MAX_WAITING + 1


def test_a_child_asks_for_a_scan_in_each_window_that_another_one_has_filled(
    start: Start, library: NewLibrary, closing: contextlib.ExitStack
) -> None:
    parent, new = start(), library()
    source = PrebuiltSource(Config(ring_bytes=RING_BYTES))
    closing.callback(source.close)
    parent.map(new)
    first, second = (closing.enter_context(parent.fork()) for _ in range(2))
    for _ in range(2):
        second.emit("loop", new, PAIRS)
        first.map(new)
        assert [one.flags & FLAG_THROTTLED for one in waiting(source) if one.tgid == first.pid] == [FLAG_THROTTLED]


def test_without_a_guard_everything_waits(
    open_source: Callable[..., Source], start: Start, library: NewLibrary
) -> None:
    flooder, new = start(), library()
    source = open_source(max_records_s=NO_GUARD)
    flooder.emit("loop", new, PAIRS)
    assert len(maps_of(source, flooder.pid)) == PAIRS
    assert source.losses().throttled == 0
