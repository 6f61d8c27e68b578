"""The code blocks of README.md and docs/*.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Block(NamedTuple):
    """A fenced block: the page it is on, its first line there, its language ("" for none), its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def prelude_of(block: Block) -> str:
    """The imports that a Python example has left out, as another one beside it has them."""
    return "" if "import" in block.text.split("def ")[0] else "from sowatch import Rule, Watcher\n"


def blocks() -> Iterator[Block]:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(str(path.relative_to(ROOT)), line, found[1], found[2])
