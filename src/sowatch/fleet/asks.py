"""What answers a question in SQL: a store in this process, or a ClickHouse. Texts of others go in as parameters only.

A question names its parameters as ClickHouse does, ``{host:String}``; `parameter` writes their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol, TypeVar

import msgspec

from sowatch.model.errors import SowatchError

__all__ = ["Asks", "parameter", "rows"]

T = TypeVar("T")

#: A value of a parameter is read as the format TabSeparated has it, in chdb and over HTTP alike.
_ESCAPES: Final = str.maketrans(
    {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0", "\b": "\\b", "\f": "\\f"}
)


class Asks(Protocol):
    """A store that takes questions."""

    def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterable[bytes]:
        """The rows as JSONEachRow, in pieces that may end anywhere.

        Args:
            sql: one SELECT without a FORMAT.
            parameters: their values as `parameter` writes them.

        Raises:
            SowatchError: it cannot be asked, or refuses.
        """
        ...


def parameter(value: int | str | Iterable[str]) -> str:
    r"""The text of a parameter's value.

    >>> parameter(5), parameter("a\tb"), parameter(["it's", "b"])
    ('5', 'a\\tb', "['it\\'s','b']")
    """
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, str):
        return _sent(value).translate(_ESCAPES)
    # Of the quotes of an array only the quote itself and what escapes it are special.
    quoted = (_sent(one).replace("\\", "\\\\").replace("'", "\\'") for one in value)
    return "[" + ",".join(f"'{one}'" for one in quoted) + "]"


def rows(asks: Asks, sql: str, kind: type[T], **parameters: int | str | Iterable[str]) -> Iterator[T]:
    """The rows of an answer, each as a value of ``kind``, as they come.

    Raises:
        SowatchError: the store cannot be asked, or answers something else.
    """
    decoder = msgspec.json.Decoder(kind, strict=False)  # numbers of 64 bits may come as texts
    given = {name: parameter(value) for name, value in parameters.items()}
    for line in _lines(asks.ask(sql, given)):
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            shown = line[:200].decode("utf-8", "backslashreplace")
            raise SowatchError(
                f"the store answers with a row that is none of a fleet: {shown!r} ({error}). "
                "Bring its tables to this version: `sowatch fleet schema`."
            ) from error


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for piece in pieces:
        first, *more = piece.split(b"\n")
        rest.append(first)
        if more:
            yield from filter(None, (b"".join(rest), *more[:-1]))
            rest = [more[-1]]
    last = b"".join(rest)
    if last:
        yield last


def _sent(text: str) -> str:
    # An argument of a command may hold bytes that are no UTF-8; in records they stand as in tables.
    from sowatch.model.encoding import readable

    return readable(text)
