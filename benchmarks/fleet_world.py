"""A fleet that is made up: hosts whose processes come and go, agents with the real coalescer, and a network that loses.

The world knows what every process has mapped at every time; the agents report it as agents do, by
`sowatch.fleet.changes.Changes`. A host has a fate: what goes wrong with it, and which state it must have in the end.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sowatch.fleet.changes import Changes
from sowatch.fleet.records import Record, WatchState
from sowatch.model.events import Library, Pod, Process
from sowatch.model.identity import FileId
from sowatch.model.wire_fleet import HostAnswer, HostState
from support import fleet_records
from support.fleet_records import Package, debian

__all__ = ["FATES", "NAMES", "SECOND", "Host", "Place", "World", "expected", "file_of", "soname"]

SECOND: Final = 1_000_000_000
HOUR_S: Final = 3600.0
#: The world begins so long before the end; agents send everything anew every six hours.
LENGTH_S: Final = 15 * HOUR_S
#: Nothing happens any more: an agent reports the number of processes of a group once a minute.
QUIET_S: Final = 300.0
INTERVAL_S: Final = 600.0
IMAGES: Final = 40
DISTRIBUTIONS: Final = 5
#: That a package can have.
VERSIONS: Final = 4
#: Of every distribution.
NAMES: Final = ("libc", "libm", "libssl", "libcrypto", "libz", "libxml2", "libcurl", "libffi", "libpq", "libpcre2")

#: What goes wrong with a host, and what it is in the end; `well` is what most are.
FATES: Final[dict[str, HostState]] = {
    "well": "answered",
    "storms": "answered",  # of processes that live for less than a second
    "late": "answered",  # its records arrive in any order, hours later
    "killed": "answered",  # its agent, and the next one finds another world
    "restarted": "answered",  # its agent, which comes back at once
    "late_epoch": "answered",  # killed, and the first agent's records arrive after those of the second
    "dropped": "answered",  # the agent drops records, knows it, and sends all anew
    "lost_earlier": "answered",  # the network loses records before the last snapshot
    "lost": "lossy",  # and one after it
    "first_snapshot": "lossy",  # no end of a snapshot ever arrives
    "killed_late": "lossy",  # the new agent's first snapshot does not arrive whole
    "twin": "lossy",  # another host has the same machine-id
    "unrepaired": "lossy",  # the agent lost events
    "unreadable": "lossy",  # and processes cannot be read
    "polling": "unsupported",
    "dead": "silent",
    "no_heartbeat": "silent",
    "ahead": "silent",  # its clock is an hour ahead
}
_SPECIAL: Final = [name for name in FATES if name != "well"]


class Place(NamedTuple):
    """Who has a file mapped, as a group has it."""

    unit: str
    container: str
    exe: str
    path: str


class File(NamedTuple):
    """A file of a package in one version."""

    name: str
    version: int
    library: Library
    package: Package


class Program(NamedTuple):
    """What an image runs."""

    number: int
    unit: str
    container: str
    pod: Pod | None
    exe: str
    names: tuple[str, ...]


def digest(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()


def soname(name: str) -> str:
    return f"{name}.so.{1 + len(name) % 3}"


def file_of(image: int, name: str, version: int) -> File:
    """The file that a package of the image's distribution has: the same one on all its hosts."""
    distribution = image % DISTRIBUTIONS
    path = f"/usr/lib/distribution-{distribution}/{soname(name)}"
    inode = int(digest(distribution, name, version)[:8], 16)
    build = digest("build", distribution, name, version)
    library = Library(path, FileId(8, 1, inode), build_id=build, soname=soname(name))
    return File(name, version, library, debian(f"{name}-{distribution}", f"1.{version}-1", name))


def programs(image: int, host: int) -> list[Program]:
    """What a host of the image runs: units, containers and pods."""
    chance = random.Random(image)
    made = []
    for number in range(6 + image % 5):
        names = ("libc", *sorted(chance.sample(NAMES[1:], 2 + number % 4)))
        exe = f"/usr/bin/program-{number}"
        if number % 3 == 2:
            container = digest("container", host, number) + "0" * 24
            pod = Pod(f"uid-{host}-{number}", f"shop-{number}-{host}", "shop") if number % 2 else None
            made.append(Program(number, "", container, pod, exe, names))
        else:
            made.append(Program(number, f"program-{number}.service", "", None, exe, names))
    return made


class Sent(NamedTuple):
    """A batch on its way: it arrives at that time."""

    arrives_s: float
    order: float
    records: list[fleet_records.Record]


