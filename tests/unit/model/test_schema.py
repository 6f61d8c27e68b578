"""The JSON Schema that ships: every event fits it, and what is no event does not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import event_schema
from sowatch.cli._schema import load_schema
from sowatch.model.errors import LoadAttempt
from sowatch.model.events import (
    Activate,
    Deactivate,
    Event,
    Library,
    LibraryEvent,
    Load,
    Lost,
    Pod,
    Process,
    Ready,
    Repaired,
    Stopped,
    Unload,
)
from sowatch.model.identity import FileId
from sowatch.model.lines import decode, to_dict, to_json
from support.scripted import HTTP, READY, RENEWED, SSL, STALE, TIME_NS, event

STRICT = jsonschema.Draft202012Validator(load_schema(strict=True))
OPEN = jsonschema.Draft202012Validator(load_schema())

EVENTS: dict[str, Event] = {
    "load": event("load", "mmap"),
    "unload": event("unload", "exit"),
    "activate": event("activate"),
    "deactivate": event("deactivate"),
    "http": HTTP,
    "stale": STALE,
    "renewed": RENEWED,
    "ready": READY,
    "lost": Lost(TIME_NS, count=12, where="kernel"),
    "repaired": Repaired(TIME_NS, loads=3, unloads=1, seconds=0.01),
    "stopped": Stopped(TIME_NS, loads=3, unloads=1, lost=0),
}

# Names as hostile processes choose them: control characters, and bytes that are not UTF-8 as surrogates.
names = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(max_codepoint=0x1F),
        st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    ),
    max_size=40,
)
naturals = st.integers(min_value=0, max_value=2**64 - 1)
pids = st.integers(min_value=1, max_value=1 << 22)
file_ids = st.builds(FileId, naturals, naturals, naturals, naturals, naturals)
processes = st.builds(
    Process,
    pid=pids,
    start_ns=naturals,
    ns_pid=st.none() | pids,
    ppid=st.none() | st.integers(min_value=0, max_value=1 << 22),
    comm=st.none() | names,
    exe=st.none() | names,
    uid=st.none() | st.integers(min_value=0, max_value=2**32 - 1),
    container=st.none() | names,
    cgroup=st.none() | names,
    pod=st.none()
    | st.builds(
        Pod,
        uid=st.text("0123456789abcdef-", min_size=1),
        name=st.none() | names,
        namespace=st.none() | names,
        container=st.none() | names,
    ),
)
libraries = st.builds(
    Library,
    path=names,
    id=file_ids,
    host_path=st.none() | names,
    kind=st.sampled_from(["library", "executable", "interpreter", "other"]),
    build_id=st.none() | st.binary(min_size=1, max_size=20).map(bytes.hex),
    soname=st.none() | names,
    deleted=st.booleans(),
    path_partial=st.booleans(),
)
rules = names.filter(bool)
times = st.integers(min_value=0, max_value=4_000_000_000 * 10**9)
causes = {
    "load": ["mmap", "snapshot", "fork", "exec", "repair"],
    "unload": ["munmap", "exec", "exit", "repair", "rules"],
    "activate": [None],
    "deactivate": [None, "stop"],
}


KINDS = (Load, Unload, Activate, Deactivate)


def library_events(kind: type[LibraryEvent]) -> st.SearchStrategy[LibraryEvent]:
    facts: dict[str, st.SearchStrategy[Any]] = {
        "rule": rules,
        "library": libraries,
        "process": processes,
        "cause": st.sampled_from(causes[kind.event]),
        "t_ns": st.none() | naturals,
        "time_ns": times,
        "ranges": st.lists(st.tuples(naturals, naturals), max_size=3).map(tuple),
        "range_count": st.none() | st.integers(257, 2**31),
    }
    return st.builds(kind, **{name: facts[name] for name in kind.__struct_fields__})


control_events = st.one_of(
    st.builds(
        Ready,
        time_ns=times,
        host=names,
        boot_id=st.none() | names,
        strategy=st.sampled_from(["core", "runtime", "prebuilt", "procfs"]),
        guarantee=st.sampled_from(["exact", "sampled"]),
        hooks=st.none() | st.sampled_from(["syscall", "trampoline"]),
        limits=st.lists(names, max_size=2).map(tuple),
        attempts=st.lists(st.builds(LoadAttempt, names, st.booleans(), st.none() | names), max_size=3).map(tuple),
        processes=naturals,
        mappings=naturals,
        seconds=st.floats(min_value=0, max_value=1e6),
        host_id=st.none() | st.just("0" * 32),
        version=st.none() | names,
    ),
    st.builds(Lost, times, st.integers(min_value=1), st.sampled_from(["kernel", "queue"])),
    st.builds(Repaired, times, naturals, naturals, st.floats(min_value=0, max_value=1e6)),
    st.builds(Stopped, times, naturals, naturals, naturals),
)


def faults(validator: jsonschema.Draft202012Validator, line: Any) -> list[str]:
    return [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(line)]


#: Words of a schema that refuse no line.
NOT_DEMANDED = ("$id", "description", "title", "deprecated", "$defs")


def meaning(node: Any, defs: dict[str, Any]) -> Any:
    """What a schema demands: references followed, no words for people, the order of sets left open."""
    if isinstance(node, list):
        return [meaning(one, defs) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = defs[node["$ref"].rpartition("/")[2]]
    found = {key: meaning(one, defs) for key, one in node.items() if key not in NOT_DEMANDED}
    for key in ("enum", "required", "type"):
        if isinstance(found.get(key), list):
            found[key] = sorted(found[key], key=repr)
    return found


def differences(before: Any, now: Any, at: str = "$") -> Iterator[str]:
    """Where two meanings differ.

    Schema 1 grows: further kinds of lines, members that need not be there and further ways to be stale are none.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now if not at.endswith(".properties") else before:
            if key in before and key in now:
                yield from differences(before[key], now[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}"
    elif at == "$.allOf":
        for number, (one, other) in enumerate(zip(before, now[: len(before)], strict=True)):
            yield from differences(one, other, f"{at}[{number}]")
    elif at == "$.properties.event.enum" or at.endswith(".stale.enum"):
        yield from set(before) - set(now)
    elif before != now:
        yield at


def of_version_0_1() -> Any:
    text = (Path(__file__).parent / "event.schema.0.1.json").read_text(encoding="utf-8")
    return meaning(json.loads(text), json.loads(text)["$defs"])


def test_the_schema_that_ships_is_made_of_the_types() -> None:
    assert event_schema.FILE.read_text(encoding="utf-8") == event_schema.text(), "run `make schema`"


def test_the_schema_demands_what_version_0_1_demanded() -> None:
    now = event_schema.event_schema()

    assert list(differences(of_version_0_1(), meaning(now, now["$defs"]))) == []


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("load", "required", ["schema"]),
        ("seq", "minimum", 1),
        ("library", "type", "array"),
        ("time", "pattern", ".*"),
        ("bytes", "contentEncoding", "hex"),
        ("ranges", "items", {}),
    ],
)
def test_a_schema_that_demands_something_else_is_noticed(place: str, key: str, value: Any) -> None:
    now = event_schema.event_schema()
    now["$defs"][place][key] = value

    assert any(one.endswith(f".{key}") for one in differences(of_version_0_1(), meaning(now, now["$defs"])))


