"""events: values that do not change, each of a type that says what it has."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest
from msgspec.structs import replace

from sowatch.model.events import ControlEvent, Event, Library, LibraryEvent, Lost, Repaired, Stopped
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import EVENT_KINDS
from support.scripted import HTTP, PROCESS, READY, RENEWED, SSL, STALE, event

LIBRARY_EVENTS: list[LibraryEvent] = [event(kind) for kind in EVENT_KINDS]
CONTROL_EVENTS: list[ControlEvent] = [READY, Lost(1, 2, "queue"), Repaired(1, 0, 0, 0.1), Stopped(1, 2, 3, 0)]


def test_every_kind_of_event_has_a_type_of_its_own() -> None:
    made = [*LIBRARY_EVENTS, HTTP, STALE, RENEWED, *CONTROL_EVENTS]

    assert [type(one) for one in made] == list(get_args(Event))
    assert [one.event for one in made] == [
        *EVENT_KINDS,
        "http",
        "stale",
        "renewed",
        "ready",
        "lost",
        "repaired",
        "stopped",
    ]
    assert [type(one).__name__.lower() for one in made] == [one.event for one in made]


def test_a_library_event_is_told_from_a_control_event_as_ever() -> None:
    assert all(isinstance(one, LibraryEvent) for one in LIBRARY_EVENTS)
    assert not any(isinstance(one, LibraryEvent) for one in [HTTP, STALE, RENEWED, *CONTROL_EVENTS])


@pytest.mark.parametrize("one", LIBRARY_EVENTS, ids=lambda one: one.event)
def test_a_library_event_has_the_attributes_that_scripts_read(one: LibraryEvent) -> None:
    names = ("event", "rule", "library", "process", "cause", "t_ns", "time_ns", "ranges", "range_count")

    assert [hasattr(one, name) for name in names] == [True] * len(names)
    assert (one.process is None) == (one.event == "deactivate")
    assert bool(one.ranges) == (one.event == "load")


def test_a_process_is_identified_by_pid_and_start() -> None:
    assert PROCESS.id == ProcessId(1234, 5_000_000_000)


@pytest.mark.parametrize(
    "one", [*LIBRARY_EVENTS, HTTP, *CONTROL_EVENTS, PROCESS, SSL], ids=lambda one: type(one).__name__
)
def test_a_value_is_frozen_and_can_be_sent_to_another_process(one: Event | Library) -> None:
    name = one.__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(one, name, getattr(one, name))

    assert pickle.loads(pickle.dumps(one)) == one


def test_when_an_inode_was_changed_is_no_part_of_what_a_library_is() -> None:
    changed = replace(SSL, changed_ns=5)

    assert (changed == SSL, hash(changed) == hash(SSL)) == (True, True)
    assert replace(SSL, id=FileId(1, 1, 1)) != SSL
