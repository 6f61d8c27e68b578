"""SubscriberQueue: what a reader gets and in which order, what it loses and how it learns of that, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sowatch.engine.published_map import PublishedMap
from sowatch.engine.subscribers import Subscribers
from sowatch.engine.subscription import SubscriberQueue, difference
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Library,
    LibraryEvent,
    Load,
    Lost,
    Process,
    Repaired,
    Stopped,
    Unload,
    size_of,
)
from sowatch.model.identity import FileId

STOPPED = Stopped(1, 0, 0, 0)


def library(inode: int) -> Library:
    return Library(f"/lib/{inode}.so", FileId(8, 1, inode))


def load(pid: int, inode: int = 1, rule: str = "tls") -> Load:
    return Load(rule, library(inode), Process(pid, 5), "mmap", 1, 1)


class Host:
    """Publishes as `sowatch.engine.publisher.Publisher` does: the map first, then the events."""

    def __init__(self) -> None:
        self.published = PublishedMap()
        self.subscribers = Subscribers(self.published)

    def reader(self, limit: int = 100, *, limit_bytes: int = 1 << 20, control: bool = True, **options: object):
        return self.subscribers.subscribe(control=control, limit=limit, limit_bytes=limit_bytes, **options)  # type: ignore[arg-type]

    def users(self, inode: int, rule: str) -> int:
        return len(self.published.where(lambda one: one.library.id.inode == inode and one.rule == rule))

    def load(self, pid: int, inode: int = 1, rule: str = "tls") -> None:
        event = load(pid, inode, rule)
        is_first = not self.users(inode, rule)
        self.published.put(event.process.id, event.library.id, event)
        if is_first:
            self.subscribers.emit(Activate(rule, event.library, event.process, None, 1, 1))
        self.subscribers.emit(event)

    def unload(self, pid: int, inode: int = 1) -> None:
        event = self.published.pop(Process(pid, 5).id, library(inode).id)
        assert event is not None
        self.subscribers.emit(Unload(event.rule, event.library, event.process, "munmap", 2, 2))
        if not self.users(inode, event.rule):
            self.subscribers.emit(Deactivate(event.rule, event.library, None, 2, 2))


@pytest.fixture
def host() -> Host:
    return Host()


def short(event: Event) -> str:
    """``load 10 1 mmap``: kind, pid, inode, cause; of control events the counts."""
    if isinstance(event, Lost):
        return f"lost {event.count} {event.where}"
    if isinstance(event, Repaired):
        return f"repaired +{event.loads} -{event.unloads}"
    if not isinstance(event, LibraryEvent):
        return event.event
    parts: list[object] = [event.event]
    if isinstance(event, Load | Unload):
        parts.append(event.process.pid)
    parts.append(event.library.id.inode)
    if isinstance(event, Load | Unload):
        parts.append(event.cause)
    return " ".join(map(str, parts))


def read(reader: SubscriberQueue, most: int = 1000) -> list[str]:
    found: list[str] = []
    while len(found) < most and (event := reader.get(0)) is not None:
        found.append(short(event))
    return found


# ---- what is offered, and to whom ---------------------------------------------------------------


def test_events_come_in_the_order_offered_once_they_were_handed_over(host: Host) -> None:
    reader = host.reader()
    host.load(10)
    host.unload(10)
    assert (read(reader), reader.waiting) == ([], 4)

    host.subscribers.hand_over()

    assert read(reader) == ["activate 1", "load 10 1 mmap", "unload 10 1 munmap", "deactivate 1"]
    assert (reader.waiting, reader.waiting_bytes) == (0, 0)


def test_a_reader_is_signalled_once_for_each_batch_and_not_for_an_empty_one(host: Host) -> None:
    reader = host.reader()
    signals: list[int] = []
    reader.call_on_event(lambda: signals.append(reader.waiting))
    host.load(10)
    assert signals == []
    host.subscribers.hand_over()
    host.subscribers.hand_over()
    assert signals == [2]

    reader.call_on_event(None)
    host.load(11)
    host.subscribers.hand_over()
    assert signals == [2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"events": ("load", "unload")}, ["load 10 1 mmap", "load 10 2 mmap", "unload 10 2 munmap", "stopped"]),
        ({"events": ("deactivate",), "control": False}, ["deactivate 2"]),
        ({"rule": "zlib", "control": False}, ["activate 2", "load 10 2 mmap", "unload 10 2 munmap", "deactivate 2"]),
        ({"events": (), "control": True}, ["stopped"]),
    ],
)
def test_a_reader_gets_only_the_kinds_and_the_rule_it_asked_for(
    host: Host, options: dict[str, object], expected: list[str]
) -> None:
    reader = host.reader(**options)  # type: ignore[arg-type]
    host.load(10, 1)
    host.load(10, 2, "zlib")
    host.unload(10, 2)
    host.subscribers.emit(STOPPED)
    host.subscribers.hand_over()

    assert read(reader) == expected
    assert reader.lost == 0


def test_what_waits_is_counted_in_events_and_in_bytes_until_each_is_read(host: Host) -> None:
    reader = host.reader(events=("load",))
    host.load(10)
    host.load(11)
    host.subscribers.hand_over()
    assert (reader.waiting, reader.waiting_bytes) == (2, 2 * size_of(load(10)))

    # The batch is with the reader by now, and its second event is not read yet.
    read(reader, 1)

    assert (reader.waiting, reader.waiting_bytes) == (1, size_of(load(10)))


# ---- what is lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["events", "bytes"])
def test_beyond_either_limit_events_are_lost_and_counted(host: Host, bound: str) -> None:
    limits = {"limit": 3} if bound == "events" else {"limit_bytes": 3 * size_of(load(10))}
    reader = host.reader(events=("load",), **limits)  # type: ignore[arg-type]
    for pid in range(10, 15):
        host.load(pid)

    # The activates were not asked for and are not lost.
    assert (reader.waiting, reader.lost, host.subscribers.lost_in_queues) == (3, 2, 2)


def test_losses_are_summed_over_the_readers_and_one_that_is_behind_costs_the_others_nothing(host: Host) -> None:
    slow, slower, quick = host.reader(2), host.reader(1), host.reader()
    for pid in range(10, 13):
        host.load(pid)
    host.subscribers.hand_over()

    # In a queue for one there is the activate and, as it belongs to that, its load.
    assert (slow.lost, slower.lost, quick.lost, host.subscribers.lost_in_queues) == (2, 2, 0, 4)
    assert read(quick) == ["activate 1", "load 10 1 mmap", "load 11 1 mmap", "load 12 1 mmap"]


def test_the_load_behind_its_activate_and_a_deactivate_fit_into_a_full_queue(host: Host) -> None:
    reader = host.reader(1)
    host.load(10)
    assert (reader.waiting, reader.lost) == (2, 0)

    one = load(10)
    reader.offer(Deactivate(one.rule, one.library, None, 2, 2))
    assert (reader.waiting, reader.lost) == (3, 0)

    # Of another file, or a second one of the same: the activate was not the event before it.
    reader.offer(load(10, 2))
    assert (reader.waiting, reader.lost) == (3, 1)


@pytest.mark.parametrize("other", [load(10, 2), load(10, 1, "zlib")], ids=["another file", "another rule"])
def test_a_load_that_does_not_belong_to_the_activate_before_it_does_not_fit(host: Host, other: Load) -> None:
    reader = host.reader(1)
    one = load(10)
    reader.offer(Activate(one.rule, one.library, one.process, None, 1, 1))
    reader.offer(other)
    assert (reader.waiting, reader.lost) == (1, 1)


def test_after_a_loss_nothing_gets_past_it_even_if_there_is_space_again(host: Host) -> None:
    reader = host.reader(2)
    host.load(10)
    host.load(11)
    host.subscribers.hand_over()
    assert read(reader) == ["activate 1", "load 10 1 mmap"]

    host.load(12)
    host.subscribers.hand_over()
    assert (read(reader), reader.lost) == ([], 2)

    host.subscribers.catch_up()
    assert read(reader) == ["lost 2 queue", "load 11 1 repair", "load 12 1 repair", "repaired +2 -0"]
    host.load(13)
    host.subscribers.hand_over()
    assert read(reader) == ["load 13 1 mmap"]


def test_a_reader_catches_up_when_at_most_a_quarter_of_its_queue_waits(host: Host) -> None:
    reader = host.reader(8, events=("load",), control=False)
    for pid in range(10, 19):
        host.load(pid)
    host.subscribers.hand_over()

    read(reader, 5)
    host.subscribers.catch_up()
    assert reader.waiting == 3
    read(reader, 1)
    host.subscribers.catch_up()

    assert read(reader) == ["load 16 1 mmap", "load 17 1 mmap", "load 18 1 repair"]


def test_a_second_loss_counts_what_it_lost_itself(host: Host) -> None:
    reader = host.reader(1, events=("load",))
    for pid in (10, 11, 12):
        host.load(pid)
    host.subscribers.hand_over()
    read(reader)
    host.subscribers.catch_up()
    assert read(reader)[0] == "lost 2 queue"

    host.load(13)
    host.load(14)
    host.subscribers.hand_over()
    read(reader)
    host.subscribers.catch_up()

    assert read(reader) == ["lost 1 queue", "load 14 1 repair", "repaired +1 -0"]
    assert reader.lost == 3


def fill(host: Host, **options: object) -> SubscriberQueue:
    """A reader of a queue for three that is full and whose next event is its first loss."""
    reader = host.reader(3, **options)  # type: ignore[arg-type]
    host.load(10)
    host.load(11)
    host.subscribers.hand_over()
    assert (reader.waiting, reader.lost) == (3, 0)
    return reader


@pytest.mark.parametrize(
    ("happens", "repaired"),
    [
        (lambda host: host.load(12), ["load 12 1 repair"]),
        (lambda host: host.load(12, 2), ["activate 2", "load 12 2 repair"]),
        (lambda host: host.unload(11), ["unload 11 1 repair"]),
        (lambda host: (host.unload(11), host.unload(10)), ["unload 11 1 repair", "unload 10 1 repair", "deactivate 1"]),
        (lambda host: (host.load(12, 2), host.unload(12, 2)), []),
        (lambda host: (host.unload(11), host.load(11)), []),
    ],
    ids=["a load", "an activate", "an unload", "the last unload", "came and went", "went and came"],
)
def test_what_did_not_fit_is_made_up_for(host: Host, happens: Callable[[Host], object], repaired: list[str]) -> None:
    reader = fill(host)
    happens(host)
    lost = reader.lost
    assert lost >= 1
    read(reader)

    host.subscribers.catch_up()

    loads, unloads = (sum(one.startswith(kind) for one in repaired) for kind in ("load", "unload"))
    assert sorted(read(reader)) == sorted([f"lost {lost} queue", *repaired, f"repaired +{loads} -{unloads}"])


def test_an_activate_once_more_fits_into_a_full_queue_and_is_no_loss(host: Host) -> None:
    reader = fill(host)
    again = Activate("tls", library(1), Process(10, 5), None, 1, 1)
    assert reader.offer_again(again)
    assert read(reader)[3:] == ["activate 1"]

    host.load(12)
    host.load(13)
    host.load(14)
    host.load(15)
    assert reader.lost == 1
    assert reader.offer_again(again)
    host.subscribers.hand_over()
    read(reader)
    host.subscribers.catch_up()
    assert read(reader) == ["lost 1 queue", "load 15 1 repair", "repaired +1 -0"]


def test_no_file_that_the_reader_has_missed_is_activated_once_more(host: Host) -> None:
    reader = fill(host)
    host.load(12, 2)
    # Its deactivate may be missed too, and then no repair has one.
    assert not reader.offer_again(Activate("tls", library(2), Process(12, 5), None, 1, 1))
    host.unload(12, 2)
    read(reader)
    host.subscribers.catch_up()
    assert read(reader) == ["lost 4 queue", "repaired +0 -0"]


def test_a_repair_stands_between_lost_and_repaired_with_ends_before_beginnings(host: Host) -> None:
    reader = fill(host)
    host.load(12, 2)
    host.unload(10)
    host.unload(11)
    read(reader)
    host.subscribers.catch_up()

    assert read(reader) == [
        "lost 5 queue",
        "unload 10 1 repair",
        "unload 11 1 repair",
        "deactivate 1",
        "activate 2",
        "load 12 2 repair",
        "repaired +1 -2",
    ]


def test_a_reader_without_control_events_gets_the_repair_and_nothing_around_it(host: Host) -> None:
    reader = fill(host, control=False)
    host.load(12)
    read(reader)
    host.subscribers.catch_up()
    assert read(reader) == ["load 12 1 repair"]


def test_a_repair_has_only_the_kinds_and_the_rule_that_were_asked_for(host: Host) -> None:
    reader = host.reader(1, events=("load",), rule="tls")
    host.load(10)
    host.load(11)
    host.load(12, 2, "zlib")
    host.unload(10)
    host.subscribers.hand_over()
    assert (read(reader), reader.lost) == (["load 10 1 mmap"], 1)

    host.subscribers.catch_up()

    # Its unload is no event for this reader; the count says what the repair consisted of.
    assert read(reader) == ["lost 1 queue", "load 11 1 repair", "repaired +1 -1"]


def test_a_reader_that_lost_nothing_has_nothing_to_catch_up_with(host: Host) -> None:
    reader = fill(host)
    read(reader)
    host.subscribers.catch_up()
    assert read(reader) == []


# ---- the difference of two maps -----------------------------------------------------------------


def maps(*loads: Load):
    published = PublishedMap()
    for one in loads:
        published.put(one.process.id, one.library.id, one)
    return published.copy()


def test_a_file_is_activated_and_deactivated_once_for_all_processes() -> None:
    both = maps(load(10), load(11))
    assert [short(one) for one in difference(maps(), both, 9)] == [
        "activate 1",
        "load 10 1 repair",
        "load 11 1 repair",
    ]
    assert [short(one) for one in difference(both, maps(), 9)] == [
        "unload 10 1 repair",
        "unload 11 1 repair",
        "deactivate 1",
    ]


def test_a_file_under_another_rule_is_unloaded_under_the_old_and_loaded_under_the_new() -> None:
    found = list(difference(maps(load(10)), maps(load(10, rule="zlib")), 9))
    assert [(short(one), one.rule) for one in found] == [
        ("unload 10 1 repair", "tls"),
        ("deactivate 1", "tls"),
        ("activate 1", "zlib"),
        ("load 10 1 repair", "zlib"),
    ]
    assert {one.time_ns for one in found} == {9}


def test_maps_that_are_equal_differ_in_nothing() -> None:
    assert list(difference(maps(load(10), load(10, 2)), maps(load(10), load(10, 2)), 9)) == []


# ---- the end ------------------------------------------------------------------------------------


def test_stopped_reaches_a_reader_that_has_lost_events(host: Host) -> None:
    reader = host.reader(1, events=("load",))
    host.load(10)
    host.load(11)
    host.subscribers.emit(STOPPED)
    host.subscribers.end()
    assert [short(one) for one in reader] == ["load 10 1 mmap", "stopped"]
    assert (reader.lost, host.subscribers.lost_in_queues) == (1, 1)


def test_the_end_comes_after_what_was_offered_and_is_for_good(host: Host) -> None:
    reader = host.reader(events=("load",))
    host.load(10)
    host.subscribers.end()
    assert not reader.has_ended
    assert [short(one) for one in reader] == ["load 10 1 mmap"]
    assert reader.has_ended
    assert reader.get() is None  # does not wait
    assert reader.get(0) is None


def test_nothing_there_is_not_the_end(host: Host) -> None:
    reader = host.reader()
    assert reader.get(0) is None
    assert not reader.has_ended
    assert reader.get(0.001) is None
    assert not reader.has_ended


def test_a_closed_reader_gets_what_was_handed_over_and_nothing_that_comes_later(host: Host) -> None:
    reader = host.reader(events=("load",))
    host.load(10)
    host.subscribers.hand_over()
    with reader:
        pass
    host.load(11)
    host.subscribers.hand_over()
    assert reader.waiting == 1
    assert [short(one) for one in reader] == ["load 10 1 mmap"]


def test_close_wakes_a_reader_that_waits_and_signals_once(host: Host, deadline) -> None:
    reader = host.reader()
    signals: list[None] = []
    reader.call_on_event(lambda: signals.append(None))
    thread = threading.Thread(target=list, args=(reader,), daemon=True)
    thread.start()

    reader.close()
    reader.close()

    thread.join(deadline(10))
    assert not thread.is_alive()
    assert (len(signals), reader.has_ended) == (1, True)


def test_an_ended_reader_may_be_closed(host: Host) -> None:
    reader = host.reader()
    signals: list[None] = []
    reader.call_on_event(lambda: signals.append(None))
    host.subscribers.end()
    reader.close()
    assert (list(reader), len(signals)) == ([], 1)


def test_one_reader_is_finished_with_what_it_missed_and_the_others_go_on(host: Host) -> None:
    reader, other = host.reader(1, events=("load",)), host.reader(events=("load",), control=False)
    host.load(10)
    host.load(11)

    reader.finish()
    host.load(12)
    host.subscribers.hand_over()

    assert (reader.waiting, reader.lost) == (4, 1)
    assert [short(one) for one in reader] == ["load 10 1 mmap", "lost 1 queue", "load 11 1 repair", "repaired +1 -0"]
    assert read(other) == ["load 10 1 mmap", "load 11 1 mmap", "load 12 1 mmap"]
    assert not other.has_ended


def test_a_reader_without_a_rule_gets_none_of_its_events_nor_of_its_repairs(host: Host) -> None:
    reader = host.reader(limit=8, without_rules=("hidden",))
    for pid in range(10, 20):
        host.load(pid, inode=1, rule="hidden")
    host.subscribers.hand_over()
    assert (read(reader), reader.lost) == ([], 0)
    for pid in range(20, 30):
        host.load(pid, inode=2)
        host.load(pid, inode=3, rule="hidden")
    host.subscribers.hand_over()
    read(reader)
    host.subscribers.catch_up()
    found = read(reader)
    assert found[0] == "lost 3 queue"
    assert found[-1] == "repaired +3 -0"
    assert {line.split()[2] for line in found[1:-1]} == {"2"}
