"""A terminal of a given size that a command runs in, and what it shows."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import pyte

__all__ = ["Terminal"]


class Terminal:
    """Runs a command in a pseudo terminal that emulates a VT100; a context manager that ends it."""

    def __init__(
        self, command: Sequence[str | Path], *, columns: int, rows: int, timeout_s: float, term: str = "xterm-256color"
    ) -> None:
        self._timeout_s = timeout_s
        self._ours, self._theirs = pty.openpty()
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        #: All that was written.
        self.written = b""
        self.resize(columns, rows)
        self.settings = termios.tcgetattr(self._theirs)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            # setsid, so that the terminal is the command's own and Ctrl-C would reach it.
            env=os.environ | {"TERM": term},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self._ours)

    def resize(self, columns: int, rows: int) -> None:
        """As if somebody pulled at the window."""
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def press(self, keys: str) -> None:
        """Types."""
        os.write(self._ours, keys.encode())

    def lines(self) -> list[str]:
        """What the screen shows now."""
        return [line.rstrip() for line in self._screen.display]

    def reversed_lines(self) -> list[str]:
        """The lines whose characters are shown in reverse."""
        buffer = self._screen.buffer
        return [line for number, line in enumerate(self.lines()) if buffer[number][0].reverse]

    def wait_for(self, is_there: Callable[[list[str]], object], what: str) -> list[str]:
        """Waits until the lines of the screen are as wanted, and returns them."""
        end = time.monotonic() + self._timeout_s
        while not is_there(self.lines()):
            assert time.monotonic() < end, f"{what} is not shown:\n" + "\n".join(self.lines())
            self._read(0.05)
        return self.lines()

    def wait_for_end(self) -> int:
        """Its exit code, once everything it wrote was read."""
        end = time.monotonic() + self._timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < end, "it did not end:\n" + "\n".join(self.lines())
            self._read(0.05)
        self._read(0)
        return self.process.returncode

    def _read(self, timeout_s: float) -> None:
        while select.select([self._ours], [], [], timeout_s)[0]:
            more = os.read(self._ours, 1 << 16)
            self.written += more
            self._stream.feed(more)
            timeout_s = 0
