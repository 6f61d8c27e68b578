"""Processes whose every step a test commands: held inside a system call, or doing one odd thing after the other.

`Stall` drives ``tests/programs/stall.c``, `Trick` drives ``tricks.c``.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
from pathlib import Path
from typing import Self

__all__ = ["Stall", "Trick"]

#: asm/unistd.h: the same number on every architecture.
_SYS_PIDFD_GETFD = 438
#: sizeof(struct uffd_msg), and the event of a fork.
_UFFD_MESSAGE_BYTES = 32
_UFFD_EVENT_FORK = 0x13


class Stall:
    """A running ``stall``, whose first thread a test can hold inside munmap, mmap or fork."""

    def __init__(self, program: Path, way: str, first: Path, other: Path) -> None:
        self._process = subprocess.Popen(
            [program, way, first, other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self._process.pid
        self._events = -1
        try:
            at, fd = self._line()
            self.at = int(at, 16)
            self._events = self._take_fd(int(fd))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
        assert self._process.stdin
        assert self._process.stdout
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def hold(self, timeout_s: float) -> None:
        """Lets the first thread make its call; back when its work is done and it waits."""
        self._write("go")
        poller = select.poll()
        poller.register(self._events, select.POLLIN)
        ready = poller.poll(1000 * timeout_s)
        assert ready, "the call was not held"
        assert ready[0][1] == select.POLLIN

    def second(self, command: str) -> None:
        """Has the second thread do something."""
        self._write(command)
        assert self._line() == ["ok"]

    def is_single_user(self) -> bool:
        """Whether the first thread is the only one."""
        return len(os.listdir(f"/proc/{self.pid}/task")) == 1

    def release(self) -> int:
        """Lets the held call return. The child's pid, if it was a fork."""
        message = os.read(self._events, _UFFD_MESSAGE_BYTES)
        if message[0] == _UFFD_EVENT_FORK:
            # ProcessScan made a userfaultfd for the child, here.
            os.close(int.from_bytes(message[8:12], "little"))
        word, child = self._line()
        assert word == "done"
        return int(child)

    def _write(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n".encode())

    def _line(self) -> list[str]:
        assert self._process.stdout
        words = self._process.stdout.readline().decode().split()
        if not words:
            raise EOFError("stall ended")
        return words

    def _take_fd(self, fd: int) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(self.pid)
        try:
            got: int = libc.syscall(ctypes.c_long(_SYS_PIDFD_GETFD), pidfd, fd, 0)
        finally:
            os.close(pidfd)
        if got < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return got


class Trick:
    """A running ``tricks``: see there for the ways."""

    def __init__(self, program: Path, way: str, *files: Path) -> None:
        self._process = subprocess.Popen(
            [program, way, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self._process.pid
        try:
            self.at, self.length = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def go_on(self) -> None:
        """Has it take its next step."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        self._answer()

    def _answer(self) -> tuple[int, int]:
        assert self._process.stdout
        words = self._process.stdout.readline().decode().split()
        assert words, "tricks ended"
        assert words[0] == "ok", " ".join(words)
        return int(words[1], 16), int(words[2])
