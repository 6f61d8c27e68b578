"""Pages of the repository's root within the site, and links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "linked", "markdown"]

ROOT: Final = Path(__file__).resolve().parents[2]
#: What they link to below docs/ is beside them in the site.
_DOCS: Final = re.compile(r"\]\(docs/")
#: As pages name them, from their own directory, and how the site does.
_PAGES: Final = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
_NAMED: Final = re.compile(rf"\]\((?P<up>(?:\.\./)*)(?P<name>{'|'.join(map(re.escape, _PAGES))})")


def markdown(name: str) -> str:
    """The text of a file, with links as from docs/."""
    return linked(_DOCS.sub("](", (ROOT / name).read_text(encoding="utf-8")))


def linked(text: str) -> str:
    """A page's text whose links to files of the root lead to their pages, which are one level lower."""
    return _NAMED.sub(lambda found: f"]({found['up'].removeprefix('../')}{_PAGES[found['name']]}", text)
