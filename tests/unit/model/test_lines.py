"""lines: the wire form of schema 1 of every kind of event, also with hostile names, and back."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sowatch.model.encoding import restore
from sowatch.model.errors import DecodeError, LoadAttempt
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Head,
    Library,
    Load,
    Lost,
    Origin,
    Process,
    Ready,
    Repaired,
    Stopped,
    Unload,
)
from sowatch.model.identity import FileId
from sowatch.model.lines import decode, to_dict, to_json
from sowatch.model.literals import EVENT_KINDS
from support import scripted, strict

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
LOAD = Load(
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

#: Names that do not print as themselves, or are not UTF-8.
ODD = replace(
    LOAD,
    library=replace(LIBRARY, path="/usr/lib/lib\u00e9\u202e\U0001f600.so", soname='\x7f\x80\t"\\'),
)
BYTES = replace(
    LOAD,
    rule="\udcff",
    process=replace(PROCESS, comm="a\udce9", exe="/\udcff", container="\udc80", cgroup="/\udc80"),
    library=replace(LIBRARY, path="/lib\udcff.so", host_path="/h\udcff", soname="\udcff"),
)

EVENTS: list[Event] = [
    LOAD,
    *(replace(LOAD, cause=cause) for cause in ("snapshot", "fork", "exec", "repair")),
    replace(LOAD, t_ns=None, ranges=()),
    replace(LOAD, process=Process(812, 0), library=Library("/memfd:x", FileId(0, 1, 0), deleted=True)),
    replace(LOAD, library=replace(LIBRARY, path_partial=True, kind="other")),
    *(Unload("tls", LIBRARY, PROCESS, cause, 12_345, NOON) for cause in ("munmap", "exec", "exit", "repair", "rules")),
    Activate("tls", LIBRARY, PROCESS, "mmap", 12_345, NOON, LOAD.ranges),
    Activate("tls", LIBRARY, PROCESS, None, 12_345, NOON),
    Deactivate("tls", LIBRARY, "stop", 12_345, NOON),
    Deactivate("tls", LIBRARY, None, 12_345, NOON),
    READY,
    replace(
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
    replace(LOAD, ranges=((0x1000, 0x2000), (0x3000, 0x9000)), range_count=300),
    ODD,
    BYTES,
    replace(READY, host="h\udcff", limits=("a\udcff", "b"), attempts=(LoadAttempt("core", False, "no \udcff"),)),
]
#: What version 0.1 wrote for each of them with seq 3, before its lines were typed.
GOLDEN = (Path(__file__).parent / "lines.jsonl").read_text(encoding="ascii").splitlines()

every_event = pytest.mark.parametrize(
    ("event", "golden"),
    list(zip(EVENTS, GOLDEN, strict=True)),
    ids=[f"{number}-{event.event}" for number, event in enumerate(EVENTS)],
)


#: What `ready` has got since.
ADDED = re.compile(r',"(?:process_count|mapping_count|host_id|version)":(?:\d+|null)(?=[,}])')


@every_event
def test_a_line_is_byte_for_byte_what_it_always_was_but_for_what_was_added(event: Event, golden: str) -> None:
    line = to_json(event, 3)
    assert ADDED.sub("", line) == golden
    assert line == golden or event.event == "ready"


@every_event
def test_a_line_that_was_read_is_written_the_same(event: Event, golden: str) -> None:
    found = decode(golden)

    assert type(found) is type(event)
    assert ADDED.sub("", to_json(found, 3)) == golden
    assert decode(golden.encode()) == found


def test_a_line_reads_back_as_its_event() -> None:
    changed = replace(LOAD, time_ns=NOON // 1000 * 1000)

    assert decode(to_json(LOAD, 1)) == changed
    assert decode(to_json(replace(BYTES, time_ns=changed.time_ns), 1)) == replace(BYTES, time_ns=changed.time_ns)


def test_members_of_a_later_version_are_left_out() -> None:
    line = to_json(LOAD, 1)
    later = line[:-1] + ',"cpu":[3,{"core":1}]}'

    assert decode(later) == decode(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "truncated"),
        ("[]", "Expected `object`"),
        ("{}", "missing required field `event`"),
        ('{"event":"mapping"}', "a line of the kind 'mapping' is no event"),
        ('{"event":"lost","schema":1}', "missing required field `seq`"),
        (GOLDEN[0].replace('"schema":1', '"schema":2'), "`$.schema`"),
        (GOLDEN[0].replace('"mmap"', '"exit"'), "`$.cause`"),
        (GOLDEN[0].replace("2023-11", "2023-13"), "month must be in 1..12"),
        (GOLDEN[0].replace('"pid":812', '"pid":"812"'), "`$.process.pid`"),
        (GOLDEN[25].replace('"rule_bytes":"/w=="', '"rule_bytes":"/w=!"'), "base64"),
        ("[" * 100_000, "Expected `object`"),
        # Python 3.14 counts no calls but bytes of the stack, and these do not use it up.
        ('{"event":"lost","x":' + "[" * 100_000, "recursion" if sys.version_info < (3, 14) else "truncated"),
        (b"\xff", "malformed"),
        ("\udcff", "surrogates not allowed"),
    ],
)
def test_what_is_no_event_is_an_error_that_says_where(line: str | bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=re.escape(reason)) as caught:
        decode(line)

    assert "sowatch watch --json" in str(caught.value)


@every_event
def test_every_event_is_one_line_of_the_schema(event: Event, golden: str, schema: Callable[[Any], Any]) -> None:
    line = to_json(event, 3)

    assert "\n" not in line
    assert line.isascii()
    assert schema(line) == restore(to_dict(event, 3))


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
        "snapshot": {
            "processes": 212,
            "mappings": 5120,
            "seconds": 0.031235,
            "process_count": 212,
            "mapping_count": 5120,
        },
        "host_id": None,
        "version": None,
    }


def test_the_head_of_a_file_is_written_and_read_back() -> None:
    head = Head(NOON, Origin("h\udcff", "0" * 32, None, "0.1.0"))
    assert decode(to_json(head, 0)) == replace(head, time_ns=NOON // 1000 * 1000)
    assert READY.origin == Origin("box", None, READY.boot_id, None)


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
    fields = {kind: set(to_dict(scripted.event(kind), 1)) for kind in EVENT_KINDS}

    assert [kind for kind in EVENT_KINDS if "ranges" in fields[kind]] == ["load"]
    assert [kind for kind in EVENT_KINDS if "t_ns" in fields[kind]] == ["load", "unload"]


def test_a_deactivate_names_no_process() -> None:
    assert "process" not in to_dict(Deactivate("tls", LIBRARY, "exit", None, NOON), 1)


def test_an_unfinished_path_says_so_and_a_whole_one_says_nothing() -> None:
    partial = replace(LOAD, library=replace(LIBRARY, path_partial=True))

    assert to_dict(partial, 1)["library"]["path_partial"] is True
    assert "path_partial" not in to_dict(LOAD, 1)["library"]


def test_what_could_not_be_read_of_a_process_is_null_not_left_out() -> None:
    found = to_dict(replace(LOAD, process=Process(812, 10)), 1)["process"]

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
    event = replace(
        LOAD,
        library=replace(LIBRARY, path=os.fsdecode(path), soname=os.fsdecode(path)),
        process=replace(PROCESS, comm=os.fsdecode(comm)),
    )
    line = to_json(event, 1)
    back = strict.loads(line)

    assert line.isascii()
    assert line.isprintable()
    assert os.fsencode(back["library"]["path"]) == path
    assert os.fsencode(back["process"]["comm"]) == comm


def test_bytes_that_are_not_utf_8_are_beside_the_name_on_the_wire() -> None:
    event = replace(LOAD, library=replace(LIBRARY, path=os.fsdecode(b"/lib/\xff\x1b[31m.so")))

    assert r'"path":"/lib/\\xff\u001b[31m.so","path_bytes":"L2xpYi//G1szMW0uc28="' in to_json(event, 1)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=5))
def test_ranges_read_back_as_the_same_numbers(ranges: list[tuple[int, int]]) -> None:
    found = to_dict(replace(LOAD, ranges=tuple(ranges)), 1)["ranges"]

    assert [(int(start, 16), int(end, 16)) for start, end in found] == ranges
