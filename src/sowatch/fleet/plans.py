"""What has to be restarted in a fleet, and by which command on which host. Pure; nothing is restarted.

`sowatch.inventory.restarts` has the rules for one host. A record names a unit or a container, not its cgroup, so the
runtime of a container is not known; a pod is restarted by whatever has made it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final, Literal, NamedTuple

from sowatch.fleet.questions import StaleGroup, pod_of
from sowatch.inventory.restarts import restart_target
from sowatch.model.escape import one_line
from sowatch.model.lines import stamp
from sowatch.model.wire_fleet import FleetRestart

__all__ = ["PlannedRestart", "plan_line", "planned", "restart_line"]

#: A unit of a user's service manager, as `sowatch.fleet.records` writes it.
_OF_USER: Final = re.compile(r"user@(\d+)\.service/([^/]+)")
#: The names that a Deployment gives its pods: hash of the template, random end (apimachinery, rand.SafeEncodeString).
_OF_DEPLOYMENT: Final = re.compile(r"(.+)-[bcdf-hj-np-tv-xz24-9]{8,10}-[bcdf-hj-np-tv-xz24-9]{5}")
#: RFC 1123, as the API server has it: nothing else may stand in a command.
_KUBERNETES_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
#: Names in which each backslash is one of two. systemd-escape(1) makes names with `\x2d` in them.
_DOUBLED_ONLY: Final = re.compile(r"(?:[^\\]|\\\\)*")
#: A unit of logins and other transient scopes, as records have it.
_SESSION: Final = "session"

PlannedKind = Literal["unit", "container", "session", "process", "pod"]


class PlannedRestart(NamedTuple):
    """What is restarted as one, with its groups of processes."""

    target: PlannedKind
    name: str
    deployment: str
    command: str | None
    advice: str | None
    groups: tuple[StaleGroup, ...]

    @property
    def first(self) -> StaleGroup:
        """A group, for what all of them have in common."""
        return self.groups[0]

    @property
    def processes(self) -> int:
        """With stale files; one that has several is counted once for each executable."""
        by_exe: dict[tuple[str, str], int] = {}
        for one in self.groups:
            key = one.exe, one.container
            by_exe[key] = max(by_exe.get(key, 0), one.processes)
        return sum(by_exe.values())

    @property
    def listen(self) -> list[str]:
        """The ports of all of them."""
        return list(dict.fromkeys(port for one in self.groups for port in one.listen.split(",") if port))

    @property
    def paths(self) -> list[str]:
        """Of the stale files."""
        return sorted({one.path for one in self.groups})

    @property
    def purls(self) -> list[str]:
        """Of the packages that are still run."""
        return sorted({one.purl for one in self.groups if one.purl})

    @property
    def stale_since(self) -> int:
        """Since when the first of them is stale, in ns since the epoch; 0: not known."""
        return min((one.stale_since for one in self.groups if one.stale_since), default=0)


def planned(groups: Iterable[StaleGroup]) -> Iterator[PlannedRestart]:
    """What has to be restarted, as the groups come: those of one host, pod, container and unit one after the other."""
    for _, some in groupby(groups, _key):
        yield _planned(tuple(some))


def _key(one: StaleGroup) -> tuple[str, ...]:
    if one.pod_uid or one.pod:
        return one.host_id, one.namespace, one.pod_uid, one.pod
    return one.host_id, "", "", "", one.container, one.unit


def _planned(groups: tuple[StaleGroup, ...]) -> PlannedRestart:
    one = groups[0]
    if one.pod_uid or one.pod:
        return _of_pod(groups)
    if one.container:
        advice = "restart the container with what started it: which is not known"
        return PlannedRestart("container", one.container, "", None, advice, groups)
    if one.unit == _SESSION:
        return PlannedRestart("session", one.unit, "", None, "log out and in, or end what runs in it", groups)
    unit = _real_name(one.unit)
    user = None if unit is None else _OF_USER.fullmatch(unit)
    if user is not None:
        found = restart_target(f"/user.slice/user-{user[1]}.slice/user@{user[1]}.service/app.slice/{user[2]}")
    elif unit is None or "/" in unit:  # a part of it would be another unit
        return PlannedRestart("unit", one.unit, "", None, "its name is none that may stand in a command", groups)
    else:
        found = restart_target(f"/system.slice/{unit}" if unit else "/")
    return PlannedRestart(found.kind, one.unit, "", found.command, found.advice, groups)


def _real_name(shown: str) -> str | None:
    """What `sowatch.model.escape.visible` made this of; None if it has another escape than that of a backslash."""
    return shown.replace(r"\\", "\\") if _DOUBLED_ONLY.fullmatch(shown) else None


def _of_pod(groups: tuple[StaleGroup, ...]) -> PlannedRestart:
    one = groups[0]
    names = one.namespace, one.pod
    if not all(_KUBERNETES_NAME.fullmatch(name) for name in names):
        advice = "its name is none that may stand in a command" if one.pod else "its name is not known: restart the pod"
        return PlannedRestart("pod", one.pod or one.pod_uid, "", None, advice, groups)
    made_by = _OF_DEPLOYMENT.fullmatch(one.pod)
    if made_by is not None:
        words = ["kubectl", "-n", one.namespace, "rollout", "restart", f"deployment/{made_by[1]}"]
        return PlannedRestart("pod", one.pod, made_by[1], shlex.join(words), None, groups)
    # A StatefulSet or DaemonSet makes it anew; nobody does so for one that was made by hand.
    words = ["kubectl", "-n", one.namespace, "delete", "pod", one.pod]
    return PlannedRestart("pod", one.pod, "", None, f"if a controller has made it: {shlex.join(words)}", groups)


def plan_line(one: PlannedRestart) -> str:
    """A line of `HOST COMMAND # why` for a shell; a comment where there is no command. One of a cluster has `-`.

    Where the name of the host may not stand in a command, that is a comment, too.
    """
    first = one.first
    facts = [f"{one.processes} processes" if one.processes != 1 else "1 process"]
    facts += [f"listens on {','.join(one.listen)}"] if one.listen else []
    facts += one.purls or one.paths
    facts += [] if first.state == "answered" else [f"the host is {first.state}"]
    why = "; ".join(facts)
    is_safe = _HOST_NAME.fullmatch(first.host_name) is not None
    if one.command is None or not is_safe:
        label = one.name or "(no unit)"
        return one_line(f"# {first.host_name} {label}: {one.command or one.advice} ({why})")
    place = "-" if one.target == "pod" else first.host_name
    return one_line(f"{place} {one.command}  # {why}")


def restart_line(one: PlannedRestart, seq: int) -> FleetRestart:
    """The same as JSON has it."""
    first = one.first
    return FleetRestart(
        schema=1,
        event="fleet_restart",
        seq=seq,
        host_id=first.host_id,
        host_name=first.host_name,
        state=first.state,
        target=one.target,
        name=one.name,
        pod=pod_of(first),
        deployment=one.deployment,
        command=one.command,
        advice=one.advice,
        process_count=one.processes,
        listen=one.listen,
        paths=one.paths,
        purls=one.purls,
        stale_since=stamp(one.stale_since) if one.stale_since else None,
    )
