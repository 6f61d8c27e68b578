"""Records of agents as docs/decisions/0069-fleet-records.md has them, for stores of tests.

A `HostRecords` makes the records of one agent in order, with its clock and its numbers; what a test leaves out was
lost. `otlp` gives them as a request of OTLP/HTTP in JSON, `row` as a line of the table ``otel_logs``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

__all__ = ["SECOND", "Group", "HostRecords", "Package", "Record", "debian", "otlp", "row"]

SECOND = 1_000_000_000
SCOPE = "sowatch.fleet"
VERSION = "0.1.0"


class Record(NamedTuple):
    """One log record: when, which event, of whom, and what it says. All values are texts."""

    time_ns: int
    event: str
    resource: dict[str, str]
    attributes: dict[str, str]


class Package(NamedTuple):
    """What a package database says of a file."""

    name: str
    version: str
    source: str
    purl: str
    identified_by: str = "dpkg"


def debian(name: str, version: str, source: str | None = None) -> Package:
    """A package of Debian 12."""
    return Package(name, version, source or name, f"pkg:deb/debian/{name}@{version}?arch=amd64&distro=debian-12")


@dataclass(frozen=True, slots=True)
class Group:
    """What is the same: who has which file mapped."""

    path: str
    build_id: str = ""
    soname: str = ""
    package: Package | None = None
    exe: str = "/usr/sbin/nginx"
    exe_build_id: str = ""
    container: str = ""
    pod: str = ""
    pod_uid: str = ""
    namespace: str = ""
    unit: str = "nginx.service"
    kind: str = "library"
    processes: int = 1
    pids: Sequence[int] = (4711,)
    short_lived: int = 0
    since_ns: int = 0
    listen: str = ""
    stale: str = ""
    stale_since_ns: int = 0

    def key(self, host_id: str) -> str:
        """Its number within the host, as 16 hex digits."""
        parts = (self.kind, self.container, self.unit, self.exe, self.exe_build_id, self.build_id, self.path, host_id)
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    def attributes(self, host_id: str) -> dict[str, str]:
        """As a record has them: what is not known is left out."""
        package = self.package or Package("", "", "", "", "")
        found: dict[str, Any] = {
            "sowatch.library.key": self.key(host_id),
            "sowatch.library.build_id": self.build_id,
            "sowatch.library.soname": self.soname,
            "sowatch.library.path": self.path,
            "sowatch.library.kind": self.kind,
            "sowatch.library.processes": str(self.processes),
            "sowatch.library.pids": ",".join(map(str, self.pids[:5])),
            "sowatch.library.short_lived": str(self.short_lived) if self.short_lived else "",
            "sowatch.library.since": str(self.since_ns) if self.since_ns else "",
            "sowatch.library.stale": self.stale,
            "sowatch.library.stale_since": str(self.stale_since_ns) if self.stale_since_ns else "",
            "process.executable.path": self.exe,
            "process.executable.build_id.gnu": self.exe_build_id,
            "container.id": self.container,
            "k8s.pod.uid": self.pod_uid,
            "k8s.pod.name": self.pod,
            "k8s.namespace.name": self.namespace,
            "sowatch.unit": self.unit,
            "sowatch.process.listen": self.listen,
            "sowatch.package.name": package.name,
            "sowatch.package.version": package.version,
            "sowatch.package.source": package.source,
            "sowatch.package.purl": package.purl,
            "sowatch.package.identified_by": package.identified_by,
        }
        return {name: value for name, value in found.items() if value != ""}


@dataclass(slots=True)
class HostRecords:
    """One agent: its records in order, from ``epoch_ns`` on. ``now_ns`` may be set forward between them."""

    host_id: str
    name: str
    epoch_ns: int
    boot_id: str = "3f0c9a4e-5c1b-4b5e-9a55-0f3d2f6c7a11"
    interval_s: int = 30
    strategy: str = "core"
    guarantee: str = "exact"
    limits: str = ""
    lost: int = 0
    is_repaired: bool = True
    unreadable: int = 0
    dropped: int = 0
    now_ns: int = 0
    snapshot: int = 0
    seq: int = 0
    groups: dict[str, Group] = field(default_factory=dict)

    def snapshot_of(self, groups: Iterable[Group]) -> list[Record]:
        """Everything anew: begin, a state for each group, end."""
        made = self.seq if self.snapshot else 0
        self.snapshot += 1
        self.seq = 0
        records = [self._record("sowatch.fleet.snapshot_begin", {"sowatch.fleet.records": str(made)})]
        self.groups = {one.key(self.host_id): one for one in map(self._with_since, groups)}
        records += [self._group("state", one) for one in self.groups.values()]
        end = {"sowatch.fleet.records": str(len(self.groups))}
        return [*records, self._record("sowatch.fleet.snapshot_end", end)]

    def mapped(self, group: Group) -> Record:
        """The first process of a group."""
        group = self._with_since(group)
        self.groups[group.key(self.host_id)] = group
        return self._group("mapped", group)

    def changed(self, group: Group) -> Record:
        """The same group with another number of processes, ports or staleness."""
        old = self.groups[group.key(self.host_id)]
        return self._group("state", replace(group, since_ns=group.since_ns or old.since_ns))

    def unmapped(self, group: Group) -> Record:
        """The last process of a group has gone."""
        old = self.groups.pop(group.key(self.host_id))
        return self._group("unmapped", replace(old, processes=0, pids=()))

    def heartbeat(self) -> Record:
        """The agent is there."""
        facts = {
            "sowatch.fleet.interval_s": str(self.interval_s),
            "sowatch.fleet.groups": str(len(self.groups)),
            "sowatch.fleet.dropped": str(self.dropped),
            "sowatch.watch.strategy": self.strategy,
            "sowatch.watch.guarantee": self.guarantee,
            "sowatch.watch.limits": self.limits,
            "sowatch.watch.lost": str(self.lost),
            "sowatch.watch.repaired": "0",
            "sowatch.watch.is_repaired": "true" if self.is_repaired else "false",
            "sowatch.watch.unreadable": str(self.unreadable),
        }
        return self._record("sowatch.fleet.heartbeat", {name: value for name, value in facts.items() if value})

    def restart(self, epoch_ns: int) -> None:
        """The agent starts again: another epoch, and nothing sent in it yet."""
        self.epoch_ns, self.now_ns, self.snapshot, self.seq, self.groups = epoch_ns, 0, 0, 0, {}

    def _with_since(self, group: Group) -> Group:
        return group if group.since_ns else replace(group, since_ns=max(self.now_ns, self.epoch_ns))

    def _group(self, event: str, group: Group) -> Record:
        return self._record(f"sowatch.library.{event}", group.attributes(self.host_id))

    def _record(self, event: str, attributes: dict[str, str]) -> Record:
        self.now_ns = max(self.now_ns, self.epoch_ns) + 1
        numbers = {"sowatch.fleet.snapshot": str(self.snapshot), "sowatch.fleet.seq": str(self.seq)}
        self.seq += 1
        resource = {
            "host.id": self.host_id,
            "host.name": self.name,
            "service.name": "sowatch",
            "service.version": VERSION,
            "sowatch.boot.id": self.boot_id,
            "sowatch.fleet.epoch": str(self.epoch_ns),
        }
        return Record(self.now_ns, event, resource, attributes | numbers)


def otlp(records: Sequence[Record]) -> bytes:
    """A request to ``/v1/logs`` in JSON, as OTLP has it; a resource for each host."""
    by_host: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        by_host.setdefault(tuple(record.resource.values()), []).append(record)
    resources = [
        {
            "resource": {"attributes": _pairs(some[0].resource)},
            "scopeLogs": [{"scope": {"name": SCOPE, "version": VERSION}, "logRecords": [_log(one) for one in some]}],
        }
        for some in by_host.values()
    ]
    return json.dumps({"resourceLogs": resources}).encode("ascii")


def row(record: Record) -> dict[str, Any]:
    """A row of ``otel_logs`` for ``INSERT ... FORMAT JSONEachRow``."""
    seconds, rest = divmod(record.time_ns, SECOND)
    return {
        "Timestamp": f"{seconds}.{rest:09}",
        "ServiceName": record.resource["service.name"],
        "ResourceAttributes": record.resource,
        "ScopeName": SCOPE,
        "ScopeVersion": VERSION,
        "LogAttributes": record.attributes,
        "EventName": record.event,
    }


def _log(record: Record) -> dict[str, Any]:
    return {
        "timeUnixNano": str(record.time_ns),
        "observedTimeUnixNano": str(record.time_ns),
        "eventName": record.event,
        "attributes": _pairs(record.attributes),
    }


def _pairs(attributes: dict[str, str]) -> list[dict[str, Any]]:
    return [{"key": name, "value": {"stringValue": value}} for name, value in attributes.items()]
