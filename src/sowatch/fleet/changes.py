"""`Changes`: from events of one host to records of what changed, for the fleet. Pure: time is passed in, nothing waits.

What is the same (container, unit, executable, library, path) is one group with its number of processes. A process
counts once it has had a file for a second; what comes and goes faster makes no record. Records are made when something
happens and wait in a bounded queue; beyond it they are dropped and counted, nothing more is queued, and everything is
sent anew once somebody takes records again. docs/decisions/0069-fleet-records.md has what the records mean.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from cachetools import LRUCache
from msgspec.structs import replace

from sowatch.fleet.clock import RecordClock
from sowatch.fleet.groups import MAX_PIDS, Group, Identity, facts_of, identity_of
from sowatch.fleet.lookups import Lookups, Question
from sowatch.fleet.records import Package, Record, WatchState, group_attributes, heartbeat_attributes
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId, ProcessId

__all__ = ["MAX_PIDS", "Changes"]

#: A process counts once it has had a file for so long.
SETTLE_S: Final = 1.0
#: A group has a state, or comes and goes, once in so long.
STATE_EVERY_S: Final = 60.0
#: So long a new group waits for its package, to have it in its first record.
HOLD_S: Final = 3.0
#: Mappings that wait for their second; the oldest of more count at once.
MAX_PENDING: Final = 65_536
#: Groups of a host. Mappings of further ones are counted and left out.
MAX_GROUPS: Final = 16_384
#: Records that wait to be taken.
MAX_RECORDS: Final = 4_096
#: Hashes of files without a build id that are known.
_MAX_HASHES: Final = 16_384
#: A mapping waits so many seconds for the hash of its file: on a busy host their thread is late.
_MAX_TRIES: Final = 120
#: After so many it counts as one that cannot be read.
_PATIENCE: Final = 5
#: Ports of one group.
_MAX_PORTS: Final = 100


class _Pending:
    """A mapping in its first second, or until the hash of its file is known."""

    __slots__ = ("due_s", "is_over", "library", "process", "time_ns", "tries")

    def __init__(self, process: Process, library: Library, due_s: float, time_ns: int) -> None:
        self.process = process
        self.library = library
        self.due_s = due_s
        self.time_ns = time_ns
        self.is_over = False
        self.tries = 0


class _Held:
    """What a process has mapped: by file its group, or that it is pending; None: it was left out. And what is stale.

    ``groups`` has how many of the files each group has: one, but for a path that has the same build twice.
    """

    __slots__ = ("exe_build_id", "files", "groups", "stale")

    def __init__(self) -> None:
        self.exe_build_id = ""
        self.files: dict[FileId, Group | _Pending | None] = {}
        self.groups: Counter[Group] = Counter()
        self.stale: dict[FileId, tuple[str, int]] = {}


class Changes:
    """The state of one host, and the records of its changes. One thread at a time.

    Args:
        host_id: part of the keys of groups.
        interval_s: from one heartbeat to the next.
        snapshot_interval_s: from one snapshot to the next.
        needs_hash: whether a file that has no build id is named by its content, for which there will be questions.
        asks_packages: whether there are questions for the packages of groups.
        max_groups, max_records, max_pending: bounds.

    Attributes:
        dropped: records that were made, or taken, and did not arrive.
        left_out: mappings that are in no group, as there are too many groups.
        short_lived: mappings that were over within a second.
        lookups: what is asked.
        may_begin: whether the first snapshot may be sent: what is mapped already is known.
    """

    def __init__(
        self,
        host_id: str,
        *,
        interval_s: float = 30.0,
        snapshot_interval_s: float = 21_600.0,
        needs_hash: Callable[[Library], bool] = lambda _library: False,
        asks_packages: bool = False,
        max_groups: int = MAX_GROUPS,
        max_records: int = MAX_RECORDS,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._host_id = host_id
        self._interval_s = interval_s
        self._snapshot_interval_s = snapshot_interval_s
        self._needs_hash = needs_hash
        self._asks_packages = asks_packages
        self._max_groups = max_groups
        self._max_records = max_records
        self._max_pending = max_pending
        self._held: dict[ProcessId, _Held] = {}
        self._groups: dict[Identity, Group] = {}
        self._pending: deque[_Pending] = deque()
        #: With numbers, so that no groups are compared.
        self._due: list[tuple[float, int, Group]] = []
        self._numbers = itertools.count()
        self._outbox: deque[Record] = deque()
        self._hashes: LRUCache[tuple[FileId, int], str] = LRUCache(_MAX_HASHES)
        self.lookups = Lookups()
        self._open_packages = 0
        self._walk: Iterator[Group] | None = None
        self._walked = 0
        self._needs_snapshot = True
        #: Nothing is queued until the next snapshot.
        self._is_paused = True
        self._snapshot = 0
        self._seq = 0
        self._clock = RecordClock()
        self._now_s = float("-inf")
        self._now_ns = 0
        self._snapshot_s = float("inf")
        self._heartbeat_s = float("-inf")
        self.dropped = 0
        self.left_out = 0
        self.short_lived = 0
        self.may_begin = False

    def go_on(self, before: Changes) -> None:
        """Follows another one that has failed, with all that is given anew: to a receiver records were dropped."""
        self._snapshot, self._seq, self._clock = before._snapshot, before._seq, before._clock
        self._now_s, self._now_ns = before._now_s, before._now_ns
        self.dropped = before.dropped + before.waiting
        self.short_lived = before.short_lived
        # What has ended meanwhile is known once everything was sent.
        self._heartbeat_s = float("inf")

    # ---- figures --------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """Groups that have processes, or had some a moment ago."""
        return len(self._groups)

    @property
    def waiting(self) -> int:
        """Records that were made and not taken."""
        return len(self._outbox)

    @property
    def has_records(self) -> bool:
        """Whether `take` would give some."""
        return bool(self._outbox) or self._walk is not None or (self._needs_snapshot and self.may_begin)

    @property
    def has_questions(self) -> bool:
        """Whether `take_questions` would give some."""
        return bool(self.lookups)

    @property
    def is_asking(self) -> bool:
        """Whether questions are open."""
        return bool(self._open_packages) or self.lookups.is_hashing

    @property
    def nameless(self) -> int:
        """Mappings that have waited for the hash of their file for some seconds, and are in no group yet."""
        return sum(one.tries > _PATIENCE and not one.is_over for one in self._pending)

    @property
    def needs_mapped(self) -> bool:
        """Whether everything mapped has to be given once more: some of it was left out, and there is space again."""
        return bool(self.left_out) and len(self._groups) < self._max_groups * 0.9

    # ---- what happens ---------------------------------------------------------------------------

    def tick(self, now_s: float, now_ns: int) -> None:
        """Time goes on; what is given from now on had happened by then.

        Args:
            now_s: monotonic.
            now_ns: the wall clock, ns since the epoch.
        """
        self._now_s, self._now_ns = now_s, now_ns
        if self._clock.tick(now_s, now_ns):
            self._pause()
            self._heartbeat_s = float("inf")  # until everything was sent

    def load(self, process: Process, library: Library) -> None:
        """A process has mapped a file; again what is known changes nothing."""
        key = process.id
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held()
        if library.kind == "executable" and (library.build_id or "") != held.exe_build_id:
            held.exe_build_id = library.build_id or ""
            self._regroup(key, held)
        file = library.id
        if held.files.get(file) is not None:
            return
        if file in held.files:
            self.left_out -= 1
        pending = held.files[file] = _Pending(process, library, self._now_s + SETTLE_S, self._now_ns)
        self._pending.append(pending)
        if len(self._pending) > self._max_pending:
            self._settle(self._pending.popleft(), is_last=True)

    def unload(self, process: ProcessId, file: FileId, *, is_executable: bool = False) -> None:
        """A process has a file mapped no more."""
        held = self._held.get(process)
        if held is None or file not in held.files:
            return
        self._take_away(process, held, file)
        if is_executable:
            held.exe_build_id = ""
        if not held.files:
            del self._held[process]

    def stale(self, process: ProcessId, file: FileId, staleness: str, time_ns: int) -> None:
        """A file that a process has mapped is no longer the one on disk."""
        held = self._held.get(process)
        if held is None or file not in held.files:
            return
        if file in held.stale and held.stale[file][0] == staleness:
            return  # since when is known
        held.stale[file] = staleness, time_ns
        group = held.files[file]
        if isinstance(group, Group):
            group.stale[process, file] = staleness, time_ns
            self._schedule(group)

    def renewed(self, process: ProcessId, file: FileId) -> None:
        """It is the one on disk again."""
        held = self._held.get(process)
        if held is None or held.stale.pop(file, None) is None:
            return
        group = held.files[file]
        if isinstance(group, Group) and group.stale.pop((process, file), None) is not None:
            self._schedule(group)

    def stale_are(self, stale: Mapping[tuple[ProcessId, FileId], str], time_ns: int) -> None:
        """All that is stale by now, after some of that was missed."""
        for process, file in [(process, file) for process, held in self._held.items() for file in held.stale]:
            if (process, file) not in stale:
                self.renewed(process, file)
        for (process, file), staleness in stale.items():
            self.stale(process, file, staleness, time_ns)

    def advance(self) -> None:
        """What had happened by the last `tick` was given: deals with what has come due by then."""
        now_s = self._now_s
        pending = self._pending
        while pending and (pending[0].is_over or pending[0].due_s <= now_s):
            self._settle(pending.popleft())
        due = self._due
        while due and due[0][0] <= now_s:
            at_s, _, group = heapq.heappop(due)
            if group.due_s == at_s:
                group.due_s = None
                self._look(group)
        if now_s >= self._snapshot_s:
            self._needs_snapshot = True

    def is_heartbeat_due(self) -> bool:
        """Whether `heartbeat` is to be called."""
        return self._now_s >= self._heartbeat_s and not self._is_paused

    def heartbeat(self, watch: WatchState) -> None:
        """Makes one; the next is due an interval later."""
        self._heartbeat_s = self._now_s + self._interval_s
        figures = heartbeat_attributes(
            watch,
            interval_s=max(1, round(self._interval_s)),
            groups=len(self._groups),
            dropped=self.dropped,
            left_out=self.left_out,
        )
        self._record("sowatch.fleet.heartbeat", figures)

    @property
    def next_due_s(self) -> float:
        """When `advance` has something to do, if nothing happens."""
        times = [self._snapshot_s if not self._needs_snapshot else float("inf")]
        if self._pending:
            times.append(self._pending[0].due_s)
        if self._due:
            times.append(self._due[0][0])
        if not self._is_paused:
            times.append(self._heartbeat_s)
        return min(times)

    # ---- the way out ----------------------------------------------------------------------------

    def take(self, limit: int) -> list[Record]:
        """The next records, at most so many; begins a snapshot if one is due. They count as sent."""
        if self._needs_snapshot and self.may_begin:
            self._begin_snapshot()
        outbox = self._outbox
        while self._walk is not None and len(outbox) < min(limit, self._max_records):
            self._walk_on()
        return [outbox.popleft() for _ in range(min(limit, len(outbox)))]

    def drop(self, count: int) -> None:
        """Records that were taken will not arrive: everything is sent anew."""
        self.dropped += count
        self._pause()

    def _pause(self) -> None:
        self.dropped += len(self._outbox)
        self._outbox.clear()
        self._walk = None
        self._is_paused = self._needs_snapshot = True

    def _begin_snapshot(self) -> None:
        self._needs_snapshot = self._is_paused = False
        self._snapshot += 1
        made, self._seq = self._seq, 0
        self._snapshot_s = self._now_s + self._snapshot_interval_s
        for group in list(self._groups.values()):
            if not group.processes and not group.is_reported:
                self._forget(group)
            elif group.package is None:
                self._ask_package(group)
        self._walk = iter(list(self._groups.values()))
        self._walked = 0
        self._record("sowatch.fleet.snapshot_begin", {"sowatch.fleet.records": made})

    def _walk_on(self) -> None:
        assert self._walk is not None
        group = next(self._walk, None)
        if group is None:
            self._walk = None
            self._record("sowatch.fleet.snapshot_end", {"sowatch.fleet.records": self._walked})
            self._heartbeat_s = self._now_s
        elif group.snapshot == self._snapshot:
            return  # a change of it was reported since this snapshot began
        elif group.processes:
            self._walked += 1
            self._report("state", group)
        elif group.is_reported:
            self._report("unmapped", group)

    # ---- what only reading files answers ---------------------------------------------------------

    def take_questions(self, limit: int) -> list[Question]:
        """Questions that were not asked before, and are not over; each is to be answered, in any order."""
        return self.lookups.take(limit)

    def answer_hash(self, library: Library, name: str | None) -> None:
        """What names the content of a file; None: it cannot be read."""
        self.lookups.answered(library)
        self._hashes[library.id, library.changed_ns] = name or ""

    def answer_package(self, identity: Identity, package: Package | None) -> None:
        """The package of a group's file; None: it is unknown."""
        group = self._groups.get(identity)
        if group is None or not group.is_asked:
            return
        group.is_asked = False
        self._open_packages -= 1
        group.package = package
        if group.processes and not group.is_reported:
            self._report("mapped", group)
        elif group.processes and package is not None:
            self._schedule(group)

    def answer_ports(self, ports: Mapping[int, str]) -> None:
        """Where processes listen, by pid, such as ``tcp:443,udp:53``; those that cannot be read are left out."""
        for group in self._groups.values():
            known = [ports[one.pid] for one in group.shown if one.pid in ports]
            if known:
                words = {word for text in known for word in text.split(",") if word}
                listen = ",".join(sorted(words, key=_by_port)[:_MAX_PORTS])
                if listen != group.listen:
                    group.listen = listen
                    self._schedule(group)

    def shown_processes(self) -> list[ProcessId]:
        """Those whose pids records have."""
        return sorted({one.id for group in self._groups.values() for one in group.shown})

    def _ask_package(self, group: Group) -> None:
        """The next snapshot asks again, if too many questions wait."""
        if self._asks_packages and not group.is_asked and group.members:
            question = Question(group.shown[0], group.library, group.identity)
            group.is_asked = self.lookups.ask(question, lambda: group.is_asked, self._now_s)
            self._open_packages += group.is_asked

    def _build_id(self, library: Library) -> str | None:
        """What names the content of a file; None: that is not known yet."""
        if library.build_id is not None:
            return library.build_id
        return self._hashes.get((library.id, library.changed_ns)) if self._needs_hash(library) else ""

    def _ask_hash(self, pending: _Pending) -> None:
        """It is pending for another second, and asks again then."""
        question = Question(pending.process, pending.library, None)
        self.lookups.ask(question, lambda: not pending.is_over, self._now_s)
        pending.tries += 1
        pending.due_s = self._now_s + SETTLE_S
        self._pending.append(pending)

    # ---- groups ---------------------------------------------------------------------------------

    def _settle(self, pending: _Pending, *, is_last: bool = False) -> None:
        """Its second is over."""
        if pending.is_over:
            return
        process, library = pending.process, pending.library
        build_id = self._build_id(library)
        if build_id is None:
            if pending.tries < _MAX_TRIES and not is_last:
                self._ask_hash(pending)
                return
            build_id = ""
        held = self._held[process.id]
        identity = identity_of(process, library, held.exe_build_id, build_id)
        group = self._groups.get(identity)
        if group is None:
            if len(self._groups) >= self._max_groups:
                self.left_out += 1
                held.files[library.id] = None
                return
            facts = facts_of(process, library, held.exe_build_id, build_id)
            group = self._groups[identity] = Group(identity, facts, library, self._host_id)
        self._join(process, held, library.id, group, pending.time_ns)

    def _join(self, process: Process, held: _Held, file: FileId, group: Group, time_ns: int) -> None:
        held.files[file] = group
        held.groups[group] += 1
        if file in held.stale:
            group.stale[process.id, file] = held.stale[file]
            if group.processes:
                self._schedule(group)
        if held.groups[group] > 1:
            return  # the same path and build twice in one process
        group.add(process)
        if group.processes > 1:
            self._schedule(group)
        elif group.is_reported:
            # It went, and that was not reported.
            group.has_gone = True
            self._schedule(group)
        else:
            group.since_ns = time_ns
            group.is_flapping = self._now_s < group.last_s + STATE_EVERY_S
            if group.package is None:
                self._ask_package(group)
            if group.is_asked:
                self._schedule(group, self._now_s + HOLD_S)
            else:
                self._report("mapped", group)

    def _take_away(self, process: ProcessId, held: _Held, file: FileId) -> None:
        found = held.files.pop(file)
        held.stale.pop(file, None)
        if found is None:
            self.left_out -= 1
        elif isinstance(found, _Pending):
            found.is_over = True
            self.short_lived += 1
            build_id = self._build_id(found.library)
            group = self._groups.get(identity_of(found.process, found.library, held.exe_build_id, build_id or ""))
            if group is not None:
                group.short_lived += 1
        else:
            self._leave(process, held, file, found)

    def _leave(self, process: ProcessId, held: _Held, file: FileId, group: Group) -> None:
        if group.stale.pop((process, file), None) is not None:
            self._schedule(group)
        held.groups[group] -= 1
        if held.groups[group]:
            return
        del held.groups[group]
        group.remove(process)
        if group.processes or (group.is_reported and group.is_flapping):
            self._schedule(group)  # one that comes and goes has both once a minute
        elif group.is_reported:
            self._report("unmapped", group)
        else:
            self.short_lived += 1
            self._forget(group)  # the receiver never knew it

    def _forget(self, group: Group) -> None:
        if self._groups.get(group.identity) is group:
            del self._groups[group.identity]
            self._open_packages -= group.is_asked
            group.is_asked = False
            group.due_s = None

    def _regroup(self, process: ProcessId, held: _Held) -> None:
        """The build id of the executable became known late."""
        for file, group in list(held.files.items()):
            member = group.members.get(process) if isinstance(group, Group) else None
            if not isinstance(group, Group) or group.facts.exe_build_id == held.exe_build_id:
                continue
            identity = (*group.identity[:4], held.exe_build_id, *group.identity[5:])
            held.files[file] = None
            self._leave(process, held, file, group)
            other = self._groups.get(identity)
            if other is None and len(self._groups) < self._max_groups:
                facts = replace(group.facts, exe_build_id=held.exe_build_id)
                other = self._groups[identity] = Group(identity, facts, group.library, self._host_id)
            if other is None:
                self.left_out += 1
                continue
            self._join(member or Process(*process), held, file, other, group.since_ns)

    def _schedule(self, group: Group, at_s: float | None = None) -> None:
        """Something changed: it is reported a minute after the last record of the group, or now."""
        if group.due_s is None and not self._is_paused:
            group.due_s = max(self._now_s, group.last_s + STATE_EVERY_S) if at_s is None else at_s
            heapq.heappush(self._due, (group.due_s, next(self._numbers), group))

    def _look(self, group: Group) -> None:
        """A group has come due."""
        if group.processes:
            group.is_flapping, group.has_gone = group.has_gone, False
            if not group.is_reported:
                self._report("mapped", group)
            elif group.is_news():
                self._report("state", group)
        elif not group.is_reported:
            self._forget(group)
        elif not self._is_paused:
            self._report("unmapped", group)

    # ---- records --------------------------------------------------------------------------------

    def _report(self, what: str, group: Group) -> None:
        """A record of a group, with all that is known of it."""
        if self._is_paused:
            return
        state = group.state()
        group.reported = state
        group.is_reported = what != "unmapped"
        group.last_s = self._now_s
        group.snapshot = self._snapshot
        self._record(f"sowatch.library.{what}", group_attributes(group.key, group.facts, state))
        if what == "unmapped":
            # It is kept for a minute, to know one that comes and goes.
            group.due_s = None
            self._schedule(group)

    def _record(self, event: str, attributes: dict[str, str | int | bool]) -> None:
        if self._is_paused:
            return
        if len(self._outbox) >= self._max_records:
            self.dropped += 1
            self._pause()
            return
        attributes["sowatch.fleet.snapshot"] = self._snapshot
        attributes["sowatch.fleet.seq"] = self._seq
        self._seq += 1
        self._outbox.append(Record(event, self._clock.next_ns(), attributes))


def _by_port(word: str) -> tuple[str, int]:
    protocol, _, port = word.partition(":")
    return protocol, int(port) if port.isdigit() else 0
