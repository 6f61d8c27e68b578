"""Group commit: what waits is one insert, what fails is tried by itself, what is accepted is stored at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import pytest

from sowatch.fleet import commits
from sowatch.fleet.commits import Commits, QueueFull
from sowatch.fleet.log_requests import Decoded
from sowatch.fleet.store import StoreFull
from sowatch.model.errors import SowatchError


class Scripted:
    """Takes rows as a store does; waits in each insert until it may go on, and refuses rows that are bad."""

    def __init__(self) -> None:
        self.inserts: list[list[bytes]] = []
        self.may_go_on = threading.Semaphore(0)
        self.is_full = False

    def insert(self, rows: Iterable[bytes]) -> None:
        given = list(rows)
        self.may_go_on.acquire()
        if self.is_full:
            raise StoreFull("store", "no space left on it")
        if b"bad" in given:
            raise SowatchError("a row is none")
        self.inserts.append(given)


def request(data: bytes, days: Iterable[int] = (1,)) -> Decoded:
    return Decoded([data], 1, len(data), frozenset(days))


@pytest.fixture
def store() -> Scripted:
    return Scripted()


@pytest.fixture
def running(store: Scripted) -> Iterator[Commits]:
    made = Commits(store)
    yield made
    for _ in range(100):
        store.may_go_on.release()
    made.close()


def begun(running: Commits, store: Scripted) -> Future[None]:
    """A first insert, which waits: what is submitted from now on comes together."""
    first = running.submit(request(b"first"))
    while running._waiting:
        pass
    return first


def test_requests_that_come_while_an_insert_runs_are_the_next_one(running: Commits, store: Scripted) -> None:
    first = begun(running, store)
    others = [running.submit(request(b"%d" % number)) for number in range(5)]
    assert not first.done()
    for _ in range(2):
        store.may_go_on.release()
    for one in [first, *others]:
        assert one.result(20) is None

    assert store.inserts == [[b"first"], [b"0", b"1", b"2", b"3", b"4"]]
    assert (running.counts.inserts, running.counts.records) == (2, 6)


def test_a_request_that_fails_takes_none_of_its_group_with_it(running: Commits, store: Scripted) -> None:
    first = begun(running, store)
    good, bad, last = [running.submit(request(data)) for data in (b"good", b"bad", b"last")]
    for _ in range(5):
        store.may_go_on.release()
    first.result(20)
    assert (good.result(20), last.result(20)) == (None, None)
    with pytest.raises(SowatchError, match="a row is none"):
        bad.result(20)
    assert store.inserts == [[b"first"], [b"good"], [b"last"]]


def test_on_a_full_disk_a_group_is_refused_at_once_and_a_later_one_stored(running: Commits, store: Scripted) -> None:
    first = begun(running, store)
    group = [running.submit(request(b"x")) for _ in range(3)]
    store.may_go_on.release()
    first.result(20)
    store.is_full = True
    store.may_go_on.release()
    for one in group:
        with pytest.raises(StoreFull):
            one.result(20)
    assert isinstance(running.failure, StoreFull)
    store.is_full = False
    again = running.submit(request(b"again"))
    store.may_go_on.release()
    again.result(20)
    assert (running.failure, store.inserts[-1]) == (None, [b"again"])


def test_more_than_may_wait_is_refused(
    running: Commits, store: Scripted, monkeypatch: pytest.MonkeyPatch, wait_until
) -> None:
    monkeypatch.setattr(commits, "QUEUE_BYTES", 10)
    first = begun(running, store)
    second = running.submit(request(b"12345"))
    with pytest.raises(QueueFull):
        running.submit(request(b"1"))
    for _ in range(2):
        store.may_go_on.release()
    first.result(20)
    second.result(20)
    wait_until(lambda: running.counts.waiting_bytes == 0, 20, "nothing waits")
    assert running.counts.waiting_records == 0


def test_an_insert_has_no_more_days_and_bytes_than_the_bounds(
    running: Commits, store: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "INSERT_DAYS", 2)
    monkeypatch.setattr(commits, "INSERT_BYTES", 9)
    first = begun(running, store)
    some = [running.submit(request(b"%d" % day, [day])) for day in (1, 2, 3, 3)]
    large = running.submit(request(b"123456789"))
    for _ in range(4):
        store.may_go_on.release()
    for one in [first, *some, large]:
        one.result(20)
    assert store.inserts == [[b"first"], [b"1", b"2"], [b"3", b"3"], [b"123456789"]]


def test_what_was_accepted_is_stored_at_the_end_and_nothing_is_accepted_after_it(store: Scripted) -> None:
    running = Commits(store)
    accepted = [running.submit(request(b"x")) for _ in range(5)]
    for _ in range(5):
        store.may_go_on.release()
    running.close()
    assert [one.result(0) for one in accepted] == [None] * 5
    assert sum(map(len, store.inserts)) == 5
    with pytest.raises(QueueFull):
        running.submit(request(b"y"))
    running.close()


def test_a_request_that_nobody_waits_for_any_more_keeps_no_other_from_being_stored(
    running: Commits, store: Scripted
) -> None:
    first = begun(running, store)
    gone, other = running.submit(request(b"gone")), running.submit(request(b"other"))
    assert gone.cancel()
    for _ in range(2):
        store.may_go_on.release()
    first.result(20)
    other.result(20)
    assert store.inserts == [[b"first"], [b"other"]]


def test_a_fault_in_an_insert_reaches_those_that_wait_and_does_not_end_the_thread() -> None:

    class Faulty(Scripted):
        def insert(self, rows: Iterable[bytes]) -> None:
            raise ValueError("a fault")

    running = Commits(Faulty())
    for _ in range(2):
        with pytest.raises(ValueError, match="a fault"):
            running.submit(request(b"x")).result(20)
    running.close()
