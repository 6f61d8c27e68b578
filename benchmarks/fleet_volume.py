"""A fleet by the million rows: made by SQL from tables of images and hosts, its truth reckoned in Python beside it.

Images have 250 programs with 20 libraries each; four images share a distribution and so its builds. In each image one
package is upgraded (`HOT`): a host replaces it at its time, and each of its programs is restarted later, or not yet.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from sowatch.model.wire_fleet import HostAnswer, HostState

__all__ = ["HOT", "Image", "Volume"]

IMAGES: Final = 40
DISTRIBUTIONS: Final = 10
PROGRAMS: Final = 250
LIBRARIES: Final = 20
#: Of 300 libraries that a distribution has.
POOL: Final = 300
HOT: Final = "libssl"
SECOND: Final = 1_000_000_000
#: Programs in a container.
IN_CONTAINER: Final = 10
_BATCH_HOSTS: Final = 100


class Group(NamedTuple):
    """What every host of an image maps, but for the state of the upgrade."""

    number: int
    build_id: str
    new_build_id: str
    soname: str
    path: str
    exe: str
    unit: str
    container: int
    program: int
    processes: int


class Image(NamedTuple):
    """What its hosts map."""

    number: int
    groups: tuple[Group, ...]

    @property
    def distribution(self) -> int:
        """Whose builds it has."""
        return self.number % DISTRIBUTIONS


def build_id(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()


def images() -> list[Image]:
    """The same ones in every run."""
    made = []
    for number in range(IMAGES):
        chance = random.Random(number)
        groups: list[Group] = []
        for program in range(PROGRAMS):
            names = {"libc", *(["libssl"] if chance.random() < 0.25 else [])}
            while len(names) < LIBRARIES:
                names.add(f"lib{int(POOL * chance.random() ** 2)}")
            for name in sorted(names):
                distribution = number % DISTRIBUTIONS
                groups.append(
                    Group(
                        number=len(groups),
                        build_id=build_id(distribution, name, 0),
                        new_build_id=build_id(distribution, name, 1) if name == HOT else "",
                        soname=f"{name}.so.{1 + len(name) % 3}",
                        path=f"/usr/lib/x86_64-linux-gnu/{name}.so.{1 + len(name) % 3}",
                        exe=f"/usr/sbin/program-{program}",
                        unit=f"program-{program}.service",
                        container=program // IN_CONTAINER + 1 if program % 2 else 0,
                        program=program,
                        processes=1 + program % 4,
                    )
                )
        made.append(Image(number, tuple(groups)))
    return made


class Volume:
    """A fleet in a store.

    Args:
        query: runs one statement.
        hosts: how many.
        now_ns: the time of the last heartbeats.
    """

    def __init__(self, query: Callable[[str], Any], hosts: int, now_ns: int) -> None:
        self._query = query
        self.hosts = hosts
        self.now_ns = now_ns
        self.images = images()
        self.rows = hosts * PROGRAMS * LIBRARIES

    # ---- truth: by number of host, nothing of it is asked of the store -----------------------------

    @staticmethod
    def state(host: int) -> HostState:
        """What a host is: some are dead, lost a record, or poll."""
        place = host % 100
        return "silent" if place < 2 else "lossy" if place == 2 else "unsupported" if place == 3 else "answered"

    @staticmethod
    def is_upgraded(host: int) -> bool:
        """Whether it has replaced its package."""
        return host % 10 < 7

    @classmethod
    def is_restarted(cls, host: int, program: int) -> bool:
        """Whether a program maps the new file since."""
        return cls.is_upgraded(host) and (host // 10 + program) % 8 != 0

    def builds_of(self, name: str) -> set[str]:
        """Of all distributions, old and new."""
        return {
            one.build_id for image in self.images for one in image.groups if one.soname.startswith(f"{name}.so")
        } | {
            one.new_build_id for image in self.images for one in image.groups if one.soname.startswith(f"{name}.so")
        } - {""}

    def mapped(self, build: str) -> dict[int, tuple[int, int]]:
        """By host that has it, groups and processes."""
        found = {}
        wanted = [[one for one in image.groups if build in (one.build_id, one.new_build_id)] for image in self.images]
        for host in range(self.hosts):
            some = [
                one.processes
                for one in wanted[host % IMAGES]
                if (one.new_build_id if one.new_build_id and self.is_restarted(host, one.program) else one.build_id)
                == build
            ]
            if some:
                found[host] = (len(some), sum(some))
        return found

    def answers(self, build: str) -> dict[str, HostAnswer]:
        """Of each host, by its name."""
        mapped = self.mapped(build)
        found: dict[str, HostAnswer] = {}
        for host in range(self.hosts):
            state = self.state(host)
            if host in mapped:
                answer: HostAnswer = "mapped" if state in ("answered", "unsupported") else "not observed"
            else:
                answer = "not mapped" if state == "answered" else "not observed"
            found[self.name(host)] = answer
        return found

    def stale_rows(self) -> int:
        """Groups that run a replaced file."""
        hot = [[one for one in image.groups if one.new_build_id] for image in self.images]
        return sum(
            not self.is_restarted(host, one.program)
            for host in range(self.hosts)
            if self.is_upgraded(host)
            for one in hot[host % IMAGES]
        )

    @staticmethod
    def name(host: int) -> str:
        return f"host-{host:05}"

    # ---- rows --------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Everything: a snapshot of each host, its upgrade, its last heartbeat."""
        self._make_images()
        for first in range(0, self.hosts, _BATCH_HOSTS):
            self._fill(first, min(_BATCH_HOSTS, self.hosts - first))

    def snapshot(self, number: int, at_ns: int) -> None:
        """Everything anew."""
        for first in range(0, self.hosts, _BATCH_HOSTS):
            count = min(_BATCH_HOSTS, self.hosts - first)
            self._query(self._snapshot(first, count, number, at_ns))

    def _make_images(self) -> None:
        self._query("DROP TABLE IF EXISTS sim_groups")
        self._query(
            "CREATE TABLE sim_groups (image UInt32, number UInt32, build_id String, new_build_id String, soname String, "
            "path String, exe String, exe_build_id String, unit String, container UInt32, program UInt32, "
            "processes UInt32, purl String, new_purl String, package String) ENGINE = MergeTree ORDER BY (image, number)"
        )
        for image in self.images:
            self._query("INSERT INTO sim_groups FORMAT TSV\n" + "\n".join(self._lines(image)))

    @staticmethod
    def _lines(image: Image) -> Iterator[str]:
        for one in image.groups:
            name = one.soname.partition(".")[0]
            purl = f"pkg:deb/distribution-{image.distribution}/{name}@1.0-1?arch=amd64"
            unit = "" if one.container else one.unit
            cells = (
                *(image.number, one.number, one.build_id, one.new_build_id, one.soname, one.path, one.exe),
                *(build_id(image.distribution, one.exe), unit, one.container, one.program, one.processes),
                *(purl, purl.replace("1.0-1", "1.0-2") if one.new_build_id else "", name),
            )
            yield "\t".join(map(str, cells))

    #: What Python has as `is_upgraded` and `is_restarted`.
    _UPGRADED: Final = "new_build_id != '' AND host % 10 < 7"
    _RESTARTED: Final = f"{_UPGRADED} AND (intDiv(host, 10) + program) % 8 != 0"
    _HOST: Final = (
        "concat('id-', leftPad(toString(host), 5, '0')) AS host_id, concat('host-', leftPad(toString(host), 5, '0')) AS "
        "host_name, 'boot' AS boot_id, '0.1' AS agent_version"
    )

    @property
    def begin_ns(self) -> int:
        """When the agents started."""
        return self.now_ns - 12 * 3600 * SECOND

    def _groups(self, *, event: str, build: str, purl: str, version: str, seq: str, snapshot: int, extra: str) -> str:
        return (
            f"SELECT {event} AS event, {version} AS version, {self._HOST}, {self.begin_ns} + host AS epoch, "
            f"{snapshot} AS snapshot, {seq} AS seq, cityHash64(host, number, {build}) AS key, {build} AS build_id, soname, "
            "path, 'library' AS kind, exe, exe_build_id, "
            "if(container = 0, '', lower(hex(SHA256(toString(host * 1000 + container))))) AS container, unit, package, "
            f"if({build} = new_build_id, '1.0-2', '1.0-1') AS package_version, package AS source_package, {purl} AS purl, "
            "'dpkg' AS identified_by, "
            "arrayMap(one -> toUInt32(cityHash64(host, program, one) % 100000), range(processes)) AS pids, "
            f"{extra}"
        )

    _COLUMNS: Final = (
        "event, version, host_id, host_name, boot_id, agent_version, epoch, snapshot, seq, key, build_id, soname, path, kind, "
        "exe, exe_build_id, container, unit, package, package_version, source_package, purl, identified_by, pids, since, "
        "processes, stale, stale_since"
    )

    def _from(self, first: int, count: int) -> str:
        return (
            f"FROM (SELECT {first} + number AS host FROM numbers({count})) AS hosts "
            f"INNER JOIN sim_groups AS groups ON host % {IMAGES} = groups.image"
        )

    def _snapshot(self, first: int, count: int, number: int, at_ns: int, *, is_first: bool = False) -> str:
        """States of what each host maps; at the first one everything is old."""
        restarted = "0" if is_first else self._RESTARTED
        upgraded = "0" if is_first else self._UPGRADED
        since = f"if({restarted}, {self.begin_ns} + {2 * 3600 * SECOND} + program, epoch)"
        extra = (
            f"{since} AS since, processes, if({upgraded} AND NOT ({restarted}), 'replaced', '') AS stale, "
            f"if({upgraded} AND NOT ({restarted}), {self.begin_ns} + {3600 * SECOND}, 0) AS stale_since"
        )
        sql = self._groups(
            event="'state'",
            build=f"if({restarted}, new_build_id, groups.build_id)",
            purl=f"if({restarted}, new_purl, groups.purl)",
            version=f"{at_ns} + number",
            seq="number + 1",
            snapshot=number,
            extra=extra,
        )
        # One record of those hosts that are lossy is lost.
        return (
            f"INSERT INTO fleet_incoming ({self._COLUMNS}) {sql} {self._from(first, count)} "
            "WHERE NOT (host % 100 = 2 AND number = 7)"
        )

    def _fill(self, first: int, count: int) -> None:
        begin = self.begin_ns + SECOND
        size = PROGRAMS * LIBRARIES
        self._query(self._snapshot(first, count, 1, begin, is_first=True))
        hosts = f"FROM (SELECT {first} + number AS host FROM numbers({count})) AS hosts"
        marks = (
            f"INSERT INTO fleet_incoming (event, version, host_id, host_name, boot_id, agent_version, epoch, snapshot, seq, "
            f"records) SELECT event, {begin} + at AS version, {self._HOST}, {self.begin_ns} + host AS epoch, 1, seq, "
            f"if(event = 'snapshot_end', {size}, 0) {hosts} ARRAY JOIN ['snapshot_begin', 'snapshot_end'] AS event, "
            f"[-1, {size}] AS at, [0, {size + 1}] AS seq"
        )
        self._query(marks)
        # An hour later the file is replaced, two hours later programs are restarted.
        is_new = "change.1 = 'mapped'"
        replaced = f"{self.begin_ns} + {3600 * SECOND}"
        sql = self._groups(
            event="change.1",
            build=f"if({is_new}, new_build_id, groups.build_id)",
            purl=f"if({is_new}, new_purl, groups.purl)",
            version=f"{self.begin_ns} + change.2 * {SECOND} + number",
            seq=f"{size + 1} + row_number() OVER (PARTITION BY host ORDER BY change.2, number)",
            snapshot=1,
            extra=f"if({is_new}, {self.begin_ns} + {7200 * SECOND} + program, epoch) AS since, "
            f"if(change.1 = 'unmapped', 0, processes) AS processes, if({is_new}, '', 'replaced') AS stale, "
            f"if({is_new}, 0, {replaced}) AS stale_since",
        )
        changes = "[('state', 3600), ('unmapped', 7200), ('mapped', 7201)]"
        self._query(
            f"INSERT INTO fleet_incoming ({self._COLUMNS}) {sql} FROM (SELECT * {self._from(first, count)} WHERE "
            f"{self._UPGRADED}) AS groups ARRAY JOIN if({self._RESTARTED}, {changes}, arraySlice({changes}, 1, 1)) AS change"
        )
        self._heartbeats(hosts)

    def _heartbeats(self, hosts: str) -> None:
        # Dead ones sent their last an hour ago. The number of one that came already: it counts once.
        self._query(
            f"INSERT INTO fleet_incoming (event, version, host_id, host_name, boot_id, agent_version, epoch, snapshot, seq, "
            f"interval_s, strategy, guarantee, is_repaired, groups) SELECT 'heartbeat', {self.now_ns} - "
            f"if(host % 100 < 2, {3600 * SECOND}, 0) AS version, {self._HOST}, {self.begin_ns} + host AS epoch, 1, "
            f"1, 30, if(host % 100 = 3, 'procfs', 'core'), if(host % 100 = 3, 'sampled', 'exact'), 1, "
            f"{PROGRAMS * LIBRARIES} {hosts}"
        )
