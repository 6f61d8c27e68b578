"""Processes that call functions of libraries as they are told: tests/programs/caller.c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from sowatch.linux.symbols import resolve

__all__ = ["Caller", "is_probed"]


class Caller:
    """A running ``caller``; the process ends with the fixture ``spawn`` that started it."""

    def __init__(self, spawn: Any, program: Path, library: Path | None = None, **options: Any) -> None:
        self._process = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
        self.pid = self._answer()
        if library is not None:
            self.open(library)

    def open(self, library: Path | str) -> None:
        self._emit(f"open {library}")

    def call(self, name: str, value: int = 0, *, times: int = 1) -> None:
        self._emit(f"call {name} {value} {times}")

    def call_in_threads(self, name: str, times: int, threads: int) -> None:
        self._emit(f"threads {name} {times} {threads}")

    def close_library(self) -> None:
        self._emit("close")

    def fork_and_leave(self) -> None:
        """The process goes on as its own child; the parent has exited."""
        self.pid = self._emit("fork")

    def is_probed(self, library: Path, symbol: str) -> bool:
        """See `is_probed`."""
        return is_probed(self.pid, library, symbol)

    def enter_sandbox(self) -> None:
        """From now on a seccomp filter ends the process at any system call that it does not need."""
        self._emit("sandbox")

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _emit(self, line: str) -> int:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        kind, _, rest = self._process.stdout.readline().rstrip("\n").partition(" ")
        assert kind == "ok", rest
        return int(rest)


def is_probed(pid: int, library: Path, symbol: str) -> bool:
    """Whether the code of a function is another in a process than in its file: the kernel has a probe there."""
    with library.open("rb") as file:
        (found,) = resolve(file.fileno(), symbol)
        expected = os.pread(file.fileno(), 1, found.offset)
    for row in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        span, perms, offset, _, _, *name = row.split(maxsplit=5)
        start, end = (int(one, 16) for one in span.split("-"))
        at = found.offset - int(offset, 16)
        if name == [str(library)] and "x" in perms and 0 <= at < end - start:
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start + at)
                return memory.read(1) != expected
    raise AssertionError(f"{pid} has no code of {library} mapped")
