"""Debian's way to write versions of this package, which scripts/deb has: `~` sorts before a release."""

from __future__ import annotations

import re

__all__ = ["python_version"]


def python_version(version: str) -> str:
    """What `sowatch --version` prints in a package of this version: 1.2.3~rc1 is 1.2.3rc1, 0.1~dev5 is 0.1.dev5."""
    return re.sub(r"~(dev)", r".\1", version).replace("~", "")
