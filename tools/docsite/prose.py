"""Text of help and docstrings as Markdown."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Final

__all__ = ["escaped", "paragraphs"]

_SPECIAL: Final = re.compile(r"([\\*_<>\[\]#|$~{}])")
_CODE: Final = re.compile(r"(``.+?``|`[^`]*`)")


def escaped(text: str) -> str:
    """One line of plain text, so that Markdown shows it as it is; what is in backquotes stays code."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(part if number % 2 else _SPECIAL.sub(r"\\\1", part) for number, part in enumerate(parts))


def paragraphs(text: str) -> str:
    """Paragraphs of plain text; what is indented, such as lists and examples, is shown as it stands."""
    made: list[str] = []
    kept: list[str] = []
    is_indented = False

    def close() -> None:
        lines = dedent("\n".join(kept)).strip("\n")
        if lines.strip():
            made.append(f"```text\n{lines}\n```" if is_indented else escaped(lines))
        kept.clear()

    for line in text.strip("\n").splitlines():
        if not line.strip():
            if is_indented:
                kept.append("")
            else:
                close()
        else:
            if line.startswith("  ") != is_indented:
                close()
                is_indented = not is_indented
            kept.append(line)
    close()
    return "\n\n".join(made)
