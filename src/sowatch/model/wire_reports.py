"""Schema 1: what answers a question with one object: ``audit``, ``doctor`` and the agent's ``GET /inventory``.

As `sowatch.model.wire` has lines, and `sowatch.model.wire_explain` explanations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.literals import Kind, Staleness
from sowatch.model.wire import DEPRECATED, Attempt, Name, Natural, Pid, RuleName, Schema, Seconds, Seq, Time
from sowatch.model.wire_explain import Difference

__all__ = ["Audit", "Doctor", "Inventory"]


class Audit(Struct, frozen=True, gc=False, kw_only=True):
    """The object of `audit` and of the agent's `/audit`: the mapping table compared with ``/proc``."""

    schema: Schema
    event: Literal["audit"]
    processes: Annotated[Natural, Meta(description="Use process_count.", extra_json_schema=DEPRECATED)]
    mappings: Annotated[Natural, Meta(description="Use mapping_count.", extra_json_schema=DEPRECATED)]
    unreadable: Annotated[Natural, Meta(description="Processes that are there and cannot be read.")]
    unread: Annotated[
        list[Pid],
        Meta(
            description="Those of them that the kernel does not answer for. Use unread_pids.",
            extra_json_schema=DEPRECATED,
        ),
    ]
    seconds: Seconds
    lost: Annotated[Natural, Meta(description="Records that the kernel side lost.")] | UnsetType = UNSET
    repairs: Natural | UnsetType = UNSET
    differences: list[Difference]
    process_count: Natural | UnsetType = UNSET
    mapping_count: Natural | UnsetType = UNSET
    unread_pids: list[Pid] | UnsetType = UNSET
    seq: Seq | UnsetType = UNSET


class InventoryLibrary(Struct, frozen=True, gc=False, kw_only=True):
    """A file of the map, under one path, and who has it."""

    rule: RuleName
    path: Name
    host_path: Name | None
    dev: str
    inode: Natural
    generation: Natural
    subvol: Natural
    kind: Kind
    build_id: str | None
    soname: Name | None
    deleted: bool
    path_partial: bool | UnsetType = UNSET
    stale: Staleness | None
    stale_reason: str | UnsetType | None = UNSET
    processes: Annotated[list[Natural], Meta(description="Use process_indexes.", extra_json_schema=DEPRECATED)]
    stale_processes: Annotated[list[Natural], Meta(description="As process_indexes, of those for whom it is stale.")]
    unknown_processes: Annotated[
        list[Natural], Meta(description="As process_indexes, of those for whom that cannot be determined.")
    ]
    process_indexes: Annotated[list[Natural], Meta(description="Places in `processes` of the inventory, from 0 on.")]


class InventoryProcess(Struct, frozen=True, gc=False, kw_only=True):
    """A process of the map."""

    pid: Pid
    ns_pid: Pid | None
    start_ns: Natural
    ppid: Natural | None
    comm: Name | None
    exe: Name | None
    uid: Natural | None
    container: Name | None
    cgroup: Name | None
    libraries: Annotated[Natural, Meta(description="Use library_count.", extra_json_schema=DEPRECATED)]
    stale_libraries: Natural
    library_count: Natural


class Compared(Struct, frozen=True, gc=False):
    """When the files on disk were compared with those that are mapped, and whether all were."""

    compared: Time | None
    complete: bool


class Inventory(Struct, frozen=True, gc=False, kw_only=True):
    """The object of the agent's `/inventory` and of `debug inventory`: each process and each library once."""

    schema: Schema
    event: Literal["inventory"]
    time: Time
    mappings: Annotated[Natural, Meta(description="Use mapping_count.", extra_json_schema=DEPRECATED)]
    staleness: Annotated[Compared, Meta(description="Use comparison.", extra_json_schema=DEPRECATED)]
    libraries: list[InventoryLibrary]
    processes: list[InventoryProcess]
    mapping_count: Natural
    comparison: Compared
    seq: Seq


class DoctorProbe(Struct, frozen=True, gc=False):
    """A feature of the kernel that was tried."""

    name: str
    answer: str
    detail: Name | None
    needed_for: str


class Decision(Struct, frozen=True, gc=False):
    """Which strategy a watch uses, and why."""

    strategy: str | None
    hooks: str | None
    guarantee: str | None
    limits: list[Name]
    attempts: list[Attempt]
    remedy: Name | None


class KnownRisk(Struct, frozen=True, gc=False):
    """Something that others reported of kernels; not seen here."""

    name: str
    status: Annotated[str, Meta(description="Use evidence.", extra_json_schema=DEPRECATED)]
    kernels_like_this: bool | None
    text: str
    concerns: str
    sources: list[str]
    evidence: Annotated[Literal["reported"], Meta(description="By others; not seen here.")]


class BpfObjectFile(Struct, frozen=True, gc=False):
    """A file with BPF programs of this installation."""

    name: str
    sha256: Annotated[str | None, Meta(description="Of the file; null: it cannot be read.")]
    as_built: Annotated[
        bool | None, Meta(description="Whether that is what the build wrote down; null: it wrote nothing down.")
    ]


class Doctor(Struct, frozen=True, gc=False):
    """The object of `doctor`."""

    schema: Schema
    event: Literal["doctor"]
    host: Name
    facts: Annotated[dict[str, Any], Meta(description="Of this user on this kernel; null: it cannot be determined.")]
    probes: Annotated[list[DoctorProbe], Meta(description="Use features.", extra_json_schema=DEPRECATED)]
    decision: Decision
    risks: list[KnownRisk]
    features: list[DoctorProbe]
    seq: Seq
    objects: list[BpfObjectFile]
