"""`watch` and `awatch`: what they start and stop, when iteration ends, and that nothing is left running after it.

The watcher behind them is one whose events a test writes down; the queue in between is the real one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any, Self

import pytest

from sowatch.engine.published_map import PublishedMap
from sowatch.engine.subscribers import Subscribers
from sowatch.engine.subscription import SubscriberQueue
from sowatch.model.events import LibraryEvent, Stopped
from sowatch.model.rules import Rule
from sowatch.watcher import streams
from sowatch.watcher.streams import awatch, watch
from support.scripted import READY, event

LOAD, UNLOAD, ACTIVATE = event(), event("unload", "munmap"), event("activate")


class FakeWatcher:
    """A `Watcher` as far as streams use it: `start` sends ``before``, `stop` ends the queues."""

    before: tuple[LibraryEvent, ...] = ()
    ends_at_once = False
    start_error: Exception | None = None
    #: `start` sets the first and waits for the second, on its thread.
    is_starting: threading.Event
    may_start: threading.Event | None = None
    made: list[FakeWatcher] = []  # noqa: RUF012 - the test's

    def __init__(self, *rules: Rule, **options: Any) -> None:
        self.rules, self.options = rules, options
        self.subscribers = Subscribers(PublishedMap())
        self.subscription: SubscriberQueue | None = None
        self.asked_for: tuple[Collection[str], bool] | None = None
        self.steps: list[str] = []
        self.readers_at_stop = 0
        self.threads: dict[str, threading.Thread] = {}
        self.is_started, self.is_stopped = threading.Event(), threading.Event()
        self.made.append(self)

    def subscribe(self, *, events: Collection[str], control: bool) -> SubscriberQueue:
        self.steps.append("subscribe")
        self.asked_for = events, control
        self.subscription = self.subscribers.subscribe(events=events, control=control, limit=100, limit_bytes=1 << 20)
        return self.subscription

    def send(self, *events: LibraryEvent) -> None:
        for one in events:
            self.subscribers.emit(one)
        self.subscribers.hand_over()

    def end(self) -> None:
        """The watch ends by itself."""
        self.subscribers.emit(Stopped(1, 0, 0, 0))
        self.subscribers.end()

    def start(self) -> None:
        self.threads["start"] = threading.current_thread()
        self.is_starting.set()
        if self.may_start is not None:
            self.may_start.wait()
        self.steps.append("start")
        if self.start_error is not None:
            raise self.start_error
        self.subscribers.emit(READY)
        self.send(*self.before)
        if self.ends_at_once:
            self.end()
        self.is_started.set()

    def stop(self) -> None:
        self.threads["stop"] = threading.current_thread()
        self.steps.append("stop")
        self.readers_at_stop = len(self.subscribers._subscriptions)
        self.subscribers.emit(Stopped(1, 1, 0, 0))
        self.subscribers.end()
        self.is_stopped.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeWatcher]]:
    class Fake(FakeWatcher):
        made: list[FakeWatcher] = []  # noqa: RUF012 - the test's
        is_starting = threading.Event()

    monkeypatch.setattr(streams, "Watcher", Fake)
    yield Fake
    for one in Fake.made:
        # Whatever happened: it is stopped once at the most, and nobody waits for its queue.
        assert one.steps.count("stop") <= 1
        assert one.subscription is not None
        assert one.subscription._is_closed


def run(make: Callable[[], Any], timeout_s: float) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(make(), timeout_s)

    return asyncio.run(limited())


async def collect(iterator: AsyncIterator[LibraryEvent]) -> list[str]:
    return [one.event async for one in iterator]


# ---- rules --------------------------------------------------------------------------------------


def test_equal_texts_are_one_rule_and_rules_stay_what_they_are(fake: type[FakeWatcher]) -> None:
    fake.ends_at_once = True
    own = Rule("libz", name="zlib")
    assert list(watch("libssl", own, "libc", "libssl", snapshot=False)) == []
    (made,) = fake.made
    assert made.rules[0] is own
    assert [(one.name, one.pattern) for one in made.rules[1:]] == [("libssl", "libssl"), ("libc", "libc")]
    assert made.options == {"snapshot": False}


# ---- watch --------------------------------------------------------------------------------------


def test_watch_does_nothing_until_its_first_step(fake: type[FakeWatcher]) -> None:
    watch("libssl").close()  # type: ignore[attr-defined]
    assert fake.made == []


def test_watch_subscribes_before_it_starts_so_that_the_snapshot_is_there(fake: type[FakeWatcher]) -> None:
    fake.before, fake.ends_at_once = (LOAD, ACTIVATE, UNLOAD), True
    assert [one.event for one in watch()] == ["load", "unload"]
    (made,) = fake.made
    assert made.asked_for == (("load", "unload"), False)
    assert made.steps == ["subscribe", "start", "stop"]


def test_watch_gives_the_kinds_that_were_asked_for(fake: type[FakeWatcher]) -> None:
    fake.before, fake.ends_at_once = (LOAD, ACTIVATE, UNLOAD), True
    assert [one.event for one in watch(events=("activate",))] == ["activate"]


def test_watch_stops_when_whoever_iterates_has_enough(fake: type[FakeWatcher]) -> None:
    fake.before = (LOAD, UNLOAD)
    iterator = watch()
    assert next(iterator) == LOAD
    (made,) = fake.made
    assert made.steps[-1] == "start"
    iterator.close()  # type: ignore[attr-defined]
    assert made.steps[-1] == "stop"


@pytest.mark.parametrize("is_set", ["before", "between"])
def test_watch_ends_when_stop_is_set(fake: type[FakeWatcher], is_set: str) -> None:
    fake.before = (LOAD, UNLOAD)
    stop = threading.Event()
    if is_set == "before":
        stop.set()
    seen = []
    for one in watch(stop=stop):
        seen.append(one.event)
        stop.set()
    assert seen == ([] if is_set == "before" else ["load"])
    assert fake.made[0].steps == ["subscribe", "start", "stop"]


def test_watch_gives_control_events_to_the_last_if_they_are_asked_for(fake: type[FakeWatcher]) -> None:
    fake.before = (LOAD, UNLOAD)
    stop = threading.Event()
    seen = []
    for one in watch(stop=stop, control=True):
        seen.append(one.event)
        if one.event == "unload":
            stop.set()
    assert seen == ["ready", "load", "unload", "stopped"]
    assert fake.made[0].asked_for == (("load", "unload"), True)


def test_awatch_gives_control_events_to_the_last_if_they_are_asked_for(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.before = (LOAD, UNLOAD)

    async def go() -> list[str]:
        stop = asyncio.Event()
        seen = []
        async for one in awatch(stop=stop, control=True):
            seen.append(one.event)
            if one.event == "unload":
                stop.set()
        return seen

    assert run(go, deadline(10)) == ["ready", "load", "unload", "stopped"]


def test_watch_that_can_be_stopped_waits_on_while_nothing_comes(fake: type[FakeWatcher], deadline: Any) -> None:
    stop, seen = threading.Event(), []
    is_read = threading.Semaphore(0)

    def read() -> None:
        for one in watch(stop=stop):
            seen.append(one.event)
            is_read.release()

    polls = threading.Semaphore(0)
    get = SubscriberQueue.get

    def counted(self: SubscriberQueue, timeout_s: float | None = None) -> Any:
        assert timeout_s == 0.1  # so long it takes to see the stop
        found = get(self, 0)
        if found is None:
            polls.release()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubscriberQueue, "get", counted)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        for _ in range(3):
            assert polls.acquire(timeout=deadline(10))
        fake.made[0].send(LOAD)
        assert is_read.acquire(timeout=deadline(10))
        stop.set()
        thread.join(deadline(10))
    assert seen == ["load"]
    assert not thread.is_alive()


def test_watch_that_has_a_stop_ends_with_the_watch_as_well(fake: type[FakeWatcher]) -> None:
    fake.before, fake.ends_at_once = (LOAD,), True
    assert [one.event for one in watch(stop=threading.Event())] == ["load"]


def test_watch_raises_at_the_first_step_what_start_raised(fake: type[FakeWatcher]) -> None:
    fake.start_error = OSError("not permitted")
    with pytest.raises(OSError, match="not permitted"):
        next(watch())
    assert fake.made[0].subscription is not None
    assert list(fake.made[0].subscription) == []  # closed


# ---- awatch -------------------------------------------------------------------------------------


def test_awatch_gives_what_watch_gives_and_ends_with_the_watch(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.before, fake.ends_at_once = (LOAD, ACTIVATE, UNLOAD), True
    assert run(lambda: collect(awatch("libssl", snapshot=False)), deadline(10)) == ["load", "unload"]
    (made,) = fake.made
    assert made.asked_for == (("load", "unload"), False)
    assert ([one.name for one in made.rules], made.options) == (["libssl"], {"snapshot": False})
    assert made.steps == ["subscribe", "start", "stop"]


def test_awatch_starts_and_stops_on_another_thread_so_that_the_event_loop_goes_on(
    fake: type[FakeWatcher], deadline: Any
) -> None:
    fake.ends_at_once, fake.may_start = True, threading.Event()

    async def go() -> None:
        reader = asyncio.ensure_future(collect(awatch()))
        await asyncio.to_thread(fake.is_starting.wait)
        assert not reader.done()
        assert fake.may_start is not None
        fake.may_start.set()
        assert await reader == []

    run(go, deadline(10))
    assert threading.main_thread() not in fake.made[0].threads.values()
    assert set(fake.made[0].threads) == {"start", "stop"}


def test_awatch_waits_for_events_that_come_later_in_as_many_batches(fake: type[FakeWatcher], deadline: Any) -> None:
    async def go() -> list[str]:
        seen = []
        iterator = awatch(events=("load", "unload", "activate"))
        for number, batch in enumerate(((LOAD,), (ACTIVATE, UNLOAD), (LOAD,))):
            first = asyncio.ensure_future(anext(iterator))
            if not number:
                await asyncio.to_thread(fake.is_starting.wait)
                await asyncio.to_thread(fake.made[0].is_started.wait)
            await asyncio.sleep(0)
            assert not first.done()  # it waits, and lets the event loop go on
            await asyncio.to_thread(fake.made[0].send, *batch)
            seen.append((await first).event)
            seen += [(await anext(iterator)).event for _ in batch[1:]]
        await asyncio.to_thread(fake.made[0].end)
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)
        return seen

    assert run(go, deadline(10)) == ["load", "activate", "unload", "load"]


async def waiting(fake: type[FakeWatcher], **options: Any) -> tuple[asyncio.Task[list[str]], FakeWatcher]:
    """A task that reads, and its watcher once that has started."""
    task = asyncio.ensure_future(collect(awatch(**options)))
    await asyncio.to_thread(fake.is_starting.wait)
    await asyncio.to_thread(fake.made[0].is_started.wait)
    return task, fake.made[0]


def test_awatch_ends_when_stop_is_set_while_it_waits(fake: type[FakeWatcher], deadline: Any) -> None:
    async def go() -> None:
        stop = asyncio.Event()
        task, made = await waiting(fake, stop=stop)
        stop.set()
        assert await task == []
        assert made.steps[-1] == "stop"

    run(go, deadline(10))


def test_awatch_whose_stop_is_set_before_reads_nothing_and_stops(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.before = (LOAD,)

    async def go() -> list[str]:
        stop = asyncio.Event()
        stop.set()
        return await collect(awatch(stop=stop))

    assert run(go, deadline(10)) == []
    assert fake.made[0].steps == ["subscribe", "start", "stop"]


def test_awatch_that_is_cancelled_while_it_waits_stops_the_watch(fake: type[FakeWatcher]) -> None:
    async def go() -> None:
        stop = asyncio.Event()
        task, made = await waiting(fake, stop=stop)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.steps == ["subscribe", "start", "stop"]
        assert made.subscription is not None
        # A late event signals nobody: the loop may be closed by then.
        assert made.subscription._on_event is None
        # Nor is a task left that waits for the stop.
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_awatch_that_is_cancelled_while_it_starts_stops_the_watch(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.may_start = threading.Event()

    async def go() -> FakeWatcher:
        task = asyncio.ensure_future(collect(awatch()))
        await asyncio.to_thread(fake.is_starting.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made = fake.made[0]
        assert "stop" in made.steps
        assert fake.may_start is not None
        fake.may_start.set()
        return made

    made = run(go, deadline(10))
    assert made.subscription is not None
    assert made.subscription._on_event is None


def test_awatch_stops_when_whoever_iterates_has_enough(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.before = (LOAD, UNLOAD)

    async def go() -> None:
        iterator = awatch()
        assert await anext(iterator) == LOAD
        await iterator.aclose()  # type: ignore[attr-defined]
        assert fake.made[0].steps[-1] == "stop"
        # Nothing is queued for it while that takes long.
        assert fake.made[0].readers_at_stop == 0

    run(go, deadline(10))


def test_awatch_raises_what_start_raised_and_leaves_nothing(fake: type[FakeWatcher], deadline: Any) -> None:
    fake.start_error = OSError("not permitted")
    with pytest.raises(OSError, match="not permitted"):
        run(lambda: collect(awatch()), deadline(10))
    assert fake.made[0].steps == ["subscribe", "start", "stop"]


def test_many_batches_wake_the_event_loop_once_until_it_has_read_them(fake: type[FakeWatcher], deadline: Any) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        wakes: list[object] = []
        call = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **options: Any) -> Any:
            if getattr(callback, "__self__", None).__class__ is asyncio.Event:
                wakes.append(callback)
            return call(callback, *args, **options)

        task, made = await waiting(fake)
        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        for _ in range(5):
            made.send(LOAD)  # on the loop's own thread: it reads none of them meanwhile
        assert len(wakes) == 1
        made.end()
        assert await task == ["load"] * 5

    run(go, deadline(10))
