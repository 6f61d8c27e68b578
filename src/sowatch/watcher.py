"""`Watcher`, `watch` and `awatch`: source, map, rules and subscribers put together.

May import every room above it. This is the room to read first to see how the parts meet: a
`Watcher` opens a source, gives it to an `Engine` thread, and hands out what that publishes; each
rule with callbacks has a worker thread of its own, so a slow callback delays only its own rule.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sowatch.audit import AuditReport, audit
from sowatch.config import Config
from sowatch.engine import Engine
from sowatch.errors import ProcessGone, SowatchError, UsageError
from sowatch.events import EVENT_KINDS, Library, LibraryEvent, Process, Ready
from sowatch.explain import Desk, PathReport, ProcessReport, explain
from sowatch.identity import FileId
from sowatch.inspector import Inspector, open_mapped
from sowatch.ladder import open_source
from sowatch.latency import CALLBACKS, RuleTimings
from sowatch.processes import container_id
from sowatch.procfs import ProcFs
from sowatch.publisher import Publisher, Selection
from sowatch.registry import FileRegistry
from sowatch.rules import Rule, RuleSet
from sowatch.sources import EventSource, Losses
from sowatch.subscriptions import Subscription
from sowatch.tracker import Tracker

if TYPE_CHECKING:
    import asyncio

__all__ = ["ActiveFile", "Mapped", "Stats", "Watcher", "awatch", "watch"]

LOG = logging.getLogger("sowatch")

T = TypeVar("T")

#: How long stop() waits for the callbacks of one rule that are under way.
WORKER_STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class Mapped:
    """One library in one process, as the map has it. ``ranges`` are executable address ranges."""

    process: Process
    library: Library
    rule: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of a watch so far. ``lost_kernel`` counts facts, ``lost_queue`` events of slow readers.

    ``lost_throttled`` of the facts were dropped because one process said more than
    ``Config.max_records_s`` of them in a second.

    ``rereads`` are single processes whose mappings were read because other threads might have
    interfered; ``callback_errors`` are exceptions that user callbacks raised. ``records`` are what
    the kernel side sent, ``losses`` says where ``lost_kernel`` was lost. ``audits`` ran to their
    end, and the last one found ``audit_differences``. ``poll_interval_s`` is the time between two looks
    at ``/proc`` as it is now, None with a strategy that does not poll.
    """

    processes: int
    libraries: int
    mappings: int
    events: int
    loads: int
    unloads: int
    lost_kernel: int
    lost_throttled: int
    lost_queue: int
    repairs: int
    rereads: int
    unresolved: int
    callback_errors: int
    records: int
    losses: Losses
    audits: int
    audit_differences: int
    poll_interval_s: float | None = None


