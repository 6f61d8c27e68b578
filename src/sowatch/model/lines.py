"""Lines of schema 1: events written as JSON, and read back.

Bytes that are not UTF-8 and what is not ASCII take a path of their own, see `sowatch.model.encoding`.
"""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast, get_args

import msgspec
from msgspec import UNSET, Struct

from sowatch.model import wire
from sowatch.model.encoding import dumps, exact, restore
from sowatch.model.errors import DecodeError, LoadAttempt
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Head,
    Http,
    Library,
    Load,
    Lost,
    Origin,
    Pod,
    Process,
    Ready,
    Renewed,
    Repaired,
    Stale,
    Stopped,
    Unload,
)
from sowatch.model.identity import FileId
from sowatch.model.literals import Hooks
from sowatch.model.wire import SCHEMA

__all__ = [
    "SCHEMA",
    "decode",
    "decode_as",
    "head_line",
    "library_dict",
    "library_from",
    "library_line",
    "line_of",
    "process_dict",
    "process_from",
    "process_line",
    "ranges_from",
    "ranges_list",
    "stamp",
    "time_ns_from",
    "to_dict",
    "to_json",
]


def to_json(event: Event | Head, seq: int = 0) -> str:
    """One line of ``--json``, without its newline: ASCII, control characters escaped, no lone surrogates.

    Args:
        event: any event.
        seq: counts the lines of one output.
    """
    return dumps(line_of(event, seq))


def to_dict(event: Event | Head, seq: int) -> dict[str, Any]:
    """The same as the plain object that such a line holds.

    Names that are not UTF-8 are in it as `sowatch.model.encoding` writes them.
    """
    found: dict[str, Any] = exact(line_of(event, seq))
    return found


def line_of(event: Event | Head, seq: int) -> wire.EventLine:
    """The same as a value, to write many together: see `sowatch.model.encoding.dumps_lines`."""
    time = stamp(event.time_ns)
    match event:
        case Load():
            count = UNSET if event.range_count is None else event.range_count
            process, library = process_line(event.process), library_line(event.library)
            ranges = ranges_list(event.ranges)
            return wire.Load(
                SCHEMA, "load", seq, time, event.t_ns, event.cause, event.rule, process, library, ranges, count
            )
        case Unload():
            process, library = process_line(event.process), library_line(event.library)
            return wire.Unload(SCHEMA, "unload", seq, time, event.t_ns, event.cause, event.rule, process, library)
        case Activate():
            return wire.Activate(
                schema=SCHEMA,
                event="activate",
                seq=seq,
                time=time,
                cause=event.cause or UNSET,
                rule=event.rule,
                process=process_line(event.process),
                library=library_line(event.library),
            )
        case Deactivate():
            return wire.Deactivate(
                schema=SCHEMA,
                event="deactivate",
                seq=seq,
                time=time,
                cause=event.cause or UNSET,
                rule=event.rule,
                library=library_line(event.library),
            )
        case Http():
            return wire.Http(
                schema=SCHEMA,
                event="http",
                seq=seq,
                time=time,
                side=event.side,
                protocol=event.protocol,
                method=event.method,
                scheme="https",
                authority=event.authority,
                path=event.path,
                status=event.status,
                grpc_status=event.grpc_status,
                request_bytes=event.request_bytes,
                response_bytes=event.response_bytes,
                ttfb_ms=None if event.ttfb_ns is None else event.ttfb_ns / 1e6,
                duration_ms=None if event.duration_ns is None else event.duration_ns / 1e6,
                complete=event.is_complete,
                peer=None if event.peer is None else wire.Peer(*event.peer),
                local_port=event.local_port,
                process=process_line(event.process),
                library=None if event.library is None else library_line(event.library),
                request_headers=UNSET if event.request_headers is None else event.request_headers,
                response_headers=UNSET if event.response_headers is None else event.response_headers,
            )
        case Stale() | Renewed():
            return _staleness_line(event, seq, time)
        case Ready():
            return wire.Ready(
                schema=SCHEMA,
                event="ready",
                seq=seq,
                time=time,
                host=event.host,
                boot_id=event.boot_id,
                strategy=event.strategy,
                guarantee=event.guarantee,
                hooks=event.hooks,
                limits=list(event.limits),
                attempts=[wire.Attempt(*attempt) for attempt in event.attempts],
                snapshot=wire.Snapshot(
                    event.processes, event.mappings, round(event.seconds, 6), event.processes, event.mappings
                ),
                host_id=event.host_id,
                version=event.version,
            )
        case Head():
            return head_line(event.origin, event.time_ns, seq)
        case Lost():
            return wire.Lost(SCHEMA, "lost", seq, time, event.count, event.where)
        case Repaired():
            seconds = round(event.seconds, 6)
            return wire.Repaired(SCHEMA, "repaired", seq, time, event.loads, event.unloads, seconds)
        case Stopped():
            return wire.Stopped(SCHEMA, "stopped", seq, time, event.loads, event.unloads, event.lost)


