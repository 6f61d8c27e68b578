"""`Watcher`, `watch` and `awatch` on real processes: callbacks, files, isolation, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import EnvironmentFault, Rule, Watcher, awatch, watch
from sowatch.config import Config
from sowatch.errors import BpfError, SowatchError, UsageError
from sowatch.events import LibraryEvent
from sowatch.sources import BpfSource, Reading
from sowatch.watcher import ActiveFile
from support import bpfsys, leaks
from support.kernel import IN_OWN_MOUNTS, TAG, Ledger, with_prelude
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
OpenLedger = Callable[..., Ledger]

#: The library that ``library()`` makes in this run of the tests; another run has other names.
NEW = rf"/libnew{TAG}\.so$"


class Calls:
    """Callbacks that write down how they were called."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.contents: list[str] = []
        self.files: list[ActiveFile] = []

    def rule(self, pattern: str, name: str = "rule") -> Rule:
        return Rule(
            pattern,
            name=name,
            on_load=lambda event: self.made.append(("load", Path(event.library.path).name)),
            on_unload=lambda event: self.made.append(("unload", Path(event.library.path).name)),
            on_activate=self._activate,
            on_deactivate=lambda file: self.made.append(("deactivate", Path(file.library.path).name)),
        )

    def _activate(self, file: ActiveFile) -> None:
        self.files.append(file)
        self.contents.append(hashlib.sha256(os.pread(file.fileno(), 1 << 20, 0)).hexdigest())
        self.made.append(("activate", Path(file.library.path).name))


def digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def different(path: Path) -> Path:
    """The same library with other bytes at its end."""
    path.write_bytes(path.read_bytes() + os.urandom(16))
    return path


# ---- callbacks ----------------------------------------------------------------------------------


def test_callbacks_come_in_order_and_activation_brackets_the_loads_of_all_processes(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), library()
    ledger = open_ledger(calls.rule(NEW))
    first, second = start(), start()
    for mapper in (first, second):
        mapper.map(new)
        ledger.wait_load(mapper.pid, new.stat().st_ino)
    first.exit()
    at, length = second.map(new)
    second.exit()
    assert length
    assert at
    wait_until(lambda: calls.made[-1:] == [("deactivate", f"libnew{TAG}.so")])
    assert [name for name, _ in calls.made] == ["activate", "load", "load", "unload", "unload", "deactivate"]


def test_the_active_file_is_open_while_it_is_activated_and_reads_the_very_file(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), different(library())
    open_ledger(calls.rule(NEW))
    start().map(new)
    wait_until(lambda: ("load", f"libnew{TAG}.so") in calls.made)
    (file,) = calls.files
    assert calls.contents == [digest(new)]
    assert file.library.host_path == str(new)
    assert not file.is_open
    with pytest.raises(SowatchError, match="dup"):
        file.fileno()


