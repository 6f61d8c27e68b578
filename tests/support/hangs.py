"""`Hang`: drives ``tests/programs/hang.c``, a file system that stops to answer, and those who wait for it.

May import nothing of the package.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path
from typing import Self

__all__ = ["Hang"]


class Hang:
    """A running ``hang``. Leaving the block ends it and all that waits for it, whatever has happened.

    Args:
        program: compiled.
        way: ``lock``, ``maps`` or ``files``; see there.
        directory: where the file systems are mounted.
        library: what its processes map, or what the files are copies of.
        count: of processes, or of file systems.
        timeout_s: how long to wait for an answer.
    """

    def __init__(
        self, program: Path, way: str, directory: Path, library: Path, count: int = 1, *, timeout_s: float = 20.0
    ) -> None:
        self._timeout_s = timeout_s
        directory.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [program, way, directory, library, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._unread = b""
        try:
            self.pids = [int(self._answer().removeprefix("pid ")) for _ in range(1 if way == "files" else count)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """The end of its input ends it; the kernel then lets go everybody who waits."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def hang(self) -> None:
        """From now on nothing can take the locks of its processes."""
        self._emit("hang", "hung")

    def free(self) -> None:
        """It is over."""
        self._emit("free", "free")

    def _emit(self, word: str, answer: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(word.encode() + b"\n")
        said = self._answer()
        assert said == answer, said

    def _answer(self) -> str:
        assert self._process.stdout
        end_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._unread:
            left_s = end_s - time.monotonic()
            assert left_s > 0, "hang does not answer"
            if select.select([self._process.stdout], [], [], left_s)[0]:
                more = os.read(self._process.stdout.fileno(), 4096)
                assert more, "hang ended"
                self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()
