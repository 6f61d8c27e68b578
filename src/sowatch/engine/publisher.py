"""From changes of the map to events: file facts, rules, activation.

Runs on the engine's thread; nothing here runs user code or opens a file.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.file_inspector import FileFacts, Inspection, Inspector, host_path
from sowatch.engine.subscription import Held, Subscription
from sowatch.model.config import Config
from sowatch.model.events import EVENT_KINDS, Event, Library, LibraryEvent, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import Rule, RuleSet

__all__ = ["Publisher", "Selection", "Subscription"]

#: How long the events behind a file wait for its facts; a file that cannot be read in that time
#: (a dead network file system, a hostile FUSE mount) is told of without them.
FACTS_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Selection:
    """Which processes are told of. ``container`` is a prefix of the container's id."""

    pids: frozenset[int] = frozenset()
    container: str | None = None
    excluded_pids: frozenset[int] = frozenset()

    def wants(self, change: Change) -> bool:
        process = change.process
        if process.pid in self.excluded_pids or (self.pids and process.pid not in self.pids):
            return False
        return self.container is None or (process.container or "").startswith(self.container)


class Publisher:
    """Turns changes into events and hands them to every subscription, in order.

    Args:
        rules: the first that matches names the event.
        registry: counts holders; its first and last decide on activate and deactivate.
        selection: which processes are told of.
        proc_root: for host paths.
        limit_bytes: what the changes that wait for facts of files may take; beyond it the first ones wait no longer.
    """

    def __init__(
        self,
        rules: RuleSet,
        registry: FileRegistry,
        selection: Selection,
        *,
        proc_root: str,
        limit_bytes: int | None = None,
    ) -> None:
        self._rules = rules
        self._registry = registry
        #: Both are set before the engine starts.
        self.inspector: Inspector | None = None
        self.selection = selection
        self._proc_root = proc_root
        #: The agent's own view of the file system, as `table.MappedFile.view` has it.
        self.own_view_id = b""
        self._waiting: deque[tuple[Change, Inspection] | Callable[[], None]] = deque()
        self._waiting_bytes = 0
        self._limit_bytes = Config().queue_bytes if limit_bytes is None else limit_bytes
        self._held: Held = {}
        self._silent: set[tuple[ProcessId, FileId]] = set()
        self._libraries: dict[tuple[int, str], tuple[MappedFile, Library]] = {}
        self._lock = threading.Lock()
        self._subscriptions: tuple[Subscription, ...] = ()
        self.loads = 0
        self.unloads = 0
        self.events = 0
        self.unresolved = 0
        self.partial = 0
        self.lost_in_queues = 0

    # ---- subscriptions ------------------------------------------------------------------------

    def subscribe(
        self,
        *,
        events: Collection[str] = EVENT_KINDS,
        control: bool,
        limit: int,
        limit_bytes: int,
        rule: str | None = None,
    ) -> Subscription:
        """A new reader, from the next event on."""
        subscription = Subscription(
            self, events=events, control=control, limit=limit, limit_bytes=limit_bytes, rule=rule
        )
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)

    def catch_up(self) -> None:
        """Lets readers that fell behind recover."""
        for subscription in self._subscriptions:
            subscription.catch_up()
        self.hand_over()

    def hand_over(self) -> None:
        """Gives every reader what was offered; what follows waits for the next time."""
        for subscription in self._subscriptions:
            subscription.hand_over()

    def end(self) -> None:
        """Ends every subscription."""
        for subscription in self._subscriptions:
            subscription.end()

    # ---- what is published --------------------------------------------------------------------

    def held_copy(self) -> Held:
        """The published map: the load event of every mapping."""
        return {process: dict(files) for process, files in list(self._held.items())}

    def held_of(self, pid: int) -> list[LibraryEvent]:
        """The load events of one process; on the engine's thread."""
        return [event for process, files in self._held.items() if process.pid == pid for event in files.values()]

    def counts(self) -> tuple[int, int, int]:
        """Processes, files and mappings in the published map."""
        held = list(self._held.values())
        return len(held), len({file for files in held for file in list(files)}), sum(map(len, held))

    @property
    def waiting_bytes(self) -> int:
        """What waits for facts of files takes, each change counted as if it shared nothing with another one."""
        return self._waiting_bytes

    @property
    def is_waiting(self) -> bool:
        """Whether something waits for a file's facts."""
        return bool(self._waiting)

    def publish(self, changes: list[Change]) -> None:
        """Takes changes of the map, in order."""
        for change in changes:
            if not self.selection.wants(change):
                continue
            if self._silent and self._was_silent(change):
                continue
            if not self._waiting:
                facts = self._facts(change)
                if facts is not None:
                    self._emit(change, facts)
                    continue
            self._waiting.append((change, self._inspect(change)))
            self._waiting_bytes += _bytes_of(change)
        if self._waiting_bytes > self._limit_bytes:
            self.flush(time.monotonic())
        self.hand_over()

    def look_again(self, changes: list[Change], *, only_held: bool = False) -> None:
        """Takes loads of what is mapped already: each is told unless it was, under the rule that wants it now.

        Args:
            changes: loads.
            only_held: leave out what is not published, such as the baseline that was taken silently.
        """

        def begin() -> None:
            known = changes
            if only_held:
                known = [one for one in changes if one.name.file_id in self._held.get(one.process.id, {})]
            wanted = [(one, self._inspect(one)) for one in known if self.selection.wants(one)]
            self._waiting.extendleft(reversed(wanted))
            self._waiting_bytes += sum(_bytes_of(one) for one, _ in wanted)

        self.in_turn(begin)
        self.flush(time.monotonic())

    def take_silently(self, changes: list[Change]) -> None:
        """Takes the baseline of a watch without a snapshot: neither its loads nor their unloads are told."""
        self._silent.update((change.process.id, change.name.file_id) for change in changes if change.is_load)

    def _was_silent(self, change: Change) -> bool:
        key = (change.process.id, change.name.file_id)
        if change.is_load or key not in self._silent:
            return False
        self._silent.discard(key)
        return True

    def announce(self, make: Callable[[], Event]) -> None:
        """Takes a control event, made when its turn comes."""
        self.in_turn(lambda: self.emit(make()))

    def in_turn(self, action: Callable[[], None]) -> None:
        """Does something once everything taken before it was told."""
        if self._waiting:
            self._waiting.append(action)
        else:
            action()
            self.hand_over()

    def change_rules(self, rules: RuleSet, take_over: Callable[[], None]) -> None:
        """From its turn on, other rules hold. What a rule had that goes, or that calls others now, is unloaded.

        Args:
            rules: the new ones.
            take_over: called when that was told, before anything is told of the new rules.
        """
        stays = {rule.name for rule in rules if (old := self._rules.named(rule.name)) and old.calls_the_same_as(rule)}
        self._rules = rules
        self.let_go(lambda load: load.rule not in stays)
        take_over()

    def let_go(self, is_meant: Callable[[LibraryEvent], bool]) -> int:
        """Unloads by order, cause ``rules``, what was told by these load events; how many."""
        found = [event for files in self._held.values() for event in files.values() if is_meant(event)]
        now_ns = time.monotonic_ns()
        for load in found:
            assert load.process is not None
            self._forget(load.process, load.library.id, "rules", now_ns)
        return len(found)

    def flush(self, now_s: float) -> None:
        """Goes on with what waited for facts that are there, or that took too long, or while too much waits."""
        waiting = self._waiting
        if waiting and self.inspector is not None:
            self.inspector.relieve(time.monotonic())
        while waiting:
            item = waiting[0]
            if isinstance(item, tuple):
                change, inspection = item
                facts = inspection.facts
                if facts is None:
                    is_too_much = self._waiting_bytes > self._limit_bytes
                    if not is_too_much and now_s - inspection.asked_s < FACTS_TIMEOUT_S:
                        break
                    facts = self._facts(change) or FileFacts()
                waiting.popleft()
                self._waiting_bytes -= _bytes_of(change)
                self._emit(change, facts)
            else:
                waiting.popleft()
                item()
        self.hand_over()

    def flush_all(self) -> None:
        """Goes on with everything, without what is not known."""
        self.flush(float("inf"))

    def emit(self, event: Event) -> None:
        """Hands one event to every reader."""
        self.events += 1
        for subscription in self._subscriptions:
            subscription.offer(event)

    def stop(self, now_ns: int) -> None:
        """Deactivates every active file, cause ``stop``."""
        active: dict[tuple[str, FileId], LibraryEvent] = {}
        for files in self._held.values():
            for file, event in files.items():
                active.setdefault((event.rule, file), event)
        for event in active.values():
            self.emit(LibraryEvent("deactivate", event.rule, event.library, None, "stop", None, now_ns))

    # ---- one change ---------------------------------------------------------------------------

    def _facts(self, change: Change) -> FileFacts | None:
        if not change.is_load or not change.name.is_regular:
            return FileFacts()  # an unload has its load's
        assert self.inspector is not None
        return self.inspector.known(change.name)

    def _inspect(self, change: Change) -> Inspection:
        facts = self._facts(change)
        if facts is not None:
            done = Inspection(0.0)
            done.facts = facts
            return done
        assert self.inspector is not None
        return self.inspector.inspect(change, is_own_view=change.name.view == self.own_view_id, now_s=time.monotonic())

    def _emit(self, change: Change, facts: FileFacts) -> None:
        if change.is_load:
            self._load(change, facts)
        else:
            self._unload(change)

    def _load(self, change: Change, facts: FileFacts) -> None:
        name = change.name
        kind = facts.kind(change.kind, name.path, is_anonymous=name.is_anonymous)
        rule = self._rules.match(name.path, kind, facts.exports)
        self.partial += facts.is_partial
        process = change.process
        held = self._held.get(process.id, {}).get(name.file_id)
        if held is not None:
            # Looked at again, as rules have changed, or the file was not complete or could not be read.
            known = held.library
            has_changed = facts.is_elf is not None and (
                known.kind != kind or (known.build_id is not None and known.build_id != facts.build_id)
            )
            if isinstance(rule, Rule) and rule.name == held.rule and not has_changed:
                if held.library.build_id is None and facts.build_id is not None:
                    # Its load was told before the file could be read.
                    library = replace(held.library, build_id=facts.build_id, soname=facts.soname)
                    self._held[process.id][name.file_id] = replace(held, library=library)
                return
            self._forget(process, name.file_id, "repair" if has_changed else "rules", change.t_ns)
            if has_changed:
                change = change._replace(cause="repair")
        if not isinstance(rule, Rule):
            self.unresolved += self._rules.needs_exports and facts.is_elf is None
            return
        library = self._library(change, kind, facts)
        now_ns = time.time_ns()
        where = (change.ranges, change.range_count)
        event = LibraryEvent("load", rule.name, library, process, change.cause, change.t_ns, now_ns, *where)
        process_id = process.id
        files = self._held.get(process_id)
        if files is None:
            files = self._held[process_id] = {}
        files[name.file_id] = event
        self.loads += 1
        if self._registry.acquire(rule.name, library, process_id):
            # With its ranges: whoever activates the file opens it by them.
            self.emit(LibraryEvent("activate", rule.name, library, process, None, change.t_ns, now_ns, *where))
        self.emit(event)

    def _unload(self, change: Change) -> None:
        self._forget(change.process, change.name.file_id, change.cause, change.t_ns)

    def _forget(self, process: Process, file: FileId, cause: str, t_ns: int) -> None:
        """Tells that a process has a file no more, if it was told that it has."""
        files = self._held.get(process.id)
        load = files.pop(file, None) if files is not None else None
        if files is None or load is None:
            return
        if not files:
            del self._held[process.id]
        now_ns = time.time_ns()
        self.unloads += 1
        self.emit(LibraryEvent("unload", load.rule, load.library, process, cause, t_ns, now_ns))
        if self._registry.release(load.rule, file, process.id):
            self.emit(LibraryEvent("deactivate", load.rule, load.library, None, None, t_ns, now_ns))

    def _library(self, change: Change, kind: str, facts: FileFacts) -> Library:
        name = change.name
        is_own_view = facts.place == "own"
        if is_own_view:
            known = self._libraries.get((id(name), kind))
            # The id of a name may be reused once it is gone, so the entry keeps the name itself.
            if (
                known is not None
                and known[0] is name
                and (known[1].build_id, known[1].soname) == (facts.build_id, facts.soname)
            ):
                return known[1]
        library = Library(
            path=name.path,
            id=name.file_id,
            host_path=host_path(self._proc_root, change.process.pid, name, facts),
            kind=kind,
            build_id=facts.build_id,
            soname=facts.soname,
            deleted=name.is_deleted,
            path_partial=name.is_partial,
            changed_ns=max(0, name.changed_ns),
        )
        if is_own_view:
            if len(self._libraries) > 5_000:
                self._libraries.clear()
            self._libraries[(id(name), kind)] = (name, library)
        return library


def _bytes_of(change: Change) -> int:
    """About what `sowatch.model.events.size_of` has for the event that it becomes."""
    return 200 + 128 * len(change.ranges) + len(change.name.path)
