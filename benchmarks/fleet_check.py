"""Every answer of a store compared with the truth of a made-up world; what differs, in words."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.fleet_world import DISTRIBUTIONS, NAMES, SECOND, VERSIONS, Host, Place, World, expected, file_of, soname

from sowatch.fleet.asks import Asks
from sowatch.fleet.plans import planned
from sowatch.fleet.questions import Fleet
from sowatch.fleet.targets import Target
from sowatch.model.lines import time_ns_from
from sowatch.model.wire_fleet import FleetHistory, FleetHost, FleetMapping, FleetRemediation, FleetVersion

__all__ = ["Check"]

T = TypeVar("T")

#: A record is made within a second of a mapping, and one of a group that comes and goes within a minute.
_LATE_S = 62.0


@dataclass
class Check:
    """Compares; ``differences`` has what is wrong, ``compared`` how much was compared.

    Every mapping of every host is compared by the sonames; of other names there are ``samples`` of each kind, 0: all.
    """

    world: World
    asks: Asks
    samples: int = 0
    differences: list[str] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.asks, self.world.end_ns)
        self.chance = random.Random(7)
        #: Twins are one host to the store.
        self.hosts: dict[str, list[Host]] = {}
        for host in self.world.hosts:
            self.hosts.setdefault(host.host_id, []).append(host)
        self.mapped = {host_id: _sum(host.mapped() for host in some) for host_id, some in self.hosts.items()}
        self.builds = sorted({build for host in self.world.hosts for build in host.edges})

    def run(self) -> None:
        """All questions."""
        self.coverage()
        for name in NAMES:
            builds = {
                file_of(distribution, name, version).library.build_id or ""
                for distribution in range(DISTRIBUTIONS)
                for version in range(VERSIONS)
            }
            self.who(Target("soname", soname(name)), builds)
            self.versions(name, builds)
        for target, builds in self._others():
            self.who(target, builds)
            self.remediated(target, builds)
        self.stale()
        for build in self._some(self.builds):
            self.history(build)

    def _others(self) -> Iterator[tuple[Target, set[str]]]:
        """Names by which a part of the same is asked for."""
        yield Target("build_id", "0" * 40), set()
        yield (
            Target("soname", "libssl"),
            {
                file_of(distribution, "libssl", version).library.build_id or ""
                for distribution in range(DISTRIBUTIONS)
                for version in range(VERSIONS)
            },
        )
        for build in self._some(self.builds):
            yield Target("build_id", build[: self.chance.choice((8, 40))]), {build}
        for distribution, name in self._some([(one, name) for one in range(DISTRIBUTIONS) for name in NAMES]):
            files = [file_of(distribution, name, version) for version in range(VERSIONS)]
            of_name = {one.library.build_id or "" for one in files}
            purl = files[1].package.purl
            yield Target("purl", purl), {files[1].library.build_id or ""}
            yield Target("purl", purl.partition("@")[0]), of_name
            yield Target("path", files[0].library.path), of_name

    def _some(self, values: list[T]) -> list[T]:
        return values if not self.samples else self.chance.sample(values, min(self.samples, len(values)))

    # ---- one question each -------------------------------------------------------------------------

    def coverage(self) -> None:
        """The states of hosts are those that they have to be."""
        found = {one.host_id: one for one in self.fleet.coverage().lines if isinstance(one, FleetHost)}
        self._same("coverage", set(found), set(self.hosts))
        for host_id, some in self.hosts.items():
            one = found.get(host_id)
            if one is not None:
                self._same(f"state of {some[0].name}, {some[0].fate}, {one.reason!r}", one.state, some[0].state)

    def who(self, target: Target, builds: set[str]) -> None:
        """Each host has the answer that it should have, and the rows are what is mapped."""
        what = f"who {target.text}"
        answer = self.fleet.who(target)
        rows: dict[str, dict[str, Counter[Place]]] = {}
        open_hosts = set()
        for line in answer.lines:
            if isinstance(line, FleetMapping):
                place = Place(line.unit, line.container, line.exe, line.path)
                rows.setdefault(line.host_id, {}).setdefault(line.build_id, Counter())[place] += line.process_count
            elif isinstance(line, FleetHost):
                open_hosts.add(line.host_id)
        counts: Counter[str] = Counter()
        for host_id, some in self.hosts.items():
            truth = {build: places for build, places in self.mapped[host_id].items() if build in builds}
            state = some[0].state
            right = expected(state, is_mapped=bool(truth))
            counts[right] += 1
            given = "not observed" if host_id in open_hosts else "mapped" if host_id in rows else "not mapped"
            self._same(f"{what}: {some[0].name}, {some[0].fate}", given, right)
            if given == "not mapped" and truth:
                self.differences.append(f"{what}: {some[0].name} has it, and the answer is that it has not")
            if state in ("answered", "unsupported"):
                self._same(f"{what}: rows of {some[0].name}, {some[0].fate}", rows.get(host_id, {}), truth)
        total = "mapped" if counts["mapped"] else "not observed" if counts["not observed"] else "not mapped"
        head = answer.head
        self._same(f"{what}: of all", head.answer, total)
        self._same(
            f"{what}: counts",
            (head.mapped_host_count, head.not_mapped_host_count, head.not_observed_host_count),
            (counts["mapped"], counts["not mapped"], counts["not observed"]),
        )

    def remediated(self, target: Target, builds: set[str]) -> None:
        """Of all hosts together."""
        right = {
            expected(some[0].state, is_mapped=any(build in self.mapped[host_id] for build in builds))
            for host_id, some in self.hosts.items()
        }
        answer = "mapped" if "mapped" in right else "not observed" if "not observed" in right else "not mapped"
        self._same(f"remediated {target.text}", self.fleet.remediated([target]).head.answer, answer)

    def versions(self, name: str, builds: set[str]) -> None:
        """As many hosts and processes by build."""
        right: dict[str, tuple[int, int]] = {}
        for build in builds:
            having = [
                self.mapped[host_id][build]
                for host_id, some in self.hosts.items()
                if build in self.mapped[host_id] and some[0].state in ("answered", "unsupported")
            ]
            if having:
                right[build] = (len(having), sum(sum(places.values()) for places in having))
        lines = self.fleet.versions(Target("soname", name)).lines
        found = {
            one.build_id: (one.mapped_host_count, one.process_count)
            for one in lines
            if isinstance(one, FleetVersion) and one.mapped_host_count
        }
        self._same(f"versions {name}", found, right)

    def stale(self) -> None:
        """Who runs a replaced file, since when; and each of them is in the plan."""
        right: dict[tuple[str, Place, str], float] = {}
        for host_id, some in self.hosts.items():
            if some[0].state not in ("answered", "unsupported"):
                continue
            for build, places in self.mapped[host_id].items():
                at_s = some[0].replaced_s.get(build)
                if at_s is not None:
                    right |= {(host_id, place, build): at_s for place in places}
        found = {}
        for one in self.fleet.stale().lines:
            assert isinstance(one, FleetMapping)
            if one.answer == "mapped":
                place = Place(one.unit, one.container, one.exe, one.path)
                assert one.stale_since is not None
                since_s = (time_ns_from(one.stale_since) - self.world.begin_ns) / SECOND
                found[one.host_id, place, one.build_id] = since_s
        self._same("stale", found.keys(), right.keys())
        for key in found.keys() & right.keys():
            self._near(f"stale since, {key}", found[key], right[key], 0.001)
        in_plan = {
            (group.host_id, Place(group.unit, group.container, group.exe, group.path), group.build_id)
            for one in planned(self.fleet.stale_groups())
            for group in one.groups
            if group.answer == "mapped"
        }
        self._same("stale --plan", in_plan, right.keys())

    def history(self, build: str) -> None:
        """When the first process came, the last one went, and how long that took."""
        found: dict[str, FleetHistory] = {}
        for line in self.fleet.history(Target("build_id", build)).lines:
            if isinstance(line, FleetHistory):
                found[line.host_id] = line
            else:
                assert isinstance(line, FleetRemediation)
        for host_id, some in self.hosts.items():
            host = some[0]
            if host.state not in ("answered", "unsupported"):
                continue
            edges = _without_short(host.edges.get(build, []))
            one = found.get(host_id)
            what = f"history {build}: {host.name}, {host.fate}"
            self._same(f"{what}: known", one is not None, bool(edges))
            if one is None or not edges:
                continue
            whole = host.agents == 1
            self._same(f"{what}: gone", one.last_gone is not None, not edges[-1][1])
            self._near(f"{what}: first", self._s(one.first_mapped), edges[0][0], 1.0 if whole else 1e9)
            if one.last_gone is not None and not edges[-1][1]:
                # What ended while no agent ran is known to have ended when the next one began.
                late_s = _LATE_S if host.fate in ("well", "storms", "late", "polling") else 6.1 * 3600
                self._near(f"{what}: last", self._s(one.last_gone), edges[-1][0], late_s)
                replaced_s = host.replaced_s.get(build)
                if replaced_s is not None and one.remediated_s is not None:
                    self._near(f"{what}: remediated", one.remediated_s, edges[-1][0] - replaced_s, late_s)
            replaced_s = host.replaced_s.get(build)
            if edges[-1][1] and replaced_s is not None:
                self._same(f"{what}: open", one.remediated_s, None)

    # ---- comparison --------------------------------------------------------------------------------

    def _s(self, time: str | None) -> float:
        assert time is not None
        return (time_ns_from(time) - self.world.begin_ns) / SECOND

    def _same(self, what: str, found: object, right: object) -> None:
        self.compared[what.partition(":")[0].partition(" ")[0]] += 1
        if found != right:
            self.differences.append(f"{what}: {found!r}, and right is {right!r}")

    def _near(self, what: str, found: float, right: float, tolerance: float) -> None:
        self.compared[what.partition(":")[0].partition(" ")[0]] += 1
        if abs(found - right) > tolerance:
            self.differences.append(f"{what}: {found:.3f} s, and right is {right:.3f} s")


def _sum(parts: Iterable[dict[str, Counter[Place]]]) -> dict[str, Counter[Place]]:
    found: dict[str, Counter[Place]] = {}
    for part in parts:
        for build, places in part.items():
            found.setdefault(build, Counter()).update(places)
    return found


def _without_short(edges: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """Times as an agent has them: what lasts for less than a second is no mapping, and no gap either."""
    found: list[tuple[float, bool]] = []
    for at_s, is_mapped in edges:
        if found and at_s - found[-1][0] < 1.0:
            found.pop()
        else:
            found.append((at_s, is_mapped))
    return found
