"""Schema 1: the lines of ``--json`` as they are written. ``event.schema.json`` is made of these types.

The order of fields is the order in a line. Fields are only ever added, with ``UNSET`` as their default: such a field is
left out of a line where it says nothing. A docstring is the description in the schema.

`sowatch.model.encoding.dumps` writes any of them; `sowatch.model.events` makes them of events, and events of them.
`tools/event_schema.py` makes the schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.literals import (
    DeactivateCause,
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

__all__ = ["DEPRECATED", "SCHEMA", "Line"]

SCHEMA: Final = 1


def _name(description: str | None = None, **limits: Any) -> Meta:
    """Of a string that others chose: bytes that are not UTF-8 stand beside it, see `sowatch.model.encoding`."""
    return Meta(description=description, extra_json_schema={"x-bytes": True}, **limits)


#: Of a member that is kept for schema 1, as its name has another type elsewhere; its description names the other one.
DEPRECATED: Final = {"deprecated": True}

Schema: TypeAlias = Literal[1]
Natural: TypeAlias = Annotated[int, Meta(ge=0)]
Pid: TypeAlias = Annotated[int, Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Name: TypeAlias = Annotated[str, _name()]
Seq: TypeAlias = Annotated[int, Meta(ge=0, description="Counts the lines of this output; the command starts with 1.")]
Time: TypeAlias = Annotated[
    str,
    Meta(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z$", description="RFC 3339, UTC, microseconds."),
]
KernelTime: TypeAlias = Annotated[
    Natural | None,
    Meta(description="The kernel's CLOCK_MONOTONIC of the fact itself; null where only a scan found it."),
]
Address: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]+$")]
HostId: TypeAlias = Annotated[
    str | None,
    Meta(description="The id of machine-id(5); null where there is none that this user may read."),
]
Version: TypeAlias = Annotated[str | None, Meta(description="Of sowatch.")]
Ranges: TypeAlias = Annotated[
    list[Annotated[list[Address], Meta(min_length=2, max_length=2)]],
    Meta(description="Executable address ranges, each as first address and first address after it, in hexadecimal."),
]
RangeCount: TypeAlias = Annotated[
    int,
    Meta(
        ge=257,
        description="Only where a process has more than 256 executable ranges of the file: how many, at the least. "
        "`ranges` are two then: the first one, and what spans the others.",
    ),
]
RuleName: TypeAlias = Annotated[
    str, _name("The name of the rule that wanted the file: its pattern, or `all`.", min_length=1)
]


class Pod(Struct, frozen=True, gc=False):
    """The pod of Kubernetes that the process runs in.

    Names are null unless the socket of the container runtime is given, and it has answered.
    """

    pod_uid: Annotated[str, Meta(min_length=1)]
    name: Name | None
    namespace: Name | None
    container_name: Annotated[
        Name | None,
        Meta(description="The name that the pod gives the container whose id is `container` of the process."),
    ]


class Process(Struct, frozen=True, gc=False):
    """The process as it was then. What could not be read is null."""

    pid: Annotated[int, Meta(ge=1, description="The tgid in the initial pid namespace.")]
    ns_pid: Annotated[Pid | None, Meta(description="The tgid in the process's own pid namespace.")]
    start_ns: Annotated[
        int, Meta(ge=0, description="Start in ns since boot; exact from the kernel, else rounded down to 10 ms.")
    ]
    ppid: Natural | None
    comm: Name | None
    exe: Annotated[Name | None, Meta(description="The main executable as the process sees it.")]
    uid: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)] | None
    container: Annotated[Name | None, Meta(description="The container's id, null outside containers.")]
    cgroup: Name | None
    pod: Pod | UnsetType = UNSET


class Library(Struct, frozen=True, gc=False):
    """A mapped file. (dev, inode, generation, subvol) is its identity: the real inode, below any overlay."""

    path: Annotated[Name, Meta(description="As the process sees it; a memfd is /memfd:NAME.")]
    host_path: Annotated[Name | None, Meta(description="A path that opens the same file from where sowatch runs.")]
    dev: Annotated[str, Meta(pattern=r"^\d+:\d+$", description="major:minor of the device.")]
    inode: Natural
    generation: Natural
    subvol: Annotated[int, Meta(ge=0, description="The btrfs subvolume, 0 elsewhere.")]
    kind: Kind
    build_id: Annotated[str, Meta(pattern="^[0-9a-f]+$")] | None
    soname: Name | None
    deleted: Annotated[bool, Meta(description="The kernel says the name is gone; always true of a memfd.")]
    path_partial: (
        Annotated[
            bool,
            Meta(
                description="Only there, and true, where a very deep path could not be completed.",
                extra_json_schema={"const": True},
            ),
        ]
        | UnsetType
    ) = UNSET


class Load(Struct, frozen=True, gc=False):
    """The process has mapped the file executable."""

    schema: Schema
    event: Literal["load"]
    seq: Seq
    time: Time
    t_ns: KernelTime
    cause: LoadCause
    rule: RuleName
    process: Process
    library: Library
    ranges: Ranges
    range_count: RangeCount | UnsetType = UNSET


class Unload(Struct, frozen=True, gc=False):
    """The process's last executable mapping of the file is gone."""

    schema: Schema
    event: Literal["unload"]
    seq: Seq
    time: Time
    t_ns: KernelTime
    cause: UnloadCause
    rule: RuleName
    process: Process
    library: Library


