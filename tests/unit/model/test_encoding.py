"""encoding: names of any bytes in JSON that the strictest readers take, and back."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sowatch
from sowatch.model.encoding import dumps, dumps_lines, exact, readable, restore
from support import strict

#: Names as the kernel gives them: any bytes but NUL, in Python as surrogate escapes.
names = st.binary(max_size=20).map(lambda name: os.fsdecode(name.replace(b"\0", b"/")))
keys = st.sampled_from(["path", "comm", "paths", "nested"])
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**64 - 1) | names | st.lists(names, max_size=3),
    lambda inner: st.dictionaries(keys, inner, max_size=3) | st.lists(st.dictionaries(keys, inner), max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(keys, values), max_size=4))
def test_many_lines_together_are_what_each_is_by_itself(values: list[dict[str, Any]]) -> None:
    assert dumps_lines(values) == "".join(f"{dumps(value)}\n" for value in values)


@given(st.dictionaries(keys, values))
def test_strict_readers_take_every_line_and_every_byte_comes_back(value: dict[str, Any]) -> None:
    line = dumps(value)

    assert line.isascii()
    assert "\n" not in line
    assert strict.loads(line) == value
    assert strict.loads_wire(line) == exact(value)
    assert restore(exact(value)) == value


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.characters(max_codepoint=0xFF)))
def test_a_name_that_is_utf_8_is_escaped_as_the_standard_library_does(name: str) -> None:
    assert dumps({"path": name, name: [name]}) == json.dumps({"path": name, name: [name]}, separators=(",", ":"))


def test_what_a_default_makes_of_a_value_may_hold_bytes_too() -> None:
    assert strict.loads(dumps({"path": Path("/\udcff"), "n": [1]}, default=str)) == {"path": "/\udcff", "n": [1]}


@pytest.mark.parametrize("value", [object(), {"a": Path("/")}, [re.compile("")]])
def test_what_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        dumps(value)


def test_a_name_that_is_not_utf_8_has_its_bytes_beside_it() -> None:
    found = strict.loads_wire(dumps({"path": os.fsdecode(b"/lib/\xff\xfe.so"), "inode": 7}))

    assert found == {
        "path": r"/lib/\xff\xfe.so",
        "path_bytes": base64.b64encode(b"/lib/\xff\xfe.so").decode(),
        "inode": 7,
    }


def test_names_in_a_list_have_their_bytes_in_a_list_beside_it() -> None:
    found = strict.loads_wire(dumps({"missing": ["SSL_read", os.fsdecode(b"\xff")]}))

    assert found == {"missing": ["SSL_read", r"\xff"], "missing_bytes": [None, "/w=="]}


@pytest.mark.parametrize("name", ["/lib/libz.so", "/lib/\U0001f600.so", r"/lib/\xff.so", r"/lib/\udcff.so", "/\x1b\n"])
def test_a_name_that_is_utf_8_stands_alone_and_as_it_is(name: str) -> None:
    assert json.loads(dumps({"path": name})) == {"path": name}


def test_a_name_that_looks_like_an_escape_is_told_from_the_bytes() -> None:
    looks_like, bytes_like = r"/lib/\xff.so", os.fsdecode(b"/lib/\xff.so")

    assert readable(bytes_like) == looks_like
    assert strict.loads(dumps({"path": looks_like})) != strict.loads(dumps({"path": bytes_like}))


def test_surrogates_that_stand_for_no_byte_are_no_danger_either() -> None:
    assert strict.loads_wire(dumps(["\ud800", {"\udcff": "\udfff"}])) == [
        r"\ud800",
        {r"\xff": r"\udfff", r"\xff_bytes": base64.b64encode("\ufffd".encode()).decode()},
    ]


def test_what_else_ends_in_bytes_is_left_alone() -> None:
    value = {"request_bytes": 7, "response_bytes": "x", "path": "/", "path_bytes": 4}

    assert restore(value) == value


def test_nothing_else_writes_json() -> None:
    """`json.dumps` writes lone surrogates, which strict readers refuse."""
    root = Path(sowatch.__file__).parent
    # logs: quotes of logfmt; the build has names of files of ours; requests are decoded from UTF-8, whose encoder
    # refuses a lone surrogate; CycloneDX is written anew from what its library wrote of names that are escaped.
    allowed = {"model/encoding.py", "web/logs.py", "bpf/_build_programs.py"}
    allowed |= {"fleet/log_requests.py", "inventory/sbom_cyclonedx.py"}
    writing = r"\bjson\.(dumps?|encode)\(|\bjson\.Encoder\b|\bJSONResponse\(|\bJSONEncoder\b"
    writers = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(writing, path.read_text(encoding="utf-8"))
    }

    assert writers - allowed == {"agent/page/__init__.py"}  # an error in words of ours
