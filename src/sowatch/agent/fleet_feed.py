"""The section [fleet] of the agent: off, or a feed that gives `Changes` the events of the watch and sends its records.

Changed on the main thread. One thread follows the watch, one sends. What sends is an extra, and imported only where it
is switched on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from sowatch.agent.fleet_facts import FleetFacts
from sowatch.agent.fleet_settings import FLEET_RULE, FleetSettings
from sowatch.fleet.changes import SETTLE_S, Changes
from sowatch.fleet.exporter import FleetExporter
from sowatch.fleet.lookups import Question
from sowatch.fleet.records import Package, Record, WatchState
from sowatch.fleet.sender import Sender
from sowatch.inventory.packages import Packages
from sowatch.inventory.stale_watch import StaleWatch
from sowatch.linux.liveness import process_is_alive
from sowatch.linux.memory_files import is_memory
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Event, Library, Load, Lost, Origin, Renewed, Repaired, Stale, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import Rule
from sowatch.telemetry import Sampler
from sowatch.watcher.watcher import Watcher

__all__ = ["FleetFeed", "with_everything"]

LOG = logging.getLogger("sowatch.agent")

#: The thread looks after itself this often even if nothing happens.
_TURN_S: Final = 1.0
#: Events that are taken before those get a turn who wait for the lock.
_CHUNK: Final = 500
#: What rules let go is looked at again after so long: another rule has wanted it by then, or its process has ended.
_LET_GO_S: Final = 10.0
#: The first snapshot waits so long for packages and hashes of what is mapped.
_IDENTIFY_S: Final = 15.0
#: After a fault it begins anew so much later; doubled each time, and the first again after an hour without one.
_FIRST_PAUSE_S: Final = 1.0
_LAST_PAUSE_S: Final = 300.0
_WELL_S: Final = 3600.0
#: At the end, so long for what waits.
_DELIVER_S: Final = 2.0


def with_everything(rules: list[Rule], settings: FleetSettings) -> list[Rule]:
    """The rules with the one that [fleet] adds after all others: for every file that no other rule wants."""
    if not settings.enabled:
        return rules
    return [*(rules or [Rule()]), Rule(None, name=FLEET_RULE, kind=("library", "executable", "interpreter"))]


class Feed:
    """One run of the feed, by one set of settings.

    Args:
        settings: enabled.
        watcher: the agent's.
        origin: where it runs.
        proc: the host's.
        stale: what is stale already.
        packages: the agent's.

    Raises:
        SowatchError: the receiver cannot be written to, as far as the settings say.
    """

    def __init__(
        self,
        settings: FleetSettings,
        watcher: Watcher,
        origin: Origin,
        proc: ProcFs,
        *,
        stale: StaleWatch,
        packages: Packages,
    ) -> None:
        self._watcher = watcher
        self._stale = stale
        self._proc = proc
        host_id = origin.host_id or origin.host
        self._make_changes = partial(
            Changes,
            host_id,
            interval_s=settings.interval_s,
            snapshot_interval_s=settings.snapshot_interval_s,
            needs_hash=_needs_hash,
            asks_packages=True,
        )
        self.changes = self._make_changes()
        resource = {
            "host.id": host_id,
            "host.name": origin.host,
            "service.version": origin.version,
            "sowatch.boot.id": origin.boot_id,
            "sowatch.fleet.epoch": str(time.time_ns()),
        }
        exporter = FleetExporter(
            settings.endpoint,
            protocol=settings.protocol,
            headers=settings.headers,
            token_file=settings.token_file,
            resource={name: value for name, value in resource.items() if value is not None},
        )
        self.sender = Sender(self, exporter)
        self._facts = FleetFacts(self, packages, proc)
        self._lock = threading.Lock()
        #: Why it does not go on; None: it does, or does again.
        self.failure: str | None = None
        self.faults = 0
        self._closing = threading.Event()
        self._lost_in_queue = 0
        self._is_repaired = True
        self._has_lost_stale = False
        self._needs_stale = False
        #: What was let go by hand or by rules, and may be mapped all the same.
        self._let_go: dict[tuple[ProcessId, FileId], float] = {}
        # Before the start for all that is mapped by then; the rest comes as it happens.
        self._subscription = watcher.subscribe(events=("load", "unload", "stale", "renewed"), with_hidden=True)
        self._begin_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="sowatch-fleet", daemon=True)

    def start(self) -> None:
        """Begins; the watch runs, and has a rule for everything."""
        self._thread.start()
        self._facts.start()
        self.sender.start()

    def close(self) -> None:
        """Sends what waits, for two seconds at most. Safe to call again."""
        self._closing.set()
        self._subscription.close()
        if self._thread.is_alive():
            self._thread.join(_TURN_S)
        self._facts.close()
        self.sender.close(_DELIVER_S)

    def figures(self) -> dict[str, int]:
        """What `Sampler.follow_fleet` wants; any thread."""
        stats, changes = self.sender.stats, self.changes
        return {
            "records": stats.sent,
            "lost": changes.dropped,
            "errors": stats.errors + self.faults,
            "waiting": stats.waiting + changes.waiting,
            "up": int(stats.is_up and self.failure is None),
            "groups": changes.groups,
            "left_out": changes.left_out,
            "short_lived": changes.short_lived,
        }

    # ---- what the sender asks -------------------------------------------------------------------

    def take(self, limit: int) -> list[Record]:
        """See `sowatch.fleet.sender.RecordSource`."""
        with self._lock:
            return self.changes.take(limit)

    def drop(self, count: int) -> None:
        """See `sowatch.fleet.sender.RecordSource`."""
        with self._lock:
            self.changes.drop(count)

    # ---- what the thread asks that reads files --------------------------------------------------

    def take_questions(self, limit: int) -> list[Question]:
        """See `sowatch.agent.fleet_facts.HasQuestions`."""
        with self._lock:
            return self.changes.take_questions(limit)

    def answer(
        self,
        packages: Sequence[tuple[Question, Package | None]],
        hashes: Sequence[tuple[Library, str | None]],
        ports: Mapping[int, str],
    ) -> None:
        """See `sowatch.agent.fleet_facts.HasQuestions`."""
        with self._lock:
            for library, name in hashes:
                self.changes.answer_hash(library, name)
            for question, package in packages:
                if question.identity is not None:
                    self.changes.answer_package(question.identity, package)
            if ports:
                self.changes.answer_ports(ports)
            has_records = self.changes.has_records
        if has_records:
            self.sender.wake()

    def shown_processes(self) -> list[ProcessId]:
        """See `sowatch.agent.fleet_facts.HasQuestions`."""
        with self._lock:
            return self.changes.shown_processes()

    # ---- the thread that follows the watch ------------------------------------------------------

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            begun_s = time.monotonic()
            try:
                self._follow()
            except Exception as error:
                # No heartbeat follows until everything was sent anew: the host is silent to its receiver, not wrong.
                LOG.exception("the feed of the fleet has failed; it begins anew")
                self.failure = f"the feed has failed: {error}"
            else:
                return
            self.faults += 1
            with self._lock:
                before, self.changes = self.changes, self._make_changes()
                self.changes.go_on(before)
            if time.monotonic() - begun_s > _WELL_S:
                pause_s = _FIRST_PAUSE_S
            self._closing.wait(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    def _follow(self) -> None:
        subscription, changes = self._subscription, self.changes
        self._take_mapped()
        # By then what is mapped already counts.
        self._begin_s = time.monotonic() + SETTLE_S
        while not subscription.has_ended:
            event = subscription.get(max(0.01, min(_TURN_S, changes.next_due_s - time.monotonic())))
            # All that was published before this moment is in the queue by now.
            now_s, waiting = time.monotonic(), subscription.waiting
            with self._lock:
                changes.tick(now_s, time.time_ns())
            while event is not None:
                with self._lock:
                    for _ in range(_CHUNK):
                        self._take(event)
                        event = subscription.get(0) if waiting > 0 else None
                        waiting -= 1
                        if event is None:
                            break
            self._turn()

    def _take_mapped(self) -> None:
        with self._lock:
            self.changes.tick(time.monotonic(), time.time_ns())
        for one in self._watcher.snapshot(with_ranges=False, with_hidden=True):
            with self._lock:
                self.changes.load(one.process, one.library)
        self._take_stale()

    def _take_stale(self) -> None:
        self._needs_stale = False
        found = {
            (one.process.id, one.library.id): answer.stale.value
            for one, answer in self._stale.stale()
            if answer.stale is not None
        }
        with self._lock:
            self.changes.stale_are(found, self._stale.compared_ns or time.time_ns())

    def _take(self, event: Event) -> None:
        changes = self.changes
        if isinstance(event, Load):
            if self._let_go:
                self._let_go.pop((event.process.id, event.library.id), None)
            changes.load(event.process, event.library)
        elif isinstance(event, Unload):
            if event.cause == "rules":
                self._let_go[event.process.id, event.library.id] = time.monotonic() + _LET_GO_S
            else:
                is_executable = event.library.kind == "executable"
                changes.unload(event.process.id, event.library.id, is_executable=is_executable)
        elif isinstance(event, Stale):
            changes.stale(event.process.id, event.library.id, event.staleness, event.time_ns)
        elif isinstance(event, Renewed):
            changes.renewed(event.process.id, event.library.id)
        elif isinstance(event, Lost):
            self._is_repaired = False
            self._lost_in_queue += event.count if event.where == "queue" else 0
            self._has_lost_stale |= event.where == "queue"
        elif isinstance(event, Repaired):
            self._is_repaired = True
            # The repair has what is mapped, and not what is stale of it.
            self._needs_stale |= self._has_lost_stale
            self._has_lost_stale = False

    def _turn(self) -> None:
        changes = self.changes
        if self._needs_stale:
            self._take_stale()
        gone = self._ended()
        with self._lock:
            for process, file in gone:
                changes.unload(process, file)
            changes.advance()
            now_s = time.monotonic()
            changes.may_begin = now_s >= self._begin_s + (_IDENTIFY_S if changes.is_asking else 0.0)
            if changes.is_heartbeat_due():
                changes.heartbeat(self._watch_state())
                self.failure = None
            has_records, needs_mapped = changes.has_records, changes.needs_mapped
            has_questions = changes.has_questions
        if needs_mapped:
            self._take_mapped()
        if has_questions:
            self._facts.wake()
        if has_records:
            self.sender.wake()

    def _ended(self) -> list[tuple[ProcessId, FileId]]:
        """What was let go of processes that are not there any more: nothing else reports their end."""
        now_s = time.monotonic()
        due = [key for key, due_s in self._let_go.items() if due_s <= now_s]
        gone = []
        for key in due:
            if process_is_alive(key[0], self._proc):
                self._let_go[key] = now_s + _LET_GO_S
            else:
                del self._let_go[key]
                gone.append(key)
        return gone

    def _watch_state(self) -> WatchState:
        watcher = self._watcher
        ready, stats = watcher.ready, watcher.stats
        is_behind = self._subscription.lost > self._lost_in_queue
        return WatchState(
            strategy=ready.strategy if ready else "",
            guarantee=ready.guarantee if ready else "",
            limits=ready.limits if ready else (),
            lost=stats.lost_kernel + self._subscription.lost,
            repaired=stats.repairs,
            is_repaired=watcher.is_repaired and self._is_repaired and not is_behind,
            unreadable=stats.unread + self.changes.nameless,
        )


def _nothing() -> None:
    """There is nothing to end."""


def _needs_hash(library: Library) -> bool:
    return library.path.startswith("/") and not is_memory(library.id)


class FleetChange:
    """Settings on their way to be in force: `apply`, or `discard`."""

    def __init__(self, fleet: FleetFeed, settings: FleetSettings, new: Feed | None, *, is_change: bool) -> None:
        self._fleet = fleet
        self._settings = settings
        self._new = new
        self._is_change = is_change

    def apply(self) -> None:
        """Once the watcher has the rules: ends the feed that is gone, and begins the new one."""
        if self._is_change:
            self._fleet.take_over(self._settings, self._new)
        self._new = None

    def discard(self) -> None:
        """What is new is not wanted after all. Safe to call again."""
        if self._new is not None:
            self._new.close()
            self._new = None


class FleetFeed:
    """The section [fleet] of the agent.

    Args:
        watcher: the agent's.
        sampler: follows its figures.
        origin: where it runs.
        proc: the host's.
        stale: what is stale already; what becomes so comes as events.
        packages: the agent's.
    """

    def __init__(
        self,
        watcher: Watcher,
        sampler: Sampler,
        origin: Origin,
        proc: ProcFs,
        *,
        stale: StaleWatch,
        packages: Packages,
    ) -> None:
        self._packages = packages
        self._watcher = watcher
        self._sampler = sampler
        self._origin = origin
        self._proc = proc
        self._stale = stale
        self._settings = FleetSettings()
        self._feed: Feed | None = None
        self._unfollow: Callable[[], None] = _nothing

    def prepare(self, settings: FleetSettings) -> FleetChange:
        """The change to other settings; what they need is made.

        Raises:
            SowatchError: it cannot be made; nothing has changed then.
        """
        if settings == self._settings:
            return FleetChange(self, settings, None, is_change=False)
        return FleetChange(self, settings, self._make(settings) if settings.enabled else None, is_change=True)

    def _make(self, settings: FleetSettings) -> Feed:
        where = (self._watcher, self._origin, self._proc)
        return Feed(settings, *where, stale=self._stale, packages=self._packages)

    def take_over(self, settings: FleetSettings, new: Feed | None) -> None:
        """See `FleetChange.apply`."""
        self.close()
        self._settings = settings
        if new is not None:
            self._feed = new
            new.start()
            self._unfollow = self._sampler.follow_fleet(new.figures)

    def state(self) -> dict[str, Any] | None:
        """Its figures for ``/readyz``; None: it is off."""
        feed = self._feed
        if feed is None:
            return None
        figures = feed.figures()
        up = {"up": bool(figures.pop("up")), "error": feed.failure or feed.sender.stats.last_error}
        return {"name": "fleet", "kind": "fleet", "type": "otlp", **up, **figures}

    def close(self) -> None:
        """Ends it. Safe to call again."""
        feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()
            self._unfollow()
