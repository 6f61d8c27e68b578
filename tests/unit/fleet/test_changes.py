"""Changes of one host: what counts, what is reported, and what a receiver makes of it whatever gets lost."""

from __future__ import annotations

from collections import Counter

from sowatch.fleet.changes import MAX_PIDS, STATE_EVERY_S, Changes
from sowatch.fleet.records import Record, WatchState
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId

HOST = "0123456789abcdef0123456789abcdef"
NS = 1_000_000_000
START_NS = 1_700_000_000 * NS
WELL = WatchState("core", "exact")


def process(pid: int, *, exe: str = "/usr/sbin/nginx", cgroup: str = "/system.slice/nginx.service") -> Process:
    return Process(pid, pid * 1000, exe=exe, cgroup=cgroup)


def library(number: int, *, kind: str = "library") -> Library:
    return Library(f"/usr/lib/lib{number}.so", FileId(8, 1, number), kind=kind, build_id=f"{number:040x}")  # type: ignore[arg-type]


class Host:
    """A `Changes` with a clock, and what it made."""

    def __init__(self, **bounds: int) -> None:
        self.changes = Changes(HOST, **bounds)
        self.now_s = 0.0
        self.records: list[Record] = []
        self.go(0)

    def go(self, seconds: float) -> None:
        self.now_s += seconds
        self.changes.tick(self.now_s, START_NS + round(self.now_s * NS))
        self.changes.advance()
        if self.changes.is_heartbeat_due():
            self.changes.heartbeat(WELL)

    def begin(self) -> None:
        """The first snapshot, of what is mapped already."""
        self.go(1)
        self.changes.may_begin = True
        self.take()

    def take(self) -> list[Record]:
        """What was made since."""
        made = []
        while some := self.changes.take(100):
            made += some
            self.go(0)
        self.records += made
        return made

    def said(self) -> list[tuple[str, int]]:
        """The event and the number of processes of each record of a group since the last time."""
        return [
            (one.event.removeprefix("sowatch.library."), one.attributes["sowatch.library.processes"])  # type: ignore[misc]
            for one in self.take()
            if one.event.startswith("sowatch.library.")
        ]


def test_the_first_snapshot_has_what_is_mapped_and_then_comes_a_heartbeat() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.changes.load(process(2), library(1))
    host.changes.load(process(2), library(2))
    host.begin()
    assert [one.event for one in host.records] == [
        "sowatch.fleet.snapshot_begin",
        "sowatch.library.state",
        "sowatch.library.state",
        "sowatch.fleet.snapshot_end",
        "sowatch.fleet.heartbeat",
    ]
    assert [one.attributes["sowatch.fleet.seq"] for one in host.records] == [0, 1, 2, 3, 4]
    assert host.records[1].attributes["sowatch.library.processes"] == 2
    assert host.records[1].attributes["sowatch.library.pids"] == "1,2"
    assert host.records[1].attributes["sowatch.library.since"] == START_NS
    assert host.records[3].attributes["sowatch.fleet.records"] == 2


def test_a_process_counts_once_it_has_had_a_file_for_a_second() -> None:
    host = Host()
    host.begin()
    host.changes.load(process(1), library(1))
    host.go(0.9)
    assert host.said() == []
    host.go(0.1)
    assert host.said() == [("mapped", 1)]
    host.changes.unload(process(1).id, library(1).id)
    assert host.said() == [("unmapped", 0)]


def test_a_storm_of_short_processes_makes_no_record_and_is_counted() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    for pid in range(2, 2002):
        host.changes.load(process(pid), library(1))
        host.go(0.02)
        host.changes.unload(process(pid).id, library(1).id)
    assert Counter(one.event for one in host.take()) == {"sowatch.fleet.heartbeat": 1}
    assert host.changes.short_lived == 2000
    host.changes.unload(process(1).id, library(1).id)
    (last,) = host.take()
    assert last.attributes["sowatch.library.short_lived"] == 2000


def test_a_group_has_one_state_a_minute() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    for pid in range(2, 12):
        host.changes.load(process(pid), library(1))
        host.go(2)
    assert host.said() == []
    host.go(STATE_EVERY_S)
    assert host.said() == [("state", 11)]
    assert len(host.records[-2].attributes["sowatch.library.pids"].split(",")) == MAX_PIDS  # type: ignore[union-attr]
    host.go(STATE_EVERY_S)
    assert host.said() == []


def test_a_group_that_comes_and_goes_ends_once_a_minute() -> None:
    host = Host()
    host.begin()
    said = []
    for pid in range(1, 101):
        host.changes.load(process(pid), library(1))
        host.go(2)
        host.changes.unload(process(pid).id, library(1).id)
        host.go(1)
        said += host.said()
    assert len(said) <= 2 * (300 / STATE_EVERY_S) + 2
    host.go(STATE_EVERY_S)
    said += host.said()
    assert said[-1] == ("unmapped", 0)
    host.go(STATE_EVERY_S)
    host.go(STATE_EVERY_S)
    assert host.changes.groups == 0


def test_versions_rise_strictly_even_if_the_clock_goes_back() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    host.changes.tick(host.now_s + 5, START_NS - 3600 * NS)
    host.changes.unload(process(1).id, library(1).id)
    versions = [one.version_ns for one in [*host.records, *host.take()]]
    assert versions == sorted(set(versions))


def test_what_nobody_takes_is_dropped_and_everything_is_sent_anew() -> None:
    host = Host(max_records=10)
    host.begin()
    for number in range(1, 21):
        host.changes.load(process(1), library(number))
    host.go(1)
    assert host.changes.waiting == 0
    assert host.changes.dropped == 11
    assert [one.event for one in host.take()][:2] == ["sowatch.fleet.snapshot_begin", "sowatch.library.state"]
    assert Counter(one.event for one in host.records)["sowatch.library.state"] == 20


def test_mappings_beyond_the_groups_that_there_may_be_are_counted_and_not_repaired() -> None:
    host = Host(max_groups=3)
    for number in range(1, 6):
        host.changes.load(process(1), library(number))
    host.begin()
    assert host.changes.left_out == 2
    beat = host.records[-1].attributes
    assert (beat["sowatch.fleet.left_out"], beat["sowatch.watch.lost"], beat["sowatch.watch.is_repaired"]) == (
        2,
        2,
        False,
    )
    assert not host.changes.needs_mapped
    for number in (1, 2, 3):
        host.changes.unload(process(1).id, library(number).id)
    host.go(STATE_EVERY_S)
    assert host.changes.needs_mapped
    host.changes.load(process(1), library(4))
    host.changes.load(process(1), library(5))
    host.go(1)
    assert host.changes.left_out == 0
    assert host.said()[-2:] == [("mapped", 1), ("mapped", 1)]
