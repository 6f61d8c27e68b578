"""How a watch ends and what it leaves behind, several at once, slow readers, and `watch` and `awatch`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule, Watcher, awatch, watch
from sowatch.bpf.record_log import RecordLog
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, UsageError
from sowatch.model.events import LibraryEvent
from sowatch.sources.base import ProcessScan
from sowatch.sources.core import BpfSource
from support import bpfsys, leaks
from support.kernel import TAG, Calls, Ledger
from support.programs import Mapper

Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
OpenLedger = Callable[..., Ledger]

#: The library that ``library()`` makes in this run of the tests; another run has other names.
NEW = rf"/libnew{TAG}\.so$"


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
    mapper.emit("loop", new, 500)
    mapper.map(new)
    ledger.wait_for(lambda: ledger.controls()[-1:] == ["repaired"], lambda: f"no repair: {ledger.controls()}", 30)
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
        # It waits one second for callbacks, and detaching takes its time; the callback would take sixty.
        stopping.join(deadline(10))
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
            links = {one for one in bpfsys.held_ids("self") - before.bpf if one[0] == "link"}
            assert links
        # At once: the kernel may take its time with the hooks, but has no program on them any more.
        assert not links & bpfsys.all_ids()
    assert leaks.settle(before, deadline(10)) == []


class Interrupted(BpfSource):
    """The real source; Ctrl-C comes while it scans, and who closes it meanwhile is waited for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_closed = threading.Event()

    def scan_all(self, meanwhile: Any = None) -> tuple[list[ProcessScan], RecordLog]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self.is_closed.wait(0.5)
        return super().scan_all(meanwhile)

    def close(self) -> None:
        self.is_closed.set()
        super().close()


def test_a_start_that_is_interrupted_ends_its_thread_before_what_that_uses(caplog: pytest.LogCaptureFixture) -> None:
    opened: list[Interrupted] = []

    def open_source(config: Config) -> Interrupted:
        opened.append(Interrupted(config))
        return opened[-1]

    with pytest.raises(KeyboardInterrupt):
        Watcher(open_source=open_source).start()
    assert opened[0].is_closed.is_set()
    assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == []


class Failing(BpfSource):
    """The real source, but for one call that fails."""

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
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
    process = spawn([sys.executable, "-c", WATCHING], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    held = bpfsys.held_ids(process.pid)
    assert {kind for kind, _ in held} >= {"prog", "map", "link"}
    assert held <= bpfsys.all_ids()
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What is pinned or attached keeps its id.
    wait_until(lambda: not held & bpfsys.all_ids(), 10, "the end of what the killed process had loaded")


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
        # The snapshot reads the whole host, which takes its time where everything else is busy, too.
        seen = asyncio.run(asyncio.wait_for(collect(), deadline(60)))
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
