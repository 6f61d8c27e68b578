"""Events, and the records in them: frozen values. Their wire form is made by `sowatch.model.lines`.

An event is one of `Load`, `Unload`, `Activate`, `Deactivate` (together `LibraryEvent`), `Http`, `Stale`,
`Renewed` (together `AddedEvent`), `Ready`, `Lost`, `Repaired` and `Stopped`. Its ``event`` names its kind, and by it
a type checker knows which one it is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

from msgspec import Struct
from msgspec.structs import astuple

from sowatch.model.errors import LoadAttempt
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import (
    DeactivateCause,
    Hooks,
    HttpProtocol,
    HttpSide,
    Kind,
    LoadCause,
    LossPlace,
    RenewedCause,
    Staleness,
    Strategy,
    UnloadCause,
)

__all__ = [
    "Activate",
    "AddedEvent",
    "ControlEvent",
    "Deactivate",
    "Event",
    "Head",
    "Http",
    "Library",
    "LibraryEvent",
    "Load",
    "Lost",
    "Origin",
    "Pod",
    "Process",
    "Ready",
    "Renewed",
    "Repaired",
    "Stale",
    "Stopped",
    "Unload",
    "size_of",
]

Ranges: TypeAlias = tuple[tuple[int, int], ...]


class Pod(Struct, frozen=True, gc=False):
    """A pod of Kubernetes. ``uid`` is in the path of the cgroup; all else only the container runtime knows.

    ``container`` is the name that the pod gives the container; None of what is in none of its containers.
    """

    uid: str
    name: str | None = None
    namespace: str | None = None
    container: str | None = None


class Process(Struct, frozen=True, gc=False):
    """A process as it was when the event happened. What could not be read is ``None``.

    ``pid`` is the tgid in the initial pid namespace, ``ns_pid`` in its own. ``start_ns`` is in
    ns since boot: exact from the kernel, else rounded down to the 10 ms tick. ``exe`` is the
    path of the main executable as the process sees it, ``cgroup`` the path of its cgroup below
    the root of the hierarchy, ``container`` the id found in it, and ``pod`` the pod.
    """

    pid: int
    start_ns: int
    ns_pid: int | None = None
    ppid: int | None = None
    comm: str | None = None
    exe: str | None = None
    uid: int | None = None
    container: str | None = None
    cgroup: str | None = None
    pod: Pod | None = None

    @property
    def id(self) -> ProcessId:
        """The identity, which survives a reuse of the pid."""
        return ProcessId(self.pid, self.start_ns)


class Library(Struct, frozen=True, gc=False):
    """A mapped file. ``path`` is what the process sees, ``host_path`` opens it from the agent.

    ``kind`` is ``library``, ``executable``, ``interpreter`` or ``other``. ``deleted`` is the
    kernel's word that the name is gone (always true of a memfd, whose path is
    ``/memfd:NAME``). Bytes that are not UTF-8 stand in paths as surrogate escapes.

    ``changed_ns`` is the change time of the inode when it was mapped, 0 if unknown. It is not part of an event on the
    wire nor of equality: on an overlay it distinguishes what was mapped from what has its place since.
    """

    path: str
    id: FileId
    host_path: str | None = None
    kind: Kind = "library"
    build_id: str | None = None
    soname: str | None = None
    deleted: bool = False
    path_partial: bool = False
    changed_ns: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Library) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[Any, ...]:
        return astuple(self)[:-1]


class Load(Struct, frozen=True, gc=False):
    """A process has mapped a file executable.

    Attributes:
        rule: the name of the rule that wanted the file.
        library: the file.
        process: who mapped it.
        cause: ``mmap``, ``snapshot`` (it was mapped already), ``fork``, ``exec`` or ``repair`` (it was missed).
        t_ns: the kernel's CLOCK_MONOTONIC of the fact; None where only a scan found it.
        time_ns: the wall clock, ns since the epoch.
        ranges: the executable address ranges known at that moment, as ``(start, end)``.
        range_count: None: ``ranges`` are all. Of a file that has more than 256 in one process there are two, the first
            one and what spans the others, and this is how many there are, at the least.
    """

    event: ClassVar[Literal["load"]] = "load"

    rule: str
    library: Library
    process: Process
    cause: LoadCause
    t_ns: int | None
    time_ns: int
    ranges: Ranges = ()
    range_count: int | None = None


class Unload(Struct, frozen=True, gc=False):
    """A process's last executable mapping of a file is gone. Attributes as of `Load`, without ranges.

    ``cause`` is ``munmap``, ``exec``, ``exit``, ``repair`` or ``rules`` (no rule matches the file any more).
    """

    event: ClassVar[Literal["unload"]] = "unload"
    ranges: ClassVar[Ranges] = ()
    range_count: ClassVar[None] = None

    rule: str
    library: Library
    process: Process
    cause: UnloadCause
    t_ns: int | None
    time_ns: int


class Activate(Struct, frozen=True, gc=False):
    """The first process mapped a file of a rule; comes before its `Load`. Attributes as of that."""

    event: ClassVar[Literal["activate"]] = "activate"

    rule: str
    library: Library
    process: Process
    cause: LoadCause | None
    t_ns: int | None
    time_ns: int
    ranges: Ranges = ()
    range_count: int | None = None


class Deactivate(Struct, frozen=True, gc=False):
    """The last process that mapped a file of a rule is gone; comes after its `Unload`. ``process`` is None.

    ``cause`` is ``stop`` when the watch ends, else None.
    """

    event: ClassVar[Literal["deactivate"]] = "deactivate"
    process: ClassVar[None] = None
    ranges: ClassVar[Ranges] = ()
    range_count: ClassVar[None] = None

    rule: str
    library: Library
    cause: DeactivateCause | None
    t_ns: int | None
    time_ns: int


class Origin(Struct, frozen=True, gc=False):
    """Which host, which boot of it, and which sowatch.

    ``host_id`` is that of machine-id(5), ``version`` that of sowatch. What could not be read is None.
    """

    host: str
    host_id: str | None
    boot_id: str | None
    version: str | None


class Ready(Struct, frozen=True, gc=False):
    """The start-up snapshot is complete; what follows is live.

    ``host_id`` is that of machine-id(5), ``version`` that of sowatch.
    """

    event: ClassVar[Literal["ready"]] = "ready"

    time_ns: int
    host: str
    boot_id: str | None
    strategy: Strategy
    guarantee: str
    hooks: Hooks | None
    limits: tuple[str, ...]
    attempts: tuple[LoadAttempt, ...]
    processes: int
    mappings: int
    seconds: float
    host_id: str | None = None
    version: str | None = None

    @property
    def origin(self) -> Origin:
        """Where this watch runs."""
        return Origin(self.host, self.host_id, self.boot_id, self.version)


class Head(Struct, frozen=True, gc=False):
    """The first line of a file of events: whose they are. No watch gives it, `sowatch.decode` does."""

    event: ClassVar[Literal["head"]] = "head"

    time_ns: int
    origin: Origin


class Lost(Struct, frozen=True, gc=False):
    """``count`` facts did not get through, in the ``kernel`` or in a ``queue`` of ours."""

    event: ClassVar[Literal["lost"]] = "lost"

    time_ns: int
    count: int
    where: LossPlace


class Repaired(Struct, frozen=True, gc=False):
    """The map is right again; ``loads`` and ``unloads`` were found missing and were sent."""

    event: ClassVar[Literal["repaired"]] = "repaired"

    time_ns: int
    loads: int
    unloads: int
    seconds: float


class Stopped(Struct, frozen=True, gc=False):
    """The last event of a watch, with its totals."""

    event: ClassVar[Literal["stopped"]] = "stopped"

    time_ns: int
    loads: int
    unloads: int
    lost: int


class Http(Struct, frozen=True, gc=False):
    """A request and its response that passed a TLS library. What is not known is None.

    Attributes:
        time_ns: the wall clock when it began, or the first that is known of it; ns since the epoch.
        process: who made or served it.
        library: that it passed.
        side: ``client`` made the request, ``server`` served it.
        protocol: as in the status line; ``HTTP/2`` for that.
        method, authority, path: of the request; HTTP/2 fields that were sent before the watch are ``<unknown>``.
        status, grpc_status: of the response.
        request_bytes, response_bytes: of the bodies.
        ttfb_ns, duration_ns: from the first byte of the request to the first and to the last of the response.
        is_complete: its end was seen.
        peer: address and port of the other end of the socket.
        local_port: of the socket.
        request_headers, response_headers: those that were named, in lower case; None: none was named.
    """

    event: ClassVar[Literal["http"]] = "http"

    time_ns: int
    process: Process
    library: Library | None
    side: HttpSide
    protocol: HttpProtocol
    method: str | None
    authority: str | None
    path: str | None
    status: int | None
    grpc_status: int | None
    request_bytes: int
    response_bytes: int
    ttfb_ns: int | None
    duration_ns: int | None
    is_complete: bool
    peer: tuple[str, int] | None
    local_port: int | None
    request_headers: dict[str, str] | None = None
    response_headers: dict[str, str] | None = None


class Stale(Struct, frozen=True, gc=False):
    """The file that a process has mapped is no longer the one on disk: the process has to be restarted for the new one.

    Attributes:
        rule: the name of the rule that wanted the file.
        library: the file.
        process: who has it mapped.
        staleness: ``replaced`` or ``deleted``.
        reason: where the name of the file decided.
        time_ns: the wall clock when that was noticed, ns since the epoch.
    """

    event: ClassVar[Literal["stale"]] = "stale"

    rule: str
    library: Library
    process: Process
    staleness: Staleness
    reason: str | None
    time_ns: int


class Renewed(Struct, frozen=True, gc=False):
    """A process no longer has a stale file mapped. Attributes as of `Stale`.

    ``cause`` is ``unmapped`` (the process ended, or has the file no more, or no rule wants it any more) or ``restored``
    (the file is back under its name).
    """

    event: ClassVar[Literal["renewed"]] = "renewed"

    rule: str
    library: Library
    process: Process
    cause: RenewedCause
    time_ns: int


#: A library came or went; also for `isinstance`.
LibraryEvent: TypeAlias = Load | Unload | Activate | Deactivate
#: What others than the engine find out, and have published among the rest; also for `isinstance`.
AddedEvent: TypeAlias = Http | Stale | Renewed
ControlEvent: TypeAlias = Ready | Lost | Repaired | Stopped
Event: TypeAlias = LibraryEvent | AddedEvent | ControlEvent


def size_of(event: Event) -> int:
    """About how many bytes an event takes that shares nothing with another one; for bounds of queues."""
    if isinstance(event, Load):  # first what comes most; a class by itself is asked for faster than a union of some
        library, ranges = event.library, event.ranges
    elif isinstance(event, Unload):
        library, ranges = event.library, ()
    elif isinstance(event, Activate):
        library, ranges = event.library, event.ranges
    elif isinstance(event, Deactivate):
        library, ranges = event.library, ()
    elif isinstance(event, Http):
        headers = [*(event.request_headers or {}).items(), *(event.response_headers or {}).items()]
        return 500 + len(event.authority or "") + len(event.path or "") + sum(200 + len(value) for _, value in headers)
    elif isinstance(event, Stale | Renewed):
        library, ranges = event.library, ()
    else:
        return 200
    return 200 + 128 * len(ranges) + len(library.path) + len(library.host_path or "")
