r"""JSON that every reader takes, whatever bytes are in a name. Pure.

Names of files, processes and cgroups are bytes; in Python those that are not UTF-8 stand as surrogate escapes
(PEP 383). JSON has no lone surrogates: strict readers refuse the whole line, others put a replacement character there.
So a string ``K`` of an object that is not UTF-8 is written as two members:

- ``K``: the name for people, each such byte as ``\xff`` (a backslash, an x and two hexadecimal digits);
- ``K_bytes``: the exact bytes in base64. It is there only where it is needed, and then it decides.

Of a list of strings ``K_bytes`` is a list, null for those that are UTF-8.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

__all__ = ["dumps", "dumps_lines", "exact", "readable", "restore"]

_SUFFIX: Final = "_bytes"
_encode: Final = msgspec.json.Encoder().encode
_encode_lines: Final = msgspec.json.Encoder().encode_lines
_LONE: Final = re.compile("[\ud800-\udfff]")


def dumps(value: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    r"""``value`` as JSON without spaces and line breaks, in ASCII.

    Args:
        value: structs, dicts, lists, strings, numbers; strings may hold surrogate escapes.
        default: as of `json.dumps`.

    >>> print(dumps({"path": "/lib\udcff.so"}))
    {"path":"/lib\\xff.so","path_bytes":"L2xpYv8uc28="}
    """
    try:
        text = _text(value, default)
    except UnicodeEncodeError:
        text = _text(exact(msgspec.to_builtins(value, enc_hook=default)), None)
    return _printable(text)


def dumps_lines(values: Sequence[Any]) -> str:
    """The same of many, each ended by a newline: a third of the time that many single ones take."""
    try:
        text = _encode_lines(values).decode()
    except UnicodeEncodeError:
        return "".join(f"{dumps(value)}\n" for value in values)
    return _printable(text)


def _printable(text: str) -> str:
    """What does not print as itself is in strings only. It is escaped: a line in a terminal must not steer it."""
    if not text.isascii():
        text = text.encode("ascii", _ESCAPED).decode("ascii")
    return text.replace("\x7f", "\\u007f")


def _text(value: Any, default: Callable[[Any], Any] | None) -> str:
    return (_encode(value) if default is None else msgspec.json.encode(value, enc_hook=default)).decode()


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.encoder.encode_basestring_ascii(error.object[error.start : error.end])[1:-1], error.end


#: Writes what is not ASCII as JSON has it, a pair of surrogates for what lies beyond the BMP.
_ESCAPED: Final = "sowatch.json"
codecs.register_error(_ESCAPED, _escape)


def exact(value: Any) -> Any:
    """A copy in the form that `dumps` writes; the value itself where nothing has to be changed."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.to_builtins(value)
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, list | tuple):
        return [exact(one) for one in value]
    if not isinstance(value, dict):
        return value
    found: dict[Any, Any] = {}
    for key, one in value.items():
        name = readable(key) if isinstance(key, str) else key
        found[name] = exact(one)
        if isinstance(one, str) and _LONE.search(one):
            found[f"{name}{_SUFFIX}"] = _base64(one)
        elif isinstance(one, list | tuple) and any(isinstance(part, str) and _LONE.search(part) for part in one):
            found[f"{name}{_SUFFIX}"] = [
                _base64(part) if isinstance(part, str) and _LONE.search(part) else None for part in one
            ]
    return found


def restore(value: Any) -> Any:
    r"""The inverse of `exact`, for what a JSON reader gave: names as surrogate escapes, as `os.fsencode` takes them.

    >>> restore({"path": r"/lib\xff.so", "path_bytes": "L2xpYv8uc28="})
    {'path': '/lib\udcff.so'}
    """
    if isinstance(value, list):
        return [restore(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: restore(one) for key, one in value.items()}
    for key in [key for key in found if key.endswith(_SUFFIX) and key.removesuffix(_SUFFIX) in found]:
        name = key.removesuffix(_SUFFIX)
        if isinstance(found[name], str) and isinstance(found[key], str):
            found[name] = _decoded(found.pop(key))
        elif isinstance(found[name], list) and isinstance(found[key], list):
            found[name] = [
                text if part is None else _decoded(part) for text, part in zip(found[name], found.pop(key), strict=True)
            ]
    return found


def readable(text: str) -> str:
    r"""``text`` for people: each byte that is not UTF-8 as ``\xff``; nothing else is changed."""
    return _LONE.sub(lambda found: _shown(ord(found[0])), text) if _LONE.search(text) else text


def _shown(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _base64(text: str) -> str:
    # Surrogates that stand for no byte come from the one that types them, never from the kernel.
    data = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text).encode("utf-8", "surrogateescape")
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str) -> str:
    return base64.b64decode(text, validate=True).decode("utf-8", "surrogateescape")