class ActiveFile:
    """What ``on_activate`` gets: the library, and an open descriptor of that very file.

    The descriptor is the watcher's and is closed when ``on_activate`` has returned; ``os.dup`` it
    to keep it. ``path`` opens the same inode, whatever has become of its name.
    """

    __slots__ = ("_fd", "library")

    def __init__(self, library: Library, fd: int) -> None:
        self.library = library
        self._fd = fd

    @property
    def is_open(self) -> bool:
        """Whether the descriptor can be used."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor.

        Raises:
            SowatchError: it was closed.
        """
        if self._fd < 0:
            raise SowatchError(
                "the file was closed when on_activate returned. Use os.dup(file.fileno()) in on_activate to keep it."
            )
        return self._fd

    @property
    def path(self) -> str:
        """``/proc/self/fd/N``: attach through this, never through a name that may change."""
        return f"/proc/self/fd/{self.fileno()}"

    def close(self) -> None:
        """Closes the descriptor. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Worker:
    """Runs the callbacks of one rule, in the order things happened."""

    def __init__(self, rule: Rule, subscription: Subscription, registry: FileRegistry, proc: ProcFs) -> None:
        self._rule = rule
        self._subscription = subscription
        self._registry = registry
        self._proc = proc
        self._active: dict[FileId, ActiveFile] = {}
        self.errors = 0
        self.timings = RuleTimings([name for name in CALLBACKS if getattr(rule, name) is not None])
        #: CLOCK_MONOTONIC; what the snapshot found has waited for the watch, not for its callback.
        self.live_since_ns = sys.maxsize
        self._thread = threading.Thread(target=self._run, name=f"sowatch-rule-{rule.name}"[:60], daemon=True)
        self._thread.start()

    @property
    def rule_name(self) -> str:
        return self._rule.name

    def join(self, timeout_s: float) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                LOG.warning("a callback of rule %r is still running after %.1f s", self._rule.name, timeout_s)

    def _run(self) -> None:
        for event in self._subscription:
            if not isinstance(event, LibraryEvent):
                continue
            if event.event == "activate":
                self._activate(event)
            elif event.event == "deactivate":
                self._deactivate(event)
            elif event.event == "load":
                self._call("on_load", self._rule.on_load, event)
            elif event.event == "unload":
                self._call("on_unload", self._rule.on_unload, event)

    def _activate(self, event: LibraryEvent) -> None:
        rule = self._rule
        if rule.on_activate is None and rule.on_deactivate is None:
            return
        process = event.process
        self._registry.activate(
            rule.name,
            event.library,
            lambda library: self._open_and_call(event, library),
            deactivate=self._after_failure,
            process=None if process is None else process.id,
        )

    def _open_and_call(self, event: LibraryEvent, library: Library) -> None:
        begun_s = time.monotonic()
        try:
            self._attach(event, library)
        finally:
            self.timings.attach.observe(time.monotonic() - begun_s)

    def _attach(self, event: LibraryEvent, library: Library) -> None:
        assert event.process is not None
        fd = open_mapped(
            self._proc,
            event.process.pid,
            library.id,
            library.path,
            event.ranges,
            is_own_view=library.host_path == library.path,
            is_deleted=library.deleted,
        )
        if fd is None:
            raise ProcessGone(event.process.pid)
        file = ActiveFile(library, fd)
        self._active[library.id] = file
        try:
            if self._rule.on_activate is not None:
                self._note_delay("on_activate", event)
                self._timed("on_activate", self._rule.on_activate, file)
        finally:
            file.close()

    def _after_failure(self, library: Library) -> None:
        self._call_deactivate(library)

    def _deactivate(self, event: LibraryEvent) -> None:
        self._registry.deactivate(self._rule.name, event.library.id, self._call_deactivate)

    def _call_deactivate(self, library: Library) -> None:
        file = self._active.pop(library.id, None)
        if self._rule.on_deactivate is not None:
            self._timed("on_deactivate", self._rule.on_deactivate, file or ActiveFile(library, -1))

    def _timed(self, name: str, callback: Callable[[T], Any], argument: T) -> None:
        begun_s = time.monotonic()
        try:
            callback(argument)
        finally:
            self.timings.callbacks[name].observe(time.monotonic() - begun_s)

    def _note_delay(self, name: str, event: LibraryEvent) -> None:
        if event.t_ns is not None and event.t_ns > self.live_since_ns and event.cause != "repair":
            self.timings.delays[name].observe((time.monotonic_ns() - event.t_ns) / 1e9)

    def _call(self, name: str, callback: Callable[[LibraryEvent], Any] | None, event: LibraryEvent) -> None:
        if callback is None:
            return
        if name == "on_load":
            self._note_delay(name, event)
        try:
            self._timed(name, callback, event)
        except Exception:
            self.errors += 1
            LOG.exception("a callback of rule %r raised", self._rule.name)


class Watcher:
    r"""Watches the whole host, and tells of the libraries that its rules want.

    Args:
        rules: the first that matches a file wins; without any, every shared library.
        config: limits and policy.
        pids: only these processes (pids in the initial pid namespace).
        container: only processes of containers whose id starts with this.
        exclude_self: leave this very process out.
        snapshot: tell of what is mapped already. Without, only news is told.
        open_source: where records come from; the default climbs the load ladder.

    Use it as a context manager, or `start` and `stop` it. All methods may be called from any
    thread. Iterating gives the library events from before the start on.

    >>> with Watcher(Rule(r"libc\.so", name="libc")) as watcher:  # doctest: +SKIP
    ...     print(len(watcher.snapshot()))
    """

    def __init__(
        self,
        *rules: Rule,
        config: Config = Config(),  # noqa: B008 - frozen
        pids: Collection[int] = (),
        container: str | None = None,
        exclude_self: bool = False,
        snapshot: bool = True,
        open_source: Callable[[Config], EventSource] = open_source,
    ) -> None:
        self._rules = RuleSet(rules)
        self._config = config
        self._pids = frozenset(pids)
        self._container = container
        self._exclude_self = exclude_self
        self._wants_snapshot = snapshot
        self._open_source = open_source
        self._proc = ProcFs(config.proc_root)
        #: Who has what, what is active, what is blocked.
        self.registry = FileRegistry(config)
        self._inspector: Inspector | None = None
        self._engine: Engine | None = None
        self._workers: list[_Worker] = []
        self._lock = threading.RLock()
        self._is_started = False
        self._is_stopped = False
        self._audit_lock = threading.Lock()
        self._audits = 0
        self._audit_differences = 0
        self._stopped = threading.Event()
        exports = frozenset[str]().union(*(rule.exports for rule in self._rules))
        self._exports = exports
        self._publisher = Publisher(
            self._rules,
            self.registry,
            Selection(self._pids, container),
            proc_root=config.proc_root,
        )
        self._own: Subscription | None = None

    def start(self) -> Ready:
        """Loads, attaches, takes the snapshot. Returns what the ``ready`` event says.

        Raises:
            NotPermitted: this user may not load BPF programs.
            LoadError: no strategy works; ``attempts`` has each.
            LibbpfMissing: the binding to libbpf does not load.
            UsageError: it was started before.
        """
        with self._lock:
            if self._is_started:
                raise UsageError("a Watcher can be started once. Make a new one.")
            source = self._open_source(self._config)
            self._is_started = True
            try:
                return self._start(source)
            except BaseException:
                source.close()
                self.stop()
                raise

    def _start(self, source: EventSource) -> Ready:
        engine = Engine(
            source,
            Tracker(self._rules, container_id),
            self._publisher,
            self._rules,
            self._config,
            silent_baseline=not self._wants_snapshot,
        )
        self._engine = engine
        self._inspector = Inspector(proc=self._proc, exports=self._exports, on_done=engine.wake)
        self._publisher.inspector = self._inspector
        for rule in self._rules:
            if rule.has_callbacks:
                subscription = self._publisher.subscribe(control=False, limit=self._config.queue_events, rule=rule.name)
                self._workers.append(_Worker(rule, subscription, self.registry, self._proc))
        engine.look_at_ourselves()
        self._publisher.selection = Selection(
            self._pids, self._container, engine.own_pid if self._exclude_self else None
        )
        ready = engine.start()
        for worker in self._workers:
            worker.live_since_ns = time.monotonic_ns()
        return ready

    def stop(self) -> None:
        """Detaches everything, deactivates every active file, ends every thread. Safe to call again."""
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            if self._engine is not None:
                self._engine.stop()
            # Once more if the engine's thread did so: whoever waits for events must not wait for ever.
            self._publisher.end()
            deadline = time.monotonic() + WORKER_STOP_S
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            if self._inspector is not None:
                self._inspector.close(max(0.0, deadline - time.monotonic()))
            self.registry.clear(timeout_s=max(0.0, deadline - time.monotonic()))
            self._stopped.set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __iter__(self) -> Iterator[LibraryEvent]:
        with self._lock:
            if self._own is None:
                self._own = self.subscribe(control=False)
            own = self._own
        # Not a generator: the subscription has to be there before the start.
        return (event for event in own if isinstance(event, LibraryEvent))

    @property
    def ready(self) -> Ready | None:
        """What the ``ready`` event said; None before the start."""
        return None if self._engine is None else self._engine.ready

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until `stop` was called, or the time is up; whether it was stopped."""
        return self._stopped.wait(timeout_s)

    def subscribe(
        self, *, events: Collection[str] = EVENT_KINDS, control: bool = True, limit: int | None = None
    ) -> Subscription:
        """A queue of events from now on; subscribe before `start` to get the snapshot too.

        Args:
            events: which of ``load``, ``unload``, ``activate``, ``deactivate``.
            control: also `Ready`, `Lost`, `Repaired`, `Stopped`.
            limit: events that may wait in it before some are lost; default ``config.queue_events``.

        Raises:
            UsageError: an unknown event.
        """
        for one in events:
            if one not in EVENT_KINDS:
                raise UsageError(f"unknown event {one!r}. Use some of: {', '.join(EVENT_KINDS)}.")
        return self._publisher.subscribe(events=events, control=control, limit=limit or self._config.queue_events)

    def snapshot(self) -> list[Mapped]:
        """The map as published so far: every (process, library) that the rules want.

        Ranges are those of now, which may be others than its load had; of a watch that has ended, the
        load's.
        """
        ranges = {}
        if self.ready is not None:
            # The watch may end at any moment.
            with contextlib.suppress(SowatchError):
                engine = self._running_engine()
                ranges = engine.ask(engine.ranges, settled=False)
        return [
            Mapped(event.process, event.library, event.rule, ranges.get(process, {}).get(file, event.ranges))
            for process, files in self._publisher.held_copy().items()
            for file, event in files.items()
            if event.process is not None
        ]

    def audit(self) -> AuditReport:
        """Compares the map with an independent reading of ``/proc``, every live process tried.

        A difference counts if it is still there after a few looks some 50 ms apart. Takes about as
        long as reading every process's maps. Any thread but a callback's may ask.

        Raises:
            SowatchError: the watch is not running.
        """
        engine = self._running_engine()
        report = audit(lambda: engine.ask(engine.view), self._proc, self._rules)
        with self._audit_lock:
            self._audits += 1
            self._audit_differences = len(report.differences)
        return report

    def explain(self, target: int | str | os.PathLike[str]) -> ProcessReport | PathReport:
        """The decision trail of one process or one file: what was seen of it, and why no more.

        Looks at ``/proc``, the map, what the kernel side remembers, and the files themselves, each of
        which is given up after 2 s. Changes nothing. Any thread but a callback's may ask.

        Args:
            target: a pid, or the path of a file as this process sees it; the file may be gone.

        Raises:
            SowatchError: the watch is not running, there is no such process, or nothing of that name
                exists or is mapped.
            UsageError: the id of a thread, or no path.
        """
        engine = self._running_engine()
        desk = Desk(
            self._proc,
            self._rules,
            self.registry,
            ask_map=lambda pid, wants: engine.ask(lambda: engine.known(pid, wants)),
            view=lambda: engine.ask(engine.view),
            is_repaired=lambda: engine.is_repaired,
        )
        return explain(target, desk)

    def _running_engine(self) -> Engine:
        engine = self._engine
        if engine is None or self._is_stopped:
            raise SowatchError("the watch is not running. Call start() first.")
        return engine

    @property
    def stats(self) -> Stats:
        """Figures so far."""
        processes, libraries, mappings = self._publisher.counts()
        engine = self._engine
        return Stats(
            processes=processes,
            libraries=libraries,
            mappings=mappings,
            events=self._publisher.events,
            loads=self._publisher.loads,
            unloads=self._publisher.unloads,
            lost_kernel=0 if engine is None else engine.lost,
            lost_throttled=0 if engine is None else engine.throttled,
            lost_queue=self._publisher.lost_in_queues,
            repairs=0 if engine is None else engine.repairs,
            rereads=0 if engine is None else engine.rereads,
            unresolved=self._publisher.unresolved,
            callback_errors=sum(worker.errors for worker in self._workers),
            records=0 if engine is None else engine.records,
            losses=Losses() if engine is None else engine.losses,
            audits=self._audits,
            audit_differences=self._audit_differences,
            poll_interval_s=None if engine is None else engine.poll_interval_s,
        )

    @property
    def timings(self) -> dict[str, RuleTimings]:
        """How long callbacks took, by rule; rules without callbacks have none."""
        return {worker.rule_name: worker.timings for worker in self._workers}

    @property
    def is_repaired(self) -> bool:
        """Whether every loss in the kernel was repaired."""
        return self._engine is None or self._engine.is_repaired


