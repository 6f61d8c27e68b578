"""Schema 1: the lines of ``sowatch fleet ... --json``, as `sowatch.model.wire` has events.

The first line of an answer is a `FleetAnswer`; what it consists of follows it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from sowatch.model.wire import Name, Natural, Pod, Schema, Seq, Time

__all__ = ["FleetLine", "HostAnswer", "HostState", "Question", "TargetKind"]

#: docs/decisions/0069-fleet-records.md has the rules of both.
HostAnswer: TypeAlias = Literal["mapped", "not mapped", "not observed"]
HostState: TypeAlias = Literal["answered", "silent", "lossy", "unsupported"]
Question: TypeAlias = Literal["who", "stale", "versions", "history", "coverage", "remediated"]
TargetKind: TypeAlias = Literal["build_id", "purl", "soname", "path", "cve"]

Version: TypeAlias = Annotated[Time | None, Meta(description="By the clock of the host.")]


class FleetHosts(Struct, frozen=True, gc=False):
    """How many hosts there are in which state: an answer holds for those that answered."""

    answered: Natural
    silent: Natural
    lossy: Natural
    unsupported: Natural


class FleetTarget(Struct, frozen=True, gc=False):
    """What was asked for, and as what it was taken."""

    kind: TargetKind
    text: Name


class FleetBuild(Struct, frozen=True, gc=False):
    """A build that is meant, as the hosts name it."""

    build_id: str
    sonames: list[Name]
    purls: list[Name]


class FleetAnswer(Struct, frozen=True, gc=False, kw_only=True):
    """The first line of `fleet`: what the answer is, and for how many hosts it holds."""

    schema: Schema
    event: Literal["fleet_answer"]
    seq: Seq
    time: Annotated[Time, Meta(description="When it holds.")]
    question: Question
    targets: list[FleetTarget]
    builds: list[FleetBuild]
    answer: Annotated[HostAnswer | None, Meta(description="Of all hosts; null where it is no question of yes or no.")]
    hosts: FleetHosts
    mapped_host_count: Annotated[Natural, Meta(description="On which it is mapped.")]
    not_mapped_host_count: Annotated[Natural, Meta(description="On which it is certainly not.")]
    not_observed_host_count: Annotated[Natural, Meta(description="Of which that is not known.")]
    unknown_builds: Annotated[
        list[FleetBuild] | UnsetType,
        Meta(description="Of a CVE or a purl: builds that are or were mapped, and may be meant: that is not known."),
    ] = UNSET


class FleetHost(Struct, frozen=True, gc=False, kw_only=True):
    """A host: of `coverage` each one, else those whose answer is not known, and with `remediated` that map it."""

    schema: Schema
    event: Literal["fleet_host"]
    seq: Seq
    host_id: Name
    host_name: Name
    state: HostState
    reason: Annotated[Name, Meta(description="Why it has that state; empty if it answered.")]
    answer: HostAnswer | UnsetType = UNSET
    heard: Annotated[Time | None, Meta(description="Its last heartbeat; null: there was none.")]
    agent_version: str | UnsetType = UNSET
    strategy: str | UnsetType = UNSET
    guarantee: Name | UnsetType = UNSET
    limits: list[Name] | UnsetType = UNSET
    lost: Natural | UnsetType = UNSET
    dropped: Natural | UnsetType = UNSET
    unreadable: Natural | UnsetType = UNSET
    groups: Natural | UnsetType = UNSET


class FleetMapping(Struct, frozen=True, gc=False, kw_only=True):
    """Processes of one host, unit or container, and executable that have one file mapped, as reported last."""

    schema: Schema
    event: Literal["fleet_mapping"]
    seq: Seq
    host_id: Name
    host_name: Name
    state: HostState
    reason: Name
    answer: HostAnswer
    build_id: str
    soname: Name
    path: Name
    kind: str
    exe: Name
    exe_build_id: str
    unit: Name
    container: Name
    pod: Pod | UnsetType = UNSET
    purl: Name
    process_count: Natural
    short_lived: Annotated[Natural, Meta(description="Processes that ended within a second, and are not counted.")]
    pids: Annotated[list[Natural], Meta(description="Of some of them.")]
    listen: Annotated[list[Name], Meta(description="On what they listen: `tcp:443`.")]
    stale: Annotated[str, Meta(description="replaced or deleted, if the file is not the one on disk; else empty.")]
    stale_since: Version
    since: Version
    reported: Version


class FleetVersion(Struct, frozen=True, gc=False, kw_only=True):
    """A build of a library, and on how many hosts it is mapped."""

    schema: Schema
    event: Literal["fleet_version"]
    seq: Seq
    build_id: str
    sonames: list[Name]
    purls: list[Name]
    path_count: Natural
    mapped_host_count: Annotated[Natural, Meta(description="On which it is mapped.")]
    not_observed_host_count: Annotated[Natural, Meta(description="That reported it, and whose state is no answer.")]
    process_count: Natural
    stale_host_count: Annotated[Natural, Meta(description="On which some process has a file mapped that was replaced.")]


class FleetHistory(Struct, frozen=True, gc=False, kw_only=True):
    """From when to when a host had a library or a build mapped."""

    schema: Schema
    event: Literal["fleet_history"]
    seq: Seq
    host_id: Name
    host_name: Name
    state: HostState
    answer: HostAnswer
    first_mapped: Version
    last_gone: Annotated[Version, Meta(description="When the last process had it no more; null: some may have it.")]
    stale_since: Version
    remediated_s: Annotated[
        float | None, Meta(description="From when the file was replaced until nobody had the old one mapped any more.")
    ]


class FleetHostCount(Struct, frozen=True, gc=False):
    """From a time on, on how many hosts something is mapped."""

    time: Time
    host_count: Natural


class FleetRemediation(Struct, frozen=True, gc=False, kw_only=True):
    """After the hosts of a history: their number over time, and how long it took until nobody had the old file."""

    schema: Schema
    event: Literal["fleet_remediation"]
    seq: Seq
    hosts_over_time: Annotated[
        list[FleetHostCount], Meta(description="How many hosts had it mapped, from each of these times on.")
    ]
    remediated_host_count: Annotated[
        Natural, Meta(description="Hosts where the file was replaced and nobody has the old one.")
    ]
    open_host_count: Annotated[
        Natural, Meta(description="Hosts where the file was replaced and somebody has the old one.")
    ]
    median_s: float | None
    p95_s: float | None


class FleetRestart(Struct, frozen=True, gc=False, kw_only=True):
    """What has to be restarted on a host, with what it still runs and listens on. Nothing restarts it."""

    schema: Schema
    event: Literal["fleet_restart"]
    seq: Seq
    host_id: Name
    host_name: Name
    state: HostState
    target: Annotated[Literal["unit", "container", "session", "process", "pod"], Meta(description="What that is.")]
    name: Name
    pod: Pod | UnsetType = UNSET
    deployment: Annotated[Name, Meta(description="That has made the pod, as far as the pod's name shows; else empty.")]
    command: Annotated[Name | None, Meta(description="That restarts it, on that host; null if there is none.")]
    advice: Annotated[Name | None, Meta(description="What to do where there is no command.")]
    process_count: Natural
    listen: list[Name]
    paths: list[Name]
    purls: list[Name]
    stale_since: Version


FleetLine: TypeAlias = (
    FleetAnswer | FleetHost | FleetMapping | FleetVersion | FleetHistory | FleetRemediation | FleetRestart
)
