"""Losses of processes that said too much: told, and made up for, in whatever order the words arrive."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import FLAG_NEEDS_RESCAN, FLAG_THROTTLED
from sowatch.engine.activation import FileRegistry
from sowatch.engine.effects import LIVE, Causes
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.reconciler import Reconciler
from sowatch.engine.rescan_schedule import FEW, FORKED_S, LONGEST_REST_S, RescanSchedule
from sowatch.engine.scanner import MANY_RESCANS
from sowatch.engine.table import MappingTable
from sowatch.linux.proc import ProcReadError
from sowatch.model.config import Config
from sowatch.model.events import Lost, Repaired
from sowatch.model.rules import Rule, RuleSet
from sowatch.model.stats import Losses
from sowatch.sources import scan_rows
from sowatch.sources.unread import ScanTimeout, UnreadProcesses
from support.records import File, Proc, scan

FLOODER = Proc(10)


class Scripted:
    """A source that says what it is told to."""

    def __init__(self):
        self.records = []
        self.unread = UnreadProcesses()
        self.lost = Losses()
        self.read = []
        self.entries = {}
        self.record_limit = self.polls = self.reports = self.answer_clock = None

    def drain(self):
        taken, self.records = self.records, []
        return taken

    def scan_process(self, pid, meanwhile=None):
        self.read.append(pid)
        return scan(FLOODER, 10, 20) if pid == FLOODER.pid else None

    def scan_all(self, meanwhile=None):
        self.read.append("all")
        return [scan(FLOODER, 10, 20)], []

    def losses(self):
        return self.lost

    def answer(self, keys, *, is_wanted):
        pass

    def untrack(self, pid, start_ns, activity):
        return False

    def tracked(self, pid):
        return self.entries.get(pid)


@pytest.fixture
def source():
    return Scripted()


@pytest.fixture
def publisher():
    return Publisher(RuleSet([Rule("libssl")]), FileRegistry(Config()), Selection(), proc_root="/proc")


@pytest.fixture
def reported(publisher):
    """``told()`` are the control events since the last call."""
    subscription = publisher.subscribers.subscribe(control=True, limit=100, limit_bytes=1 << 20)

    def take():
        publisher.subscribers.hand_over()
        found = []
        while (event := subscription.get(0)) is not None:
            found.append(event.event)
        return found

    return take


@pytest.fixture
def reconciler(source, publisher):
    rules = RuleSet([Rule("libssl")])
    return Reconciler(source, MappingTable(rules), publisher, rules, Config(), silent_baseline=False)


def throttled():
    return FLOODER.needs_rescan(t=1)._replace(flags=FLAG_NEEDS_RESCAN | FLAG_THROTTLED)


def turn(reconciler, now=1e9):
    reconciler.drain()
    reconciler.do_what_is_due(now)


def test_a_process_that_said_too_much_is_read_and_nobody_else(reconciler, source, reported):
    source.records, source.lost = [throttled()], Losses(throttled=5)
    turn(reconciler)
    reconciler.tick()
    turn(reconciler)
    assert reported() == ["lost", "repaired"]
    assert set(source.read) == {FLOODER.pid}
    assert reconciler.is_repaired


def test_who_it_was_may_be_said_after_the_loss_was_counted(reconciler, source, reported):
    source.lost = Losses(throttled=5)
    reconciler.tick()
    assert reported() == ["lost"]
    source.records = [throttled()]
    turn(reconciler)
    reconciler.tick()
    turn(reconciler)
    assert reported() == ["repaired"]
    assert set(source.read) == {FLOODER.pid}


def test_a_repair_counts_what_was_found_since_the_loss_and_not_before(reconciler, source, publisher):
    subscription = publisher.subscribers.subscribe(control=True, limit=100, limit_bytes=1 << 20)
    publisher._repaired = [3, 1000]  # of a process that hung and can be read now
    source.records, source.lost = [throttled()], Losses(throttled=5)
    turn(reconciler)
    reconciler.tick()
    publisher._repaired = [1, 2]
    turn(reconciler)
    publisher.subscribers.hand_over()
    assert isinstance(subscription.get(0), Lost)
    repaired = subscription.get(0)
    assert isinstance(repaired, Repaired)
    assert (repaired.loads, repaired.unloads) == (2, 1)


def test_if_nobody_says_who_it_was_all_are_read(reconciler, source, reported):
    source.lost = Losses(throttled=5)
    reconciler.tick()
    turn(reconciler)
    assert not reconciler.is_repaired
    reconciler.tick()
    turn(reconciler)
    assert reported() == ["lost", "repaired"]
    assert source.read == ["all"]


def test_one_that_ended_before_it_was_read_is_in_nobodys_debt(reconciler, source, reported):
    source.records, source.lost = [FLOODER.intro(t=1), throttled()], Losses(throttled=5)
    reconciler.drain()
    reconciler.tick()
    source.records = [FLOODER.exit(t=2)]
    turn(reconciler)
    assert reported() == ["lost", "repaired"]
    assert source.read == []


def test_nothing_is_repaired_while_the_reading_is_still_to_come(reconciler, source, reported):
    source.records, source.lost = [throttled()], Losses(throttled=5)
    reconciler.drain()
    reconciler.tick()
    seen = []
    source.scan_process = lambda pid, _: seen.append((pid, reconciler.is_repaired))
    reconciler.do_what_is_due(1e9)
    assert seen == [(FLOODER.pid, False)]
    assert reported() == ["lost", "repaired"]


def test_whoever_asks_again_and_again_adds_no_full_scan_to_those_that_have_to_rest(reconciler, source):
    reconciler._search.needs_full_scan = True
    reconciler.sync()
    assert source.read == ["all"]
    reconciler._search.at = time.monotonic() + 60  # as after a scan of three seconds
    for _ in range(5):
        reconciler._search.needs_full_scan = True
        reconciler.sync()
        assert reconciler.is_resting
    assert source.read == ["all"]
    reconciler._search.at = 0.0
    assert not reconciler.is_resting
    reconciler.sync()
    assert source.read == ["all", "all"]


def test_a_process_that_hangs_is_not_read_again_until_it_can_be(reconciler, source):
    tried = []

    def hang(pid, _):
        tried.append(pid)
        with contextlib.suppress(ScanTimeout):
            source.unread.run(pid, over.wait)
        raise ScanTimeout(pid)

    over = threading.Event()
    source.scan_process, read = hang, source.scan_process
    source.records = [FLOODER.needs_rescan(t=1)]
    for _ in range(3):
        turn(reconciler)
        reconciler.sync()
    assert tried == [FLOODER.pid]
    assert list(source.unread) == [FLOODER.pid]
    source.scan_process = read
    over.set()
    while source.unread:
        turn(reconciler)
    assert source.read == [FLOODER.pid]
    source.unread.close()


def test_a_loss_is_not_said_to_be_repaired_as_long_as_nobody_can_be_read(reconciler, source, reported):
    def refuse(_):
        raise ScanTimeout(0, is_refused=True)

    source.scan_all, read = refuse, source.scan_all
    source.lost = Losses(ring=3)
    reconciler.tick()
    turn(reconciler, time.monotonic())
    assert reported() == ["lost"]
    assert not reconciler.is_repaired
    source.scan_all = read
    while not reconciler.is_repaired:
        turn(reconciler, time.monotonic())
    assert reported() == ["repaired"]


# ---- scans that take long -----------------------------------------------------------------------


def test_a_scan_that_took_long_is_followed_by_a_rest_of_many_times_that_and_a_short_one_is_not():
    turns = RescanSchedule()
    for pid, seconds in ((1, 0.05), (2, 0.0001), (3, 60.0)):
        assert turns.take({pid: LIVE}, now=100.0) == {pid: LIVE}
        turns.rest(pid, seconds)
    assert turns.take({1: LIVE, 2: LIVE, 3: LIVE}, now=100.1) == {2: LIVE}
    assert turns.take({1: LIVE, 3: LIVE}, now=100.0 + 20 * 0.05) == {1: LIVE}
    assert turns.next_at == 100.0 + LONGEST_REST_S
    assert turns.take({3: LIVE}, now=100.0 + LONGEST_REST_S) == {3: LIVE}


def test_whose_scans_take_long_is_scanned_once_for_a_question():
    turns = RescanSchedule()
    needs_rescan = {1: LIVE, 2: LIVE}
    assert turns.expedite(needs_rescan, since=100.0)
    assert turns.take(needs_rescan, now=100.0) == {1: LIVE, 2: LIVE}
    turns.rest(1, 0.5)
    assert turns.expedite({1: LIVE, 2: LIVE}, since=100.0)
    assert turns.take({1: LIVE, 2: LIVE}, now=100.5) == {2: LIVE}
    assert not turns.expedite({1: LIVE}, since=100.0)
    # The next question is another one.
    assert turns.expedite({1: LIVE}, since=101.0)


def test_a_process_whose_records_are_dropped_again_and_again_is_scanned_four_times_a_second(reconciler, source):
    begun = time.monotonic()
    for _ in range(50):
        source.records, source.lost = [throttled()], Losses(throttled=5)
        turn(reconciler)
    assert source.read.count(FLOODER.pid) <= 1 + 4 * (time.monotonic() - begun) + 1


def test_until_a_full_scan_may_be_made_again_few_are_scanned_in_a_turn_the_longest_waiting_first():
    schedule = RescanSchedule()
    late, early = range(100), range(100, 100 + FEW)
    schedule.due = dict.fromkeys(late, 3.0) | dict.fromkeys(early, 2.0)
    schedule.few_until = 9.0
    assert sorted(schedule.take(dict.fromkeys((*late, *early), LIVE), 4.0)) == list(early)
    assert len(schedule.take(dict.fromkeys(late, LIVE), 9.0)) == len(late)


def test_a_child_of_a_threaded_process_that_ends_soon_is_not_scanned():
    schedule = RescanSchedule()
    assert schedule.take({7: Causes("fork", "munmap")}, 10.0) == {}
    assert schedule.take({}, 10.0) == {}
    assert list(schedule.take({7: Causes("fork", "munmap")}, 10.5)) == []
    assert list(schedule.take({7: Causes("fork", "munmap")}, 10.5 + FORKED_S)) == [7]


# ---- what others do while processes are scanned -----------------------------------------------


def running(pid):
    """A process that is there."""
    return Proc(pid, start_ticks=int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]))


def ourselves():
    """One that is there as long as the test."""
    return running(os.getpid())


@pytest.mark.parametrize("begin", ["_repair", "_read_for_rules"])
def test_what_a_full_scan_has_found_of_a_process_is_published_before_its_end(reconciler, source, publisher, begin):
    late, ending = ourselves(), Proc(11)
    published = []
    publisher.publish = lambda changes: published.extend((one.process.pid, one.is_load) for one in changes)
    source.records = [late.map(File(), t=1)]
    reconciler.drain()
    source.scan_all = lambda _=None: ([scan(ending, 10, 20, ending.map(File(), t=15))], [])

    def read(pid, meanwhile):
        source.records = [ending.exit(t=30)]
        meanwhile()
        return scan(late, 40, 50, late.map(File(), t=45)) if pid == late.pid else None

    source.scan_process = read
    getattr(reconciler, begin)()
    assert published == [(late.pid, True), (ending.pid, True), (ending.pid, False)]


#: After every end of a drain: one batch at a time is taken.
LATER = 1 << 62


def test_what_a_process_did_while_its_scan_was_merged_is_published_in_parts(reconciler, source, publisher, monkeypatch):
    for setting, value in {"reconciler.MANY_CHANGES": 4, "merge.MANY_CHANGES": 4}.items():
        monkeypatch.setattr(f"sowatch.engine.{setting}", value)
    monkeypatch.setattr(scan_rows, "SLICE", 2)
    flooder, parts = ourselves(), []
    publisher.publish = lambda changes: parts.append(len(changes)) if changes else None
    files = [File(path=f"/usr/lib/libssl{number}.so", inode=1000 + number) for number in range(21)]
    maps = [flooder.map(one, 0x1000 * one.inode, t=LATER + one.inode) for one in files]
    batches = [maps[at : at + 3] for at in range(0, len(maps), 3)]
    # One while it is scanned, one when that is over, the rest while those are merged and applied.
    source.drain = lambda: batches.pop(0) if batches else []

    def read(_, meanwhile):
        meanwhile()
        return scan(flooder, 40, 50)

    source.scan_process = read
    reconciler._table.await_rescan(flooder.pid)
    reconciler.do_what_is_due(1e9)
    assert sum(parts) == 21
    assert max(parts) <= 4 + 3


# ---- scans that fail for want of descriptors ----------------------------------------------------


LACK = ProcReadError("/proc", errno.EMFILE)


@contextlib.contextmanager
def lacking(source):
    """Nothing can be scanned."""

    def fail(*_):
        raise LACK

    scans = source.scan_all, source.scan_process
    source.scan_all = source.scan_process = fail
    yield
    source.scan_all, source.scan_process = scans


def test_who_ended_after_nothing_could_be_scanned_is_not_scanned_for_ever(reconciler, source, publisher, reported):
    publisher.publish = lambda _: None
    child = subprocess.Popen(["sleep", "inf"])
    there, ended = ourselves(), running(child.pid)
    source.records = [there.map(File(), t=1), ended.map(File(), t=2)]
    reconciler.drain()
    source.scan_process = lambda pid, _: scan(there, 10, 20, there.map(File(), t=15)) if pid == there.pid else None
    with lacking(source):
        source.lost = Losses(ring=5)
        reconciler.tick()
        reconciler.do_what_is_due(time.monotonic())
    assert ended.pid in reconciler._unscanned
    child.kill()
    child.wait()
    source.records = [ended.exit(t=3)]
    source.scan_all = lambda _=None: ([scan(there, 10, 20, there.map(File(), t=15))], [])
    for _ in range(5):
        reconciler.tick()
        if reconciler._repairs.at is not None:
            reconciler._repairs.at = 0.0  # it rests after one in vain
        reconciler.do_what_is_due(1e9)
    assert reconciler.is_repaired
    assert not reconciler._unscanned
    assert dict(reconciler._table.needs_rescan) == {}


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_change_of_rules_that_cannot_be_scanned_for_is_made_good_without_a_repair(source, publisher, is_silent):
    rules = RuleSet([Rule("nothing")])
    reconciler = Reconciler(source, MappingTable(rules), publisher, rules, Config(), silent_baseline=is_silent)
    there, published = ourselves(), []
    publisher.publish = lambda changes: published.extend((one.process.pid, one.cause) for one in changes)
    source.scan_all = lambda _=None: ([scan(there, 10, 20, there.map(File(), t=15))], [])
    reconciler._table.set_rules(RuleSet([Rule("libssl")]))
    with lacking(source):
        reconciler._read_for_rules()
        reconciler.tick()
        reconciler.do_what_is_due(time.monotonic())
    assert published == []
    assert not reconciler.is_repaired
    reconciler.do_what_is_due(1e9)
    reconciler.do_what_is_due(1e9)
    assert published == ([] if is_silent else [(there.pid, "snapshot")])


# ---- one full scan in the place of many single ones -------------------------------------------


def many():
    return [Proc(100 + one).needs_rescan(t=1) for one in range(MANY_RESCANS + 1)]


def test_a_full_scan_that_hangs_takes_no_rescan_away(reconciler, source, reported):
    def hang(_):
        raise ScanTimeout(0)

    source.scan_all, read = hang, source.scan_all
    source.records, source.lost = [*many(), throttled()], Losses(throttled=5)
    reconciler.drain()
    reconciler.tick()
    owed = dict(reconciler._table.needs_rescan)
    assert len(owed) == MANY_RESCANS + 2
    reconciler.do_what_is_due(1e9)
    assert dict(reconciler._table.needs_rescan) == owed
    assert reported() == ["lost"]
    source.scan_all = read
    while not reconciler.is_repaired:
        turn(reconciler)
    assert reported() == ["repaired"]


def entry(process):
    return SimpleNamespace(start_ns=process.start_ns, activity=1)


def test_who_a_process_is_that_was_not_to_be_scanned_is_learnt_from_a_full_scan(reconciler, source, publisher):
    publisher.publish = lambda _: None
    known, unknown, empty, ended, other = (Proc(one) for one in (20, 21, 22, 23, 24))
    late, executed = Proc(24, start_ticks=2), Proc(20, exec_id=2)
    source.entries = {one.pid: entry(one) for one in (known, unknown, empty, late)}
    source.records = [*many(), known.map(File(), t=2), late.map(File(), t=2)]
    found = [
        *(scan(one, 10, 20, one.map(File(), t=15), intro=True) for one in (known, unknown, ended, other)),
        scan(empty, 10, 20, intro=True),
    ]
    source.scan_all = lambda _=None: (found, RecordLog())
    reconciler.drain()
    assert reconciler._table.get(known.pid).exe is None
    reconciler.do_what_is_due(1e9)
    table = reconciler._table
    assert {one.id.pid: one.exe for one in table.processes()} == {
        known.pid: known.exe.path,
        unknown.pid: unknown.exe.path,
        late.pid: None,
    }
    # Its exec was lost: that is noticed by what is known of it.
    source.records = many()
    found[:] = [scan(executed, 30, 40, executed.map(File(), t=35), intro=True)]
    reconciler.drain()
    reconciler.do_what_is_due(2e9)
    assert table.get(known.pid).exec_id == known.exec_id
