"""`Publisher`: makes events of the changes of the mapping table, by the facts of files and the rules.

Runs on the engine's thread; nothing here runs user code or reads a file. Its parts: `FactsQueue` has what waits for
facts of files, `PublishedMap` what was published, `LibraryCache` the values of files, `Subscribers` the readers;
`RuleSet` matches, and `FileRegistry` counts the processes of each active file.

Events of one process come in the order of what happened to it; those of different processes may overtake each other
while a file is read. The events of one (rule, file) agree with each other all the same: whether one is its first load
or its last unload is decided when it is emitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from msgspec.structs import replace

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change
from sowatch.engine.descendants import Descendants
from sowatch.engine.facts_queue import FactsQueue
from sowatch.engine.file_inspector import FileFacts, Inspection
from sowatch.engine.library_cache import LibraryCache
from sowatch.engine.published_map import PublishedMap
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.subscribers import Subscribers
from sowatch.model.config import Config
from sowatch.model.events import Activate, Deactivate, Event, Load, Process, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import LoadCause, UnloadCause
from sowatch.model.rules import Decision, Rule, RuleSet

__all__ = ["Publisher", "Selection"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Whose events are published. ``container`` is a prefix of an id; ``descendants``, if any, stand for ``pids``."""

    pids: frozenset[int] = frozenset()
    container: str | None = None
    excluded_pids: frozenset[int] = frozenset()
    descendants: Descendants | None = None

    def wants(self, process: Process) -> bool:
        """Whether events of a process are published."""
        if process.pid in self.excluded_pids:
            return False
        if self.descendants is not None:
            if process not in self.descendants:
                return False
        elif self.pids and process.pid not in self.pids:
            return False
        return self.container is None or (process.container or "").startswith(self.container)


class ProcessNames(Protocol):
    """Names that processes get from elsewhere, as `sowatch.watcher.pod_names.PodNames` has them. Nothing waits."""

    def named(self, process: Process) -> Process:
        """The process with the names that are known."""

    def look_up(self, process: Process) -> Inspection | None:
        """What is over when more is known; None: nothing is worth waiting for."""

    def take_finished(self) -> list[Inspection]:
        """What is over since the last call."""


#: Of what nothing is read of, and the inspection that need not be made.
NO_FACTS: Final = FileFacts()
NOTHING_TO_READ: Final = Inspection(0.0, NO_FACTS)


