"""Whatever happens on a host and to its records: a receiver has exactly the truth, or knows that it may not."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.fleet.changes import STATE_EVERY_S, Changes
from sowatch.fleet.records import Package, Record, WatchState
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from support.fleet_receiver import Replica, Sent

NS = 1_000_000_000
START_NS = 1_700_000_000 * NS
WELL = WatchState("core", "exact")
PACKAGE = Package("libssl3", "3.0.11-1", "openssl", "pkg:deb/debian/libssl3@3.0.11-1", "dpkg")

PIDS, FILES = st.integers(0, 3), st.integers(0, 2)
#: What may happen: to which process and which file, or for how many tenths of a second nothing does.
STEPS = st.one_of(
    st.tuples(st.just("load"), PIDS, FILES),
    st.tuples(st.just("unload"), PIDS, FILES),
    st.tuples(st.just("exit"), PIDS, st.just(0)),
    st.tuples(st.just("stale"), PIDS, FILES),
    st.tuples(st.just("renewed"), PIDS, FILES),
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 10, 50]), st.just(0)),
    st.tuples(st.just("wait"), st.sampled_from([50, 300, 700]), st.just(0)),
    st.tuples(st.just("answer"), st.just(0), st.just(0)),
    st.tuples(st.just("take"), st.integers(1, 6), st.booleans()),
    st.tuples(st.just("refuse"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("clock"), st.sampled_from([-3600, -200, -1, 1, 60, 200, 3600, 86_400, 0]), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)
#: Of snapshots: one that comes in the end anyway, and one that never does.
INTERVALS = st.sampled_from([200.0, 1e9])


def process(pid: int) -> Process:
    # Some of them are of one group.
    return Process(pid + 1, 1000, exe=f"/bin/{pid % 2}", cgroup="/system.slice/a.service")


def library(number: int) -> Library:
    # The last two are one file under one path, replaced by the same build.
    path = f"/usr/lib/{min(number, 1)}.so"
    build_id = None if number == 0 else f"{min(number, 1):040x}"
    return Library(path, FileId(8, 1, number), build_id=build_id)


class Model:
    """A host, its agent, and a receiver between which records are lost, repeated and reordered."""

    def __init__(self, random: Random, snapshot_interval_s: float) -> None:
        self.random = random
        self.snapshot_interval_s = snapshot_interval_s
        self.now_s, self.clock_ns = 0.0, START_NS
        self.mapped: dict[tuple[int, int], float] = {}
        self.stale: set[tuple[int, int]] = set()
        self.wire: list[Sent] = []
        self.epoch = 0
        #: When it was last heard: no heartbeat is later than its arrival.
        self.heard_ns = 0
        self.start()

    def start(self) -> None:
        """The agent, anew: it finds what is mapped."""
        self.epoch += 1
        self.changes = Changes(
            "host",
            snapshot_interval_s=self.snapshot_interval_s,
            needs_hash=lambda _library: True,
            asks_packages=True,
            max_groups=3,
            max_records=12,
        )
        self.tick()
        for pid, number in self.mapped:
            self.changes.load(process(pid), library(number))
            self.mapped[pid, number] = self.now_s
        self.stale.clear()
        self.wait(1)
        self.changes.may_begin = True

    @property
    def now_ns(self) -> int:
        """The time, by a clock that is right."""
        return START_NS + round(self.now_s * NS)

    def tick(self) -> None:
        self.changes.tick(self.now_s, self.clock_ns + round(self.now_s * NS))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.tick()
        self.changes.advance()
        if self.changes.is_heartbeat_due():
            self.changes.heartbeat(WELL)

    def do(self, what: str, one: int, other: Any) -> None:
        """One step."""
        self.tick()
        getattr(self, f"on_{what}")(one, other)

    def on_load(self, pid: int, number: int) -> None:
        self.mapped.setdefault((pid, number), self.now_s)
        self.changes.load(process(pid), library(number))

    def on_unload(self, pid: int, number: int) -> None:
        self.unload(pid, number)

    def on_exit(self, pid: int, _: int) -> None:
        for one, number in list(self.mapped):
            if one == pid:
                self.unload(pid, number)

    def on_stale(self, pid: int, number: int) -> None:
        if (pid, number) in self.mapped:
            self.stale.add((pid, number))
            self.changes.stale(process(pid).id, library(number).id, "replaced", START_NS)

    def on_renewed(self, pid: int, number: int) -> None:
        self.stale.discard((pid, number))
        self.changes.renewed(process(pid).id, library(number).id)

    def on_wait(self, tenths: int, _: int) -> None:
        self.wait(tenths / 10)

    def on_answer(self, _: int, __: int) -> None:
        self.answer()

    def on_take(self, limit: int, may_be_lost: bool) -> None:
        self.send(self.changes.take(limit), is_lost=may_be_lost and self.random.random() < 0.2)

    def on_refuse(self, limit: int, _: int) -> None:
        self.changes.drop(len(self.changes.take(limit)))

    def on_clock(self, seconds: int, _: int) -> None:
        # 0: it is set right.
        self.clock_ns = self.clock_ns + seconds * NS if seconds else START_NS

    def on_restart(self, _: int, __: int) -> None:
        self.start()

    def unload(self, pid: int, number: int) -> None:
        self.mapped.pop((pid, number), None)
        self.stale.discard((pid, number))
        self.changes.unload(process(pid).id, library(number).id)

    def answer(self) -> None:
        for one in self.changes.take_questions(3):
            if one.identity is None:
                self.changes.answer_hash(one.library, "htlhash:00")
            else:
                self.changes.answer_package(one.identity, PACKAGE if self.random.random() < 0.5 else None)

    def send(self, records: list[Record], *, is_lost: bool) -> None:
        sent = [_sent(one, self.epoch) for one in records]
        # What is from too far ahead no store takes.
        sent = [one for one in sent if one.version < self.now_ns + 300 * NS]
        self.heard_ns = max(
            [self.heard_ns, *(min(one.version, self.now_ns) for one in sent if one.event == "sowatch.fleet.heartbeat")]
        )
        if is_lost:
            sent = sent[: self.random.randrange(len(sent) + 1)]
        self.wire += sent
        if sent and self.random.random() < 0.3:
            self.wire += self.random.choices(self.wire, k=3)

    def settle(self) -> None:
        """Nothing happens for a while, and the receiver takes all there is."""
        for _ in range(12):
            self.answer()
            self.wait(STATE_EVERY_S / 3)
            while records := self.changes.take(5):
                self.send(records, is_lost=False)

    def truth(self) -> dict[tuple[str, str], tuple[int, bool]]:
        """By executable and path how many processes have it, and whether one has a stale one."""
        found: dict[tuple[str, str], tuple[set[int], bool]] = {}
        for pid, number in self.mapped:
            exe, path = process(pid).exe, library(number).path
            assert exe is not None
            pids, is_stale = found.get((exe, path), (set(), False))
            found[exe, path] = pids | {pid}, is_stale or (pid, number) in self.stale
        return {key: (len(pids), is_stale) for key, (pids, is_stale) in found.items()}


def _sent(one: Record, epoch: int) -> Sent:
    attributes: dict[str, Any] = dict(one.attributes)
    snapshot, seq = attributes.pop("sowatch.fleet.snapshot"), attributes.pop("sowatch.fleet.seq")
    return Sent(one.event, one.version_ns, epoch, snapshot, seq, attributes, {})


def known(replica: Replica) -> dict[tuple[str, str], tuple[int, bool]]:
    """The same as `Model.truth`, of a receiver."""
    return {
        (row["process.executable.path"], row["sowatch.library.path"]): (
            row["sowatch.library.processes"],
            "sowatch.library.stale" in row,
        )
        for one in replica.in_force.values()
        for row in [one.attributes]
    }


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(STEPS, min_size=10, max_size=150), seed=st.integers(0, 2**32), interval_s=INTERVALS)
def test_a_receiver_has_the_truth_or_knows_that_it_is_lossy(
    steps: list[tuple[str, int, Any]], seed: int, interval_s: float
) -> None:
    model = Model(Random(seed), interval_s)
    for step in steps:
        model.do(*step)
    model.settle()
    check(model)
    # What is reported by now ends, too.
    for pid in range(seed % 5):
        model.do("exit", pid, 0)
    model.settle()
    check(model)


def check(model: Model) -> None:
    """What a receiver knows of all that was sent, in whatever order it came."""
    wire = list(model.wire)
    model.random.shuffle(wire)
    replica = Replica()
    replica.take(wire)
    if replica.is_lossy or model.heard_ns + 90 * NS < model.now_ns:
        return
    assert max(replica.ends, key=replica.ends.__getitem__)[0] == model.epoch
    assert known(replica) == model.truth()


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(STEPS.filter(lambda step: step[0] not in ("clock", "restart")), min_size=10, max_size=150),
    interval_s=INTERVALS,
)
def test_without_losses_on_the_way_a_receiver_has_the_truth(
    steps: list[tuple[str, int, Any]], interval_s: float
) -> None:
    model = Model(Random(0), interval_s)
    for what, one, other in steps:
        model.do(what, one, False if what == "take" else other)
    for exits in (0, 2, 4):
        for pid in range(exits):
            model.do("exit", pid, 0)
        model.settle()
        replica = Replica()
        replica.take(model.wire)
        assert replica.is_lossy == bool(model.changes.left_out)
        if not replica.is_lossy:
            assert known(replica) == model.truth()


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(STEPS.filter(lambda step: step[0] != "restart"), min_size=10, max_size=150),
    seed=st.integers(0, 2**32),
    interval_s=INTERVALS,
)
def test_a_clock_that_is_set_right_leaves_a_receiver_with_the_truth(
    steps: list[tuple[str, int, Any]], seed: int, interval_s: float
) -> None:
    model = Model(Random(seed), interval_s)
    for what, one, other in steps:
        model.do(what, one, False if what == "take" else other)
    model.do("clock", 0, 0)
    # Five minutes ahead is taken, and later than what follows until then.
    for _ in range(3):
        model.settle()
    replica = Replica()
    replica.take(model.wire)
    assert model.heard_ns + 90 * NS >= model.now_ns
    assert replica.is_lossy == bool(model.changes.left_out)
    if not replica.is_lossy:
        assert known(replica) == model.truth()