class Activate(Struct, frozen=True, gc=False, kw_only=True):
    """The first process mapped a file of this rule; comes before its load."""

    schema: Schema
    event: Literal["activate"]
    seq: Seq
    time: Time
    cause: LoadCause | UnsetType = UNSET
    rule: RuleName
    process: Process
    library: Library


class Deactivate(Struct, frozen=True, gc=False, kw_only=True):
    """The last process that mapped a file of this rule is gone; comes after its unload."""

    schema: Schema
    event: Literal["deactivate"]
    seq: Seq
    time: Time
    cause: DeactivateCause | UnsetType = UNSET
    rule: RuleName
    library: Library


class Attempt(Struct, frozen=True, gc=False):
    """One strategy that was tried."""

    strategy: str
    ok: bool
    error: Name | None


class Snapshot(Struct, frozen=True, gc=False):
    """What was mapped when the watch began."""

    processes: Annotated[Natural, Meta(description="Use process_count.", extra_json_schema=DEPRECATED)]
    mappings: Annotated[Natural, Meta(description="Use mapping_count.", extra_json_schema=DEPRECATED)]
    seconds: Seconds
    process_count: Natural | UnsetType = UNSET
    mapping_count: Natural | UnsetType = UNSET


class Ready(Struct, frozen=True, gc=False):
    """The snapshot is complete; what follows is live."""

    schema: Schema
    event: Literal["ready"]
    seq: Seq
    time: Time
    host: Name
    boot_id: str | None
    strategy: Strategy
    guarantee: Annotated[
        str, Meta(min_length=1, description="What the strategy promises: `exact`, or what it falls short of.")
    ]
    hooks: Annotated[str | None, Meta(description="The hook set in use, null without kernel programs.")]
    limits: Annotated[list[Name], Meta(description="What is not seen as events, in words.")]
    attempts: Annotated[list[Attempt], Meta(description="Every strategy that was tried, in order.")]
    snapshot: Snapshot
    host_id: HostId | UnsetType = UNSET
    version: Version | UnsetType = UNSET


class AskedAgent(Struct, frozen=True, gc=False):
    """The agent that answered."""

    socket: Name
    version: str | None


class Head(Struct, frozen=True, gc=False, kw_only=True):
    """The first line of `list --json`, and of each file of a file sink: whose lines follow.

    What stands behind `version` is in that of `list` only.
    """

    schema: Schema
    event: Literal["head"]
    seq: Seq
    time: Annotated[Time, Meta(description="Of a list: when the host was scanned, or the agent answered.")]
    host: Name
    host_id: HostId
    boot_id: str | None
    version: Version
    source: (
        Annotated[
            Literal["scan", "watch", "agent"],
            Meta(
                description="`scan`: one scan without hooks, each process was read at one moment; `watch`: a watch "
                "that was started for this; `agent`: an agent that watches all the time, by its own rules."
            ),
        ]
        | UnsetType
    ) = UNSET
    strategy: Strategy | UnsetType = UNSET
    guarantee: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    hooks: str | UnsetType | None = UNSET
    limits: list[Name] | UnsetType = UNSET
    seconds: Annotated[float, Meta(ge=0, description="How long the scan took.")] | UnsetType = UNSET
    agent: AskedAgent | UnsetType = UNSET
    rule_names: Annotated[list[RuleName], Meta(description="The rules of the agent.")] | UnsetType = UNSET