def _rules_of(patterns: tuple[str | Rule, ...]) -> list[Rule]:
    """Rules as they are; all texts together are one rule, "any of them"."""
    texts = [pattern for pattern in patterns if not isinstance(pattern, Rule)]
    rules = [pattern for pattern in patterns if isinstance(pattern, Rule)]
    rules += [Rule(text) for text in dict.fromkeys(texts)]
    return rules


def watch(
    *patterns: str | Rule,
    stop: threading.Event | None = None,
    events: Collection[str] = ("load", "unload"),
    **options: Any,
) -> Iterator[LibraryEvent]:
    r"""Library events of the whole host, one after the other, until ``stop`` is set.

    Args:
        patterns: regular expressions or rules; none: every shared library.
        stop: ends the iteration; checked ten times a second.
        events: which of ``load``, ``unload``, ``activate``, ``deactivate``.
        options: as for `Watcher`: ``config``, ``pids``, ``container``, ``exclude_self``, ``snapshot``.

    Raises:
        SowatchError: at the first step, before anything is attached; see `Watcher.start`.

    >>> for event in watch(r"libssl\.so"):  # doctest: +SKIP
    ...     print(event.cause, event.process.pid, event.library.path)
    """
    watcher = Watcher(*_rules_of(patterns), **options)
    with watcher.subscribe(events=events, control=False) as subscription, watcher:
        while stop is None or not stop.is_set():
            event = subscription.get(None if stop is None else 0.1)
            if isinstance(event, LibraryEvent):
                yield event
            elif subscription.has_ended:
                return


