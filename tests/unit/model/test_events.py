"""events: the wire form of schema 1, on every kind of event and on hostile names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.model.errors import LoadAttempt
from sowatch.model.events import (
    EVENT_KINDS,
    Event,
    JsonLines,
    Library,
    LibraryEvent,
    Lost,
    Process,
    Ready,
    Repaired,
    Stopped,
    to_dict,
    to_json,
)
from sowatch.model.identity import FileId, ProcessId
from support import strict

NOON = 1_700_000_000_123_456_789  # 2023-11-14T22:13:20.123456789Z

PROCESS = Process(
    pid=812,
    start_ns=5_544_830_000_000,
    ns_pid=7,
    ppid=1,
    comm="nginx",
    exe="/usr/sbin/nginx",
    uid=33,
    container="4f2a",
    cgroup="/docker/4f2a",
)
LIBRARY = Library(
    path="/usr/lib/libssl.so.3",
    id=FileId(254, 0, 4711, 99, 5),
    host_path="/proc/812/root/usr/lib/libssl.so.3",
    build_id="c0b995",
    soname="libssl.so.3",
)
LOAD = LibraryEvent(
    event="load",
    rule="tls",
    library=LIBRARY,
    process=PROCESS,
    cause="mmap",
    t_ns=12_345,
    time_ns=NOON,
    ranges=((0x7F91AC0AC000, 0x7F91AC0BF000), (0, 0x1000)),
)
READY = Ready(
    time_ns=NOON,
    host="box",
    boot_id="ac2485fd-d76a-435d-9bd8-a382471bdd50",
    strategy="core",
    guarantee="exact",
    hooks="syscall",
    limits=("32-bit processes are watched by reads",),
    attempts=(LoadAttempt("core", True, None),),
    processes=212,
    mappings=5120,
    seconds=0.0312345678,
)

EVENTS: list[Event] = [
    LOAD,
    *(dataclasses.replace(LOAD, cause=cause) for cause in ("snapshot", "fork", "exec", "repair")),
    dataclasses.replace(LOAD, t_ns=None, ranges=()),
    dataclasses.replace(LOAD, process=Process(812, 0), library=Library("/memfd:x", FileId(0, 1, 0), deleted=True)),
    dataclasses.replace(LOAD, library=dataclasses.replace(LIBRARY, path_partial=True, kind="other")),
    *(
        dataclasses.replace(LOAD, event="unload", cause=cause)
        for cause in ("munmap", "exec", "exit", "repair", "rules")
    ),
    dataclasses.replace(LOAD, event="activate"),
    dataclasses.replace(LOAD, event="activate", cause=None),
    dataclasses.replace(LOAD, event="deactivate", process=None, cause="stop"),
    dataclasses.replace(LOAD, event="deactivate", process=None, cause=None),
    READY,
    dataclasses.replace(
        READY,
        strategy="procfs",
        guarantee="sampled",
        hooks=None,
        boot_id=None,
        limits=(),
        attempts=(LoadAttempt("core", False, "no BTF"), LoadAttempt("procfs", True, None)),
    ),
    Lost(NOON, 12, "kernel"),
    Lost(NOON, 1, "queue"),
    Repaired(NOON, 3, 1, 0.01),
    Stopped(NOON, 5, 4, 0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event.event}-{getattr(event, 'cause', '')}")
def test_every_event_is_one_line_of_the_schema(event: Event, schema: Callable[[Any], Any]) -> None:
    line = to_json(event, 3)

    assert "\n" not in line
    assert line.isascii()
    assert schema(line) == to_dict(event, 3)


def test_a_load_is_written_in_full() -> None:
    assert to_dict(LOAD, 41) == {
        "schema": 1,
        "event": "load",
        "seq": 41,
        "time": "2023-11-14T22:13:20.123456Z",
        "t_ns": 12_345,
        "cause": "mmap",
        "rule": "tls",
        "process": {
            "pid": 812,
            "ns_pid": 7,
            "start_ns": 5_544_830_000_000,
            "ppid": 1,
            "comm": "nginx",
            "exe": "/usr/sbin/nginx",
            "uid": 33,
            "container": "4f2a",
            "cgroup": "/docker/4f2a",
        },
        "library": {
            "path": "/usr/lib/libssl.so.3",
            "host_path": "/proc/812/root/usr/lib/libssl.so.3",
            "dev": "254:0",
            "inode": 4711,
            "generation": 99,
            "subvol": 5,
            "kind": "library",
            "build_id": "c0b995",
            "soname": "libssl.so.3",
            "deleted": False,
        },
        "ranges": [["7f91ac0ac000", "7f91ac0bf000"], ["0", "1000"]],
    }


def test_ready_is_written_in_full() -> None:
    assert to_dict(READY, 1) == {
        "schema": 1,
        "event": "ready",
        "seq": 1,
        "time": "2023-11-14T22:13:20.123456Z",
        "host": "box",
        "boot_id": "ac2485fd-d76a-435d-9bd8-a382471bdd50",
        "strategy": "core",
        "guarantee": "exact",
        "hooks": "syscall",
        "limits": ["32-bit processes are watched by reads"],
        "attempts": [{"strategy": "core", "ok": True, "error": None}],
        "snapshot": {"processes": 212, "mappings": 5120, "seconds": 0.031235},
    }


def test_the_other_control_events_are_written_in_full() -> None:
    time = "2023-11-14T22:13:20.123456Z"

    assert [
        to_dict(event, 9) for event in (Lost(NOON, 12, "queue"), Repaired(NOON, 3, 1, 0.5), Stopped(NOON, 5, 4, 2))
    ] == [
        {"schema": 1, "event": "lost", "seq": 9, "time": time, "count": 12, "where": "queue"},
        {"schema": 1, "event": "repaired", "seq": 9, "time": time, "loads": 3, "unloads": 1, "seconds": 0.5},
        {"schema": 1, "event": "stopped", "seq": 9, "time": time, "loads": 5, "unloads": 4, "lost": 2},
    ]


def test_only_a_load_has_ranges_and_only_loads_and_unloads_have_a_kernel_time() -> None:
    fields = {kind: set(to_dict(dataclasses.replace(LOAD, event=kind), 1)) for kind in EVENT_KINDS}

    assert [kind for kind in EVENT_KINDS if "ranges" in fields[kind]] == ["load"]
    assert [kind for kind in EVENT_KINDS if "t_ns" in fields[kind]] == ["load", "unload"]


def test_a_deactivate_names_no_process() -> None:
    event = dataclasses.replace(LOAD, event="deactivate", process=None, cause="exit")

    assert "process" not in to_dict(event, 1)


def test_an_unfinished_path_says_so_and_a_whole_one_says_nothing() -> None:
    partial = dataclasses.replace(LOAD, library=dataclasses.replace(LIBRARY, path_partial=True))

    assert to_dict(partial, 1)["library"]["path_partial"] is True
    assert "path_partial" not in to_dict(LOAD, 1)["library"]


def test_what_could_not_be_read_of_a_process_is_null_not_left_out() -> None:
    found = to_dict(dataclasses.replace(LOAD, process=Process(812, 10)), 1)["process"]

    assert {name for name, value in found.items() if value is None} == {
        "ns_pid", "ppid", "comm", "exe", "uid", "container", "cgroup",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (999, "1970-01-01T00:00:00.000000Z"),
        (1_000, "1970-01-01T00:00:00.000001Z"),
        (1_709_208_000_999_999_999, "2024-02-29T12:00:00.999999Z"),
    ],
)
def test_times_are_utc_with_six_digits_cut_not_rounded(time_ns: int, text: str) -> None:
    assert to_dict(Stopped(time_ns, 0, 0, 0), 1)["time"] == text


@given(st.integers(0, 4_102_444_800 * 10**9), st.integers(0, 10**12))
def test_later_times_are_never_written_as_earlier_ones(time_ns: int, later: int) -> None:
    first, second = (to_dict(Stopped(at, 0, 0, 0), 1)["time"] for at in (time_ns, time_ns + later))

    assert first <= second


@given(st.binary(max_size=40), st.binary(max_size=15))
def test_any_bytes_in_names_make_one_ascii_line_that_reads_back_the_same(path: bytes, comm: bytes) -> None:
    event = dataclasses.replace(
        LOAD,
        library=dataclasses.replace(LIBRARY, path=os.fsdecode(path), soname=os.fsdecode(path)),
        process=dataclasses.replace(PROCESS, comm=os.fsdecode(comm)),
    )
    line = to_json(event, 1)
    back = strict.loads(line)

    assert line.isascii()
    assert line.isprintable()
    assert os.fsencode(back["library"]["path"]) == path
    assert os.fsencode(back["process"]["comm"]) == comm


def test_bytes_that_are_not_utf_8_are_beside_the_name_on_the_wire() -> None:
    event = dataclasses.replace(LOAD, library=dataclasses.replace(LIBRARY, path=os.fsdecode(b"/lib/\xff\x1b[31m.so")))

    assert r'"path":"/lib/\\xff\u001b[31m.so","path_bytes":"L2xpYi//G1szMW0uc28="' in to_json(event, 1)
    assert JsonLines().line(event, 1) == to_json(event, 1)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=5))
def test_ranges_read_back_as_the_same_numbers(ranges: list[tuple[int, int]]) -> None:
    found = to_dict(dataclasses.replace(LOAD, ranges=tuple(ranges)), 1)["ranges"]

    assert [(int(start, 16), int(end, 16)) for start, end in found] == ranges


def test_a_process_is_identified_by_pid_and_start() -> None:
    assert PROCESS.id == ProcessId(812, 5_544_830_000_000)


@pytest.mark.parametrize("event", EVENTS[:1] + EVENTS[-4:], ids=lambda event: event.event)
def test_events_are_frozen(event: Event) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.time_ns = 0  # type: ignore[misc]
