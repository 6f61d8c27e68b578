"""Names that others chose, on their way through every record and out of every command: same bytes, no effect."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.bpf.records import path_of
from sowatch.cli._lines import pieces_of, plain
from sowatch.linux.cgroups import unit_of
from sowatch.linux.containers import container_id
from sowatch.model.encoding import dumps
from sowatch.model.escape import one_line, visible
from sowatch.model.events import Library, LibraryEvent, Process
from sowatch.model.identity import FileId
from sowatch.model.lines import to_dict, to_json
from sowatch.model.rules import Rule, RuleSet
from support import scripted, strict

#: What is most likely to break something, and then anything: bytes as the kernel lets names be, without NUL.
SPECIAL = [
    *(b"\x1b[2J", b"\n", b"\r", b'"', b"\\", b"\\012", b" (deleted)", b"\xff", b"\xed\xa0\x80", b"\xc2\x9b31m"),
    *("\u202e".encode(), "\u200b".encode(), "\u2028".encode(), b"[bold]", b"{0}", b"%s", b"-x", b" ", b"\x7f"),
]
names = st.lists(st.sampled_from(SPECIAL) | st.binary(min_size=1, max_size=6), min_size=1, max_size=8).map(
    lambda parts: b"".join(parts).replace(b"\0", b"0").replace(b"/", b"_")[:255]
)
comms = names.map(lambda name: name[:15])
paths = st.lists(names, min_size=1, max_size=6).map(lambda parts: b"/" + b"/".join(parts))


def text(data: bytes) -> str:
    return os.fsdecode(data)


def event(path: bytes, comm: bytes, cgroup: bytes, soname: bytes, kind: str = "load") -> LibraryEvent:
    library = Library(
        path=text(path), id=FileId(254, 0, 7), host_path=text(path), kind="library", build_id=None, soname=text(soname)
    )
    process = Process(
        pid=7,
        start_ns=10**7,
        comm=text(comm),
        exe=text(path),
        cgroup=text(cgroup),
        container=container_id(text(cgroup)),
    )
    cause = {"load": "mmap", "unload": "munmap"}.get(kind)
    return scripted.event(kind, cause, rule=text(path)[:20], library=library, process=process)


@given(paths, comms, paths, names)
def test_a_line_of_json_is_plain_and_gives_every_byte_back(
    path: bytes, comm: bytes, cgroup: bytes, soname: bytes
) -> None:
    reported = event(path, comm, cgroup, soname)
    line = to_json(reported, 1)
    assert line.isascii()
    assert line.isprintable()
    found = strict.loads(line)
    assert found == strict.loads(dumps(to_dict(reported, 1)))
    assert os.fsencode(found["library"]["path"]) == os.fsencode(found["library"]["host_path"]) == path
    assert os.fsencode(found["library"]["soname"]) == soname
    assert os.fsencode(found["process"]["comm"]) == comm
    assert os.fsencode(found["process"]["exe"]) == path
    assert os.fsencode(found["process"]["cgroup"]) == cgroup


@given(paths, comms, paths, names)
def test_every_event_is_of_the_schema_whatever_the_names(
    schema: Callable[[Any], Any], path: bytes, comm: bytes, cgroup: bytes, soname: bytes
) -> None:
    for kind in ("load", "unload", "activate"):
        schema(event(path, comm, cgroup, soname, kind))


@given(paths, comms, paths, st.sampled_from(["load", "unload", "activate", "deactivate"]))
def test_a_line_for_people_prints_as_one_line(path: bytes, comm: bytes, cgroup: bytes, kind: str) -> None:
    reported = event(path, comm, cgroup, b"x", kind)
    for with_rule in (True, False):
        assert plain(pieces_of(reported, with_rule=with_rule)).isprintable()


@given(names)
def test_an_error_that_quotes_a_name_stays_on_one_line(name: bytes) -> None:
    assert one_line(f"cannot read {text(name)!r}: {text(name)}").isprintable()


@given(paths, paths)
def test_names_that_differ_are_shown_differently(one: bytes, other: bytes) -> None:
    assert (visible(text(one)) == visible(text(other))) == (one == other)


@given(st.lists(names, min_size=1, max_size=40))
def test_components_from_the_kernel_make_the_path_they_came_from(components: list[bytes]) -> None:
    written = b"".join(component + b"\0" for component in reversed(components))
    assert os.fsencode(path_of(written)) == b"/" + b"/".join(components)


@given(paths)
def test_any_cgroup_path_has_a_container_and_a_unit_or_none_in_bounded_time(cgroup: bytes) -> None:
    for found in (container_id(text(cgroup)), unit_of(text(cgroup))):
        assert found is None or found


@pytest.mark.parametrize("part", ["machine-\\x2d", "lxc.payload.", "docker-" + "0" * 63, "a:" * 3, "lxc/", "/"])
def test_a_cgroup_path_made_to_slow_the_search_down_is_answered(part: str) -> None:
    """The path has at most 512 bytes here; a search that backtracks would not end in a lifetime."""
    for path in ("/" + part * (100_000 // len(part)), ("/" + part) * 5_000):
        container_id(path)
        unit_of(path)


@given(paths)
def test_rules_search_any_path_and_a_name_is_found_by_its_own_pattern(path: bytes) -> None:
    rules = RuleSet([Rule(re.escape(text(path)), name="itself")])
    assert rules.could_match(text(path))
    assert not rules.could_match("/" + "x" * 5)