class Lost(Struct, frozen=True, gc=False):
    """Facts did not get through; a repair follows."""

    schema: Schema
    event: Literal["lost"]
    seq: Seq
    time: Time
    count: Annotated[int, Meta(ge=1)]
    where: LossPlace
    what: Annotated[str, Meta(description="Of `trace`: calls, records or stacks.")] | UnsetType = UNSET


class Repaired(Struct, frozen=True, gc=False):
    """The map is right again; what was missing has been sent."""

    schema: Schema
    event: Literal["repaired"]
    seq: Seq
    time: Time
    loads: Natural
    unloads: Natural
    seconds: Seconds


class Stopped(Struct, frozen=True, gc=False):
    """The last line, with the totals."""

    schema: Schema
    event: Literal["stopped"]
    seq: Seq
    time: Time
    loads: Natural
    unloads: Natural
    lost: Natural


class Peer(Struct, frozen=True, gc=False):
    """The other end of a socket."""

    address: str
    port: Natural


Headers: TypeAlias = Annotated[
    dict[str, str],
    Meta(
        description="The header fields that were named and are there, in lower case; left out where none was named. "
        "`<unknown>`: it may have been sent before the watch."
    ),
]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0)]


class Http(Struct, frozen=True, gc=False):
    """A request and its response that passed a TLS library in the clear. What is not known is null."""

    schema: Schema
    event: Literal["http"]
    seq: Seq
    time: Annotated[Time, Meta(description="When the request began, or the first that is known of it.")]
    side: Annotated[HttpSide, Meta(description="`client`: the process made the request; `server`: it served it.")]
    protocol: HttpProtocol
    method: Annotated[Name | None, Meta(description="`<unknown>`: an HTTP/2 field that was sent before the watch.")]
    scheme: Literal["https"]
    authority: Name | None
    path: Annotated[Name | None, Meta(description="Without what stands behind `?`, unless that was asked for.")]
    status: Natural | None
    grpc_status: Natural | None
    request_bytes: Annotated[int, Meta(ge=0, description="Of the body.")]
    response_bytes: Annotated[int, Meta(ge=0, description="Of the body.")]
    ttfb_ms: Annotated[Milliseconds | None, Meta(description="Up to the first byte of the response.")]
    duration_ms: Annotated[Milliseconds | None, Meta(description="Up to the last byte of the response.")]
    complete: Annotated[bool, Meta(description="Its end was seen.")]
    peer: Annotated[Peer | None, Meta(description="Null: the socket was never seen. Never guessed.")]
    local_port: Natural | None
    process: Process
    library: Library | None
    request_headers: Headers | UnsetType = UNSET
    response_headers: Headers | UnsetType = UNSET


class Package(Struct, frozen=True, gc=False):
    """The package of a mapped file, as it was when the file was mapped."""

    name: Name
    version: Name
    source: Annotated[Name | None, Meta(description="The source package.")]
    purl: Name
    identified_by: Annotated[
        str, Meta(description="`note` in the file, a package manager, or metadata beside the file.")
    ]


class Mapping(Struct, frozen=True, gc=False):
    """A line of `list`: this process has this file mapped now."""

    schema: Schema
    event: Literal["mapping"]
    seq: Seq
    rule: RuleName
    process: Process
    library: Library
    ranges: Ranges
    stale: Annotated[
        Staleness | None,
        Meta(
            description="`deleted`: the path names nothing any more; `replaced`: it names another file now; "
            "`modified`: it is the same file, written to since; `unknown`: that cannot be determined, `stale_reason` "
            "says why; null: neither, or it never was a file on disk."
        ),
    ]
    stale_reason: (
        Annotated[
            str | None,
            Meta(
                description="Why that cannot be determined, or what of its name decided; null where there is nothing "
                "to say."
            ),
        ]
        | UnsetType
    ) = UNSET
    stale_path: (
        Annotated[
            Name,
            Meta(
                description="Only where a file is stale under another name than its own, such as that without "
                "`.dpkg-new`."
            ),
        ]
        | UnsetType
    ) = UNSET
    range_count: RangeCount | UnsetType = UNSET
    package: (
        Annotated[
            Name | None,
            Meta(
                description="With --stale: the package that owns the path inside the process's own root, as its "
                "package manager names it."
            ),
        ]
        | UnsetType
    ) = UNSET
    unit: (
        Annotated[
            Name | None,
            Meta(description="With --stale: the systemd unit the process runs in; of a container one inside it."),
        ]
        | UnsetType
    ) = UNSET
    unit_manager: (
        Annotated[
            Name | None,
            Meta(
                description="With --stale: the unit that runs the service manager which has that unit, such as "
                "user@1000.service; null for the system's own manager, and for that of a container."
            ),
        ]
        | UnsetType
    ) = UNSET
    unit_uid: (
        Annotated[
            Natural | None,
            Meta(description="With --stale: the user whose service manager has that unit; null for any other manager."),
        ]
        | UnsetType
    ) = UNSET
    same_build: (
        Annotated[
            bool,
            Meta(
                description="Only where `stale` is `replaced` and it is known: the file on disk has the same build id."
            ),
        ]
        | UnsetType
    ) = UNSET
    restart: (
        Annotated[
            Name | None,
            Meta(
                description="With --stale: the command, for a shell of root, that restarts the unit or container of "
                "the process; null where there is none."
            ),
        ]
        | UnsetType
    ) = UNSET
    restart_advice: (
        Annotated[Name | None, Meta(description="With --stale: what to do where there is no such command, else null.")]
        | UnsetType
    ) = UNSET
    mapped_package: (
        Annotated[Package | None, Meta(description="Of the agent: the package that a stale file was of.")] | UnsetType
    ) = UNSET
    listen: (
        Annotated[
            list[str] | None, Meta(description="Of the agent, of a process with stale files; null: it is not known.")
        ]
        | UnsetType
    ) = UNSET


