"""What sowatch reports: events and the records in them. Frozen values, no I/O.

`to_dict` gives the wire form of schema 1; its JSON Schema (``event.schema.json``)
describes the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from sowatch.model.encoding import dumps, exact
from sowatch.model.errors import LoadAttempt
from sowatch.model.identity import FileId, ProcessId

__all__ = [
    "EVENT_KINDS",
    "SCHEMA",
    "ControlEvent",
    "Event",
    "JsonLines",
    "Library",
    "LibraryEvent",
    "Lost",
    "Process",
    "Ready",
    "Repaired",
    "Stopped",
    "size_of",
    "to_dict",
    "to_json",
]

SCHEMA: Final = 1

#: The events about libraries; control events are always sent beside them.
EVENT_KINDS: Final = ("load", "unload", "activate", "deactivate")


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was when the event happened. What could not be read is ``None``.

    ``pid`` is the tgid in the initial pid namespace, ``ns_pid`` in its own. ``start_ns`` is in
    ns since boot: exact from the kernel, else rounded down to the 10 ms tick. ``exe`` is the
    path of the main executable as the process sees it, ``cgroup`` the path of its cgroup below
    the root of the hierarchy, ``container`` the id found in it.
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

    @property
    def id(self) -> ProcessId:
        """The identity, which survives a reuse of the pid."""
        return ProcessId(self.pid, self.start_ns)


@dataclass(frozen=True, slots=True)
class Library:
    """A mapped file. ``path`` is what the process sees, ``host_path`` opens it from the agent.

    ``kind`` is ``library``, ``executable``, ``interpreter`` or ``other``. ``deleted`` is the
    kernel's word that the name is gone (always true of a memfd, whose path is
    ``/memfd:NAME``). Bytes that are not UTF-8 stand in paths as surrogate escapes.
    """

    path: str
    id: FileId
    host_path: str | None = None
    kind: str = "library"
    build_id: str | None = None
    soname: str | None = None
    deleted: bool = False
    path_partial: bool = False
    #: The change time of the inode when it was mapped, 0 if unknown: not part of the event. On an overlay it
    #: distinguishes what was mapped from what has its place since.
    changed_ns: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class LibraryEvent:
    """A library came or went. ``event`` is one of `EVENT_KINDS`.

    ``cause`` of a load: ``mmap``, ``snapshot``, ``fork``, ``exec``, ``repair``; of an unload:
    ``munmap``, ``exec``, ``exit``, ``repair``, ``rules``; of a deactivate on stop: ``stop``.
    ``t_ns`` is the kernel's CLOCK_MONOTONIC of the fact, ``time_ns`` the wall clock in ns since
    the epoch. ``ranges`` are the executable address ranges known at that moment, as
    ``(start, end)``, and ``range_count`` is None: these are all. Of a file that has more than 256 in
    one process there are two, the first one and what spans the others, and ``range_count`` is how many
    there are, at the least. ``process`` of an activate is the one that came first; a deactivate has none.
    """

    event: str
    rule: str
    library: Library
    process: Process | None
    cause: str | None
    t_ns: int | None
    time_ns: int
    ranges: tuple[tuple[int, int], ...] = ()
    range_count: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """The start-up snapshot is complete; what follows is live."""

    time_ns: int
    host: str
    boot_id: str | None
    strategy: str
    guarantee: str
    hooks: str | None
    limits: tuple[str, ...]
    attempts: tuple[LoadAttempt, ...]
    processes: int
    mappings: int
    seconds: float
    event: str = "ready"


@dataclass(frozen=True, slots=True)
class Lost:
    """``count`` facts did not get through, in the ``kernel`` or in a ``queue`` of ours."""

    time_ns: int
    count: int
    where: str
    event: str = "lost"


@dataclass(frozen=True, slots=True)
class Repaired:
    """The map is right again; ``loads`` and ``unloads`` were found missing and were sent."""

    time_ns: int
    loads: int
    unloads: int
    seconds: float
    event: str = "repaired"


@dataclass(frozen=True, slots=True)
class Stopped:
    """The last event of a watch, with its totals."""

    time_ns: int
    loads: int
    unloads: int
    lost: int
    event: str = "stopped"


ControlEvent = Ready | Lost | Repaired | Stopped
Event = LibraryEvent | ControlEvent


def size_of(event: Event) -> int:
    """About how many bytes an event takes that shares nothing with another one; for bounds of queues."""
    if not isinstance(event, LibraryEvent):
        return 200
    library = event.library
    return 200 + 128 * len(event.ranges) + len(library.path) + len(library.host_path or "")


def to_dict(event: Event, seq: int) -> dict[str, Any]:
    """The event as the plain object that one line of ``--json`` holds; ``seq`` counts lines.

    Names that are not UTF-8 are in it as `sowatch.model.encoding` writes them.
    """
    found: dict[str, Any] = exact(_to_dict(event, seq))
    return found


def _to_dict(event: Event, seq: int) -> dict[str, Any]:
    head: dict[str, Any] = {"schema": SCHEMA, "event": event.event, "seq": seq, "time": _rfc3339(event.time_ns)}
    if isinstance(event, LibraryEvent):
        return _library_event(head, event)
    if isinstance(event, Ready):
        head |= {
            "host": event.host,
            "boot_id": event.boot_id,
            "strategy": event.strategy,
            "guarantee": event.guarantee,
            "hooks": event.hooks,
            "limits": list(event.limits),
            "attempts": [attempt._asdict() for attempt in event.attempts],
            "snapshot": {
                "processes": event.processes,
                "mappings": event.mappings,
                "seconds": round(event.seconds, 6),
            },
        }
    elif isinstance(event, Lost):
        head |= {"count": event.count, "where": event.where}
    elif isinstance(event, Repaired):
        head |= {"loads": event.loads, "unloads": event.unloads, "seconds": round(event.seconds, 6)}
    else:
        head |= {"loads": event.loads, "unloads": event.unloads, "lost": event.lost}
    return head


def to_json(event: Event, seq: int) -> str:
    """One line of ``--json``, without its newline: ASCII, control characters escaped, no lone surrogates."""
    return dumps(_to_dict(event, seq))


class JsonLines:
    """`to_json` for many events: what they share is encoded once. One thread uses it.

    Processes and libraries come again and again as the same objects, so their text is kept; so is
    the second of the time. A line equals `to_json`'s in all that a JSON reader sees.
    """

    __slots__ = ("_fragments", "_second", "_stamp")

    #: Kept objects and their text, some 500 bytes each.
    _MAX_KEPT: Final = 20_000

    def __init__(self) -> None:
        self._fragments: dict[int, tuple[object, str]] = {}
        self._second = -1
        self._stamp = ""

    def line(self, event: Event, seq: int) -> str:
        """One line, without its newline."""
        if not isinstance(event, LibraryEvent):
            return to_json(event, seq)
        seconds, rest = divmod(event.time_ns, 1_000_000_000)
        if seconds != self._second:
            self._second = seconds
            self._stamp = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}."
        kind = event.event
        t_ns = f'"t_ns":{"null" if event.t_ns is None else event.t_ns},' if kind in ("load", "unload") else ""
        cause = "" if event.cause is None else f'"cause":{self._text(event.cause)},'
        process = "" if event.process is None else f'"process":{self._kept(event.process, _process_text)},'
        ranges = ""
        if kind == "load":
            ranges = ',"ranges":[' + ",".join([f'["{start:x}","{end:x}"]' for start, end in event.ranges]) + "]"
            if event.range_count is not None:
                ranges += f',"range_count":{event.range_count}'
        line = (
            f'{{"schema":{SCHEMA},"event":"{kind}","seq":{seq},"time":"{self._stamp}{rest // 1000:06d}Z",'
            f'{t_ns}{cause}"rule":{self._text(event.rule)},{process}'
            f'"library":{self._kept(event.library, _library_text)}{ranges}}}'
        )
        # Names that are not UTF-8 need members of their own.
        return to_json(event, seq) if "\\ud" in line else line

    def _text(self, text: str) -> str:
        return self._kept(text, _quoted)

    def _kept(self, value: Any, encode: Callable[[Any], str]) -> str:
        # By identity: hashing a record costs more than encoding it. The entry keeps its object
        # alive, so the id cannot pass to another one.
        known = self._fragments.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        if len(self._fragments) >= self._MAX_KEPT:
            self._fragments.clear()
        text = encode(value)
        self._fragments[id(value)] = (value, text)
        return text


#: A string as JSON: ASCII, quoted; surrogates as \\udcXX, which `JsonLines.line` lets nobody see.
_quoted: Final = json.encoder.encode_basestring_ascii


def _or_null(value: str | int | None) -> str:
    return "null" if value is None else _quoted(value) if isinstance(value, str) else str(value)


def _process_text(process: Process) -> str:
    """`process_dict` as JSON; each process needs it once or twice, so it is written out."""
    return (
        f'{{"pid":{process.pid},"ns_pid":{_or_null(process.ns_pid)},"start_ns":{process.start_ns},'
        f'"ppid":{_or_null(process.ppid)},"comm":{_or_null(process.comm)},"exe":{_or_null(process.exe)},'
        f'"uid":{_or_null(process.uid)},"container":{_or_null(process.container)},'
        f'"cgroup":{_or_null(process.cgroup)}}}'
    )


def _library_text(library: Library) -> str:
    return json.dumps(library_dict(library), separators=(",", ":"))


def _library_event(head: dict[str, Any], event: LibraryEvent) -> dict[str, Any]:
    if event.event in ("load", "unload"):
        head["t_ns"] = event.t_ns
    if event.cause is not None:
        head["cause"] = event.cause
    head["rule"] = event.rule
    if event.process is not None:
        head["process"] = process_dict(event.process)
    head["library"] = library_dict(event.library)
    if event.event == "load":
        head["ranges"] = ranges_list(event.ranges)
        if event.range_count is not None:
            head["range_count"] = event.range_count
    return head


def process_dict(process: Process) -> dict[str, Any]:
    """The ``process`` object of schema 1."""
    return {
        "pid": process.pid,
        "ns_pid": process.ns_pid,
        "start_ns": process.start_ns,
        "ppid": process.ppid,
        "comm": process.comm,
        "exe": process.exe,
        "uid": process.uid,
        "container": process.container,
        "cgroup": process.cgroup,
    }


def library_dict(library: Library) -> dict[str, Any]:
    """The ``library`` object of schema 1."""
    found: dict[str, Any] = {
        "path": library.path,
        "host_path": library.host_path,
        "dev": library.id.dev,
        "inode": library.id.inode,
        "generation": library.id.generation,
        "subvol": library.id.subvolume,
        "kind": library.kind,
        "build_id": library.build_id,
        "soname": library.soname,
        "deleted": library.deleted,
    }
    if library.path_partial:
        found["path_partial"] = True
    return found


def ranges_list(ranges: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Address ranges as pairs of hexadecimal strings."""
    return [[f"{start:x}", f"{end:x}"] for start, end in ranges]


def _rfc3339(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    stamp = datetime.fromtimestamp(seconds, UTC)
    return f"{stamp:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"
