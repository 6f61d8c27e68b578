"""The thread that drains the source: runs its `Reconciler`, and answers queries of the mapping table.

It never runs user code, reads no file but ``/proc`` and waits for no other thread, so that the ring is drained as fast
as one thread can.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Final, TypeVar

from sowatch.engine.address_space import MappedFile, Mapping
from sowatch.engine.publisher import Publisher
from sowatch.engine.queries import Known, KnownProcess
from sowatch.engine.reconciler import Reconciler
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.table import MappingTable
from sowatch.linux.origin import origin_of
from sowatch.linux.priority import add_nice
from sowatch.linux.proc import ProcFs
from sowatch.linux.wake import Wake
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError
from sowatch.model.events import AddedEvent, Event, Load, Ready, Stopped
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import RuleSet
from sowatch.sources.base import EventSource, Verdicts

__all__ = ["Engine"]

LOG = logging.getLogger("sowatch")

T = TypeVar("T")

#: Counters are polled and answers grow old this often.
TICK_S: Final = 1.0
#: So many wakes or records within so many seconds are a storm; records of the next milliseconds then come together.
BUSY_WAKES: Final = 10
BUSY_RECORDS: Final = 12
BUSY_WINDOW_S: Final = 0.005
BATCH_S: Final = 0.005
#: It lasts as long as each pause brings so many; after a pause that brought more than the other number no time is lost.
STORM_RECORDS: Final = 8
FLOOD_RECORDS: Final = 400
#: `Engine.stop` waits no longer for the thread.
STOP_S: Final = 2.0
#: An answer waits so long for the rest after a full scan to be over.
REST_S: Final = 2.0
DEFERRED_S: Final = 0.25
#: Processes that a limit names.
NAMED: Final = 5
#: What those are told who ask too late.
ENDED: Final = "the watch has ended. Ask before stop()."


class _Answer(Future[T]):
    """Takes the first answer only: a thread that was left behind gives its own when nobody waits any more."""

    def set_result(self, result: T) -> None:
        with suppress(InvalidStateError):
            super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        with suppress(InvalidStateError):
            super().set_exception(exception)


class Engine:
    """Drives one source, one mapping table and one publisher on a thread of its own.

    Args:
        source: open; the engine closes it.
        silent_baseline: take the start-up snapshot without reporting it.

    Attributes:
        reconciler: what works on that thread. Others may read its figures.
        ready: what `start` returned.
    """

    def __init__(
        self,
        source: EventSource,
        table: MappingTable,
        publisher: Publisher,
        rules: RuleSet,
        config: Config,
        *,
        silent_baseline: bool,
    ) -> None:
        self._source = source
        self._table = table
        self._publisher = publisher
        self._silent = silent_baseline
        self._nice = config.nice
        self._proc = ProcFs(config.proc_root)
        self.reconciler = Reconciler(source, table, publisher, rules, config, silent_baseline=silent_baseline)
        #: Makes the thread go round once more; from any thread.
        self.wake = Wake()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self.ready: Ready | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._jobs: list[tuple[Callable[[], None], Future[Any]]] = []
        self._deferred: list[tuple[Callable[[], None], Future[Any]]] = []
        #: What callers wait for.
        self._answers: set[Future[Any]] = set()
        self._has_ended = False
        self._is_left_behind = False
        self._jobs_lock = threading.Lock()

    # ---- other threads ------------------------------------------------------------------------

    def start(self, first: RuleChange) -> Ready:
        """Takes the snapshot by these rules and starts the thread; returns once `Ready` was published."""
        self._publisher.change_rules(first)
        self._thread = threading.Thread(target=self._run, name="sowatch-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        assert self.ready is not None
        return self.ready

    def stop(self) -> None:
        """Ends the thread and closes the source. Safe to call again.

        A thread that does not end within `STOP_S` is left to itself: it closes the source when it does.
        """
        self._stop.set()
        self.wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_S)
        with self._jobs_lock:
            if thread is not None and thread.is_alive() and not self._has_ended:
                self._is_left_behind = True
                self._refuse()
                LOG.error("the draining thread has not ended within %.0f s; it is left to itself", STOP_S)
                return
            self._refuse()
        self._source.close()
        self.wake.close()

    def ask(self, question: Callable[[], T], *, synced: bool = True) -> T:
        """Answers a query of the mapping table on the engine's thread.

        Args:
            question: what to call there.
            synced: with everything on its way taken in, and every process scanned that needed it.

        Raises:
            SowatchError: the watch has ended.
        """
        answer: Future[T] = self.request(lambda answer: answer.set_result(question()), synced=synced)
        return answer.result()

    def publish(self, events: Sequence[AddedEvent]) -> Future[None]:
        """Has events from elsewhere published among those of the engine, in their order; done once they are.

        Raises:
            SowatchError: the watch has ended.
        """

        def emit(answer: Future[None]) -> None:
            for event in events:
                self._publisher.subscribers.emit(event)
            self._publisher.subscribers.hand_over()
            answer.set_result(None)

        return self.request(emit, synced=False)

    def change_rules(self, change: RuleChange) -> Future[None]:
        """Watches by other rules from now on; done once everything that is mapped was published by them.

        Raises:
            SowatchError: the watch has ended. If it ends meanwhile, the Future has that.
        """
        return self.request(lambda done: self.reconciler.set_rules(change, lambda: done.set_result(None)))

    def request(self, work: Callable[[Future[T]], None], *, synced: bool = True) -> Future[T]:
        """Has something done on the engine's thread, which may be over later than the call.

        Args:
            work: what to call there; it gives the answer, at once or when its turn in the publisher has come, which a
                file system that hangs may delay by seconds.
            synced: see `ask`.

        Raises:
            SowatchError: the watch has ended. If it ends meanwhile, the Future has that.
        """
        answer: Future[T] = _Answer()
        end_s = time.monotonic() + REST_S

        def job() -> None:
            if synced:
                self.reconciler.sync()
                if self.reconciler.is_resting and time.monotonic() < end_s:
                    # A caller that asks again and again gets no scans that would not be made without them.
                    self._deferred.append((job, answer))
                    return
            work(answer)

        with self._jobs_lock:
            if self._has_ended:
                raise SowatchError(ENDED)
            self._jobs.append((job, answer))
            self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        self.wake()
        return answer

    def _refuse(self) -> None:
        """From now on there are no answers, to those who wait neither. With the lock of the jobs."""
        self._has_ended = True
        for answer in list(self._answers):
            answer.set_exception(SowatchError(ENDED))

    @property
    def is_running(self) -> bool:
        """Whether the thread is there to answer; from any thread."""
        return self._thread is not None and not self._has_ended

    @property
    def poll_interval_s(self) -> float | None:
        """Between two polls of a source that polls, now; from any thread."""
        return None if self._source.polls is None else self._source.polls.interval_s

    @property
    def unread(self) -> dict[int, float]:
        """Processes whose mappings cannot be read now, and for how many seconds; from any thread."""
        unread, now_s = self._source.unread, time.monotonic()
        return {pid: now_s - since_s for pid in unread if pid and (since_s := unread.since_s(pid)) is not None}

    # ---- queries of the mapping table -------------------------------------------------------------

    def query(self, pid: int | None = None, wants: Callable[[MappedFile], bool] = lambda _: True) -> Known:
        """The mapping table as it is with everything on its way taken in; from any other thread, which does the work.

        The engine's thread spends on it what a copy of the load events takes, not more for each file.

        Args:
            pid: of one process, which is there if the table has it; None: of all that have a file that is wanted.
            wants: which files.

        Raises:
            SowatchError: the watch has ended.
        """
        known, taken = self.ask(lambda: self._take(pid))
        processes = (about.with_files(exe_id, mappings, loads, wants) for about, exe_id, mappings, loads in taken)
        return known._replace(processes={one.process.pid: one for one in processes if one.files or pid is not None})

    def _take(
        self, pid: int | None
    ) -> tuple[Known, list[tuple[KnownProcess, FileId | None, dict[FileId, Mapping], dict[FileId, Load]]]]:
        publisher, table = self._publisher, self._table
        taken = []
        for process in table.processes(pid):
            number, record = process.id.pid, publisher.named(process.record())
            about = KnownProcess(
                record,
                process.seen_ns,
                process.is_announced,
                publisher.selection.wants(record),
                number in table.needs_rescan,
                number in table.compat,
            )
            taken.append((about, process.exe_id, process.space.mappings(), publisher.published.of(process.id)))
        known = Known(
            {},
            None if pid is None else self._source.tracked(pid),
            publisher.own_view_id,
            publisher.is_waiting,
            self._silent,
            None if pid is None else self._source.unread.since_s(pid),
        )
        return known, taken

    def open_verdicts(self) -> Verdicts:
        """What the source remembers of files, see `EventSource.open_verdicts`; from any other thread.

        Raises:
            SowatchError: the watch has ended.
        """
        return self.ask(self._source.open_verdicts, synced=False)

    def mappings(self) -> dict[ProcessId, dict[FileId, Mapping]]:
        """Where everything is mapped by now. Not to be changed. On the thread: see `ask`."""
        return {process.id: process.space.mappings() for process in self._table.processes()}

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        add_nice(self._nice)
        poller = select.epoll()
        try:
            poller.register(self._source.fileno(), select.EPOLLIN)
            poller.register(self.wake.fd, select.EPOLLIN)
            self.reconciler.take_snapshot(self._make_ready)
            self._loop(poller)
            self.reconciler.finish()
        except BaseException as error:
            self._failure = error
            if not self._is_left_behind:  # else what it uses was taken away: that it ends is asked for
                LOG.exception("the watch ended")
        finally:
            with self._jobs_lock:
                self._refuse()
            poller.close()
            now_ns = time.time_ns()
            self._publisher.stop(now_ns)
            publisher = self._publisher
            stopped = Stopped(now_ns, publisher.loads, publisher.unloads, self.reconciler.lost)
            publisher.subscribers.emit(stopped)
            publisher.subscribers.end()
            self._ready.set()
            if self._is_left_behind:
                self._source.close()
                self.wake.close()

    def _loop(self, poller: select.epoll) -> None:
        reconciler = self.reconciler
        next_tick = time.monotonic() + TICK_S
        wakes, taken, window, deferred_until, is_storm = 0, 0, 0.0, 0.0, False
        while not self._stop.is_set():
            now = time.monotonic()
            # In a storm the kernel wakes us for each record, which costs more than the record.
            wakes = wakes + 1 if now - window < BUSY_WINDOW_S else 0
            if not wakes:
                window, taken = now, 0
            is_storm = is_storm or wakes >= BUSY_WAKES or BUSY_RECORDS <= taken <= FLOOD_RECORDS
            if is_storm:
                wakes = taken = 0
                time.sleep(BATCH_S)
                now = time.monotonic()
            if now >= next_tick:
                reconciler.tick()
                next_tick = now + TICK_S
            try:
                ready = poller.poll(max(0.0, reconciler.next_work_at(next_tick) - now))
            except InterruptedError:
                continue
            if any(fd == self.wake.fd for fd, _ in ready):
                self._on_wake()
            taken += reconciler.drain()
            is_storm = is_storm and STORM_RECORDS <= taken <= FLOOD_RECORDS
            reconciler.do_what_is_due(now)
            if self._deferred and (not reconciler.is_resting or now >= deferred_until):
                jobs, self._deferred = self._deferred, []
                self._do(jobs)
                deferred_until = now + DEFERRED_S

    def _on_wake(self) -> None:
        self.wake.clear()
        self._publisher.flush(time.monotonic())
        with self._jobs_lock:
            jobs, self._jobs = self._jobs, []
        self._do(jobs)

    def _do(self, jobs: Iterable[tuple[Callable[[], None], Future[Any]]]) -> None:
        for job, answer in jobs:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - it goes to the caller
                answer.set_exception(error)

    def _unread_limits(self) -> tuple[str, ...]:
        pids = sorted(self.unread)
        if not pids:
            return ()
        named = ", ".join(map(str, pids[:NAMED])) + (", ..." if len(pids) > NAMED else "")
        return (f"processes that do not answer, to be read as soon as they do: {len(pids)} ({named})",)

    def _make_ready(self, processes: int, seconds: float) -> Event:
        source, origin = self._source, origin_of(self._proc)
        self.ready = Ready(
            time_ns=time.time_ns(),
            host=origin.host,
            host_id=origin.host_id,
            boot_id=origin.boot_id,
            version=origin.version,
            strategy=source.strategy,
            guarantee=source.guarantee,
            hooks=source.hooks,
            limits=source.limits + self._unread_limits(),
            attempts=source.attempts,
            processes=processes,
            mappings=self._publisher.published.counts().mappings,
            seconds=seconds,
        )
        self._ready.set()
        return self.ready