@dataclass
class Host:
    """One host: its processes, and what its agent made of them."""

    number: int
    image: int
    fate: str
    begin_ns: int
    host_id: str
    name: str
    chance: random.Random
    files: dict[str, File] = field(default_factory=dict)
    #: By program, its processes with the files that each has.
    running: dict[int, list[tuple[Process, list[File]]]] = field(default_factory=dict)
    replaced_s: dict[str, float] = field(default_factory=dict)
    agent: Changes | None = None
    epoch_ns: int = 0
    agents: int = 0
    compared_s: float = 0.0
    watch: WatchState = field(default_factory=lambda: WatchState("core", "exact"))
    #: By build, when its first process came and its last one went.
    edges: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    users: Counter[str] = field(default_factory=Counter)
    sent: list[Sent] = field(default_factory=list)
    next_pid: int = 1000
    now_s: float = 0.0
    loses: bool = False
    ended_s: float = LENGTH_S

    @property
    def state(self) -> HostState:
        """What it is in the end."""
        return FATES[self.fate]

    # ---- the world ---------------------------------------------------------------------------------

    def start(self, program: Program) -> None:
        """Processes of a program, with the files as they are now."""
        some = []
        for _ in range(1 + program.number % 3):
            self.next_pid += 1
            cgroup = f"/system.slice/{program.unit}" if program.unit else f"/docker/{program.container}"
            process = Process(
                self.next_pid,
                int(self.now_s * 1e9),
                exe=program.exe,
                container=program.container or None,
                cgroup=cgroup,
                pod=program.pod,
            )
            files = [self.files[name] for name in program.names]
            some.append((process, files))
            for one in files:
                self._count(one, 1)
                if self.agent is not None:
                    self.agent.load(process, one.library)
        self.running[program.number] = some

    def stop(self, program: Program) -> None:
        """The end of its processes."""
        for process, files in self.running.pop(program.number, []):
            for one in files:
                self._count(one, -1)
                if self.agent is not None:
                    self.agent.unload(process.id, one.library.id)

    def _count(self, one: File, change: int) -> None:
        build = one.library.build_id or ""
        before = self.users[build]
        self.users[build] += change
        if (before > 0) != (self.users[build] > 0):
            self.edges.setdefault(build, []).append((self.now_s, before == 0))

    def upgrade(self, name: str) -> None:
        """A package is replaced; what runs goes on with the old file."""
        old = self.files[name]
        self.files[name] = file_of(self.image, name, old.version + 1)
        self.replaced_s[old.library.build_id or ""] = self.now_s
        if self.agent is not None:
            self._report_stale()

    def _report_stale(self) -> None:
        assert self.agent is not None
        for some in self.running.values():
            for process, files in some:
                for one in files:
                    at_s = self.replaced_s.get(one.library.build_id or "")
                    if at_s is not None:
                        self.agent.stale(process.id, one.library.id, "replaced", self.begin_ns + int(at_s * 1e9))

    def storm(self, count: int) -> None:
        """Processes that are gone within a second, at most."""
        for number in range(count):
            self.next_pid += 1
            process = Process(self.next_pid, number, exe="/usr/bin/short", cgroup="/system.slice/short.service")
            assert self.agent is not None
            self.agent.load(process, self.files["libc"].library)
            self.agent.unload(process.id, self.files["libc"].library.id)

    def mapped(self) -> dict[str, Counter[Place]]:
        """By build, who has it now, with how many processes."""
        found: dict[str, Counter[Place]] = {}
        by_number = {one.number: one for one in programs(self.image, self.number)}
        for number, some in self.running.items():
            program = by_number[number]
            for _, files in some:
                for one in files:
                    place = Place(program.unit, program.container, program.exe, one.library.path)
                    found.setdefault(one.library.build_id or "", Counter())[place] += 1
        return found

    # ---- the agent ---------------------------------------------------------------------------------

    def start_agent(self) -> None:
        """It finds what runs."""
        clock_ns = int(HOUR_S) * SECOND if self.fate == "ahead" else 0
        self.epoch_ns = self.begin_ns + int(self.now_s * 1e9) + clock_ns + self.number
        self.agents += 1
        self.compared_s = self.now_s
        self.agent = Changes(self.host_id, interval_s=INTERVAL_S)
        self._tick()
        for some in self.running.values():
            for process, files in some:
                for one in files:
                    self.agent.load(process, one.library)
        self.agent.may_begin = True

    def _tick(self) -> None:
        assert self.agent is not None
        clock_ns = int(HOUR_S) * SECOND if self.fate == "ahead" else 0
        self.agent.tick(self.now_s, self.begin_ns + int(self.now_s * 1e9) + clock_ns)

    def go_on(self, until_s: float) -> None:
        """Time passes until then."""
        while self.agent is not None:
            due_s = max(self.agent.next_due_s, self.now_s)
            if due_s >= until_s:
                break
            self.now_s = due_s
            self.turn()
        self.now_s = until_s
        if self.agent is not None:
            self._tick()

    def turn(self) -> None:
        """What the agent's thread does when something is due."""
        assert self.agent is not None
        self._tick()
        self.agent.advance()
        if self.compared_s < self.now_s - 2:
            self.compared_s = float("inf")
            self._report_stale()  # what the agent found when it started is compared with the disk, too
        if self.agent.is_heartbeat_due():
            self.agent.heartbeat(self.watch)
        records = self.agent.take(100_000)
        if records:
            self._send([self._outgoing(one) for one in records])

    def _outgoing(self, record: Record) -> fleet_records.Record:
        """With the identity of the host, and packages, but of containers in each tenth image."""
        attributes = {name: _text(value) for name, value in record.attributes.items()}
        build = attributes.get("sowatch.library.build_id")
        is_read = not ("container.id" in attributes and self.image % 10 == 0)
        if build and is_read:
            package = PACKAGES[build]
            attributes |= {
                "sowatch.package.name": package.name,
                "sowatch.package.version": package.version,
                "sowatch.package.source": package.source,
                "sowatch.package.purl": package.purl,
                "sowatch.package.identified_by": package.identified_by,
            }
        resource = {
            "host.id": self.host_id,
            "host.name": self.name,
            "service.name": "sowatch",
            "service.version": fleet_records.VERSION,
            "sowatch.boot.id": digest("boot", self.number),
            "sowatch.fleet.epoch": str(self.epoch_ns),
        }
        return fleet_records.Record(record.version_ns, record.event, resource, attributes)

    # ---- the network -------------------------------------------------------------------------------

    def _send(self, records: list[fleet_records.Record]) -> None:
        """It loses, doubles, delays and mixes up."""
        if self.fate == "first_snapshot":
            records = [one for one in records if one.event != "sowatch.fleet.snapshot_end"]
        if self.fate == "no_heartbeat":
            records = [one for one in records if one.event != "sowatch.fleet.heartbeat"]
        if self.loses:
            lost = self.chance.randrange(len(records))
            records = records[:lost] + records[lost + 1 :]
        chance = self.chance
        late_s = 0.0
        if self.fate == "late":
            late_s = chance.random() * 4 * HOUR_S
        elif chance.random() < 0.1:
            late_s = chance.random() * HOUR_S
        if self.fate == "late_epoch" and self.agents == 1:
            late_s = LENGTH_S
        if chance.random() < 0.3:
            chance.shuffle(records)
        for _ in range(2 if chance.random() < 0.05 else 1):
            self.sent.append(Sent(self.now_s + late_s, chance.random(), records))


