"""What is drained: the guard learns how late it is, whoever drains, and a flood has an end."""

from __future__ import annotations

import errno
import time
from itertools import count
from types import SimpleNamespace

import pytest

from sowatch.engine import intake
from sowatch.engine.intake import Intake
from sowatch.model.config import NO_GUARD, Config
from sowatch.model.errors import BpfError
from sowatch.model.stats import Losses
from support.records import Proc

FLOODER = Proc(10)
MOST = Config().max_records_s


def waited(seconds):
    return FLOODER.range(0, 4096, t=time.monotonic_ns() - int(seconds * 1e9))


class Ring:
    """Has what it is given, and keeps the limits that it is set to. A drain raises ``error`` if there is one."""

    def __init__(self):
        self.records = []
        self.error = None
        self.limits = []
        self.record_limit = SimpleNamespace(set=self.limits.append)

    def drain(self):
        if self.error is not None:
            raise self.error
        taken, self.records = self.records, []
        return taken

    def losses(self):
        return Losses(ring=7)


@pytest.fixture
def ring():
    return Ring()


@pytest.fixture
def told_each_time(monkeypatch):
    """The guard is told at each drain."""
    monkeypatch.setattr(intake, "GUARD_S", 0.0)


@pytest.mark.usefixtures("told_each_time")
def test_while_the_watch_falls_behind_processes_may_report_less_and_then_more_again(ring, caplog):
    taken = Intake(ring, MOST)
    for _ in range(5):
        ring.records = [waited(3), waited(0)]
        taken.drain()
    assert ring.limits == [4000, 2000, 1000]
    for _ in range(6):
        ring.records = [waited(0)]
        taken.drain()
    assert ring.limits[3:] == [2000, 4000, 8000, 16000, MOST]
    taken.drain()
    assert len(ring.limits) == 8
    (warning,) = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert "the watch falls behind by 3.0 s" in warning


@pytest.mark.usefixtures("told_each_time")
def test_what_waits_no_longer_than_usual_changes_nothing(ring):
    taken = Intake(ring, MOST)
    for _ in range(3):
        ring.records = [waited(0.1)]
        taken.drain()
        taken.drain()
    assert ring.limits == []


@pytest.mark.usefixtures("told_each_time")
@pytest.mark.parametrize("configured", [1, 500, NO_GUARD])
def test_a_guard_that_was_set_lower_or_off_stays_there(ring, configured):
    ring.records = [waited(3)]
    Intake(ring, configured).drain()
    assert ring.limits == []


def test_the_guard_is_told_once_a_second_however_often_it_is_drained(ring, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=lambda: now_s[0], monotonic_ns=time.monotonic_ns))
    taken = Intake(ring, MOST)
    limits = []
    for _ in range(9):
        now_s[0] += 0.25
        ring.records = [waited(3)]
        taken.drain()
        limits.append(list(ring.limits))
    assert limits == [[]] * 3 + [[4000]] * 4 + [[4000, 2000]] * 2


def test_when_it_was_drained_last_is_known_although_nothing_came(ring, monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=lambda: now_s[0], monotonic_ns=time.monotonic_ns))
    taken = Intake(ring, MOST)
    now_s[0] = 107.0
    taken.drain()
    assert taken.drained_s == 107.0


def test_all_of_a_flood_is_what_came_until_now(ring, monkeypatch):
    moments = count(0, 300_000)
    monkeypatch.setattr(ring, "drain", lambda: [FLOODER.range(0, 4096, t=next(moments))])
    monkeypatch.setattr(intake, "time", SimpleNamespace(monotonic=time.monotonic, monotonic_ns=lambda: 0))
    times = [record.t_ns for batch in Intake(ring, MOST).drain_all() for record in batch]
    assert times == [0, 300_000, 600_000, 900_000, 1_200_000]


@pytest.mark.parametrize("reason", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_drain_that_descriptors_or_memory_were_lacking_for_is_a_loss_and_is_tried_again(ring, caplog, reason):
    taken = Intake(ring, MOST)
    ring.error = BpfError("reading", reason)
    assert taken.drain() == taken.drain() == []
    assert taken.losses() == Losses(ring=7, unread=2)
    (line,) = [one.message for one in caplog.records]
    assert "LimitNOFILE" in line
    ring.error, ring.records = None, [waited(0)]
    assert len(taken.drain()) == 1


@pytest.mark.parametrize("error", [BpfError("reading", errno.EIO), KeyError("a fault of ours")])
def test_other_errors_are_not_excused(ring, error):
    ring.error = error
    with pytest.raises(type(error)):
        Intake(ring, MOST).drain()
