"""Scans that fail: what was drained meanwhile is kept, and who could not be read is scanned later."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from sowatch.bpf.record_log import RecordLog
from sowatch.engine.effects import LIVE
from sowatch.engine.intake import Intake
from sowatch.engine.rescan_schedule import RescanSchedule
from sowatch.engine.scanner import LACK_REST_S, Scanner
from sowatch.engine.table import MappingTable
from sowatch.linux.proc import ProcReadError
from sowatch.model.config import Config
from sowatch.model.rules import RuleSet
from sowatch.model.stats import Losses
from sowatch.sources.unread import ScanTimeout
from support.records import PAGE, Proc, scan

ONE, OTHER = Proc(10), Proc(20)
LACK = ProcReadError("/proc/10/maps", errno.EMFILE)


class Source:
    """Has one record for each drain; scans fail by ``error`` if there is one."""

    record_limit = None

    def __init__(self):
        self.error = None
        self.drained = 0
        self.unread = SimpleNamespace(cpu_s=0.0)

    def drain(self):
        self.drained += 1
        return [OTHER.range(0, PAGE, t=self.drained)]

    def scan_process(self, pid, meanwhile):
        if self.error is not None:
            raise self.error
        return scan(Proc(pid), 10, 20)

    def scan_all(self, meanwhile):
        meanwhile()
        meanwhile()
        if self.error is not None:
            raise self.error
        return [scan(ONE, 10, 20)], RecordLog([[OTHER.range(0, PAGE, t=9)]])

    def losses(self):
        return Losses()


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def table():
    return MappingTable(RuleSet(()))


@pytest.fixture
def schedule():
    return RescanSchedule()


@pytest.fixture
def intake(source):
    return Intake(source, Config().max_records_s)


@pytest.fixture
def scanner(source, table, intake, schedule):
    return Scanner(source, table, intake, schedule)


@pytest.mark.parametrize("error", [ScanTimeout(0), LACK])
def test_what_was_drained_during_a_full_scan_that_failed_is_kept(scanner, source, error):
    source.error = error
    scans, records = scanner.read_all()
    assert scans == []
    assert [record.t_ns for record in records] == [1, 2]
    assert not scanner.has_scanned_all
    source.error = None
    scans, records = scanner.read_all()
    assert [one.tgid for one in scans] == [ONE.pid]
    assert [record.t_ns for record in records] == [3, 4, 9]
    assert scanner.has_scanned_all


def test_a_full_scan_without_descriptors_may_have_cost_records_and_a_single_one_has_not(scanner, source, intake):
    source.error = LACK
    scanner.read({ONE.pid: LIVE}, lambda: None)
    assert intake.losses().unread == 0
    scanner.read_all()
    assert intake.losses().unread == 1


def test_who_could_not_be_read_for_want_of_descriptors_is_scanned_after_a_rest(scanner, source, table, schedule):
    source.error = LACK
    assert schedule.take({ONE.pid: LIVE}, 100.0) == {ONE.pid: LIVE}
    scans, _ = scanner.read({ONE.pid: LIVE}, lambda: None)
    assert scans == []
    assert dict(table.needs_rescan) == {ONE.pid: LIVE}
    assert schedule.take(table.needs_rescan, 100.1) == {}
    assert schedule.take(table.needs_rescan, 100.0 + LACK_REST_S) == {ONE.pid: LIVE}


def test_another_error_is_not_excused(scanner, source):
    source.error = ProcReadError("/proc/10/maps", errno.EIO)
    with pytest.raises(ProcReadError):
        scanner.read({ONE.pid: LIVE}, lambda: None)
    with pytest.raises(ProcReadError):
        scanner.read_all()
