"""Where the build works, for which machines, and against which C library. Plain data; imports ``outside`` only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["GLIBC", "MACHINES", "NEXT_STEP", "PLATFORM", "ROOT", "cache_directory"]

#: The checkout.
ROOT: Final = Path(__file__).resolve().parents[2]
#: As `uname -m` names them.
MACHINES: Final = ("x86_64", "aarch64")
#: The oldest C library that the wheels run with: Debian 10, RHEL 8, Ubuntu 18.10.
GLIBC: Final = (2, 28)
PLATFORM: Final = f"manylinux_{GLIBC[0]}_{GLIBC[1]}"
NEXT_STEP: Final = "Run `scripts/wheels` again; if it fails again, see docs/decisions/0062-wheels.md."


def cache_directory(*parts: str) -> Path:
    """A directory below the cache, made if need be: $SOWATCH_WHEELS_CACHE, else the user's cache directory."""
    chosen = os.environ.get("SOWATCH_WHEELS_CACHE")
    base = (
        Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sowatch/wheels")
    )
    made = base.absolute().joinpath(*parts)
    made.mkdir(parents=True, exist_ok=True)
    return made
