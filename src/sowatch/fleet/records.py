"""What an agent sends of its host, as values: groups of processes, records of them, and their attributes. Pure.

docs/decisions/0069-fleet-records.md has what each of them means; the tables that take them are in `sql/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final, TypeAlias

from msgspec import Struct

from sowatch.inventory.restarts import restart_target
from sowatch.model.escape import visible

__all__ = [
    "SESSION",
    "GroupFacts",
    "GroupState",
    "Package",
    "Record",
    "WatchState",
    "group_attributes",
    "group_key",
    "heartbeat_attributes",
    "unit_of",
]

Attributes: TypeAlias = Mapping[str, str | int | bool]

#: What all logins and other transient units count as: their names never come again.
SESSION: Final = "session"
#: Of systemd-run, and of a scope that a program made for itself.
_TRANSIENT: Final = re.compile(r"run-[^/]*\.service|(?!init\.scope$).*\.scope")
#: An instance for one connection of a socket unit with Accept=yes: its number, and both addresses, or a pid and a uid.
_CONNECTION: Final = re.compile(r"@\d+-(?:\d+-\d+|[^/]*:\d+-[^/]*:\d+)\.service$")


class GroupFacts(Struct, frozen=True, gc=False):
    """What is the same of all processes of a group. What is not known is empty.

    Attributes:
        kind: of the file: library, executable or interpreter.
        container, pod_uid, pod, namespace: where the processes run.
        unit: the systemd unit, see `unit_of`.
        exe: their executable.
        exe_build_id: its GNU build id.
        build_id: that of the file, in hex, or ``htlhash:`` and OpenTelemetry's hash where it has none.
        path: of the file, as the processes see it.
        soname: of the file.
    """

    kind: str
    container: str
    unit: str
    exe: str
    exe_build_id: str
    build_id: str
    path: str
    soname: str = ""
    pod_uid: str = ""
    pod: str = ""
    namespace: str = ""


class Package(Struct, frozen=True, gc=False):
    """The package that a file came from. ``identified_by``: note, dpkg, rpm, apk, pypi, npm or maven."""

    name: str
    version: str
    source: str
    purl: str
    identified_by: str


class GroupState(Struct, frozen=True, gc=False):
    """What changes of a group.

    Attributes:
        processes: how many have the file mapped.
        pids: some of them.
        stale: ``replaced``, ``deleted`` or ``modified`` if one of them has a file that is not the one on disk.
        stale_since_ns: since when, by the wall clock.
        listen: where they listen, such as ``tcp:443,udp:53``.
        package: what the file belongs to.
        since_ns: when the group got its first process, or the agent found it.
        short_lived: processes that had it for less than a second.
    """

    processes: int
    pids: tuple[int, ...] = ()
    stale: str = ""
    stale_since_ns: int = 0
    listen: str = ""
    package: Package | None = None
    short_lived: int = 0
    since_ns: int = 0


class WatchState(Struct, frozen=True, gc=False):
    """How the agent itself is, for its heartbeats.

    Attributes:
        strategy, guarantee, limits: as its ready event has them.
        lost: events that it has lost so far, in the kernel and in its own queue.
        repaired: how often it has made a loss good.
        is_repaired: whether nothing is lost now.
        unreadable: processes whose mappings cannot be read now.
    """

    strategy: str
    guarantee: str
    limits: Sequence[str] = ()
    lost: int = 0
    repaired: int = 0
    is_repaired: bool = True
    unreadable: int = 0


class Record(Struct, frozen=True, gc=False):
    """A record on its way.

    Attributes:
        event: its name.
        version_ns: the agent's clock, ns since the epoch, made to rise strictly.
        attributes: flat.
    """

    event: str
    version_ns: int
    attributes: Attributes


def group_key(facts: GroupFacts, host_id: str) -> str:
    """What names a group within the fleet: 64 bits, as 16 hex digits."""
    parts = (
        facts.kind,
        facts.container,
        facts.unit,
        facts.exe,
        facts.exe_build_id,
        facts.build_id,
        facts.path,
        host_id,
    )
    return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@lru_cache(8192)
def unit_of(cgroup: str | None) -> str:
    """The unit that counts for a process; empty if it is in none.

    >>> unit_of("/system.slice/nginx.service")
    'nginx.service'
    >>> unit_of("/user.slice/user-1000.slice/user@1000.service/app.slice/syncthing.service")
    'user@1000.service/syncthing.service'
    >>> unit_of("/user.slice/user-1000.slice/session-3.scope")
    'session'
    >>> unit_of("/system.slice/system-sshd.slice/sshd@7-10.0.0.1:22-10.0.0.2:4711.service")
    'sshd@.service'
    """
    target = restart_target(cgroup)
    if target.unit is None:
        return ""
    if target.kind == "session" or _TRANSIENT.fullmatch(target.unit):
        return SESSION
    unit = _CONNECTION.sub("@.service", target.unit)
    return unit if target.uid is None else f"user@{target.uid}.service/{unit}"


def group_attributes(key: str, facts: GroupFacts, state: GroupState) -> dict[str, str | int | bool]:
    """The attributes of a group; what is not known is left out."""
    package = state.package
    found: dict[str, str | int | bool] = {
        "sowatch.library.key": key,
        "sowatch.library.build_id": facts.build_id,
        "sowatch.library.soname": facts.soname,
        "sowatch.library.path": facts.path,
        "sowatch.library.kind": facts.kind,
        "sowatch.library.pids": ",".join(map(str, state.pids)),
        "sowatch.library.stale": state.stale,
        "process.executable.path": facts.exe,
        "process.executable.build_id.gnu": facts.exe_build_id,
        "container.id": facts.container,
        "k8s.pod.uid": facts.pod_uid,
        "k8s.pod.name": facts.pod,
        "k8s.namespace.name": facts.namespace,
        "sowatch.unit": facts.unit,
        "sowatch.process.listen": state.listen,
    }
    if package is not None:
        found |= {f"sowatch.package.{name}": getattr(package, name) for name in Package.__struct_fields__}
    found = {name: visible(str(value)) for name, value in found.items() if value}
    found["sowatch.library.processes"] = state.processes
    if state.short_lived:
        found["sowatch.library.short_lived"] = state.short_lived
    if state.since_ns:
        found["sowatch.library.since"] = state.since_ns
    if state.stale_since_ns:
        found["sowatch.library.stale_since"] = state.stale_since_ns
    return found


def heartbeat_attributes(
    watch: WatchState, *, interval_s: int, groups: int, dropped: int, left_out: int
) -> dict[str, str | int | bool]:
    """The attributes of a heartbeat; what an agent leaves out is lost, and not repaired."""
    found: dict[str, str | int | bool] = {
        "sowatch.fleet.interval_s": interval_s,
        "sowatch.fleet.groups": groups,
        "sowatch.fleet.dropped": dropped,
        "sowatch.watch.strategy": watch.strategy,
        "sowatch.watch.guarantee": watch.guarantee,
        "sowatch.watch.lost": watch.lost + left_out,
        "sowatch.watch.repaired": watch.repaired,
        "sowatch.watch.is_repaired": watch.is_repaired and not left_out,
        "sowatch.watch.unreadable": watch.unreadable,
    }
    if left_out:
        found["sowatch.fleet.left_out"] = left_out
    if watch.limits:
        found["sowatch.watch.limits"] = visible("; ".join(watch.limits))
    return found
