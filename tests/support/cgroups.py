"""Cgroups with names that a test chooses."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Cgroups", "Memory", "memory_of"]


class Memory(NamedTuple):
    """Of a cgroup: the most that was charged to it, and its limit. Bytes."""

    used: int
    limit: int


def memory_of(pid: int, proc: Path = Path("/proc")) -> Memory:
    """Of the cgroup of a process, with the memory controller of version 1 or 2."""
    mounts: dict[str, Path] = {}
    for line in (proc / "self" / "mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            mounts.setdefault(kind, Path(left.split()[4]))
    of_both = {"": "", "memory": ""}
    for line in (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        of_both |= {one: path.lstrip("/") for one in controllers.split(",") if one in of_both}
    if "cgroup" in mounts:
        place = mounts["cgroup"] / of_both["memory"]
        names = ("memory.max_usage_in_bytes", "memory.limit_in_bytes")
    else:
        place = mounts["cgroup2"] / of_both[""]
        # Before Linux 5.19 nothing keeps the peak: then what is charged now.
        names = ("memory.peak" if (place / "memory.peak").exists() else "memory.current", "memory.max")
    return Memory(*(int((place / name).read_text(encoding="ascii")) for name in names))


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
