r"""Names that others chose, made safe to show. Pure, imports nothing of the package.

Processes choose their names and the names of their files, so a path may hold terminal control
sequences, line breaks, text direction marks or bytes that are not UTF-8. JSON has escapes of its
own; everything a person reads goes through here first.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["one_line", "visible"]

#: What can be shown as it is. Anything else goes the slow way, where each character is checked.
_PLAIN: Final = re.compile(r"[ -\[\]-~]*")

_SHORT: Final = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def visible(text: str) -> str:
    r"""``text`` with everything that does not print as itself written as an escape.

    Control characters become ``\n``, ``\x1b``, ``\u0085``; characters that only steer the display
    (text direction, zero width, foreign spaces) ``\u202e`` and the like; bytes that are not UTF-8
    (surrogate escapes) ``\xff``; a backslash is doubled, so no two names look the same.

    >>> visible("lib\x1b[31m.so")
    'lib\\x1b[31m.so'
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join("\\\\" if char == "\\" else _shown(char) for char in text)


def one_line(text: str) -> str:
    r"""Like `visible`, but leaves backslashes as they are: for messages that quoted their names already.

    >>> one_line("first\nsecond 'a\\n'")
    "first\\nsecond 'a\\n'"
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    short = _SHORT.get(char)
    if short is not None:
        return short
    code = ord(char)
    if code < 0x80:
        return f"\\x{code:02x}"
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: the raw byte 0x80..0xff
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