def head_line(origin: Origin, time_ns: int, seq: int) -> wire.Head:
    """The first line of a file of events."""
    return wire.Head(
        schema=SCHEMA,
        event="head",
        seq=seq,
        time=stamp(time_ns),
        host=origin.host,
        host_id=origin.host_id,
        boot_id=origin.boot_id,
        version=origin.version,
    )


def _staleness_line(event: Stale | Renewed, seq: int, time: str) -> wire.Stale | wire.Renewed:
    process, library = process_line(event.process), library_line(event.library)
    if isinstance(event, Renewed):
        return wire.Renewed(SCHEMA, "renewed", seq, time, event.cause, event.rule, process, library)
    return wire.Stale(SCHEMA, "stale", seq, time, event.staleness, event.reason, event.rule, process, library)


#: The process that was written last, and its object: an activation, a load and an unload often have the same one.
_last_process: tuple[Process | None, wire.Process | None] = (None, None)
#: Objects of libraries by id, beside the library itself: all processes that have a file share its `Library`.
_libraries: Final[dict[int, tuple[Library, wire.Library]]] = {}
_MAX_LIBRARIES: Final = 256


def process_line(process: Process) -> wire.Process:
    """The ``process`` object of schema 1."""
    global _last_process  # noqa: PLW0603  (one tuple, so that any thread sees a whole one)
    known, line = _last_process
    if known is not process or line is None:
        line = _process_line(process)
        _last_process = (process, line)
    return line


def _process_line(process: Process) -> wire.Process:
    pod = process.pod
    return wire.Process(
        process.pid,
        process.ns_pid,
        process.start_ns,
        process.ppid,
        process.comm,
        process.exe,
        process.uid,
        process.container,
        process.cgroup,
        UNSET if pod is None else wire.Pod(pod.uid, pod.name, pod.namespace, pod.container),
    )


def library_line(library: Library) -> wire.Library:
    """The ``library`` object of schema 1."""
    known = _libraries.get(id(library))
    if known is not None and known[0] is library:
        return known[1]
    line = _library_line(library)
    if len(_libraries) >= _MAX_LIBRARIES:
        _libraries.clear()
    _libraries[id(library)] = (library, line)
    return line


def _library_line(library: Library) -> wire.Library:
    file = library.id
    return wire.Library(
        library.path,
        library.host_path,
        f"{file.major}:{file.minor}",
        file.inode,
        file.generation,
        file.subvolume,
        library.kind,
        library.build_id,
        library.soname,
        library.deleted,
        library.path_partial or UNSET,
    )


def process_dict(process: Process) -> dict[str, Any]:
    """The same as a plain object."""
    found: dict[str, Any] = msgspec.to_builtins(process_line(process))
    return found


def library_dict(library: Library) -> dict[str, Any]:
    """The same as a plain object."""
    found: dict[str, Any] = msgspec.to_builtins(library_line(library))
    return found


