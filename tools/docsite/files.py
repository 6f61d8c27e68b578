"""Pages of the repository's root within the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "markdown"]

ROOT: Final = Path(__file__).resolve().parents[2]
#: What they link to below docs/ is beside them in the site.
_DOCS: Final = re.compile(r"\]\(docs/")


def markdown(name: str) -> str:
    """The text of a file, with links as from docs/."""
    return _DOCS.sub("](", (ROOT / name).read_text(encoding="utf-8"))