class LibraryRow(Struct, frozen=True, gc=False):
    """A line of `top --json`: this file is mapped by these processes now."""

    schema: Schema
    event: Literal["library"]
    seq: Seq
    library: Library
    pids: list[Pid]
    containers: list[Name]
    stale: Annotated[Staleness | None, Meta(description="The worst of them; as in `mapping`.")]
    stale_reason: Annotated[str | None, Meta(description="As in `mapping`.")] | UnsetType = UNSET


class ProcessRow(Struct, frozen=True, gc=False):
    """A line of `top --json --by process`: this process has so many files mapped now."""

    schema: Schema
    event: Literal["process"]
    seq: Seq
    process: Process
    libraries: Annotated[Natural, Meta(description="Use library_count.", extra_json_schema=DEPRECATED)]
    stale_libraries: Natural
    unknown_libraries: (
        Annotated[int, Meta(ge=0, description="Of how many it cannot be determined whether they are stale.")]
        | UnsetType
    ) = UNSET
    library_count: Natural | UnsetType = UNSET


class Readable(Struct, frozen=True, gc=False):
    """How many processes could be read."""

    read: Natural
    unreadable: Annotated[
        int, Meta(ge=0, description="There, and not to be read by this user. Kernel threads do not count.")
    ]
    hidden: Annotated[
        bool, Meta(description="/proc hides processes of other users (hidepid), and nobody knows how many.")
    ]


class Coverage(Struct, frozen=True, gc=False):
    """The last line of `list`, only where processes could not be read: what they have mapped is not listed."""

    schema: Schema
    event: Literal["coverage"]
    seq: Seq
    processes: Annotated[Readable, Meta(description="Use readable.", extra_json_schema=DEPRECATED)]
    readable: Readable | UnsetType = UNSET
    unreadable_processes: Annotated[
        list[Process] | UnsetType, Meta(description="Of the agent: who they are; the first thousand that are known.")
    ] = UNSET


class Stale(Struct, frozen=True, gc=False):
    """Of the agent: the file that the process has mapped is no longer the one on disk."""

    schema: Schema
    event: Literal["stale"]
    seq: Seq
    time: Time
    staleness: Staleness
    reason: Annotated[str | None, Meta(description="Where the name of the file decided.")]
    rule: RuleName
    process: Process
    library: Library


class Renewed(Struct, frozen=True, gc=False):
    """Of the agent: the process no longer has that stale file mapped."""

    schema: Schema
    event: Literal["renewed"]
    seq: Seq
    time: Time
    cause: Annotated[
        RenewedCause,
        Meta(
            description="`unmapped`: the process ended, or has the file no more, or no rule wants it any more; "
            "`restored`: it is back under its name."
        ),
    ]
    rule: RuleName
    process: Process
    library: Library


#: The lines that are events, and all of them. The schema has them in this order, and what is new at the end.
WatchLine: TypeAlias = Load | Unload | Activate | Deactivate | Ready | Lost | Repaired | Stopped
EventLine: TypeAlias = WatchLine | Http | Stale | Renewed | Head
Line: TypeAlias = WatchLine | Mapping | LibraryRow | ProcessRow | Coverage | Http | Stale | Renewed | Head
