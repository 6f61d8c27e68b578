"""Queues of readers are bounded by what their events take, too: what does not fit is counted and made up for."""

from __future__ import annotations

import time

import pytest

from sowatch.bpf.records import MAX_FILE_RANGES
from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.file_inspector import FileFacts, Inspection
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.model.config import Config
from sowatch.model.errors import ConfigError
from sowatch.model.events import Library, Load, Process, Stopped, size_of
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, Proc
from support.tracking import BASE, SSL

LIMIT = 1 << 20
RANGES = tuple((BASE + 2 * n * PAGE, BASE + (2 * n + 1) * PAGE) for n in range(MAX_FILE_RANGES))
RULES = RuleSet([Rule("libssl")])


class KnowsAll:
    """An inspector that has read every file."""

    def known(self, _):
        return FileFacts(True)

    def relieve(self, _):
        pass

    def take_finished(self):
        return []


class KnowsNothing:
    """An inspector whose files never answer."""

    def known(self, _):
        return None

    def inspect(self, _, *, is_own_view, now_s):
        del is_own_view
        return Inspection(now_s)

    def relieve(self, _):
        pass

    def take_finished(self):
        return []


@pytest.fixture
def publisher():
    made = Publisher(RULES, FileRegistry(Config()), Selection(), proc_root="/proc")
    made.in_force = RuleChange(RULES, KnowsAll())
    return made


def loads(pids, ranges=RANGES):
    name = MappedFile(Proc().map(SSL), RULES)
    return [Change(True, "fork", 1, Process(pid, 5), "library", name, ranges) for pid in pids]


def read(subscription):
    found = []
    while (event := subscription.get(0)) is not None:
        found.append(event)
    return found


def test_a_reader_that_is_behind_by_many_bytes_loses_events_and_gets_them_when_it_has_caught_up(publisher):
    subscription = publisher.subscribers.subscribe(control=True, limit=100_000, limit_bytes=LIMIT)
    publisher.publish(loads(range(1, 1001)))
    biggest = size_of(Load("r", Library(SSL.path, SSL.id), Process(1, 1), "mmap", 1, 1, RANGES))
    assert LIMIT - biggest <= subscription.waiting_bytes <= LIMIT + 2 * biggest
    assert 0 < subscription.waiting < 100
    lost = subscription.lost
    assert lost == publisher.subscribers.lost_in_queues == 1001 - subscription.waiting

    publisher.subscribers.catch_up()
    assert subscription.lost == lost
    first = read(subscription)
    publisher.subscribers.catch_up()
    rest = read(subscription)
    assert [(rest[0].event, rest[0].where, rest[0].count), rest[-1].event] == [("lost", "queue", lost), "repaired"]
    reported = [one.process.pid for one in first + rest if one.event == "load"]
    assert sorted(reported) == list(range(1, 1001))
    assert subscription.waiting_bytes == 0


def test_a_reader_with_as_many_events_of_few_bytes_loses_none(publisher):
    subscription = publisher.subscribers.subscribe(control=True, limit=100_000, limit_bytes=LIMIT)
    publisher.publish(loads(range(1, 1001), RANGES[:1]))
    assert (subscription.waiting, subscription.lost) == (1001, 0)


def test_what_waits_for_facts_of_files_is_bounded_in_bytes_and_all_of_it_is_told():
    publisher = Publisher(RULES, FileRegistry(Config()), Selection(), proc_root="/proc", limit_bytes=LIMIT)
    publisher.in_force = RuleChange(RULES, KnowsNothing())
    subscription = publisher.subscribers.subscribe(events=("load",), control=True, limit=100_000, limit_bytes=1 << 30)
    begun = time.monotonic()
    for pid in range(1, 101):
        publisher.publish(loads([pid]))
        assert publisher.waiting_bytes <= LIMIT
    first = [one.process.pid for one in read(subscription)]
    if time.monotonic() < begun + 1:
        assert 50 < len(first) < 100  # some 30 of them are as much as may wait
    publisher.flush_all()
    assert [*first, *(one.process.pid for one in read(subscription))] == list(range(1, 101))
    assert publisher.waiting_bytes == 0


def test_an_event_counts_what_it_holds():
    small = Load("r", Library("/a", FileId(1, 1, 1)), Process(1, 1), "mmap", 1, 1)
    library = Library("/" + "a" * 4000, FileId(1, 1, 1), host_path="/proc/1/root/" + "a" * 4000)
    large = Load("r", library, Process(1, 1), "mmap", 1, 1, RANGES)
    assert size_of(Stopped(1, 1, 1, 1)) <= size_of(small) < 500
    assert size_of(large) > size_of(small) + 8_000 + 100 * len(RANGES)


@pytest.mark.parametrize("value", [0, 65535, 1 << 41])
def test_a_queue_of_no_bytes_is_refused(value):
    with pytest.raises(ConfigError, match="queue_bytes"):
        Config(queue_bytes=value)
