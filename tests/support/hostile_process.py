"""`HostileProcess`: drives ``tests/programs/hostile.c``. May import nothing of the package."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Self

__all__ = ["WAYS", "HostileProcess"]

#: What it can do; see there.
WAYS = ("ranges", "flood", "forks", "spawns", "shares")


class HostileProcess:
    """Runs within the block."""

    def __init__(self, program: Path, way: str, file: Path) -> None:
        self._process = subprocess.Popen([program, way, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        assert self._process.stdout
        assert self._process.stdout.readline() == b"on\n"
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
