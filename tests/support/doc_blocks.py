"""The code blocks of README.md, CONTRIBUTING.md and docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>(?:not run|run by): [^\n]*) -->\n)?^```(?P<language>[^\n`]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block: the page it is on, its first line there, its language ("" for none), its text.

    ``marker`` is what a comment above it says of it: ``not run: WHY``, or ``run by: TEST``.
    """

    page: str
    line: int
    language: str
    text: str
    marker: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def prelude_of(block: Block) -> str:
    """The imports that a Python example has left out, as another one beside it has them."""
    return "" if "import" in block.text.split("def ")[0] else "from sowatch import Rule, Watcher\n"


def blocks() -> Iterator[Block]:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            if found["language"].startswith("{"):  # a directive of the site
                continue
            line = text.count("\n", 0, found.start("language")) + 1
            yield Block(str(path.relative_to(ROOT)), line, found["language"], found["text"], found["marker"])
