"""The thread that drains the kernel: records to the map, changes to the publisher, losses to repairs.

May import the rooms down to ``publisher``. It never runs user code, reads no file and waits for
nobody, so that the ring is emptied as fast as one thread can.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from sowatch.audit import Held, View
from sowatch.bpf.records import Record
from sowatch.config import Config
from sowatch.errors import SowatchError
from sowatch.events import Event, Lost, Ready, Repaired, Stopped
from sowatch.explain import Known, KnownFile, KnownProcess
from sowatch.identity import FileId, ProcessId
from sowatch.polling import ProcfsSource
from sowatch.procfs import ProcFs
from sowatch.publisher import Publisher
from sowatch.rules import Rule, RuleSet
from sowatch.sources import EventSource, Losses, Reading, Report
from sowatch.spaces import Change, Name, Tracked
from sowatch.tracker import LIVE, Causes, Tracker

__all__ = ["Engine"]

LOG = logging.getLogger("sowatch")

T = TypeVar("T")

#: Counters are polled and answers grow old this often.
TICK_S: Final = 1.0
#: So many wakes within so many seconds are a storm; records of the next milliseconds then come together.
BUSY_WAKES: Final = 10
BUSY_WINDOW_S: Final = 0.005
BATCH_S: Final = 0.005
#: More owed readings than this are one reading of all.
MANY_READINGS: Final = 64
#: A process that is dirty again at once is read at most this often in the long run.
SLOWEST_REREAD_S: Final = 0.25
#: A repair that found losses going on is tried again after 0.1 s, then twice that, up to this.
SLOWEST_REPAIR_S: Final = 5.0
#: After a reading of all for the sake of shared address spaces so many times its CPU time without one.
STRANGERS_REST: Final = 20
#: A 32-bit process is read this long after its exec, then after twice that, up to the second.
FIRST_NARROW_S: Final = 0.002
SLOWEST_NARROW_S: Final = 1.0
#: Records of two CPUs may stand in the ring in another order than their times by some microseconds.
SLACK_NS: Final = 1_000_000
#: A CLONE_VM child that is still there after this is not on its way to exec.
VFORK_PATIENCE_NS: Final = 500_000_000

#: A call that was under way when the rules changed has mapped its file after this.
RULES_SECOND_LOOK_S: Final = 1.0

REPAIR: Final = Causes("repair", "repair")
RULES: Final = Causes("snapshot", "rules")
SNAPSHOT: Final = Causes("snapshot", "repair")


class Engine:
    """Drives one source, one tracker and one publisher on a thread of its own.

    Args:
        source: open; the engine closes it.
        silent_baseline: take the start-up snapshot without telling of it.
    """

    def __init__(
        self,
        source: EventSource,
        tracker: Tracker,
        publisher: Publisher,
        rules: RuleSet,
        config: Config,
        *,
        silent_baseline: bool,
    ) -> None:
        self._source = source
        self._tracker = tracker
        self._publisher = publisher
        self._silent = silent_baseline
        self._proc = ProcFs(config.proc_root)
        self._base = Report.IMAGES if rules.wants_images else Report.NOTHING
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = threading.Event()
        self._ready = threading.Event()
        #: What `start` returned.
        self.ready: Ready | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._due: dict[int, float] = {}
        self._pace: dict[int, tuple[float, float]] = {}
        self._narrow_due: dict[int, tuple[float, float]] = {}
        #: What the source has lost, by where, as far as it was told.
        self.losses = Losses()
        self._repair_at: float | None = None
        self._repair_wait_s = 0.1
        self._strangers_at = 0.0
        self._rules_again_at: float | None = None
        #: CLOCK_MONOTONIC when the thread last went round, in seconds; it does at least once a second.
        self.turned_s = time.monotonic()
        self._can_read_one = True
        #: Throttled processes that are to be read before their losses are repaired, and what that told.
        self._throttled: set[int] = set()
        self._throttled_since = 0.0
        self._jobs: list[tuple[Callable[[], None], Future[Any]]] = []
        self._has_ended = False
        self._jobs_lock = threading.Lock()
        self.own_pid = os.getpid()
        self.records = 0
        self.repairs = 0
        self.lost = 0
        self.throttled = 0
        self.rereads = 0
        self.is_repaired = True

    # ---- other threads ------------------------------------------------------------------------

    def start(self) -> Ready:
        """Takes the snapshot and starts the thread; returns once `Ready` was published."""
        self._thread = threading.Thread(target=self._run, name="sowatch-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        assert self.ready is not None
        return self.ready

    def stop(self) -> None:
        """Ends the thread and closes the source. Safe to call again."""
        self._stop.set()
        self.wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._source.close()
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:
            os.close(fd)

    def wake(self) -> None:
        """Makes the thread look round; from any thread."""
        fd = self._wake_fd
        if fd >= 0:
            os.eventfd_write(fd, 1)

    def ask(self, question: Callable[[], T], *, settled: bool = True) -> T:
        """Answers a question about the map on the engine's thread.

        Args:
            question: what to call there.
            settled: with everything on its way taken in, and every doubt read away.

        Raises:
            SowatchError: the watch has ended.
        """
        answer: Future[T] = Future()

        def job() -> None:
            if settled:
                self._settle_doubts()
            answer.set_result(question())

        with self._jobs_lock:
            if self._has_ended:
                raise SowatchError("the watch has ended. Ask before stop().")
            self._jobs.append((job, answer))
        self.wake()
        return answer.result()

    def view(self) -> View:
        """The map for an audit; on the engine's thread, see `ask`."""
        found: dict[int, tuple[ProcessId, list[Held]] | None] = {}
        for process in self._tracker.processes():
            if not process.is_announced:
                found[process.id.pid] = None
                continue
            files = process.space.files.values()
            held = [Held(one.name.file_id, one.name.path, tuple(one.ranges)) for one in files]
            found[process.id.pid] = (process.id, held)
        return found

    def ranges(self) -> dict[ProcessId, dict[FileId, tuple[tuple[int, int], ...]]]:
        """Where everything is mapped by now; on the engine's thread, see `ask`."""
        return {
            process.id: {file_id: tuple(one.ranges) for file_id, one in process.space.files.items()}
            for process in self._tracker.processes()
        }

    @property
    def is_running(self) -> bool:
        """Whether the thread is there to answer; from any thread."""
        return self._thread is not None and not self._has_ended

    def set_rules(self, rules: RuleSet, take_over: Callable[[], None], done: Callable[[], None]) -> None:
        """Watches by other rules from now on; on the engine's thread, see `ask`.

        Args:
            rules: the new ones.
            take_over: called when the last event of the old rules was told.
            done: called when everything that is mapped was told by the new ones.
        """
        self._flush()
        self._publisher.in_turn(lambda: self._publisher.change_rules(rules, take_over))
        self._tracker.set_rules(rules)
        self._base = Report.IMAGES if rules.wants_images else Report.NOTHING
        # In this order: whatever the kernel drops by an old answer is there to be read.
        self._source.new_epoch()
        self._read_for_rules()
        self._publisher.look_again(self._mapped(lambda _: True), only_held=self._silent)
        self._publisher.in_turn(done)
        self._rules_again_at = time.monotonic() + RULES_SECOND_LOOK_S

    def look_again(self, pid: int, rule: Rule) -> None:
        """Reads a process, and tells of what the rule wants and it was not told to have; on the engine's thread."""
        self._tracker.dirty.setdefault(pid, LIVE)
        self._settle_doubts()
        self._publisher.look_again(self._mapped(lambda process: process.id.pid == pid, rule.matches_path))

    def _mapped(
        self, is_meant: Callable[[Tracked], bool], wants: Callable[[str], bool] = lambda _: True
    ) -> list[Change]:
        """What is mapped now, as if it were loaded now."""
        now_ns = time.monotonic_ns()
        return [
            Change(True, RULES.load, now_ns, process.record(), process.kind_of(one), one.name, tuple(one.ranges))
            for process, one in self._tracker.mappings()
            if is_meant(process) and wants(one.name.path)
        ]

    def _read_for_rules(self) -> None:
        since_ns = time.monotonic_ns()
        self._forget_vanished(self._read_everything(RULES), since_ns)
        if self._silent:
            # What was mapped before is not news, whatever the rules are.
            changes = self._tracker.take_changes()
            self._publisher.take_silently([one for one in changes if one.cause == RULES.load])
            self._publisher.publish([one for one in changes if one.cause != RULES.load])
        self._flush()

    @property
    def poll_interval_s(self) -> float | None:
        """Between two looks of a source that polls, now; from any thread."""
        return self._source.interval_s if isinstance(self._source, ProcfsSource) else None

    def known(self, pid: int | None, wants: Callable[[Name], bool]) -> Known:
        """What an explanation needs; on the engine's thread, see `ask`. The caller closes its ``verdicts``.

        Args:
            pid: of one process; None: all that have a file that is wanted.
            wants: which files.
        """
        one = None if pid is None else self._tracker.get(pid)
        told = self._publisher.held_copy()
        processes: dict[int, KnownProcess] = {}
        for process in self._tracker.processes() if pid is None else [one] if one is not None else []:
            record = process.record()
            loads = told.get(process.id, {})
            files = []
            for file_id, mapping in process.space.files.items():
                if wants(mapping.name):
                    kind = process.kind_of(mapping)
                    change = Change(True, "", 0, record, kind, mapping.name, tuple(mapping.ranges))
                    is_selected = self._publisher.selection.wants(change)
                    files.append(KnownFile(change.name, kind, change.ranges, is_selected, loads.get(file_id)))
            if files or pid is not None:
                processes[process.id.pid] = KnownProcess(
                    record,
                    process.seen_ns,
                    process.is_announced,
                    process.id.pid in self._tracker.dirty,
                    process.id.pid in self._tracker.narrow,
                    tuple(files),
                )
        return Known(
            processes,
            None if pid is None else self._source.followed(pid),
            self._source.open_verdicts(),
            self._publisher.own_view,
            self._publisher.is_waiting,
            self._silent,
        )

    # ---- the thread ---------------------------------------------------------------------------

    def look_at_ourselves(self) -> None:
        """Our own root, to tell which processes see the paths that we see; and our real pid."""
        reading = self._source.read_process(os.getpid())
        if reading is None:
            return
        self.own_pid = reading.tgid
        # In a pid namespace the kernel's numbers are not ours, and it would look up the wrong process.
        self._can_read_one = reading.tgid == os.getpid()
        for row in reading.maps:
            if isinstance(row.key, bytes):
                self._publisher.own_view = row.key[40:56]
                break

    def _run(self) -> None:
        poller = select.epoll()
        try:
            poller.register(self._source.fileno(), select.EPOLLIN)
            poller.register(self._wake_fd, select.EPOLLIN)
            self._snapshot()
            self._loop(poller)
            self._drain()
            self._check_losses()
            if not self.is_repaired:
                self._repair()
            self._publisher.flush_all()
        except BaseException as error:
            self._failure = error
            LOG.exception("the watch ended")
        finally:
            with self._jobs_lock:
                self._has_ended = True
                jobs, self._jobs = self._jobs, []
            for _, answer in jobs:
                answer.set_exception(SowatchError("the watch has ended. Ask before stop()."))
            poller.close()
            now_ns = time.time_ns()
            self._publisher.stop(now_ns)
            self._publisher.emit(Stopped(now_ns, self._publisher.loads, self._publisher.unloads, self.lost))
            self._publisher.end()
            self._ready.set()

    def _loop(self, poller: select.epoll) -> None:
        next_tick = time.monotonic() + TICK_S
        wakes, window = 0, 0.0
        while not self._stop.is_set():
            now = time.monotonic()
            # In a storm the kernel wakes us for each record, which costs more than the record.
            wakes = wakes + 1 if now - window < BUSY_WINDOW_S else 0
            if not wakes:
                window = now
            elif wakes >= BUSY_WAKES:
                wakes = 0
                time.sleep(BATCH_S)
                now = time.monotonic()
            if now >= next_tick:
                self._tick()
                next_tick = now + TICK_S
            try:
                ready = poller.poll(max(0.0, self._next_work_at(next_tick) - now))
            except InterruptedError:
                continue
            if any(fd == self._wake_fd for fd, _ in ready):
                self._on_wake()
            self._drain()
            self._read_what_is_due(now)

    def _next_work_at(self, next_tick: float) -> float:
        """When there is something to do even if the kernel says nothing."""
        times = [next_tick, *self._due.values(), *(when for when, _ in self._narrow_due.values())]
        times += [when for when in (self._repair_at, self._rules_again_at) if when is not None]
        if self._tracker.has_strangers:
            times.append(self._strangers_at)
        return min(times)

    def _read_what_is_due(self, now: float) -> None:
        if self._tracker.narrow:
            self._look_at_narrow(now)
        if self._tracker.dirty or self._due or self._throttled:
            self._reread()
        self._repair_if_due()
        if self._rules_again_at is not None and now >= self._rules_again_at:
            self._rules_again_at = None
            self._read_for_rules()
        if self._tracker.has_strangers and now >= self._strangers_at:
            self._look_for_strangers()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._publisher.flush(time.monotonic())
        with self._jobs_lock:
            jobs, self._jobs = self._jobs, []
        for job, answer in jobs:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - it goes to whoever asked
                answer.set_exception(error)

    def _settle_doubts(self) -> None:
        """Drains, and makes every reading that is owed, 32-bit processes' too; a few times at most.

        Losses that no tick has seen yet are told and repaired, so that what is asked is asked of a right map.
        """
        for pid in self._tracker.narrow:
            self._tracker.dirty.setdefault(pid, LIVE)
        self._source.refresh()
        self._check_losses()
        self._repair_if_due()
        for _ in range(10):
            self._drain()
            if self._tracker.has_strangers:
                self._look_for_strangers()
            if not self._tracker.dirty:
                return
            self._due = dict.fromkeys(self._tracker.dirty, 0.0)
            self._reread()

    def _drain(self) -> None:
        """Takes one batch: the loop comes back at once if there is more, and nothing else starves."""
        records = self._source.drain()
        apply = self._tracker.apply
        for record in records:
            apply(record)
        self.records += len(records)
        self._flush()

    def _flush(self) -> None:
        """Sends answers to the kernel and changes to the publisher."""
        if self._tracker.answers:
            wanted, ignored = self._tracker.take_answers()
            self._source.answer(wanted, is_wanted=True)
            self._source.answer(ignored, is_wanted=False)
        if self._tracker.idle:
            self._settle()
        if self._tracker.changes:
            self._publisher.publish(self._tracker.take_changes())

    def _settle(self) -> None:
        for pid, start_ns, touches in self._tracker.take_idle():
            if self._source.settle(pid, start_ns, touches):
                self._tracker.settled(pid, start_ns)

    def _tick(self) -> None:
        self.turned_s = time.monotonic()
        self._source.tick()
        self._check_losses()
        self._publisher.flush(time.monotonic())
        self._publisher.catch_up()
        for child in self._tracker.unannounced(time.monotonic_ns() - VFORK_PATIENCE_NS):
            self._tracker.dirty.setdefault(child.id.pid, Causes("fork", "munmap"))
        horizon = time.monotonic() - 10
        self._pace = {pid: pace for pid, pace in self._pace.items() if pace[0] > horizon}

    # ---- the start ----------------------------------------------------------------------------

    def _snapshot(self) -> None:
        begun = time.monotonic()
        self._source.set_report(self._base | Report.PROCESSES | Report.RANGES)
        early = self._source.drain()
        readings, meanwhile = self._source.read_all()
        again = self._tracker.merge(readings, [*early, *meanwhile, *self._drain_all()], SNAPSHOT, is_start=True)
        self._source.set_report(self._base)
        changes = self._tracker.take_changes()
        wanted, ignored = self._tracker.take_answers()
        self._source.answer(wanted, is_wanted=True)
        self._source.answer(ignored, is_wanted=False)
        for pid in again:
            self._tracker.dirty.setdefault(pid, LIVE)
        self._settle()
        found = [change for change in changes if change.cause == "snapshot"]
        seconds = time.monotonic() - begun
        if not self._silent:
            self._publisher.publish(found)
        else:
            self._publisher.take_silently(found)
        self._publisher.announce(lambda: self._make_ready(len(readings), seconds))
        self._publisher.publish([change for change in changes if change.cause != "snapshot"])
        self._check_losses()

    def _drain_all(self) -> list[Record]:
        # No longer than needed: in a flood the ring is never empty.
        until_ns = time.monotonic_ns() + SLACK_NS
        records: list[Record] = []
        while more := self._source.drain():
            records += more
            if more[-1].t_ns > until_ns:
                break
        return records

    def _make_ready(self, processes: int, seconds: float) -> Event:
        source = self._source
        self.ready = Ready(
            time_ns=time.time_ns(),
            host=socket.gethostname(),
            boot_id=self._proc.boot_id(),
            strategy=source.strategy,
            guarantee=source.guarantee,
            hooks=source.hooks,
            limits=source.limits,
            attempts=source.attempts,
            processes=processes,
            mappings=self._publisher.counts()[2],
            seconds=seconds,
        )
        self._ready.set()
        return self.ready

    # ---- readings -----------------------------------------------------------------------------

    def _reread(self) -> None:
        """Reads the processes in doubt, each as soon as its pace allows."""
        now = time.monotonic()
        for pid in self._tracker.dirty:
            if pid not in self._due:
                last, interval = self._pace.get(pid, (0.0, 0.0))
                self._due[pid] = max(now, last + interval)
        due = {}
        for pid, when in list(self._due.items()):
            causes = self._tracker.dirty.get(pid)
            if causes is None:
                del self._due[pid]  # it has gone meanwhile
            elif when <= now:
                due[pid] = causes
        if self._throttled:
            self._unthrottle(())  # those that have gone meanwhile are in nobody's debt
        if not due:
            return
        for pid in due:
            del self._due[pid]
            del self._tracker.dirty[pid]
            last, interval = self._pace.get(pid, (0.0, 0.0))
            is_busy = now - last < 2 * interval + 0.002
            self._pace[pid] = (now, min(SLOWEST_REREAD_S, max(0.001, 2 * interval)) if is_busy else 0.0)
        self._source.set_report(self._base | Report.RANGES)
        readings, meanwhile = self._read(due)
        records = [*meanwhile, *self._drain_all()]
        self._source.set_report(self._base)
        self.rereads += len(due)
        again = self._tracker.merge(readings, records, LIVE, own_causes=due)
        for pid in again:
            self._tracker.dirty.setdefault(pid, due.get(pid, LIVE))
        if self._throttled:
            self._unthrottle(due)
        self._flush()

    def _look_at_narrow(self, now: float) -> None:
        """32-bit processes are read when they start, then less and less often."""
        narrow = self._tracker.narrow
        self._narrow_due = {pid: due for pid, due in self._narrow_due.items() if pid in narrow}
        for pid in narrow:
            when, interval = self._narrow_due.get(pid, (now, FIRST_NARROW_S))
            if when <= now:
                self._tracker.dirty.setdefault(pid, LIVE)
                self._narrow_due[pid] = (now + interval, min(SLOWEST_NARROW_S, 2 * interval))

    def _read(self, due: dict[int, Causes]) -> tuple[list[Reading], list[Record]]:
        if len(due) > MANY_READINGS or not self._can_read_one:
            readings, meanwhile = self._source.read_all()
            return [reading for reading in readings if reading.tgid in due], list(meanwhile)
        found = [self._source.read_process(pid) for pid in due]
        return [reading for reading in found if reading is not None], []

    # ---- losses and repairs -------------------------------------------------------------------

    def _check_losses(self) -> None:
        before, self.losses = self.losses, self._source.losses()
        if throttled := self.losses.throttled - before.throttled:
            self._throttle(throttled)
        unresolved = self.losses.unresolved - before.unresolved
        if others := sum(self.losses) - sum(before) - throttled - unresolved:
            self._lose(others)
            if self._repair_at is None:
                self._repair_at = time.monotonic()
        if unresolved:
            self._lose(unresolved)
            self._make_up_for_unresolved()

    def _make_up_for_unresolved(self) -> None:
        """Mappings whose file could not be found out: what is left of their processes is in doubt already."""
        if self._repair_at is not None or self._throttled:
            return
        begun = time.monotonic()
        self._due = dict.fromkeys(self._tracker.dirty, 0.0)
        self._reread()
        self._has_repaired((), time.monotonic() - begun)

    def _lose(self, count: int) -> None:
        self.lost += count
        self.is_repaired = False
        self._publisher.announce(lambda: Lost(time.time_ns(), count, "kernel"))

    def _throttle(self, count: int) -> None:
        """Processes that said too much: a reading of each repairs what the kernel dropped of it."""
        self._lose(count)
        self.throttled += count
        if not self._throttled:
            self._throttled_since = time.monotonic()
        self._throttled |= self._tracker.throttled
        self._tracker.throttled.clear()
        for pid in self._throttled:
            self._tracker.dirty[pid] = REPAIR

    def _unthrottle(self, was_read: Collection[int]) -> None:
        """Readings of these processes were taken over, their changes are still to be flushed."""
        self._throttled = {pid for pid in self._throttled if pid not in was_read and pid in self._tracker.dirty}
        if self._throttled or self._repair_at is not None:
            return
        found = [change for change in self._tracker.changes if change.cause == "repair"]
        self._has_repaired(found, time.monotonic() - self._throttled_since)

    def _has_repaired(self, found: Collection[Change], seconds: float) -> None:
        loads = sum(change.is_load for change in found)
        self._flush()
        self.repairs += 1
        self.is_repaired = True
        self._publisher.announce(lambda: Repaired(time.time_ns(), loads, len(found) - loads, seconds))

    def _repair_if_due(self) -> None:
        if self._repair_at is not None and time.monotonic() >= self._repair_at:
            self._repair()

    def _repair(self) -> None:
        """Compares the map with what is there. Done when nothing was lost while it ran; else again."""
        begun = time.monotonic()
        self._check_losses()
        self._repair_at = None
        before = self.losses
        since_ns = time.monotonic_ns()
        self._forget_vanished(self._read_everything(REPAIR), since_ns)
        found = [change for change in self._tracker.changes if change.cause == "repair"]
        after = self._source.losses()
        # What is dropped of a process that floods is made up for by readings of that process alone.
        if after._replace(throttled=0, unresolved=0) == before._replace(throttled=0, unresolved=0):
            self._repair_wait_s = 0.1
            self._throttled.clear()
            self._has_repaired(found, time.monotonic() - begun)
            return
        self._flush()
        self._check_losses()
        self._repair_at = time.monotonic() + self._repair_wait_s
        self._repair_wait_s = min(SLOWEST_REPAIR_S, 2 * self._repair_wait_s)

    def _look_for_strangers(self) -> None:
        """Finds who shares an address space, by a reading of all."""
        begun_s = time.thread_time()
        self._tracker.has_strangers = False
        self._read_everything(LIVE)
        self._flush()
        self._strangers_at = time.monotonic() + STRANGERS_REST * (time.thread_time() - begun_s)

    def _read_everything(self, causes: Causes) -> set[int]:
        """Takes over a reading of all, with the records that came meanwhile; the tgids that were read."""
        self._source.set_report(self._base | Report.PROCESSES | Report.RANGES)
        early = self._source.drain()
        readings, meanwhile = self._source.read_all()
        records = [*early, *meanwhile, *self._drain_all()]
        self._source.set_report(self._base)
        for reading in readings:
            self._tracker.dirty.pop(reading.tgid, None)
        for pid in self._tracker.merge(readings, records, causes):
            self._tracker.dirty.setdefault(pid, causes)
        return {reading.tgid for reading in readings}

    def _forget_vanished(self, visited: set[int], since_ns: int) -> None:
        """Processes whose exit was lost: known for longer than the reading runs, and not met by it."""
        for process in self._tracker.processes():
            if process.id.pid in visited or process.seen_ns >= since_ns or not process.is_announced:
                continue
            stat = self._proc.stat(process.id.pid)
            # A second look: a live process of that start was only not followed in the kernel.
            is_alive = stat and (stat.threads > 1 or not stat.is_dead)
            if stat and is_alive and process.id.same_tick(ProcessId(stat.pid, stat.start_ns)):
                self._tracker.dirty.setdefault(process.id.pid, REPAIR)
            else:
                self._tracker.forget(process, "repair", since_ns)
