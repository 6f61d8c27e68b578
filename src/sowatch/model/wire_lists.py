"""Schema 1: the lines of ``list --vulnerable`` and of ``list --stale --plan``, as `sowatch.model.wire` has others."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from sowatch.model.literals import Staleness
from sowatch.model.wire import Library, Name, Natural, Package, Pod, Process, Schema, Seq, Time

__all__ = ["ListLine", "Restart", "VulnerabilityData", "Vulnerable"]


class Vulnerable(Struct, frozen=True, gc=False):
    """A line of `list --vulnerable`: this process has a file mapped that is affected, or of which that is unknown."""

    schema: Schema
    event: Literal["vulnerable"]
    seq: Seq
    finding: Annotated[
        Literal["affected", "unknown", "under_investigation", "fixed", "not_affected"],
        Meta(description="`fixed`, `not_affected` and `under_investigation`: a VEX statement has it so."),
    ]
    id: Annotated[
        Name | None,
        Meta(description="A CVE where there is one, else that of the advisory; null: unknown of every vulnerability."),
    ]
    aliases: list[Name]
    severity: Annotated[Name | None, Meta(description="A word of the advisory's, else a CVSS vector.")]
    fixed_version: Annotated[Name | None, Meta(description="Of the source package, where its data are by that.")]
    reason: Annotated[Name | None, Meta(description="Why it is unknown, or what a statement or a list of builds has.")]
    summary: Name
    found_by: Literal["osv", "build_ids", "vex"]
    mapped_package: Annotated[Package | None, Meta(description="Null: it is not known.")]
    unit: Name | None
    process: Process
    library: Library


class VulnerabilityData(Struct, frozen=True, gc=False):
    """The last line of `list --vulnerable`: what was asked, and how much of it is open."""

    schema: Schema
    event: Literal["vulnerability_data"]
    seq: Seq
    advisories: Natural
    newest: Annotated[Name | None, Meta(description="When the advisory that was changed last was changed.")]
    problems: Annotated[list[Name], Meta(description="What of the data could not be read.")]
    file_count: Annotated[int, Meta(ge=0, description="Mapped files that were judged, each once.")]
    files_without_package: Annotated[int, Meta(ge=0, description="Of these, those whose package is not known.")]
    files_unknown: Annotated[int, Meta(ge=0, description="Those of which anything is unknown, without those before.")]
    affected_processes: Natural


class RestartFile(Struct, frozen=True, gc=False):
    """A stale file of a process."""

    stale: Staleness
    stale_reason: str | None
    same_build: Annotated[bool | None, Meta(description="Whether what is on disk has the same build id.")]
    owner: Annotated[Name | None, Meta(description="The package that owns the path now.")]
    mapped_package: Annotated[
        Package | None, Meta(description="The package that is still running; null: it is not known.")
    ]
    library: Library


class RestartProcess(Struct, frozen=True, gc=False):
    """A process that has to be restarted."""

    process: Process
    listen: Annotated[list[str] | None, Meta(description="`tcp:443`; null: its sockets could not be read.")]
    listen_complete: bool
    files: list[RestartFile]


class Restart(Struct, frozen=True, gc=False):
    """A line of `list --stale --plan --json`: what is restarted as one, and for the sake of what."""

    schema: Schema
    event: Literal["restart"]
    seq: Seq
    time: Time
    kind: Literal["unit", "container", "session", "process"]
    name: Name
    unit: Name | None
    unit_uid: Annotated[Natural | None, Meta(description="Of the user whose service manager has the unit.")]
    container: Name | None
    pods: Annotated[list[Pod], Meta(description="The pods of Kubernetes that the processes are of.")]
    command: Annotated[Name | None, Meta(description="For a shell of root; null: there is none.")]
    advice: Annotated[Name | None, Meta(description="What to do where there is no command, or what is better.")]
    why_not: Annotated[str | None, Meta(description="Why no restart is called for; null: it is.")]
    listen: Annotated[list[str], Meta(description="What is not served while it restarts: of all its processes.")]
    processes: list[RestartProcess]


#: The schema has them in this order, and what is new at the end.
ListLine: TypeAlias = Vulnerable | VulnerabilityData | Restart
