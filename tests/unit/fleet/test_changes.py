"""Changes of one host: what counts, what is reported, and what a receiver makes of it whatever gets lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sowatch.fleet.changes import HOLD_S, MAX_PIDS, STATE_EVERY_S, Changes
from sowatch.fleet.lookups import MAX_QUESTIONS
from sowatch.fleet.records import Package, Record, WatchState
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from support.fleet_receiver import Replica, Sent

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

    def __init__(self, **more: Any) -> None:
        self.changes = Changes(HOST, **more)
        self.now_s = 0.0
        self.clock_ns = START_NS
        self.records: list[Record] = []
        self.go(0)

    def go(self, seconds: float) -> None:
        self.now_s += seconds
        self.changes.tick(self.now_s, self.clock_ns + round(self.now_s * NS))
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
    host.changes.tick(host.now_s + 5, START_NS - 50 * NS)
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


# ---- what only reading files answers ------------------------------------------------------------


def test_a_new_group_waits_for_its_package_but_not_for_long() -> None:
    package = Package("libone", "1", "one", "pkg:deb/debian/libone@1", "dpkg")
    host = Host(asks_packages=True)
    host.begin()
    for number in (1, 2):
        host.changes.load(process(1), library(number))
    host.go(1)
    first, second = host.changes.take_questions(10)
    assert (first.library.path, second.process.pid, host.said()) == ("/usr/lib/lib1.so", 1, [])
    assert first.identity is not None
    assert second.identity is not None
    host.changes.answer_package(first.identity, package)
    assert host.said() == [("mapped", 1)]
    assert host.records[-1].attributes["sowatch.package.purl"] == package.purl
    host.go(HOLD_S)
    assert host.said() == [("mapped", 1)]
    assert "sowatch.package.purl" not in host.records[-1].attributes
    host.changes.answer_package(second.identity, package)
    host.go(STATE_EVERY_S)
    assert host.said() == [("state", 1)]
    assert not host.changes.is_asking


def test_a_group_that_ends_while_it_waits_for_its_package_makes_no_record() -> None:
    host = Host(asks_packages=True)
    host.begin()
    host.changes.load(process(1), library(1))
    host.go(1)
    host.changes.unload(process(1).id, library(1).id)
    host.go(HOLD_S)
    assert (host.said(), host.changes.groups, host.changes.is_asking) == ([], 0, False)
    assert host.changes.short_lived == 1


def test_a_file_without_a_build_id_waits_for_its_hash_and_is_of_one_group_with_its_like() -> None:
    host = Host(needs_hash=lambda one: one.build_id is None)
    host.begin()
    plain = Library("/usr/lib/plain.so", FileId(8, 1, 9))
    host.changes.load(process(1), plain)
    host.go(1)
    (question,) = host.changes.take_questions(10)
    assert (question.identity, host.said()) == (None, [])
    host.changes.answer_hash(question.library, "htlhash:00")
    host.go(1)
    assert host.said() == [("mapped", 1)]
    assert host.records[-1].attributes["sowatch.library.build_id"] == "htlhash:00"
    host.changes.load(process(2), plain)
    host.go(STATE_EVERY_S)
    assert (host.said(), host.changes.take_questions(10)) == ([("state", 2)], [])


def test_a_file_that_nobody_can_read_counts_without_a_name_for_its_content() -> None:
    host = Host(needs_hash=lambda _: True)
    host.begin()
    host.changes.load(process(1), Library("/usr/lib/plain.so", FileId(8, 1, 9)))
    host.go(1)
    (question,) = host.changes.take_questions(10)
    host.changes.answer_hash(question.library, None)
    host.go(1)
    assert host.said() == [("mapped", 1)]
    assert "sowatch.library.build_id" not in host.records[-1].attributes


def test_on_a_busy_host_a_file_waits_two_minutes_for_what_names_its_content() -> None:
    host = Host(needs_hash=lambda _: True)
    host.begin()
    host.changes.load(process(1), Library("/usr/lib/plain.so", FileId(8, 1, 9)))
    for _ in range(115):
        host.go(1)
    assert host.said() == []
    assert host.changes.nameless == 1  # it is mapped, and nobody is to be given the answer that it is not
    (question,) = host.changes.take_questions(10)
    host.changes.answer_hash(question.library, "ab" * 20)
    host.go(1)
    assert host.changes.nameless == 0
    assert host.said() == [("mapped", 1)]
    assert host.records[-1].attributes["sowatch.library.build_id"] == "ab" * 20


def test_ports_of_the_processes_that_are_shown_are_put_together() -> None:
    host = Host()
    for pid in (1, 2):
        host.changes.load(process(pid), library(1))
    host.changes.load(process(3, exe="/usr/bin/other"), library(1))
    host.begin()
    assert host.changes.shown_processes() == [process(pid).id for pid in (1, 2, 3)]
    host.go(STATE_EVERY_S)
    host.changes.answer_ports({1: "tcp:443,tcp:80", 2: "udp:53,tcp:443"})
    host.go(0)
    assert host.said() == [("state", 2)]
    assert host.records[-1].attributes["sowatch.process.listen"] == "tcp:80,tcp:443,udp:53"
    host.changes.answer_ports({})
    host.go(STATE_EVERY_S)
    assert host.said() == []


def test_a_build_id_of_an_executable_that_comes_late_moves_what_its_process_has() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    host.changes.stale(process(1).id, library(1).id, "deleted", 7)
    host.changes.load(process(1), library(2, kind="executable"))
    found = [(one.event, one.attributes.get("process.executable.build_id.gnu")) for one in host.take()]
    assert found == [("sowatch.library.unmapped", None), ("sowatch.library.mapped", f"{2:040x}")]
    assert host.records[-1].attributes["sowatch.library.stale"] == "deleted"


def test_a_group_that_is_forgotten_and_comes_again_at_the_same_time_is_due_twice() -> None:
    host = Host(asks_packages=True, max_pending=1)
    host.begin()
    for pid in (1, 2):
        # The next mapping settles it at once; it waits for its package then.
        host.changes.load(process(pid), library(1))
        host.changes.load(process(pid), library(2))
        host.changes.unload(process(pid).id, library(1).id)
    host.changes.load(process(3), library(1))
    host.changes.load(process(3), library(2))
    host.go(HOLD_S)
    assert ("mapped", 1) in host.said()


def test_what_follows_one_that_failed_is_a_snapshot_of_the_same_run() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.changes.load(process(2), library(2))
    host.begin()
    before, host.changes = host.changes, Changes(HOST)
    made = host.take()
    host.changes.go_on(before)
    host.go(0)
    host.changes.load(process(1), library(1))
    host.begin()
    assert made == []
    replica = Replica()
    replica.take(_sent(one) for one in host.records)
    assert not replica.is_lossy
    assert [row.attributes["sowatch.library.path"] for row in replica.in_force.values()] == ["/usr/lib/lib1.so"]
    versions = [one.version_ns for one in host.records]
    assert versions == sorted(set(versions))


def test_a_clock_that_was_ahead_and_was_set_right_has_everything_sent_anew_at_its_time() -> None:
    host = Host()
    host.clock_ns += 86_400 * NS
    host.go(0)
    host.changes.load(process(1), library(1))
    host.begin()
    host.changes.load(process(2), library(2))
    host.go(1)
    host.clock_ns = START_NS
    host.records.clear()
    host.go(1)
    host.go(0)
    host.take()
    assert [one.event.rpartition(".")[2] for one in host.records] == [
        "snapshot_begin",
        "state",
        "state",
        "snapshot_end",
        "heartbeat",
    ]
    assert {round((one.version_ns - START_NS) / NS) for one in host.records} == {round(host.now_s)}
    assert host.changes.dropped == 1


def test_a_clock_that_was_set_at_last_has_everything_sent_anew() -> None:
    host = Host()
    host.clock_ns = 0
    host.changes = Changes(HOST)
    host.go(0)
    host.changes.load(process(1), library(1))
    host.begin()
    host.clock_ns = START_NS
    host.records.clear()
    host.go(1)
    events = [one.event.rpartition(".")[2] for one in host.take()]
    assert events == ["snapshot_begin", "state", "snapshot_end", "heartbeat"]
    assert min(one.version_ns for one in host.records) > START_NS


def test_a_clock_that_is_an_hour_behind_has_everything_sent_anew_once_it_has_caught_up() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    newest_ns = host.records[-1].version_ns
    host.clock_ns -= 3600 * NS
    host.go(1)
    host.take()
    assert host.records[-1].version_ns < newest_ns
    host.changes.unload(process(1).id, library(1).id)
    host.go(3500)
    host.take()
    host.go(100)
    host.take()
    replica = Replica()
    replica.take(_sent(one) for one in host.records)
    assert not replica.is_lossy
    assert replica.in_force == {}
    # A heartbeat that is later than the ones before comes with the end of that snapshot.
    later = [one.event.rpartition(".")[2] for one in host.records if one.version_ns > newest_ns]
    assert later == ["snapshot_begin", "snapshot_end", "heartbeat"]


def test_a_clock_that_drifts_is_not_taken_for_one_that_was_set() -> None:
    host = Host()
    host.begin()
    for _ in range(59):
        host.clock_ns -= NS
        host.go(0)
    assert [one.event for one in host.take() if "snapshot" in one.event] == []


def test_questions_are_bounded_and_those_that_are_over_are_not_asked() -> None:
    host = Host(needs_hash=lambda _library: True, asks_packages=True)
    host.begin()
    for number in range(30_000):
        one = Library(f"/tmp/{number}", FileId(8, 1, number))
        host.changes.load(process(1), one)
    host.go(1.1)
    for number in range(1, 30_000):
        host.changes.unload(process(1).id, FileId(8, 1, number))
    assert len(host.changes.lookups) == MAX_QUESTIONS
    # One more finds room, as the others are over.
    host.changes.load(process(2), Library("/tmp/last", FileId(8, 1, 30_000)))
    host.go(1.1)
    assert len(host.changes.lookups) == 2
    asked = host.changes.take_questions(100)
    assert [one.library.path for one in asked] == ["/tmp/0", "/tmp/last"]
    assert host.changes.take_questions(100) == []
    for one in asked:
        host.changes.answer_hash(one.library, "htlhash:00")
    # Of those that were over none is open.
    assert not host.changes.is_asking


def test_the_package_of_a_group_that_is_over_is_not_asked_for() -> None:
    host = Host(asks_packages=True)
    host.begin()
    for number in range(1, 100):
        host.changes.load(process(1), library(number))
        host.go(1.1)
        host.changes.unload(process(1).id, library(number).id)
    host.changes.load(process(1), library(200))
    host.go(1.1)
    assert [one.library for one in host.changes.take_questions(100)] == [library(200)]


def test_a_file_is_stale_since_the_first_time_that_it_was_found_so() -> None:
    host = Host()
    host.changes.load(process(1), library(1))
    host.begin()
    host.changes.stale(process(1).id, library(1).id, "replaced", 5)
    host.changes.stale(process(1).id, library(1).id, "replaced", 9)
    host.go(STATE_EVERY_S)
    assert next(one.attributes.get("sowatch.library.stale_since") for one in host.take()) == 5
    host.changes.stale(process(1).id, library(1).id, "deleted", 9)
    host.go(STATE_EVERY_S)
    assert next(one.attributes.get("sowatch.library.stale_since") for one in host.take()) == 9


def test_what_is_stale_is_what_is_given_and_nothing_else() -> None:
    host = Host()
    for number in (1, 2, 3):
        host.changes.load(process(1), library(number))
    host.begin()
    for number in (1, 2):
        host.changes.stale(process(1).id, library(number).id, "replaced", 5)
    host.changes.stale_are({(process(1).id, library(number).id): "replaced" for number in (2, 3, 4)}, 9)
    host.go(STATE_EVERY_S)
    host.changes.drop(0)
    found = {
        one.attributes["sowatch.library.path"]: one.attributes.get("sowatch.library.stale_since")
        for one in host.take()
        if one.event == "sowatch.library.state"
    }
    assert found == {"/usr/lib/lib1.so": None, "/usr/lib/lib2.so": 5, "/usr/lib/lib3.so": 9}


def _sent(one: Record) -> Sent:
    attributes: dict[str, Any] = dict(one.attributes)
    snapshot, seq = attributes.pop("sowatch.fleet.snapshot"), attributes.pop("sowatch.fleet.seq")
    return Sent(one.event, one.version_ns, 1, snapshot, seq, attributes, {})