def test_a_schema_that_lost_a_member_or_a_kind_of_line_is_noticed() -> None:
    now = event_schema.event_schema()
    del now["$defs"]["process"]["properties"]["uid"]
    now["properties"]["event"]["enum"].remove("ready")

    found = list(differences(of_version_0_1(), meaning(now, now["$defs"])))
    assert "ready" in found
    assert any(one.endswith(".process.properties.uid") for one in found)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(load_schema())
    jsonschema.Draft202012Validator.check_schema(load_schema(strict=True))


@pytest.mark.parametrize("kind", EVENTS)
def test_an_event_of_each_kind_fits_and_has_no_field_the_schema_does_not_name(kind: str) -> None:
    line = json.loads(to_json(EVENTS[kind], 1))

    assert line["event"] == kind
    assert faults(STRICT, line) == []


@given(st.one_of(control_events, *map(library_events, KINDS)), st.integers(min_value=1))
def test_every_event_fits_whatever_names_processes_and_files_have(one: Event, seq: int) -> None:
    text = to_json(one, seq)

    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text) == to_dict(one, seq)
    assert to_json(decode(text), seq) == text
    assert faults(STRICT, json.loads(text)) == []


def test_bytes_that_are_not_utf8_are_escapes_for_people_with_the_bytes_beside_them() -> None:
    library = Library(path="/tmp/\udcff\x1b[31m\n.so", id=SSL.id)

    text = to_json(event(library=library), 1)

    assert '"path":"/tmp/\\\\xff\\u001b[31m\\n.so","path_bytes":"L3RtcC//G1szMW0KLnNv"' in text
    assert faults(STRICT, json.loads(text)) == []


@pytest.mark.parametrize("kind", EVENTS)
def test_every_field_of_an_event_is_required(kind: str) -> None:
    line = to_dict(EVENTS[kind], 1)
    optional = {"activate": {"cause"}, "deactivate": {"cause"}, "ready": {"host_id", "version"}}.get(kind, set())

    for field in set(line) - optional:
        without = {name: value for name, value in line.items() if name != field}
        assert faults(STRICT, without), field


@pytest.mark.parametrize("part", ["process", "library"])
def test_every_field_of_a_process_and_a_library_is_required(part: str) -> None:
    line = to_dict(EVENTS["load"], 1)

    for field in line[part]:
        without = copy.deepcopy(line)
        del without[part][field]
        assert faults(OPEN, without), field


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("load", {"event": "opened"}),
        ("load", {"schema": 2}),
        ("load", {"seq": -1}),
        ("load", {"time": "2023-11-14T22:13:20Z"}),
        ("load", {"cause": "exit"}),
        ("load", {"process": None}),
        ("load", {"ranges": [["1000"]]}),
        ("load", {"ranges": [[4096, 8192]]}),
        ("load", {"ranges": [["0x1000", "0x2000"]]}),
        ("load", {"rule": ""}),
        ("unload", {"cause": "mmap"}),
        ("deactivate", {"cause": "snapshot"}),
        ("ready", {"strategy": "auto"}),
        ("ready", {"attempts": [{"strategy": "core"}]}),
        ("lost", {"count": 0}),
        ("lost", {"where": "disk"}),
    ],
)
def test_a_wrong_value_does_not_fit(kind: str, change: dict[str, Any]) -> None:
    assert faults(OPEN, to_dict(EVENTS[kind], 1) | change)


def test_fields_added_later_fit_the_shipped_schema_but_not_the_strict_one() -> None:
    line = to_dict(EVENTS["load"], 1)
    line["cpu"] = 3
    line["library"]["size_bytes"] = 4096

    assert faults(OPEN, line) == []
    assert len(faults(STRICT, line)) == 2


def test_an_unload_may_not_carry_the_fields_of_a_ready() -> None:
    assert faults(STRICT, to_dict(EVENTS["unload"], 1) | {"host": "box"})


def test_a_deactivate_names_no_process_because_the_last_one_is_gone() -> None:
    line = to_dict(event("deactivate"), 1) | {"process": to_dict(event("load"), 1)["process"]}

    assert faults(STRICT, line)
