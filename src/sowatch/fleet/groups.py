"""`Group`: processes that have the same file mapped, and what was reported of them. Pure."""

from __future__ import annotations

from typing import Final, TypeAlias

from sowatch.fleet.records import GroupFacts, GroupState, Package, group_key, unit_of
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId, ProcessId

__all__ = ["MAX_PIDS", "Group", "Identity", "facts_of", "identity_of"]

#: Pids that a record has, and how many are known, from which those are taken that left.
MAX_PIDS: Final = 5
_KNOWN_PIDS: Final = 16
#: Staleness that counts more comes first.
_STALENESS: Final = ("replaced", "deleted", "modified")

#: What distinguishes groups: kind, container, unit, executable and its build id, build id and path.
Identity: TypeAlias = tuple[str, str, str, str, str, str, str]


class Group:
    """One group.

    Attributes:
        identity, facts, key: what it is.
        library: the file, as one of its processes has it.
        members: some of its processes.
        processes: how many there are.
        since_ns: when it got its first process, or the agent found it.
        stale: by process and file the staleness, and since when.
        listen: the ports of its processes, as far as they are known.
        package: of the file.
        is_asked: whether its package is being looked up.
        is_reported: whether the receiver takes it to be mapped.
        reported: what the receiver knows.
        last_s: when it was last reported.
        snapshot: and in which snapshot.
        is_flapping: it came again less than a minute after it went.
        has_gone: and went again since it was checked.
        due_s: when it is checked again; None: not before it changes.
    """

    __slots__ = (
        "due_s",
        "facts",
        "has_gone",
        "identity",
        "is_asked",
        "is_flapping",
        "is_reported",
        "key",
        "last_s",
        "library",
        "listen",
        "members",
        "package",
        "processes",
        "reported",
        "short_lived",
        "since_ns",
        "snapshot",
        "stale",
    )

    def __init__(self, identity: Identity, facts: GroupFacts, library: Library, host_id: str) -> None:
        self.identity = identity
        self.facts = facts
        self.key = group_key(facts, host_id)
        self.library = library
        self.members: dict[ProcessId, Process] = {}
        self.processes = 0
        self.since_ns = 0
        self.short_lived = 0
        self.stale: dict[tuple[ProcessId, FileId], tuple[str, int]] = {}
        self.listen = ""
        self.package: Package | None = None
        self.is_asked = False
        self.is_reported = False
        self.reported: GroupState | None = None
        self.last_s = float("-inf")
        self.snapshot = 0
        self.is_flapping = False
        self.has_gone = False
        self.due_s: float | None = None

    def add(self, process: Process) -> None:
        """One more process."""
        self.processes += 1
        if len(self.members) < _KNOWN_PIDS:
            self.members[process.id] = process

    def remove(self, process: ProcessId) -> None:
        """One less."""
        self.processes -= 1
        self.members.pop(process, None)

    @property
    def shown(self) -> list[Process]:
        """The processes whose pids a record has."""
        return list(self.members.values())[:MAX_PIDS]

    def state(self) -> GroupState:
        """As it is now."""
        stale, since_ns = "", 0
        if self.stale:
            stale = min((word for word, _ in self.stale.values()), key=_rank)
            since_ns = min(time_ns for _, time_ns in self.stale.values())
        return GroupState(
            self.processes,
            tuple(sorted(process.pid for process in self.shown)),
            stale,
            since_ns,
            self.listen if self.processes else "",
            self.package,
            self.short_lived,
            self.since_ns,
        )

    def is_news(self) -> bool:
        """Whether something changed that is worth a record; some of the pids, and short processes, are not."""
        known = self.reported
        if known is None:
            return True
        now = self.state()
        if set(known.pids).isdisjoint(now.pids):
            return True
        return any(getattr(now, name) != getattr(known, name) for name in _NEWS)


def _rank(word: str) -> int:
    return _STALENESS.index(word) if word in _STALENESS else len(_STALENESS)


_NEWS: Final = ("processes", "stale", "stale_since_ns", "listen", "package")


def facts_of(process: Process, library: Library, exe_build_id: str, build_id: str) -> GroupFacts:
    """What a group has of a mapping."""
    pod = process.pod
    return GroupFacts(
        kind=library.kind,
        container=process.container or "",
        unit=unit_of(process.cgroup),
        exe=process.exe or "",
        exe_build_id=exe_build_id,
        build_id=build_id,
        path=library.path,
        soname=library.soname or "",
        pod_uid=(pod.uid if pod else "") or "",
        pod=(pod.name if pod else "") or "",
        namespace=(pod.namespace if pod else "") or "",
    )


def identity_of(process: Process, library: Library, exe_build_id: str, build_id: str) -> Identity:
    """The group that a mapping counts in."""
    return (
        library.kind,
        process.container or "",
        unit_of(process.cgroup),
        process.exe or "",
        exe_build_id,
        build_id,
        library.path,
    )
