"""`Changes`: from events of one host to records of what changed, for the fleet. Pure: time is passed in, nothing waits.

What is the same (container, unit, executable, library, path) is one group with its number of processes. A process
counts once it has had a file for a second; what comes and goes faster makes no record. Records are made when something
happens and wait in a bounded queue; beyond it they are dropped and counted, nothing more is queued, and everything is
sent anew once somebody takes records again. docs/decisions/0069-fleet-records.md has what the records mean.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Final, TypeAlias

from msgspec.structs import replace

from sowatch.fleet.records import (
    GroupFacts,
    GroupState,
    Package,
    Record,
    WatchState,
    group_attributes,
    group_key,
    heartbeat_attributes,
    unit_of,
)
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId, ProcessId

__all__ = ["Changes"]

#: A process counts once it has had a file for so long.
SETTLE_S: Final = 1.0
#: A group has a state, or comes and goes, once in so long.
STATE_EVERY_S: Final = 60.0
#: Mappings that wait for their second; the oldest of more count at once.
MAX_PENDING: Final = 65_536
#: Groups of a host. Mappings of further ones are counted and left out.
MAX_GROUPS: Final = 16_384
#: Records that wait to be taken.
MAX_RECORDS: Final = 4_096
#: Pids of a group that are known, and those of them that a record has.
_KNOWN_PIDS: Final = 16
MAX_PIDS: Final = 5
#: Staleness that counts more comes first.
_STALENESS: Final = ("replaced", "deleted", "modified")


#: What distinguishes groups: kind, container, unit, executable and its build id, build id and path.
_Identity: TypeAlias = tuple[str, str, str, str, str, str, str]


class _Pending:
    """A mapping in its first second."""

    __slots__ = ("due_s", "is_over", "library", "process", "time_ns")

    def __init__(self, process: Process, library: Library, due_s: float, time_ns: int) -> None:
        self.process = process
        self.library = library
        self.due_s = due_s
        self.time_ns = time_ns
        self.is_over = False


class _Group:
    """Processes that have the same file mapped, and what was reported of them."""

    __slots__ = (
        "due_s",
        "facts",
        "has_gone",
        "identity",
        "is_flapping",
        "is_reported",
        "key",
        "last_s",
        "listen",
        "package",
        "pids",
        "processes",
        "reported",
        "short_lived",
        "since_ns",
        "snapshot",
        "stale",
    )

    def __init__(self, identity: _Identity, facts: GroupFacts, key: str) -> None:
        self.identity = identity
        self.facts = facts
        self.key = key
        self.processes = 0
        self.pids: dict[ProcessId, None] = {}
        self.short_lived = 0
        self.since_ns = 0
        self.stale: dict[tuple[ProcessId, FileId], tuple[str, int]] = {}
        self.listen = ""
        self.package: Package | None = None
        #: What the receiver knows, and since when.
        self.is_reported = False
        self.reported: GroupState | None = None
        self.last_s = float("-inf")
        self.snapshot = 0
        #: It came again less than a minute after it went, and has done so since it was looked at.
        self.is_flapping = False
        self.has_gone = False
        #: When it is looked at again; None: no need.
        self.due_s: float | None = None

    def state(self) -> GroupState:
        stale, since_ns = "", 0
        if self.stale:
            stale = min((word for word, _ in self.stale.values()), key=_STALENESS.index)
            since_ns = min(time_ns for _, time_ns in self.stale.values())
        pids = tuple(sorted(process.pid for process in list(self.pids)[:MAX_PIDS]))
        return GroupState(
            self.processes, pids, stale, since_ns, self.listen, self.package, self.short_lived, self.since_ns
        )

    def is_news(self) -> bool:
        """Whether something changed that is worth a record: only some of the pids, or short processes, are none."""
        known = self.reported
        if known is None:
            return True
        now = self.state()
        if set(known.pids).isdisjoint(now.pids):
            return True
        return (now.processes, now.stale, now.stale_since_ns, now.listen, now.package) != (
            known.processes,
            known.stale,
            known.stale_since_ns,
            known.listen,
            known.package,
        )


class _Held:
    """What a process has mapped: by file its group, or that it is pending; None: it was left out."""

    __slots__ = ("exe_build_id", "files")

    def __init__(self) -> None:
        self.exe_build_id = ""
        self.files: dict[FileId, _Group | _Pending | None] = {}


class Changes:
    """The state of one host, and the records of its changes. One thread at a time.

    Args:
        host_id: part of the keys of groups.
        interval_s: from one heartbeat to the next.
        snapshot_interval_s: from one snapshot to the next.
        max_groups, max_records, max_pending: bounds.

    Attributes:
        dropped: records that were made, or taken, and did not arrive.
        left_out: mappings that are in no group, as there are too many groups.
        short_lived: mappings that were over within a second.
        may_begin: whether the first snapshot may be sent: what is mapped already is known.
    """

    def __init__(
        self,
        host_id: str,
        *,
        interval_s: float = 30.0,
        snapshot_interval_s: float = 21_600.0,
        max_groups: int = MAX_GROUPS,
        max_records: int = MAX_RECORDS,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._host_id = host_id
        self._interval_s = interval_s
        self._snapshot_interval_s = snapshot_interval_s
        self._max_groups = max_groups
        self._max_records = max_records
        self._max_pending = max_pending
        self._held: dict[ProcessId, _Held] = {}
        self._groups: dict[_Identity, _Group] = {}
        self._pending: deque[_Pending] = deque()
        self._due: list[tuple[float, str, _Group]] = []
        self._outbox: deque[Record] = deque()
        self._walk: Iterator[_Group] | None = None
        self._walked = 0
        self._needs_snapshot = True
        #: Nothing is queued until the next snapshot.
        self._is_paused = True
        self._snapshot = 0
        self._seq = 0
        self._version_ns = 0
        self._now_s = float("-inf")
        self._now_ns = 0
        self._snapshot_s = float("inf")
        self._heartbeat_s = float("-inf")
        self.dropped = 0
        self.left_out = 0
        self.short_lived = 0
        self.may_begin = False

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
            self._settle(self._pending.popleft())

    def unload(self, process: ProcessId, file: FileId, *, is_executable: bool = False) -> None:
        """A process has a file mapped no more."""
        held = self._held.get(process)
        if held is None or file not in held.files:
            return
        if is_executable:
            held.exe_build_id = ""
        self._take_away(process, held, file)
        if not held.files:
            del self._held[process]

    def stale(self, process: ProcessId, file: FileId, staleness: str, time_ns: int) -> None:
        """A file that a process has mapped is no longer the one on disk."""
        group = self._group_of(process, file)
        if group is not None:
            group.stale[process, file] = staleness, time_ns
            self._schedule(group)

    def renewed(self, process: ProcessId, file: FileId) -> None:
        """It is the one on disk again."""
        group = self._group_of(process, file)
        if group is not None and group.stale.pop((process, file), None) is not None:
            self._schedule(group)

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
        for group in [one for one in self._groups.values() if not one.processes and not one.is_reported]:
            del self._groups[group.identity]
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

    # ---- groups ---------------------------------------------------------------------------------

    def _settle(self, pending: _Pending) -> None:
        """Its second is over."""
        if pending.is_over:
            return
        process, library = pending.process, pending.library
        held = self._held[process.id]
        identity = _identity(process, library, held.exe_build_id)
        group = self._groups.get(identity) or self._make(identity, facts_of(process, library, held.exe_build_id))
        if group is None:
            self.left_out += 1
            held.files[library.id] = None
        else:
            self._join(process.id, held, library.id, group, pending.time_ns)

    def _make(self, identity: _Identity, facts: GroupFacts) -> _Group | None:
        if len(self._groups) >= self._max_groups:
            return None
        group = self._groups[identity] = _Group(identity, facts, group_key(facts, self._host_id))
        return group

    def _join(self, process: ProcessId, held: _Held, file: FileId, group: _Group, time_ns: int) -> None:
        is_counted = any(one is group for one in held.files.values())
        held.files[file] = group
        if is_counted:
            return  # the same path and build twice in one process
        group.processes += 1
        if len(group.pids) < _KNOWN_PIDS:
            group.pids[process] = None
        if group.processes > 1:
            self._schedule(group)
        elif group.is_reported:
            # It went, and that was not reported.
            group.has_gone = True
            self._schedule(group)
        else:
            group.since_ns = time_ns
            group.is_flapping = self._now_s < group.last_s + STATE_EVERY_S
            self._report("mapped", group)

    def _take_away(self, process: ProcessId, held: _Held, file: FileId) -> None:
        found = held.files.pop(file)
        if found is None:
            self.left_out -= 1
        elif isinstance(found, _Pending):
            found.is_over = True
            self.short_lived += 1
            group = self._groups.get(_identity(found.process, found.library, held.exe_build_id))
            if group is not None:
                group.short_lived += 1
        else:
            self._leave(process, held, file, found)

    def _leave(self, process: ProcessId, held: _Held, file: FileId, group: _Group) -> None:
        if group.stale.pop((process, file), None) is not None:
            self._schedule(group)
        if any(one is group for one in held.files.values()):
            return
        group.processes -= 1
        group.pids.pop(process, None)
        if group.processes:
            self._schedule(group)
        elif group.is_flapping:
            self._schedule(group)  # one that comes and goes has both once a minute
        else:
            self._report("unmapped", group)

    def _regroup(self, process: ProcessId, held: _Held) -> None:
        """The build id of the executable became known late."""
        for file, group in list(held.files.items()):
            if not isinstance(group, _Group):
                continue
            facts = replace(group.facts, exe_build_id=held.exe_build_id)
            identity = (*group.identity[:4], held.exe_build_id, *group.identity[5:])
            stale = group.stale.get((process, file))
            held.files[file] = None
            self._leave(process, held, file, group)
            other = self._groups.get(identity) or self._make(identity, facts)
            if other is None:
                self.left_out += 1
                continue
            self._join(process, held, file, other, group.since_ns)
            if stale is not None:
                other.stale[process, file] = stale

    def _group_of(self, process: ProcessId, file: FileId) -> _Group | None:
        held = self._held.get(process)
        found = None if held is None else held.files.get(file)
        return found if isinstance(found, _Group) else None

    def _schedule(self, group: _Group) -> None:
        """Something changed: it is reported a minute after the last record of the group, or now."""
        if group.due_s is None and not self._is_paused:
            group.due_s = max(self._now_s, group.last_s + STATE_EVERY_S)
            heapq.heappush(self._due, (group.due_s, group.key, group))

    def _look(self, group: _Group) -> None:
        """A group has come due."""
        if group.processes:
            group.is_flapping, group.has_gone = group.has_gone, False
            if not group.is_reported or group.is_news():
                self._report("state", group)
        elif group.is_reported and not self._is_paused:
            self._report("unmapped", group)
        elif not group.is_reported:
            del self._groups[group.identity]

    # ---- records --------------------------------------------------------------------------------

    def _report(self, what: str, group: _Group) -> None:
        """A record of a group, with all that is known of it."""
        if self._is_paused:
            if what == "unmapped" and not group.is_reported:
                del self._groups[group.identity]  # the receiver never knew it
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
        self._version_ns = max(self._version_ns + 1, self._now_ns)
        attributes["sowatch.fleet.snapshot"] = self._snapshot
        attributes["sowatch.fleet.seq"] = self._seq
        self._seq += 1
        self._outbox.append(Record(event, self._version_ns, attributes))


def facts_of(process: Process, library: Library, exe_build_id: str) -> GroupFacts:
    """The group that a mapping counts in."""
    pod = process.pod
    return GroupFacts(
        kind=library.kind,
        container=process.container or "",
        unit=unit_of(process.cgroup),
        exe=process.exe or "",
        exe_build_id=exe_build_id,
        build_id=library.build_id or "",
        path=library.path,
        soname=library.soname or "",
        pod_uid=(pod.uid if pod else "") or "",
        pod=(pod.name if pod else "") or "",
        namespace=(pod.namespace if pod else "") or "",
    )


def _identity(process: Process, library: Library, exe_build_id: str) -> _Identity:
    return (
        library.kind,
        process.container or "",
        unit_of(process.cgroup),
        process.exe or "",
        exe_build_id,
        library.build_id or "",
        library.path,
    )
