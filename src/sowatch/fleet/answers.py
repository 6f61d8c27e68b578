"""When an answer holds: pure rules over the states of hosts. docs/decisions/0069-fleet-records.md has the reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

from msgspec import Struct

from sowatch.model.wire_fleet import FleetAnswer, FleetHosts, FleetLine, HostAnswer, HostState

__all__ = [
    "Answer",
    "Edge",
    "Host",
    "counted_hosts",
    "exit_code",
    "fleet_answer",
    "host_answer",
    "missing_hosts",
    "over_time",
    "quantile",
]

#: Of `sowatch fleet remediated`.
GONE: Final = 0
MAPPED: Final = 1
OPEN: Final = 3


class Host(Struct, frozen=True, gc=False, kw_only=True):
    """A host as the view ``fleet_coverage`` has it; times in ns since the epoch, 0 where there is none."""

    host_id: str
    host_name: str
    state: HostState
    reason: str = ""
    heard_at: int = 0
    agent_version: str = ""
    strategy: str = ""
    guarantee: str = ""
    limits: str = ""
    lost: int = 0
    dropped: int = 0
    unreadable: int = 0
    groups: int = 0
    #: The version of the first row that is in force.
    in_force_from: int = 0


class Answer(NamedTuple):
    """The first line, and those that follow it as they come."""

    head: FleetAnswer
    lines: Iterator[FleetLine]


class Edge(NamedTuple):
    """From ``at_ns`` on a host has something mapped, or has it no more."""

    at_ns: int
    is_mapped: bool


def host_answer(state: HostState, *, is_in_force: bool) -> HostAnswer:
    """Of one host.

    >>> host_answer("lossy", is_in_force=False), host_answer("unsupported", is_in_force=True)
    ('not observed', 'mapped')
    """
    if is_in_force:
        return "mapped" if state in ("answered", "unsupported") else "not observed"
    return "not mapped" if state == "answered" else "not observed"


def fleet_answer(answers: Iterable[HostAnswer]) -> HostAnswer:
    """Of all hosts together.

    >>> fleet_answer(["not mapped", "not observed"]), fleet_answer([]), fleet_answer(["not mapped"])
    ('not observed', 'not observed', 'not mapped')
    """
    found = set(answers)
    if "mapped" in found:
        return "mapped"
    return "not mapped" if found == {"not mapped"} else "not observed"


def exit_code(answer: HostAnswer) -> int:
    """Of `sowatch fleet remediated`."""
    return {"mapped": MAPPED, "not mapped": GONE, "not observed": OPEN}[answer]


def counted_hosts(hosts: Iterable[Host]) -> FleetHosts:
    """How many there are in which state."""
    counts = dict.fromkeys(("answered", "silent", "lossy", "unsupported"), 0)
    for one in hosts:
        counts[one.state] += 1
    return FleetHosts(**counts)


def missing_hosts(hosts: Collection[Host], expected: Iterable[str]) -> list[Host]:
    """Hosts that should be there, by name or id, and of which nothing came: they are silent."""
    known = {one.host_id for one in hosts} | {one.host_name for one in hosts}
    names = dict.fromkeys(name for name in expected if name not in known)
    return [
        Host(host_id=name, host_name=name, state="silent", reason="it is expected, and nothing ever came from it")
        for name in names
    ]


def over_time(edges: Iterable[Iterable[Edge]], since_ns: int = 0) -> list[tuple[int, int]]:
    """From each time on, on how many hosts it was mapped; the first one is ``since_ns`` if something was then.

    Args:
        edges: of each host, by time, mapped and not mapped by turns.
        since_ns: what came before is one number.
    """
    changes: dict[int, int] = {}
    for one in edges:
        for at_ns, is_mapped in one:
            place_ns = max(at_ns, since_ns)
            changes[place_ns] = changes.get(place_ns, 0) + (1 if is_mapped else -1)
    found, now = [], 0
    for at_ns in sorted(changes):
        if changes[at_ns]:
            now += changes[at_ns]
            found.append((at_ns, now))
    return found


def quantile(values: Collection[float], share: float) -> float | None:
    """The value that at least ``share`` of them do not exceed; None of none.

    >>> quantile([4.0, 1.0, 2.0, 3.0], 0.5), quantile([], 0.95)
    (2.0, None)
    """
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
