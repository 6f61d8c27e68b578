"""`CallFormat`: what is shown of each call, as ``write(int, str:64, size) -> int`` says it. Pure, no I/O.

The kernel copies registers and what pointers lead to, as `CallFormat.pack` gives it; what they mean is decided here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sowatch.model.errors import UsageError
from sowatch.model.escape import visible

__all__ = ["MAX_ARGUMENTS", "MAX_TEXT", "CallFormat", "Text", "Unreadable", "ValueType", "parse_function", "value_text"]

#: As in probe_calls.h.
MAX_ARGUMENTS: Final = 6
MAX_TEXT: Final = 256
_NONE, _REGISTER, _STRING, _BYTES = range(4)
#: One entry of struct call_format: kind, size, place in the texts, unused.
_ENTRY: Final = struct.Struct("=HHHH")
#: struct call_record of probe_calls.h without its texts.
RECORD_BYTES: Final = 112
_DEFAULT_TEXT: Final = 64

_FUNCTION: Final = re.compile(
    r"(?P<symbol>(?:cpp:)?[^\s/()]+?(?:\(\))?)(?:\((?P<arguments>[^()]*)\))?\s*(?:->\s*(?P<result>[^\s()]+))?"
)


def _signed(bits: int) -> Callable[[int], int]:
    def convert(value: int) -> int:
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    return convert


def _unsigned(bits: int) -> Callable[[int], int]:
    return lambda value: value & ((1 << bits) - 1)


#: The C types of x86-64 and AArch64 Linux (LP64) by what they are called here.
_NUMBERS: Final[Mapping[str, Callable[[int], Any]]] = {
    "char": _signed(8),
    "uchar": _unsigned(8),
    "short": _signed(16),
    "ushort": _unsigned(16),
    "int": _signed(32),
    "uint": _unsigned(32),
    "long": _signed(64),
    "ulong": _unsigned(64),
    "size": _unsigned(64),
    "ssize": _signed(64),
    "bool": lambda value: bool(value & 0xFF),
    "hex": hex,
    "ptr": lambda value: hex(value) if value else None,
}
_TEXTS: Final = {"str": _STRING, "bytes": _BYTES}
_KNOWN: Final = f"{', '.join(_NUMBERS)}, str:N, bytes:N, or _ to leave one out"


class Unreadable(NamedTuple):
    """A pointer that led to memory which was not there, or not yet: nothing is read from disk for it."""

    pointer: int


class Text(NamedTuple):
    """A string or bytes of a call. ``is_cut``: it is longer."""

    value: str | bytes
    is_cut: bool


class ValueType(NamedTuple):
    """One argument or result: ``size`` is in bytes, of a string without its 0."""

    name: str
    size: int = 0

    @property
    def kind(self) -> int:
        """As enum value_kind of probe_calls.h."""
        return _NONE if self.name == "_" else _TEXTS.get(self.name, _REGISTER)

    @property
    def read_bytes(self) -> int:
        """What the kernel reads at most: of a string its 0, too, and one byte that shows that there is more."""
        return self.size + 2 * (self.kind == _STRING)

    def value(self, register: int, length: int, text: bytes) -> Any:
        """What a register means: int, bool, str (hex), None (a null pointer), `Text` or `Unreadable`.

        Args:
            register: its 64 bits.
            length: what the kernel has read, with the 0 of a string; below 0 if it could not.
            text: what the kernel has read, and more behind it.
        """
        if self.name in _NUMBERS:
            return _NUMBERS[self.name](register)
        if register == 0:
            return None
        if length < 0:
            return Unreadable(register)
        if self.kind == _BYTES:
            return Text(text[:length], is_cut=False)
        found = text[: max(0, length - 1)]
        return Text(found[: self.size].decode("utf-8", "surrogateescape"), is_cut=len(found) > self.size)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """What is recorded of each call: arguments at its entry, the result at its return. Hashable."""

    arguments: tuple[ValueType, ...] = ()
    result: ValueType | None = None

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry's record; 0 if there is none."""
        if not self.arguments and self.result is not None:
            return 0
        return RECORD_BYTES + sum(_padded(one.read_bytes) for one in self.arguments if one.kind >= _STRING)

    @property
    def return_bytes(self) -> int:
        """Bytes of a return's record; 0 if there is none."""
        if self.result is None:
            return 0
        return RECORD_BYTES + (_padded(self.result.read_bytes) if self.result.kind >= _STRING else 0)

    def places(self) -> list[int]:
        """Where the text of each argument is, behind the head of a record."""
        found, at = [], 0
        for one in self.arguments:
            found.append(at)
            at += _padded(one.read_bytes) if one.kind >= _STRING else 0
        return found

    def pack(self) -> bytes:
        """As struct call_format of probe_calls.h, 56 bytes."""
        entries = [
            _ENTRY.pack(one.kind, one.read_bytes if one.kind >= _STRING else 0, place, 0)
            for one, place in zip(self.arguments, self.places(), strict=True)
        ]
        entries += [_ENTRY.pack(_NONE, 0, 0, 0)] * (MAX_ARGUMENTS - len(entries))
        result = self.result or ValueType("_")
        entries.append(_ENTRY.pack(result.kind, result.read_bytes if result.kind >= _STRING else 0, 0, 0))
        return b"".join(entries)

    def values(self, registers: Sequence[int], lengths: Sequence[int], texts: bytes) -> tuple[Any, ...]:
        """The arguments of a record; those that are left out are left out."""
        return tuple(
            one.value(registers[at], lengths[at], texts[place : place + one.read_bytes])
            for at, (one, place) in enumerate(zip(self.arguments, self.places(), strict=True))
            if one.name != "_"
        )


