"""Cgroups with names that a test chooses."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Cgroups"]


class Cgroups:
    """Cgroups of version 2 that a test makes, wherever that hierarchy is mounted."""

    def __init__(self, at: Path) -> None:
        self._at = at
        self._made: list[Path] = []
        at.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "none", at], check=True)

    def put(self, pid: int, path: str) -> None:
        place = self._at
        for part in path.split("/"):
            place /= part
            if not place.exists():
                place.mkdir()
                self._made.append(place)
        (place / "cgroup.procs").write_text(str(pid))

    def close(self, wait_until: Callable[..., Any]) -> None:
        def is_gone(place: Path) -> bool:
            with contextlib.suppress(OSError):  # its last process has just ended
                place.rmdir()
            return not place.exists()

        for place in reversed(self._made):
            wait_until(lambda place=place: is_gone(place), what=f"the end of {place}")
        subprocess.run(["umount", self._at], check=True)