async def awatch(
    *patterns: str | Rule,
    stop: asyncio.Event | None = None,
    events: Collection[str] = ("load", "unload"),
    **options: Any,
) -> AsyncIterator[LibraryEvent]:
    """`watch` for asyncio: the same words and options; ``stop`` is an `asyncio.Event`.

    Loading the programs and stopping run in a thread, so the event loop goes on meanwhile.
    """
    # Here, not above: it takes as long to import as all the rest, and maps libssl.
    import asyncio

    loop = asyncio.get_running_loop()
    watcher = Watcher(*_rules_of(patterns), **options)
    news = asyncio.Event()
    is_signalled = threading.Event()

    def signal() -> None:
        if not is_signalled.is_set():
            is_signalled.set()
            loop.call_soon_threadsafe(news.set)

    subscription = watcher.subscribe(events=events, control=False)
    subscription.call_on_event(signal)
    stopper = None if stop is None else asyncio.ensure_future(_set_when(stop, news))
    try:
        await asyncio.to_thread(watcher.start)
        while stop is None or not stop.is_set():
            await news.wait()
            news.clear()
            is_signalled.clear()
            while (event := subscription.get(0)) is not None:
                assert isinstance(event, LibraryEvent)
                yield event
            if subscription.has_ended:
                return
    finally:
        subscription.call_on_event(None)
        if stopper is not None:
            stopper.cancel()
        subscription.close()
        await asyncio.to_thread(watcher.stop)


async def _set_when(stop: asyncio.Event, news: asyncio.Event) -> None:
    await stop.wait()
    news.set()