def test_the_active_file_is_the_mapped_one_although_another_has_its_name_by_now(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    calls, new = Calls(), different(library())
    expected = digest(new)
    start().map(new)
    new.unlink()
    different(library())
    open_ledger(calls.rule(NEW))
    wait_until(lambda: calls.contents)
    assert calls.contents == [expected]
    assert calls.files[0].library.deleted


def test_the_active_file_of_a_process_with_other_mounts_is_the_one_that_it_sees(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, scratch: Path, programs: Any, wait_until: Any
) -> None:
    here, there = different(library(f"at/libnew{TAG}.so")), different(library(f"other/libnew{TAG}.so"))
    commands = f"mount --bind {there.parent} {here.parent}"
    mapper = start(with_prelude(scratch, programs["mapper"], commands, launcher=IN_OWN_MOUNTS))
    calls = Calls()
    ledger = open_ledger(calls.rule(NEW))
    mapper.map(here)
    wait_until(lambda: calls.contents)
    assert calls.contents == [digest(there)]
    library_record = ledger.wait_load(mapper.pid, there.stat().st_ino).library
    assert library_record.path == str(here)
    assert library_record.host_path is not None
    assert digest(library_record.host_path) == digest(there)


def test_the_active_file_is_not_another_one_that_was_mapped_in_the_same_place_meanwhile(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    opened: dict[str, str] = {}
    entered, release = threading.Event(), threading.Event()

    def activate(file: ActiveFile) -> None:
        opened[Path(file.library.path).name] = hashlib.sha256(os.pread(file.fileno(), 1 << 20, 0)).hexdigest()
        if file.library.path.endswith(f"liba{TAG}.so"):
            entered.set()
            release.wait(deadline(30))

    first, second, fake = library(f"liba{TAG}.so"), library(f"libb{TAG}.so"), different(library(f"libfake{TAG}.so"))
    done: list[str] = []
    rule = Rule(
        rf"/lib[ab]{TAG}\.so$",
        name="rule",
        on_activate=activate,
        on_load=lambda event: done.append(Path(event.library.path).name),
    )
    ledger = open_ledger(rule)
    try:
        start().map(first)
        assert entered.wait(deadline(10))
        mapper = start()
        at, length = mapper.map(second)
        ledger.wait_load(mapper.pid, second.stat().st_ino)
        # By now the file was met, but its activation waits; what it will find in that place is another.
        expected = digest(second)
        mapper.map(fake, "at", f"{at:x}", "len", length)
        ledger.wait_unload(mapper.pid, second.stat().st_ino)
    finally:
        release.set()
    wait_until(lambda: second.name in done)
    assert opened.get(second.name, expected) == expected


def test_a_slow_callback_delays_only_its_own_rule(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    calls, release, entered = Calls(), threading.Event(), threading.Event()

    def wait_long(event: LibraryEvent) -> None:
        entered.set()
        release.wait(deadline(30))

    slow = Rule(rf"/libslow{TAG}\.so$", name="slow", on_load=wait_long)
    ledger = open_ledger(slow, calls.rule(rf"/libquick\d+{TAG}\.so$", "quick"))
    try:
        start().map(library(f"libslow{TAG}.so"))
        assert entered.wait(deadline(10))
        for number in range(20):
            mapper, new = start(), library(f"libquick{number}{TAG}.so")
            mapper.map(new)
            ledger.wait_load(mapper.pid, new.stat().st_ino)
        wait_until(lambda: len([call for call in calls.made if call[0] == "load"]) == 20)
    finally:
        release.set()


def test_a_file_whose_activation_raised_is_blocked_and_not_activated_again(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tried: list[str] = []

    def fail(file: ActiveFile) -> None:
        tried.append(file.library.path)
        raise ValueError("no such symbol")

    new, loads = library(), []
    rule = Rule(NEW, name="rule", on_activate=fail, on_load=loads.append)
    ledger = open_ledger(rule)
    for number in range(3):
        mapper = start()
        mapper.map(new)
        wait_until(lambda number=number: len(loads) == number + 1)
        mapper.exit()
        ledger.wait_unload(mapper.pid, new.stat().st_ino)
    assert tried == [str(new)]
    (blocked,) = ledger.watcher.registry.blocked()
    assert "no such symbol" in blocked.reason
    assert blocked.id == ledger.of(mapper.pid)[0].library.id


def test_an_environment_fault_does_not_block_the_file(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    tried: list[str] = []

    def fail_once(file: ActiveFile) -> None:
        tried.append(file.library.path)
        if len(tried) == 1:
            raise EnvironmentFault("no memory for probes today")

    new = library()
    ledger = open_ledger(Rule(NEW, name="rule", on_activate=fail_once))
    for number in range(2):
        mapper = start()
        mapper.map(new)
        wait_until(lambda number=number: len(tried) == number + 1)
        mapper.exit()
        ledger.wait_unload(mapper.pid, new.stat().st_ino)
    assert ledger.watcher.registry.blocked() == ()


def test_a_file_that_nobody_can_open_any_more_is_not_blocked(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any, deadline: Any
) -> None:
    activated: list[str] = []
    entered, release = threading.Event(), threading.Event()

    def activate(file: ActiveFile) -> None:
        activated.append(Path(file.library.path).name)
        if file.library.path.endswith(f"liba{TAG}.so"):
            entered.set()
            release.wait(deadline(30))

    first, second = library(f"liba{TAG}.so"), library(f"libb{TAG}.so")
    ledger = open_ledger(Rule(rf"/lib[ab]{TAG}\.so$", name="rule", on_activate=activate))
    try:
        start().map(first)
        assert entered.wait(deadline(10))
        gone = start()
        gone.map(second)
        ledger.wait_load(gone.pid, second.stat().st_ino)
        number = second.stat().st_ino
        second.unlink()
        gone.exit()
        ledger.wait_unload(gone.pid, number)
    finally:
        release.set()
    wait_until(lambda: ledger.watcher.registry.stats.environment_faults == 1)
    assert activated == [f"liba{TAG}.so"]
    assert ledger.watcher.registry.blocked() == ()


def test_a_callback_that_raises_is_counted_and_the_next_is_called_all_the_same(
    open_ledger: OpenLedger, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    seen: list[str] = []

    def fail(event: LibraryEvent) -> None:
        seen.append(Path(event.library.path).name)
        raise KeyError("mine")

    ledger = open_ledger(Rule(rf"/libnew\d{TAG}\.so$", name="rule", on_load=fail))
    mapper = start()
    for number in range(3):
        mapper.map(library(f"libnew{number}{TAG}.so"))
    wait_until(lambda: len(seen) == 3)
    assert seen == [f"libnew{number}{TAG}.so" for number in range(3)]
    wait_until(lambda: ledger.watcher.stats.callback_errors == 3)


# ---- what is chosen -----------------------------------------------------------------------------


def test_the_first_rule_that_matches_has_the_file(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    ledger = open_ledger(Rule(NEW, name="first"), Rule(r"/lib[^/]*$", name="second"))
    mapper, new, other = start(), library(), library("libother.so")
    mapper.map(new)
    mapper.map(other)
    assert ledger.wait_load(mapper.pid, new.stat().st_ino).rule == "first"
    assert ledger.wait_load(mapper.pid, other.stat().st_ino).rule == "second"


def test_a_rule_on_exports_wants_the_files_that_export_all_of_them(
    open_ledger: OpenLedger, start: Start, make_library: Callable[..., Path]
) -> None:
    both = make_library("libboth.so", exports=(f"read{os.getpid()}", "tls_write"))
    one = make_library("libone.so", exports=(f"read{os.getpid()}",))
    ledger = open_ledger(Rule(exports=(f"read{os.getpid()}", "tls_write"), name="tls"))
    mapper = start()
    mapper.map(one)
    mapper.map(both)
    ledger.wait_load(mapper.pid, both.stat().st_ino)
    assert ledger.story(mapper.pid, one.stat().st_ino) == []


def test_only_the_chosen_processes_are_told_of(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    chosen, other, new = start(), start(), library()
    ledger = open_ledger(pids=[chosen.pid])
    other.map(new)
    chosen.map(new)
    ledger.wait_load(chosen.pid, new.stat().st_ino)
    assert {event.process.pid for event in ledger.events if isinstance(event, LibraryEvent) and event.process} == {
        chosen.pid
    }


def test_our_own_process_is_told_of_unless_it_is_left_out(open_ledger: OpenLedger, library: NewLibrary) -> None:
    with_us, without_us = open_ledger(), open_ledger(exclude_self=True)
    with_us.wait_for(lambda: with_us.inodes(os.getpid()), "our own libraries were not told")
    without_us.wait_for(lambda: "ready" in without_us.controls(), "no snapshot")
    assert not without_us.of(os.getpid())


def test_without_a_snapshot_only_news_is_told(open_ledger: OpenLedger, start: Start, library: NewLibrary) -> None:
    mapper, before, after = start(), library("libbefore.so"), library("libafter.so")
    at, length = mapper.map(before)
    ledger = open_ledger(snapshot=False)
    mapper.unmap(at, length)
    mapper.map(after)
    ledger.wait_load(mapper.pid, after.stat().st_ino)
    mapper.exit()
    ledger.wait_unload(mapper.pid, after.stat().st_ino)
    assert {event.library.id.inode for event in ledger.of(mapper.pid)} == {after.stat().st_ino}
    assert "snapshot" not in {event.cause for event in ledger.events if isinstance(event, LibraryEvent)}


def test_the_snapshot_of_a_watcher_is_what_its_events_say(
    open_ledger: OpenLedger, start: Start, library: NewLibrary
) -> None:
    ledger = open_ledger(Rule(NEW, name="rule"))
    mapper, new = start(), library()
    mapper.map(new)
    load = ledger.wait_load(mapper.pid, new.stat().st_ino)
    (mapped,) = [one for one in ledger.watcher.snapshot() if one.process.pid == mapper.pid]
    assert (mapped.process, mapped.library, mapped.rule, mapped.ranges) == (
        load.process,
        load.library,
        "rule",
        load.ranges,
    )


# ---- two at once, and readers that are slow -----------------------------------------------------


def test_two_watchers_see_the_same_and_one_goes_on_when_the_other_stops(
    open_ledger: OpenLedger, start: Start, library: NewLibrary
) -> None:
    first, second = open_ledger(), open_ledger()
    mapper, new, later = start(), library(), library("liblater.so")
    mapper.map(new)
    events = [ledger.wait_load(mapper.pid, new.stat().st_ino) for ledger in (first, second)]
    assert events[0].library == events[1].library
    assert events[0].process == events[1].process
    first.stop()
    mapper.map(later)
    second.wait_load(mapper.pid, later.stat().st_ino)
    assert not first.of(mapper.pid, "load")[1:] or later.stat().st_ino not in first.inodes(mapper.pid)


def test_a_reader_that_falls_behind_is_told_so_and_then_what_is(
    open_ledger: OpenLedger, start: Start, library: NewLibrary
) -> None:
    new = library()
    ledger = open_ledger(Rule(NEW, name="rule"), config=Config(queue_events=10), snapshot=False)
    mapper = start()
    other = ledger.watcher.subscribe(events=("load", "unload"))
    mapper.tell("loop", new, 500)
    mapper.map(new)
    ledger.wait_for(lambda: ledger.controls()[-1:] == ["repaired"], lambda: f"no repair: {ledger.controls()}")
    ledger.wait_equal_of(mapper.pid, new.stat().st_ino)
    assert ledger.watcher.stats.lost_queue > 0
    assert ledger.watcher.stats.lost_kernel == 0
    other.close()


# ---- the end ------------------------------------------------------------------------------------


def test_on_stop_every_active_file_is_deactivated_and_the_stream_ends(
    start: Start, library: NewLibrary, schema: Any, deadline: Any
) -> None:
    calls, new = Calls(), library()
    mapper = start()
    mapper.map(new)
    ledger = Ledger(calls.rule(NEW), timeout_s=deadline(10), check=schema)
    with ledger:
        ledger.wait_load(mapper.pid, new.stat().st_ino)
    ledger.stop()
    assert calls.made == [
        ("activate", f"libnew{TAG}.so"),
        ("load", f"libnew{TAG}.so"),
        ("deactivate", f"libnew{TAG}.so"),
    ]
    assert [(event.event, getattr(event, "cause", None)) for event in ledger.events[-2:]] == [
        ("deactivate", "stop"),
        ("stopped", None),
    ]
    assert ledger.subscription.has_ended


def test_stop_can_be_called_twice_and_from_many_threads_and_ends_wait(start: Start) -> None:
    watcher = Watcher(Rule("libnothing"))
    watcher.start()
    assert not watcher.wait(0)
    threads = [threading.Thread(target=watcher.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert watcher.wait(10)
    for thread in threads:
        thread.join()
    watcher.stop()


def test_a_watcher_is_started_once() -> None:
    with Watcher(Rule("libnothing")) as watcher, pytest.raises(UsageError, match="once"):
        watcher.start()


def test_a_watcher_that_never_started_can_be_stopped() -> None:
    Watcher(Rule("libnothing"), Rule("x", on_load=print)).stop()


def test_stop_does_not_wait_for_a_callback_that_does_not_return(
    start: Start, library: NewLibrary, deadline: Any
) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang(event: LibraryEvent) -> None:
        entered.set()
        release.wait(deadline(60))

    watcher = Watcher(Rule(NEW, name="hangs", on_load=hang))
    watcher.start()
    try:
        start().map(library())
        assert entered.wait(deadline(10))
        stopping = threading.Thread(target=watcher.stop)
        stopping.start()
        # Twice the second that is promised, for a loaded machine; the callback would take sixty.
        stopping.join(deadline(2))
        assert not stopping.is_alive()
    finally:
        release.set()
        watcher.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_may_stop_the_watch(start: Start, library: NewLibrary) -> None:
    watcher = Watcher(Rule(NEW, on_load=lambda event: watcher.stop()))
    with watcher:
        start().map(library())
        assert watcher.wait(10)


def test_nothing_is_left_after_stop(start: Start, library: NewLibrary, deadline: Any) -> None:
    mapper, new, calls = start(), library(), Calls()
    mapper.map(new)
    with Watcher(Rule("libnothing")):
        pass  # what the first use of a library leaves for good is there now
    before = leaks.take_steady()
    for _ in range(3):
        watcher = Watcher(calls.rule(NEW))
        with watcher.subscribe() as subscription, watcher:
            while (event := subscription.get(deadline(10))) is not None and event.event != "ready":
                pass
            assert event is not None
            assert leaks.take().bpf - before.bpf
    assert leaks.settle(before, deadline(10)) == []


class Failing(BpfSource):
    """The real source, but for one call that fails."""

    def read_process(self, pid: int) -> Reading | None:
        raise BpfError("reading the iterator", 5)


class FailingLater(BpfSource):
    """The real source, whose ring cannot be read."""

    def drain(self) -> list[Any]:
        raise BpfError("draining the ring", 5)


@pytest.mark.parametrize("kind", [Failing, FailingLater])
def test_a_start_that_fails_half_way_raises_and_leaves_nothing(kind: type[BpfSource], deadline: Any) -> None:
    with Watcher(Rule("libnothing", on_load=print)):
        pass
    before = leaks.take_steady()
    watcher = Watcher(Rule("libnothing", on_load=print), open_source=kind)
    with pytest.raises(BpfError):
        watcher.start()
    assert leaks.settle(before, deadline(5)) == []


WATCHING = """
import sys
from sowatch import Watcher, Rule
with Watcher(Rule("libnothing", on_activate=print)) as watcher:
    print("ready", flush=True)
    watcher.wait()
"""


def test_a_killed_watch_leaves_nothing_pinned_or_attached(spawn: Any, wait_until: Any) -> None:
    pins = leaks.take().pins
    process = spawn([sys.executable, "-c", WATCHING], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    held = bpfsys.held_ids(process.pid)
    assert {kind for kind, _ in held} >= {"prog", "map", "link"}
    assert held <= bpfsys.all_ids()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not held & bpfsys.all_ids(), 10, "the end of what the killed process had loaded")
    assert leaks.take().pins == pins


# ---- watch and awatch ---------------------------------------------------------------------------


@contextlib.contextmanager
def mapping_again_and_again(mapper: Mapper, path: Path) -> Iterator[None]:
    """Has the mapper map and unmap a file until the block is left."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            mapper.unmap(*mapper.map(path))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_watch_gives_loads_and_unloads_until_it_is_told_to_stop(start: Start, library: NewLibrary, schema: Any) -> None:
    mapper, new, stop = start(), library(), threading.Event()
    seen = []
    with mapping_again_and_again(mapper, new):
        for event in watch(NEW, stop=stop):
            schema(event)
            seen.append((event.event, event.process and event.process.pid, event.library.path))
            if len(seen) == 6:
                stop.set()
            assert len(seen) < 10_000
    pairs = [("load", mapper.pid, str(new)), ("unload", mapper.pid, str(new))]
    assert seen[:6] == pairs * 3


def test_watch_that_is_abandoned_leaves_nothing(start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    events = watch(NEW, events=("activate",))
    assert next(events).event == "activate"
    events.close()  # type: ignore[attr-defined]


def test_watch_takes_rules_and_options_as_the_watcher_does(start: Start, library: NewLibrary) -> None:
    mapper, other, new = start(), start(), library()
    other.map(new)
    mapper.map(new)
    events = watch(Rule(NEW, name="mine"), pids=[mapper.pid])
    event = next(events)
    assert (event.rule, event.process and event.process.pid, event.cause) == ("mine", mapper.pid, "snapshot")
    events.close()  # type: ignore[attr-defined]


def test_awatch_gives_what_watch_gives(start: Start, library: NewLibrary, schema: Any, deadline: Any) -> None:
    mapper, new = start(), library()

    async def collect() -> list[tuple[str, str]]:
        stop = asyncio.Event()
        seen = []
        async for event in awatch(NEW, stop=stop):
            schema(event)
            assert event.process is not None
            seen.append((event.event, event.library.path))
            if len(seen) == 6:
                stop.set()
        return seen

    with mapping_again_and_again(mapper, new):
        seen = asyncio.run(asyncio.wait_for(collect(), deadline(20)))
    assert seen[:6] == [("load", str(new)), ("unload", str(new))] * 3


def test_awatch_leaves_the_event_loop_free_and_can_be_cancelled(
    start: Start, library: NewLibrary, deadline: Any
) -> None:
    mapper, new = start(), library()
    mapper.map(new)

    async def first() -> str:
        async for event in awatch(NEW):
            return event.event
        return "nothing"

    async def run() -> tuple[str, bool]:
        got = await asyncio.wait_for(first(), deadline(10))
        waiting = asyncio.ensure_future(anext(aiter(awatch(r"libnothing\.so$"))))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        return got, waiting.cancelled()

    assert asyncio.run(run()) == ("load", True)


def test_a_watcher_can_be_iterated(start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library()
    mapper.map(new)
    watcher = Watcher(Rule(NEW))
    events = iter(watcher)  # from before the start on, so the snapshot is in it
    with watcher:
        event = next(events)
    assert (event.event, event.cause) == ("activate", None)
    assert next(events).cause == "snapshot"
