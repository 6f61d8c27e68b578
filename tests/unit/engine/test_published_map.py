"""The load events in force, and the readers that they are offered to."""

from __future__ import annotations

from sowatch.engine.published_map import Counts, PublishedMap
from sowatch.engine.subscribers import Subscribers
from sowatch.model.events import Library, Load, Lost, Process
from sowatch.model.identity import FileId, ProcessId

ONE, SAME_PID, OTHER = ProcessId(1, 5), ProcessId(1, 9), ProcessId(2, 5)
A, B = FileId(1, 1, 1), FileId(1, 1, 2)


def load(process: ProcessId, file: FileId, rule: str = "r") -> Load:
    return Load(rule, Library("/a", file), Process(*process), "mmap", 1, 1)


def filled() -> PublishedMap:
    published = PublishedMap()
    for process in (ONE, SAME_PID, OTHER):
        for file in (A, B):
            published.put(process, file, load(process, file))
    return published


def test_what_was_put_is_there_until_it_is_taken_out():
    published = filled()
    assert published.get(ONE, A) == load(ONE, A)
    assert published.pop(ONE, A) == load(ONE, A)
    assert published.get(ONE, A) is None
    assert published.pop(ONE, A) is None
    assert published.copy()[ONE] == {B: load(ONE, B)}


def test_a_pid_that_was_reused_has_the_files_of_both_processes():
    published = filled()
    assert published.of_pid(1) == [load(process, file) for process in (ONE, SAME_PID) for file in (A, B)]
    for file in (A, B):
        published.pop(SAME_PID, file)
    assert published.of_pid(1) == [load(ONE, A), load(ONE, B)]
    for file in (A, B):
        published.pop(ONE, file)
    assert published.of_pid(1) == []


def test_a_copy_stays_as_it_was():
    published = filled()
    copy = published.copy()
    published.pop(ONE, A)
    assert copy[ONE] == {A: load(ONE, A), B: load(ONE, B)}
    assert published.counts() == Counts(3, 2, 5)


def test_the_load_events_that_are_meant_are_found():
    published = filled()
    published.put(OTHER, A, load(OTHER, A, "other"))
    assert published.where(lambda one: one.rule == "other") == [load(OTHER, A, "other")]


def test_each_reader_gets_what_it_wants_once_it_is_handed_over():
    subscribers = Subscribers(PublishedMap())
    options = {"limit": 10, "limit_bytes": 1 << 20}
    everything = subscribers.subscribe(control=True, **options)
    loads = subscribers.subscribe(events=("load",), control=False, rule="r", **options)
    events = [load(ONE, A), load(ONE, B, "other"), Lost(1, 1, "kernel")]
    for one in events:
        subscribers.emit(one)
    assert everything.get(0) is None
    subscribers.hand_over()
    assert [everything.get(0) for _ in events] == events
    assert [loads.get(0), loads.get(0)] == [load(ONE, A), None]
    assert subscribers.events == 3


def test_a_reader_that_has_closed_gets_nothing_more_and_the_others_go_on():
    subscribers = Subscribers(PublishedMap())
    first, second = (subscribers.subscribe(control=True, limit=10, limit_bytes=1 << 20) for _ in range(2))
    first.close()
    subscribers.emit(load(ONE, A))
    subscribers.end()
    assert first.get(0) is None
    assert first.has_ended
    assert second.get(0) == load(ONE, A)
    assert second.get(0) is None
    assert second.has_ended
