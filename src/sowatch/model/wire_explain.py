"""Schema 1: the object of ``explain --json`` and of the agent's ``GET /explain``, as `sowatch.model.wire` has lines.

The texts of ``why``, ``untold`` and the like are fixed words, for programs; the command line has the sentences.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.literals import Kind, LoadCause, Staleness
from sowatch.model.wire import (
    DEPRECATED,
    Address,
    KernelTime,
    Library,
    Name,
    Natural,
    Pid,
    Process,
    RangeCount,
    Ranges,
    RuleName,
    Schema,
    Seq,
    Time,
)

__all__ = [
    "Attachment",
    "Blocked",
    "By",
    "Difference",
    "ElfState",
    "FileLook",
    "IdSource",
    "MappedIn",
    "MappingReport",
    "NotReportedReason",
    "PathReport",
    "ProcessReport",
    "Relation",
    "RuleAnswer",
    "RuleReport",
    "Seen",
    "Tls",
    "TlsState",
    "Unprobed",
    "VerdictAnswer",
    "Why",
]

#: Why a rule does not want a file; ``earlier_rule``: it would, but the first that does wins; ``exports_given_up``: some
#: were not found, and the search was given up because the file contradicts itself or passes the limit of work.
Why: TypeAlias = Literal["pattern", "kind", "exports", "exports_unknown", "exports_given_up", "earlier_rule"]
#: Why no load of a mapping is reported: no rule wants it; the watch was narrowed down to other processes;
#: a transient vfork child; its file's facts are still being read; it was there
#: before a watch that was to leave that out; its exports could not be read when it was loaded;
#: or it is not in the mapping table, though it should be.
NotReportedReason: TypeAlias = Literal[
    "no_rule", "not_selected", "passing", "awaiting_facts", "baseline", "unresolved", "not_in_map"
]
#: What a file says of itself, or why that cannot be determined.
ElfState: TypeAlias = Literal[
    "elf", "partial", "not_elf", "not_regular", "gone", "not_permitted", "unreadable", "no_answer", "skipped"
]
#: By which way a file was opened; see `sowatch.explain.records.Try`.
By: TypeAlias = Literal["map_files", "root", "own_view", "layer"]
#: Where the FileId is from: the mapping table, a verdict of the kernel side, or ``/proc`` (or stat), which
#: shows another device on overlayfs and btrfs, and the generation only if the file can be opened.
IdSource: TypeAlias = Literal["map", "verdict", "proc"]
#: How a mapped file is related to a path: it is that file under that path; that file under another
#: name; another file under that path; a deleted file that had that path; a file of which it cannot be determined.
Relation: TypeAlias = Literal["same", "other_name", "other_file", "deleted", "unknown"]
#: Why the kernel puts no uprobe into an executable mapping (valid_vma of kernel/events/uprobes.c): it is MAP_SHARED;
#: it is writable, too; its file is of huge pages (hugetlbfs, MFD_HUGETLB).
Unprobed: TypeAlias = Literal["shared", "writable", "hugetlb"]
#: Why a process has no HTTP flows, or that it can have some. By its files alone: ``tappable``; ``no_tls``: nothing that
#: exports functions of OpenSSL, GnuTLS or NSS; ``unread``: they cannot be read; one of `OtherTls` in its place;
#: ``kernel_refuses``: its mapping of the library takes no probes. By who taps: ``off``; ``not_selected``; ``refused``,
#: for ``reason``; ``not_attached`` yet; ``no_call`` since; ``no_http`` in its calls; ``flows``.
TlsState: TypeAlias = Literal[
    "tappable",
    "no_tls",
    "unread",
    "kernel_refuses",
    "not_exported",
    "go",
    "rustls",
    "java",
    "static",
    "off",
    "not_selected",
    "refused",
    "not_attached",
    "no_call",
    "no_http",
    "flows",
]

Range: TypeAlias = Annotated[list[Address], Meta(min_length=2, max_length=2)]


class Kernel(Struct, frozen=True, gc=False):
    """What the kernel side remembers of the process; ``touches`` is its activity generation."""

    followed: bool
    touches: Natural
    range_count: Natural
    ranges: Ranges
    dirty: bool
    shares_vm: bool


class Map(Struct, frozen=True, gc=False):
    """What the mapping table has of the process, by the wall clock and by CLOCK_MONOTONIC."""

    since: Time | None
    since_ns: int
    files: Annotated[Natural, Meta(description="Use file_count.", extra_json_schema=DEPRECATED)]
    announced: bool
    awaits_reading: bool
    file_count: Natural | UnsetType = UNSET


class Seen(Struct, frozen=True, gc=False):
    """The load that was reported."""

    rule: RuleName
    cause: LoadCause | None
    t_ns: KernelTime
    time: Time


class RuleAnswer(Struct, frozen=True, gc=False):
    """What one rule says of a file."""

    rule: RuleName
    wants: bool
    why: Annotated[Why | None, Meta(description="Why it does not.")]
    missing: Annotated[list[Name], Meta(description="Exports that it asks for and the file lacks.")]


class VerdictAnswer(Struct, frozen=True, gc=False):
    """What the kernel side does with a file when somebody maps it."""

    verdict: Annotated[
        Literal["match", "ignore", "none", "mixed"], Meta(description="Use answer.", extra_json_schema=DEPRECATED)
    ]
    seconds_left: Natural | None
    answer: Literal["match", "ignore", "none", "mixed"] | UnsetType = UNSET


class Try(Struct, frozen=True, gc=False):
    """One way to open the very file, and why it did not work; null: it did."""

    by: By
    path: Name
    error: Name | None


class FileLook(Struct, frozen=True, gc=False):
    """A read of the file, now. ``build_id`` and ``soname`` of a path; of a mapping they are in its library."""

    opened_by: By | None
    tries: list[Try]
    elf: ElfState
    reason: Name | None
    exports: list[Name] | None
    build_id: str | UnsetType | None = UNSET
    soname: Name | UnsetType | None = UNSET


class Active(Struct, frozen=True, gc=False):
    """An activation in the registry."""

    rule: RuleName
    state: str


class Blocked(Struct, frozen=True, gc=False):
    """An activation that failed and will not be tried again for ``seconds_left``."""

    rule: RuleName
    reason: Name
    seconds_left: float
    path: Name
    since: Time


class Difference(Struct, frozen=True, gc=False):
    """Something that the mapping table and ``/proc`` do not agree on."""

    kind: Annotated[
        Literal["missing", "extra"],
        Meta(description="`missing`: mapped, and not in the table; `extra`: in the table, and not mapped."),
    ]
    path: Name
    inode: Natural
    range: Range
    pid: Annotated[Pid, Meta(description="Of an audit, which compares many processes.")] | UnsetType = UNSET


class Probe(Struct, frozen=True, gc=False, rename={"is_return": "return"}):
    """One program on one function of a file."""

    symbol: Name
    program: Name
    is_return: bool
    state: str
    reason: Name | None
    offset: Annotated[Natural | None, Meta(description="In the file, in bytes; null: the function was not found.")]


class Attachment(Struct, frozen=True, gc=False):
    """What a rule has attached to a file, or why nothing."""

    rule: RuleName
    state: str
    reason: Name | None
    users: Annotated[int, Meta(ge=0, description="Activations.")]
    lingering: Annotated[bool, Meta(description="The last process is gone, and it is detached soon.")]
    probes: list[Probe]


class Tls(Struct, frozen=True, gc=False):
    """Why the process has no HTTP flows."""

    state: TlsState
    reason: Name | None
    libraries: Annotated[list[Name], Meta(description="Use paths.", extra_json_schema=DEPRECATED)]
    calls: Annotated[Natural, Meta(description="Use call_count.", extra_json_schema=DEPRECATED)]
    flows: Annotated[Natural, Meta(description="Use flow_count.", extra_json_schema=DEPRECATED)]
    paths: list[Name] | UnsetType = UNSET
    call_count: Natural | UnsetType = UNSET
    flow_count: Natural | UnsetType = UNSET


class MappingReport(Struct, frozen=True, gc=False, kw_only=True):
    """One file that the process has mapped executable, by ``/proc``, and what became of it."""

    library: Library
    id_from: IdSource
    ranges: Ranges
    range_count: RangeCount | UnsetType = UNSET
    seen: Seen | None
    rule: Annotated[RuleName | None, Meta(description="The one that wants it.")]
    rules: list[RuleAnswer]
    untold: Annotated[NotReportedReason | None, Meta(description="Why no load was reported.")]
    verdict: VerdictAnswer
    file: FileLook
    activations: list[Active]
    blocked: list[Blocked]
    differences: list[Difference]
    unprobed: list[Unprobed]
    attachments: list[Attachment]
    stale: Annotated[Staleness | None, Meta(description="As in `mapping`.")] | UnsetType = UNSET
    stale_reason: Annotated[str | None, Meta(description="As in `mapping`.")] | UnsetType = UNSET
    same_build: Annotated[bool, Meta(description="As in `mapping`.")] | UnsetType = UNSET


class ProcessReport(Struct, frozen=True, gc=False):
    """The object of `explain PID`."""

    schema: Schema
    event: Literal["explain"]
    target: Literal["process"]
    process: Process
    state: Literal["running", "zombie", "kernel_thread"]
    threads: Natural
    leader_alive: bool
    bits: Literal[32, 64] | None
    kernel: Kernel | None
    map: Map | None
    mappings: list[MappingReport]
    extra: Annotated[list[Difference], Meta(description="What the map has and the process has not.")]
    withheld: Natural
    notes: list[str]
    http: Tls | None
    started: Annotated[Time, Meta(description="The start of the process by the wall clock.")] | UnsetType = UNSET
    seq: Seq | UnsetType = UNSET


class FileIdentity(Struct, frozen=True, gc=False):
    """An identity that a path may stand for."""

    dev: str
    inode: Natural
    generation: Natural
    subvol: Natural
    id_from: IdSource


class MappedIn(Struct, frozen=True, gc=False, kw_only=True):
    """A process that has the file, or another one under its path, mapped executable."""

    process: Process
    path: Name
    inode: Natural
    relation: Relation
    ranges: Ranges
    range_count: RangeCount | UnsetType = UNSET
    in_map: bool
    seen: Seen | None
    unprobed: list[Unprobed]


class PathReport(Struct, frozen=True, gc=False, kw_only=True):
    """The object of `explain PATH`."""

    schema: Schema
    event: Literal["explain"]
    target: Literal["path"]
    path: Name
    resolved: Name
    type: str | None
    error: Name | None
    ids: list[FileIdentity]
    kind: Kind
    rule: RuleName | None
    rules: list[RuleAnswer]
    verdict: VerdictAnswer
    file: FileLook
    activations: list[Active]
    blocked: list[Blocked]
    attachments: list[Attachment]
    mapped: list[MappedIn]
    notes: list[str]
    unreadable: Natural | UnsetType = UNSET
    hidden: bool | UnsetType = UNSET
    seq: Seq | UnsetType = UNSET


class RuleFile(Struct, frozen=True, gc=False):
    """A file that a rule has attached to, or could not."""

    library: Library
    rule: RuleName
    state: str
    reason: Name | None
    users: Natural
    lingering: bool
    probes: list[Probe]


class RuleBlocked(Struct, frozen=True, gc=False):
    """As `Blocked`, of one rule."""

    path: Name
    reason: Name
    seconds_left: float


class RuleReport(Struct, frozen=True, gc=False):
    """The object of `debug explain --rule`: what a rule wants, what it does, and what it could not do."""

    schema: Schema
    event: Literal["explain"]
    target: Literal["rule"]
    rule: RuleName
    pattern: Name | None
    kind: Annotated[list[Kind], Meta(description="Use kinds.", extra_json_schema=DEPRECATED)]
    exports: list[Name]
    action: dict[str, Any] | None
    files: list[RuleFile]
    calls: Annotated[list[dict[str, Any]], Meta(description="Use functions.", extra_json_schema=DEPRECATED)]
    blocked: list[RuleBlocked]
    kinds: list[Kind] | UnsetType = UNSET
    functions: Annotated[list[dict[str, Any]], Meta(description="Those whose calls it counts.")] | UnsetType = UNSET
    seq: Seq | UnsetType = UNSET
