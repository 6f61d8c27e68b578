"""Schema 1: the lines of ``trace --json``, and the figures of ``http --json``, as `sowatch.model.wire` has events."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.literals import HttpSide
from sowatch.model.wire import KernelTime, Library, Name, Natural, Pid, Process, Schema, Seq, Time
from sowatch.model.wire_explain import TlsState

__all__ = ["TraceLine"]


class Latency(Struct, frozen=True, gc=False):
    """Of the calls that returned, in ns; ``buckets`` are upper bounds with how many are below."""

    count: Natural
    sum: Natural
    p50: float | None
    p99: float | None
    buckets: list[Annotated[list[Natural], Meta(min_length=2, max_length=2)]]


class Trace(Struct, frozen=True, gc=False):
    """Calls of a function by a process so far."""

    schema: Schema
    event: Literal["trace"]
    time: Time
    symbol: Name
    library: Library
    process: Process
    calls: Natural
    latency_ns: Latency
    final: bool
    seq: Seq


class Call(Struct, frozen=True, gc=False):
    """One call, with its arguments where a format was given."""

    schema: Schema
    event: Literal["call"]
    time: Time
    symbol: Name
    library: Library
    process: Process
    tid: Pid
    t_ns: KernelTime
    arguments: list[Any] | None
    result: Any
    returned: bool
    duration_ns: Natural | None
    seq: Seq


class Frame(Struct, frozen=True, gc=False):
    """One caller."""

    address: str | None
    path: Name | None
    build_id: str | None
    offset: Natural | None
    symbol: Name | None
    inside: Natural | None


class Stack(Struct, frozen=True, gc=False):
    """Callers of a function, innermost first, and how many calls came that way."""

    schema: Schema
    event: Literal["stack"]
    time: Time
    symbol: Name
    library: Library
    calls: Natural
    frames: list[Frame]
    seq: Seq


class AttachFailed(Struct, frozen=True, gc=False):
    """A function that could not be probed."""

    schema: Schema
    event: Literal["attach_failed"]
    time: Time
    library: Library
    symbol: Name
    reason: Name
    permanent: bool
    seq: Seq


class Function(Struct, frozen=True, gc=False):
    """A function that could be probed, of `trace --list`."""

    schema: Schema
    event: Literal["function"]
    symbol: Name
    offset: Natural
    size: Natural
    library: Library
    seq: Seq


class HttpEndpoint(Struct, frozen=True, gc=False):
    """The requests of `http --summary` to one endpoint."""

    schema: Schema
    event: Literal["http_endpoint"]
    side: HttpSide
    authority: Name | None
    method: Name | None
    path: Name
    status_class: Natural | None
    flows: Annotated[Natural, Meta(description="Use flow_count.", extra_json_schema={"deprecated": True})]
    incomplete: Natural
    request_bytes: Natural
    response_bytes: Natural
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    flow_count: Natural
    seq: Seq


class TlsOf(Struct, frozen=True, gc=False):
    """Why the process has no HTTP flows, as of `tls`."""

    pid: Pid
    state: TlsState
    reason: Name | None


class HttpStats(Struct, frozen=True, gc=False):
    """The last line of `http`: what is not known. The counters stand beside `counters`, too, as they always have."""

    schema: Schema
    event: Literal["http_stats"]
    seq: Seq
    counters: dict[str, Natural]
    without_flows: Annotated[list[TlsOf], Meta(description="The processes of --pid that have none.")] | UnsetType = (
        UNSET
    )


#: The lines, in the order in which the schema has them.
TraceLine: TypeAlias = Trace | Call | Stack | AttachFailed | Function | HttpEndpoint | HttpStats