def ranges_list(ranges: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Address ranges as pairs of hexadecimal strings."""
    return [[f"{start:x}", f"{end:x}"] for start, end in ranges]


#: The second that was written last, and how: most events share theirs with the one before.
_last_second: tuple[int, str] = (-1, "")


def stamp(time_ns: int) -> str:
    """Wall-clock time in ns since the epoch as RFC 3339, UTC, cut to microseconds."""
    global _last_second  # noqa: PLW0603  (one tuple, so that any thread sees a whole one)
    seconds, rest = divmod(time_ns, 1_000_000_000)
    known, text = _last_second
    if known != seconds:
        text = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}."
        _last_second = (seconds, text)
    return f"{text}{rest // 1000:06d}Z"


class _Head(Struct):
    event: str


_DECODE_HEAD: Final = msgspec.json.Decoder(_Head).decode
_LINES: Final[dict[str, type[wire.EventLine]]] = {kind.__name__.lower(): kind for kind in get_args(wire.EventLine)}
_DECODERS: Final[dict[type[Struct], Callable[[str | bytes], Any]]] = {}
_T = TypeVar("_T", bound=Struct)


def decode(line: str | bytes) -> Event | Head:
    r"""The event in one line of ``sowatch watch --json``, of ``/events`` or of a file sink.

    What is not on the wire is at its default: ``time_ns`` is cut to microseconds, ``changed_ns`` of a library is 0,
    an `Activate` has no ranges. Members that this version does not know are left out, names that are not UTF-8 are
    surrogate escapes again, as `os.fsencode` takes them. Any thread.

    Raises:
        DecodeError: this is no such line, or of a later version in a member that this one knows.

    >>> decode('{"schema":1,"event":"lost","seq":7,"time":"2023-11-14T22:13:20.000000Z","count":2,"where":"queue"}')
    Lost(time_ns=1700000000000000000, count=2, where='queue')
    """
    try:
        kind = _DECODE_HEAD(line).event
        if kind not in _LINES:
            raise DecodeError(f"a line of the kind {kind!r} is no event")
        return _event(decode_as(line, _LINES[kind]))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error


def decode_as(line: str | bytes, kind: type[_T]) -> _T:
    """A line of schema 1 as it stands on the wire, where its type is known.

    Raises:
        msgspec.MsgspecError: it is none.
        ValueError: it is no JSON, or its bytes are no base64.
    """
    if (b'_bytes":' if isinstance(line, bytes) else '_bytes":') in line:  # type: ignore[operator]
        return msgspec.convert(restore(json.loads(line)), kind)
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind).decode
    found: _T = decoder(line)
    return found


def _event(line: wire.EventLine) -> Event | Head:
    time_ns = time_ns_from(line.time)
    match line:
        case wire.Load():
            where = ranges_from(line.ranges)
            count = None if line.range_count is UNSET else line.range_count
            process, library = process_from(line.process), library_from(line.library)
            return Load(line.rule, library, process, line.cause, line.t_ns, time_ns, where, count)
        case wire.Unload():
            process, library = process_from(line.process), library_from(line.library)
            return Unload(line.rule, library, process, line.cause, line.t_ns, time_ns)
        case wire.Activate():
            cause = None if line.cause is UNSET else line.cause
            return Activate(line.rule, library_from(line.library), process_from(line.process), cause, None, time_ns)
        case wire.Deactivate():
            why = None if line.cause is UNSET else line.cause
            return Deactivate(line.rule, library_from(line.library), why, None, time_ns)
        case wire.Http():
            return Http(
                time_ns,
                process_from(line.process),
                None if line.library is None else library_from(line.library),
                line.side,
                line.protocol,
                line.method,
                line.authority,
                line.path,
                line.status,
                line.grpc_status,
                line.request_bytes,
                line.response_bytes,
                None if line.ttfb_ms is None else round(line.ttfb_ms * 1e6),
                None if line.duration_ms is None else round(line.duration_ms * 1e6),
                line.complete,
                None if line.peer is None else (line.peer.address, line.peer.port),
                line.local_port,
                None if line.request_headers is UNSET else line.request_headers,
                None if line.response_headers is UNSET else line.response_headers,
            )
        case wire.Stale() | wire.Renewed():
            return _staleness_event(line, time_ns)
        case wire.Ready():
            return Ready(
                time_ns,
                line.host,
                line.boot_id,
                line.strategy,
                line.guarantee,
                cast("Hooks | None", line.hooks),  # a later version may have others
                tuple(line.limits),
                tuple(LoadAttempt(one.strategy, one.ok, one.error) for one in line.attempts),
                line.snapshot.processes,
                line.snapshot.mappings,
                line.snapshot.seconds,
                None if line.host_id is UNSET else line.host_id,
                None if line.version is UNSET else line.version,
            )
        case wire.Head():
            return Head(time_ns, Origin(line.host, line.host_id, line.boot_id, line.version))
        case wire.Lost():
            return Lost(time_ns, line.count, line.where)
        case wire.Repaired():
            return Repaired(time_ns, line.loads, line.unloads, line.seconds)
        case wire.Stopped():
            return Stopped(time_ns, line.loads, line.unloads, line.lost)


def _staleness_event(line: wire.Stale | wire.Renewed, time_ns: int) -> Stale | Renewed:
    process, library = process_from(line.process), library_from(line.library)
    if isinstance(line, wire.Renewed):
        return Renewed(line.rule, library, process, line.cause, time_ns)
    return Stale(line.rule, library, process, line.staleness, line.reason, time_ns)


def process_from(line: wire.Process) -> Process:
    """The process of a line that was read."""
    pod = line.pod
    return Process(
        line.pid,
        line.start_ns,
        line.ns_pid,
        line.ppid,
        line.comm,
        line.exe,
        line.uid,
        line.container,
        line.cgroup,
        None if pod is UNSET else Pod(pod.pod_uid, pod.name, pod.namespace, pod.container_name),
    )


def library_from(line: wire.Library) -> Library:
    """The library of a line that was read."""
    major, minor = line.dev.split(":")
    return Library(
        line.path,
        FileId(int(major), int(minor), line.inode, line.generation, line.subvol),
        line.host_path,
        line.kind,
        line.build_id,
        line.soname,
        line.deleted,
        line.path_partial is True,
    )


def ranges_from(found: Sequence[Sequence[str]]) -> tuple[tuple[int, int], ...]:
    """Address ranges of pairs of hexadecimal strings."""
    return tuple((int(start, 16), int(end, 16)) for start, end in found)


def time_ns_from(text: str) -> int:
    """Wall-clock time in ns since the epoch of what `stamp` has written."""
    moment = datetime.fromisoformat(text)
    return (calendar.timegm(moment.utctimetuple()) * 1_000_000 + moment.microsecond) * 1_000
