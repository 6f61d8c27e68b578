"""What is shown of a call is written as one declares a function, and read back from registers."""

from __future__ import annotations

import doctest
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.model.errors import UsageError
from sowatch.model.events import Library
from sowatch.model.identity import FileId, ProcessId
from sowatch.uprobes import call_format
from sowatch.uprobes.call_format import CallFormat, Text, Unreadable, ValueType, parse_function
from sowatch.uprobes.call_records import HEAD, CallRecords
from sowatch.uprobes.records import Site

SITE = Site(7, Library("/lib/libx.so", FileId(8, 1, 42)), "f", 0, "calls_entered", is_return=False)


def record(
    format_: CallFormat, kind: int, values: list[int], lengths: list[int], texts: bytes, since: int = 5
) -> bytes:
    spent = 90 if kind == 1 else 0
    padded = values + [0] * (6 - len(values)), lengths + [0] * (8 - len(lengths))
    return HEAD.pack(7, 1000, since, spent, 20, 21, kind, 0, *padded[0], *padded[1]) + texts


@pytest.mark.parametrize(
    ("text", "symbol", "arguments", "result"),
    [
        ("write(int, str:64, size) -> ssize", "write", ["int", "str", "size"], "ssize"),
        ("getenv(str)->str", "getenv", ["str"], "str"),
        ("SSL_*(ptr)", "SSL_*", ["ptr"], None),
        ("f()", "f", [], None),
        ("f -> bool", "f", [], "bool"),
        ("f(hex) -> void", "f", ["hex"], None),
        ("cpp:ns::f(int, _, bytes:16)", "cpp:ns::f", ["int", "_", "bytes"], None),
        ("cpp:ns::S::operator()(int)", "cpp:ns::S::operator()", ["int"], None),
        ("f+0x10(hex)", "f+0x10", ["hex"], None),
    ],
)
def test_a_function_is_read_as_it_is_declared(text: str, symbol: str, arguments: list[str], result: str | None) -> None:
    found, shown = parse_function(text)
    assert shown is not None
    assert (found, [one.name for one in shown.arguments]) == (symbol, arguments)
    assert (shown.result and shown.result.name) == result


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f(double)", "registers that a probe cannot read"),
        ("f(words)", "unknown type 'words'. Types are char"),
        ("f(str:0)", "no length from 1 to 254"),
        ("f(str:255)", "no length from 1 to 254"),
        ("f(bytes:257)", "no length from 1 to 256"),
        ("f(int:3)", "unknown type 'int:3'"),
        ("f(int,int,int,int,int,int,int)", "has 7 arguments. At most 6"),
        ("f(int", "is no function"),
        ("f(int)) -> int", "is no function"),
        ("f(int) -> ", "is no function"),
        ("f(,)", "unknown type ''"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_next_step(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        parse_function(text)


@given(st.integers(0, 2**64 - 1))
def test_numbers_are_those_that_c_has_in_a_register(register: int) -> None:
    data = struct.pack("<Q", register)
    for name, code in [("char", "b"), ("uchar", "B"), ("short", "h"), ("int", "i"), ("uint", "I"), ("long", "q")]:
        (expected,) = struct.unpack_from(f"<{code}", data)
        assert ValueType(name).value(register, 0, b"") == expected


@pytest.mark.parametrize(
    ("length", "text", "expected"),
    [
        (1, b"\0", Text("", is_cut=False)),
        (4, b"abc\0", Text("abc", is_cut=False)),
        (5, b"abcd\0", Text("abcd", is_cut=False)),
        (6, b"abcde\0", Text("abcd", is_cut=True)),
        (3, b"\xff\xfe\0", Text("\udcff\udcfe", is_cut=False)),
        (-14, b"", Unreadable(99)),
    ],
)
def test_strings_end_with_their_0_or_are_cut(length: int, text: bytes, expected: object) -> None:
    assert ValueType("str", 4).value(99, length, text) == expected
    assert ValueType("str", 4).value(0, length, text) is None


@given(
    st.lists(
        st.sampled_from(
            [ValueType("int"), ValueType("_"), ValueType("str", 1), ValueType("str", 64), ValueType("bytes", 9)]
        ),
        max_size=6,
    )
)
def test_texts_never_overlap_and_a_record_has_room_for_all(arguments: list[ValueType]) -> None:
    shown = CallFormat(tuple(arguments))
    taken: set[int] = set()
    for one, place in zip(arguments, shown.places(), strict=True):
        if one.name in ("str", "bytes"):
            own = set(range(place, place + one.read_bytes))
            assert not own & taken
            taken |= own
    assert max(taken, default=-1) < shown.entry_bytes - call_format.RECORD_BYTES
    assert (len(shown.pack()), shown.entry_bytes % 8) == (56, 0)


def test_an_entry_and_its_return_are_one_call() -> None:
    shown = CallFormat((ValueType("int"), ValueType("str", 6)), ValueType("long"))
    records = CallRecords(shown)
    entry = record(shown, 0, [3, 4096], [0, 3], b"ab\0", since=5)
    other = record(shown, 0, [4, 0], [0, -14], b"", since=6)
    assert records.take([entry, other], {7: SITE}) == []
    (call,) = records.take([record(shown, 1, [2**64 - 1], [], b"", since=5)], {7: SITE})
    assert (call.arguments, call.result, call.spent_ns, call.process) == (
        (3, Text("ab", is_cut=False)),
        -1,
        90,
        ProcessId(20, 1000),
    )
    (left,) = records.finish()
    assert (left.arguments, left.has_returned) == ((4, None), False)
    assert records.finish() == []


def test_what_was_read_again_takes_the_place_of_what_could_not_be_read() -> None:
    shown = CallFormat((ValueType("str", 6),), ValueType("int"))
    records = CallRecords(shown)
    late = [
        record(shown, 0, [4096], [-14], b""),
        record(shown, 2, [4096], [3], b"ab\0"),
        record(shown, 1, [1], [], b""),
    ]
    (call,) = records.take(late, {7: SITE})
    assert call.arguments == (Text("ab", is_cut=False),)
    # Of a call whose first record was lost there is a return only.
    (lost,) = records.take(late[1:], {7: SITE})
    assert (lost.arguments, lost.result) == (None, 1)


def test_calls_that_never_return_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sowatch.uprobes.call_records._MAX_OPEN", 3)
    shown = CallFormat((ValueType("int"),), ValueType("int"))
    records = CallRecords(shown)
    given_up = records.take([record(shown, 0, [n], [], b"", since=n) for n in range(5)], {7: SITE})
    assert [call.arguments for call in given_up] == [(0,), (1,)]
    assert len(records.finish(lambda process: process.pid != 20)) == 0
    assert len(records.finish()) == 3


def test_the_examples_of_docstrings_are_right() -> None:
    assert doctest.testmod(call_format).failed == 0