def _padded(size: int) -> int:
    return (size + 7) & ~7


def parse_function(text: str) -> tuple[str, CallFormat | None]:
    """A symbol, and what is to be shown of its calls; None: nothing.

    Raises:
        UsageError: it cannot be read, a type is unknown, or there are more than six arguments.

    >>> parse_function("write(int, str:64, size) -> ssize")[1].result
    ValueType(name='ssize', size=0)
    >>> parse_function("deflate"), parse_function("cpp:ns::S::operator()")
    (('deflate', None), ('cpp:ns::S::operator()', None))
    """
    match = _FUNCTION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no function. Write it like write(int, str:64, size) -> ssize, or its name only.")
    symbol, listed, result = match["symbol"], match["arguments"], match["result"]
    if symbol.endswith("()") and not symbol.endswith("operator()"):
        symbol, listed = symbol[:-2], listed or ""
    if listed is None and result is None:
        return symbol, None
    names = [one.strip() for one in listed.split(",")] if listed and listed.strip() else []
    if len(names) > MAX_ARGUMENTS:
        raise UsageError(
            f"{text!r} has {len(names)} arguments. At most {MAX_ARGUMENTS} are in registers: leave out those behind."
        )
    return symbol, CallFormat(
        tuple(_type(one, text) for one in names), None if result in (None, "void") else _type(str(result), text)
    )


def _type(text: str, where: str) -> ValueType:
    name, _, size = text.partition(":")
    if name in _TEXTS:
        limit = MAX_TEXT - 2 * (name == "str")
        if size and not (size.isascii() and size.isdigit() and 1 <= int(size) <= limit):
            raise UsageError(f"{where!r}: {text!r} has no length from 1 to {limit}. Write {name}:{_DEFAULT_TEXT}.")
        return ValueType(name, int(size) if size else _DEFAULT_TEXT)
    if text == "_" or text in _NUMBERS:
        return ValueType(text)
    if text in ("float", "double"):
        raise UsageError(
            f"{where!r}: {text} is passed in registers that a probe cannot read. Leave it out of the list."
        )
    raise UsageError(f"{where!r}: unknown type {text!r}. Types are {_KNOWN}.")


def value_text(value: Any) -> str:
    r"""A value for people.

    >>> [value_text(one) for one in (3, None, Text("a\n", True), Text(b"\1\2", False), Unreadable(16))]
    ['3', 'NULL', '"a\\n"...', '01 02', 'unreadable 0x10']
    """
    if value is None:
        return "NULL"
    if isinstance(value, Unreadable):
        return f"unreadable {value.pointer:#x}"
    if isinstance(value, Text):
        text = value.value.hex(" ") if isinstance(value.value, bytes) else '"' + _quoted(value.value) + '"'
        return text + "..." * value.is_cut
    return str(value)


def _quoted(text: str) -> str:
    return visible(text).replace('"', '\\"')