class Publisher:
    """Turns changes into events and hands them to every subscription.

    Args:
        rules: the first that matches names the event.
        registry: counts the processes that have a file; the first and the last decide on activate and deactivate.
        selection: whose events are published.
        proc_root: for host paths.
        limit_bytes: what the changes that wait for facts of files may take; beyond it the processes that have the most
            wait no longer.
        process_names: names for processes of loads, which wait for them as they wait for facts of files.

    Attributes:
        published: the load events in force.
        subscribers: the readers.
        in_force: the rules, what reads files for them, and the workers; replaced as a whole.
    """

    def __init__(
        self,
        rules: RuleSet,
        registry: FileRegistry,
        selection: Selection,
        *,
        proc_root: str,
        limit_bytes: int | None = None,
        process_names: ProcessNames | None = None,
    ) -> None:
        self._process_names = process_names
        self.in_force = RuleChange(rules)
        self._registry = registry
        self.selection = selection
        #: The agent's own view of the file system, as `address_space.MappedFile.view` has it.
        self.own_view_id: Hashable = None
        self.published = PublishedMap()
        self.subscribers = Subscribers(self.published)
        self._libraries = LibraryCache(proc_root)
        self._waiting = FactsQueue(
            self._publish, limit_bytes=Config().queue_bytes if limit_bytes is None else limit_bytes
        )
        #: What was taken away by hand, until it is mapped anew or asked for by hand or by new rules.
        self._detached: set[tuple[ProcessId, FileId]] = set()
        self._repaired = [0, 0]
        self.loads = 0
        self.unloads = 0
        self.unresolved = 0
        self.partial = 0

    @property
    def waiting_bytes(self) -> int:
        """What waits for facts of files takes, each change counted as if it shared nothing with another one."""
        return self._waiting.waiting_bytes

    @property
    def is_waiting(self) -> bool:
        """Whether something waits for a file's facts."""
        return bool(self._waiting)

    def publish(self, changes: list[Change]) -> None:
        """Takes changes of the mapping table, in order. An unload of what was not published becomes no event.

        What has waited and need not any more is published before.
        """
        waiting = self._waiting
        if waiting:
            self.flush(time.monotonic())
        for change in changes:
            if change.cause == "repair":
                self._repaired[change.is_load] += 1
            if not self.selection.wants(change.process):
                continue
            if self._detached:
                self._detached.discard((change.process.id, change.name.file_id))
            lookup = self._look_up(change)
            if lookup is None and (not waiting or not waiting.holds_back(change)):
                facts = self._facts(change)
                if facts is not None:
                    self._emit(change, facts)
                    continue
            waiting.put(change, self._inspect(change), lookup=lookup)
        self.subscribers.hand_over()

    def take_repaired(self) -> tuple[int, int]:
        """How many loads and unloads were taken since the last call that a repair has found."""
        (unloads, loads), self._repaired = self._repaired, [0, 0]
        return loads, unloads

    def rescan_for(self, changes: list[Change], *, only_held: bool = False) -> None:
        """Takes loads of what is mapped already: each is published unless it was, under the rule that wants it now.

        Args:
            changes: loads.
            only_held: leave out what is not published, such as the baseline of a watch without a snapshot.
        """
        for change in changes:
            if self.selection.wants(change.process):
                self._detached.discard((change.process.id, change.name.file_id))
                lookup = self._look_up(change)
                self._waiting.put(change, self._inspect(change), is_only_held=only_held, lookup=lookup)
        self.subscribers.hand_over()

    def recheck(self, changes: list[Change], *, only_held: bool) -> None:
        """Like `rescan_for`, because files can be read now: what was taken away by hand stays away."""
        keys = self._detached
        left = [one for one in changes if (one.process.id, one.name.file_id) not in keys] if keys else changes
        self.rescan_for(left, only_held=only_held)

    def announce(self, make: Callable[[], Event], *, holds: bool = False) -> None:
        """Takes a control event.

        Args:
            make: called when everything taken before is published.
            holds: what is taken from now on is published after it.
        """
        self.after_all(lambda: self.subscribers.emit(make()), holds=holds)

    def after_all(self, action: Callable[[], None], *, holds: bool = False) -> None:
        """Does something once everything taken before is published; later changes of other processes may come first.

        Args:
            action: is not to block.
            holds: what is taken from now on is published after it.
        """
        self._waiting.after_all(action, holds=holds)
        self.subscribers.hand_over()

    def change_rules(self, change: RuleChange) -> None:
        """From now on other rules hold. What a rule had that goes, or that calls others now, is unloaded.

        What waits for facts of files is published by the new rules. Workers of rules that go get the unloads, those of
        new ones what is published after them.
        """
        before, named = self.in_force, self.in_force.rules.named
        stays = {rule.name for rule in change.rules if (old := named(rule.name)) and old.calls_the_same_as(rule)}
        self._unload(self.published.where(lambda load: load.rule not in stays))
        change.workers.take_over(before.workers, self.subscribers)
        self.in_force = change
        if change.inspector is not before.inspector:
            self._waiting.ask_again(self._inspect)
        self.subscribers.hand_over()

    def let_go(self, pid: int, rule: str) -> int:
        """Unloads by hand, cause ``rules``, what was published of a process under a rule; how many files.

        It stays so until the process maps the file anew, or `rescan_for` takes it.
        """
        found = [load for load in self.published.of_pid(pid) if load.rule == rule]
        self._unload(found)
        self._detached.update((load.process.id, load.library.id) for load in found)
        return len(found)

    def _unload(self, loads: Iterable[Load]) -> None:
        now_ns = time.monotonic_ns()
        for load in loads:
            self._forget(load.process, load.library.id, "rules", now_ns)

    def flush(self, now_s: float) -> None:
        """Publishes what waited for facts that are there, or for too long.

        Args:
            now_s: CLOCK_MONOTONIC in seconds.
        """
        inspector = self.in_force.inspector
        if inspector is not None:
            done = inspector.take_finished()
            if self._process_names is not None:
                done += self._process_names.take_finished()
            if self._waiting:
                inspector.relieve(time.monotonic())
                self._waiting.advance(done, now_s)
        self.subscribers.hand_over()

    def flush_all(self) -> None:
        """Publishes everything, without the facts that are not known."""
        self.flush(float("inf"))

    def stop(self, now_ns: int) -> None:
        """Deactivates every active file, cause ``stop``."""
        active: dict[tuple[str, FileId], Load] = {}
        for load in self.published.where(lambda _: True):
            active.setdefault((load.rule, load.library.id), load)
        for load in active.values():
            self.subscribers.emit(Deactivate(load.rule, load.library, "stop", None, now_ns))

    def named(self, process: Process) -> Process:
        """The process with the names that are known of it."""
        return process if self._process_names is None else self._process_names.named(process)

    # ---- one change ---------------------------------------------------------------------------

    def _look_up(self, change: Change) -> Inspection | None:
        """What the names of its process wait for; an unload has its load's."""
        return self._process_names.look_up(change.process) if self._process_names and change.is_load else None

    def _facts(self, change: Change) -> FileFacts | None:
        if not change.is_load or not change.name.is_regular:
            return NO_FACTS  # an unload has its load's
        assert self.in_force.inspector is not None
        return self.in_force.inspector.known(change.name)

    def _inspect(self, change: Change) -> Inspection:
        facts = self._facts(change)
        if facts is NO_FACTS:
            return NOTHING_TO_READ
        if facts is not None:
            return Inspection(0.0, facts)
        assert self.in_force.inspector is not None
        is_own_view = change.name.view == self.own_view_id
        return self.in_force.inspector.inspect(change, is_own_view=is_own_view, now_s=time.monotonic())

    def _publish(self, change: Change, facts: FileFacts | None, is_only_held: bool) -> None:
        """Publishes what has waited."""
        if not is_only_held or self.published.get(change.process.id, change.name.file_id) is not None:
            self._emit(change, facts or self._facts(change) or NO_FACTS)

    def _emit(self, change: Change, facts: FileFacts) -> None:
        if change.is_load:
            self._load(change, facts)
        else:
            self._forget(change.process, change.name.file_id, cast("UnloadCause", change.cause), change.t_ns)

    def _load(self, change: Change, facts: FileFacts) -> None:
        name = change.name
        kind = facts.kind(change.kind, name.path, is_anonymous=name.is_anonymous)
        rules = self.in_force.rules
        rule = rules.match(name.path, kind, facts.exports)
        if rule is Decision.NEEDS_EXPORTS and rules.everything is not None and kind in rules.everything.kind:
            rule = rules.everything  # it is not to miss what the rules before it cannot judge
        self.partial += facts.is_partial
        process = change.process
        held = self.published.get(process.id, name.file_id)
        if held is not None:
            # Checked again, as rules have changed, or the file was not complete or could not be read.
            known = held.library
            has_changed = facts.is_elf is not None and (
                known.kind != kind or (known.build_id is not None and known.build_id != facts.build_id)
            )
            if isinstance(rule, Rule) and rule.name == held.rule and not has_changed:
                if held.library.build_id is None and facts.build_id is not None:
                    # Its load was published before the file could be read.
                    library = replace(held.library, build_id=facts.build_id, soname=facts.soname)
                    self.published.put(process.id, name.file_id, replace(held, library=library))
                return
            self._forget(process, name.file_id, "repair" if has_changed else "rules", change.t_ns)
            if has_changed:
                change = change._replace(cause="repair")
        if not isinstance(rule, Rule):
            self.unresolved += rules.needs_exports and facts.is_elf is None
            return
        process = self.named(process)
        library = self._libraries.get(process.pid, name, kind, facts)
        now_ns = time.time_ns()
        where = (change.ranges, change.range_count)
        cause = cast("LoadCause", change.cause)
        event = Load(rule.name, library, process, cause, change.t_ns, now_ns, *where)
        self.published.put(process.id, name.file_id, event)
        self.loads += 1
        if self._registry.acquire(rule.name, library, process.id):
            # With its ranges: a worker that activates the file opens it by them.
            activate = Activate(rule.name, library, process, None, change.t_ns, now_ns, *where)
            self.subscribers.emit(activate)
        self.subscribers.emit(event)

    def _forget(self, process: Process, file: FileId, cause: UnloadCause, t_ns: int) -> None:
        """Publishes that a process has a file no more, if it was published that it has."""
        load = self.published.pop(process.id, file)
        if load is None:
            return
        if load.process.pod is not None:
            # A pod that is gone has the name that it had.
            process = replace(process, pod=load.process.pod)
        now_ns = time.time_ns()
        self.unloads += 1
        self.subscribers.emit(Unload(load.rule, load.library, process, cause, t_ns, now_ns))
        if self._registry.release(load.rule, file, process.id):
            self.subscribers.emit(Deactivate(load.rule, load.library, None, t_ns, now_ns))