def _text(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else str(value)


#: By build, of every version that there can be.
PACKAGES: Final = {
    one.library.build_id: one.package
    for distribution in range(DISTRIBUTIONS)
    for name in NAMES
    for version in range(VERSIONS)
    for one in [file_of(distribution, name, version)]
}


class World:
    """All hosts.

    Args:
        hosts: how many.
        seed: of chance.
        end_ns: the time of the end.
    """

    def __init__(self, hosts: int, seed: int, end_ns: int) -> None:
        self.end_ns = end_ns
        self.begin_ns = end_ns - int(LENGTH_S * 1e9)
        self.hosts: list[Host] = []
        chance = random.Random(seed)
        for number in range(hosts):
            # Four of ten have some fate, each as many.
            fate = _SPECIAL[number // 5 * 2 % len(_SPECIAL)] if number % 5 == 0 else "well"
            fate = _SPECIAL[(number // 5 * 2 + 1) % len(_SPECIAL)] if number % 5 == 1 else fate
            self.hosts.append(self._host(number, fate, chance))
        twins = [one for one in self.hosts if one.fate == "twin"]
        for one in twins:
            self.hosts.append(self._host(len(self.hosts), "twin", chance, twin=one))

    def _host(self, number: int, fate: str, chance: random.Random, *, twin: Host | None = None) -> Host:
        image = number % IMAGES
        host_id, name = (twin.host_id, twin.name) if twin else (digest("host", number)[:32], f"host-{number:04}")
        host = Host(number, image, fate, self.begin_ns, host_id, name, random.Random(chance.random()))
        host.files = {name: file_of(image, name, 0) for name in NAMES}
        if fate == "polling":
            host.watch = WatchState("procfs", "sampled")
        if fate == "unreadable":
            host.watch = WatchState("core", "exact", unreadable=3)
        if fate == "unrepaired":
            host.watch = WatchState("core", "exact", lost=7, is_repaired=False)
        return host

    def run(self) -> Iterator[list[fleet_records.Record]]:
        """Lets it happen; batches in the order in which they arrive."""
        arriving: list[tuple[float, float, int, int, list[fleet_records.Record]]] = []
        for at, host in enumerate(self.hosts):
            self._run(host)
            for number, one in enumerate(host.sent):
                heapq.heappush(arriving, (one.arrives_s, one.order, at, number, one.records))
            host.sent.clear()
        while arriving:
            yield heapq.heappop(arriving)[-1]

    def _run(self, host: Host) -> None:
        chance = host.chance
        known = programs(host.image, host.number)
        for program in known:
            host.start(program)
        host.start_agent()
        events: list[tuple[float, str, Any]] = []
        end_s = LENGTH_S - QUIET_S
        # Upgrades roll through: an image has its hour, a host its minute; programs are restarted later, or not.
        for number, name in enumerate(("libssl", "libz", "libssl")):
            at_s = (1 + number * 4 + host.image / IMAGES + chance.random()) * HOUR_S
            events.append((at_s, "upgrade", name))
            events += [
                (at_s + chance.random() * 3 * HOUR_S, "restart", program)
                for program in known
                if name in program.names and chance.random() < 0.8
            ]
        events += [(chance.random() * end_s, "restart", chance.choice(known)) for _ in range(3)]
        events += [(chance.random() * end_s, "stop", chance.choice(known)) for _ in range(host.number % 3 == 0)]
        events += [(chance.random() * end_s, "storm", 200) for _ in range(5 if host.fate == "storms" else 0)]
        events += _troubles(host.fate, chance)
        for at_s, what, value in sorted(((at_s, what, value) for at_s, what, value in events), key=lambda one: one[0]):
            if at_s >= end_s:
                continue
            host.go_on(at_s)
            _happen(host, what, value)
        host.go_on(LENGTH_S)
        if host.agent is not None:
            host.turn()  # the last heartbeat


def _troubles(fate: str, chance: random.Random) -> list[tuple[float, str, Any]]:
    """What happens to the agent; snapshots begin at 0, 6 and 12 hours."""
    hour = HOUR_S
    match fate:
        case "killed" | "late_epoch":
            return [(5 * hour, "kill", None), ((5.2 + chance.random()) * hour, "agent", None)]
        case "killed_late":
            return [
                (13.9 * hour, "kill", None),
                (14 * hour, "loses", True),
                (14 * hour, "agent", None),
                (14.2 * hour, "loses", False),
            ]
        case "restarted":
            return [(5 * hour, "kill", None), (5 * hour + 2, "agent", None), (9 * hour, "drop", 0)]
        case "dropped":
            return [((2 + at * 4) * hour, "drop", 5) for at in range(3)]
        case "lost_earlier":
            return [(2 * hour, "loses", True), (11 * hour, "loses", False)]
        case "lost":
            return [(12.5 * hour, "loses", True), (14.5 * hour, "loses", False)]
        case "dead":
            return [((8 + 5 * chance.random()) * hour, "die", None)]
    return []


def _happen(host: Host, what: str, value: Any) -> None:
    match what:
        case "upgrade":
            host.upgrade(value)
        case "restart" if value.number in host.running:
            host.stop(value)
            host.start(value)
        case "stop":
            host.stop(value)
        case "storm" if host.agent is not None:
            host.storm(value)
        case "kill":
            host.agent = None
        case "agent":
            host.start_agent()
        case "drop" if host.agent is not None:
            host.agent.drop(value)
            host.turn()  # the sender goes on
        case "loses":
            host.loses = value
        case "die":
            host.agent = None
            host.ended_s = host.now_s


def expected(state: HostState, *, is_mapped: bool) -> HostAnswer:
    """By the decision's words: of a host in that state that really has it, or has not, and reports the truth."""
    if state == "answered":
        return "mapped" if is_mapped else "not mapped"
    return "mapped" if state == "unsupported" and is_mapped else "not observed"
