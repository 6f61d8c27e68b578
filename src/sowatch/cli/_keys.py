"""Single keys from a terminal."""

from __future__ import annotations

import os
import re
import select
import termios
import time
import tty
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

__all__ = ["Keys"]

#: CSI and SS3 sequences (ECMA-48).
_SEQUENCE: Final = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|O.)")
#: As xterm, the Linux console and those that follow them send them.
_NAMES: Final = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1bOH": "home",
    "\x1bOF": "end",
}
_CHARACTERS: Final = {
    "\x1b": "escape",
    "\t": "tab",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
}
#: The rest of a sequence comes at once; after a lone Escape nothing does.
_REST_S: Final = 0.05


class Keys:
    """Reads keys one by one while it is open; a context manager that gives the terminal back as it was.

    Where ``fd`` is no terminal, or not ours to change (a job in the background), no key ever comes.
    """

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._before: list[int | list[bytes | int]] | None = None
        self._unread = ""

    def __enter__(self) -> Self:
        if os.isatty(self._fd) and os.tcgetpgrp(self._fd) == os.getpgrp():
            self._before = termios.tcgetattr(self._fd)
            # Not raw: Ctrl-C stays a signal.
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            with suppress(termios.error):  # it has gone
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            self._before = None

    def get(self, timeout_s: float) -> str | None:
        """The next key: a character, or a name; None if none came within the time.

        Raises:
            EOFError: the terminal has gone.
        """
        if self._before is None:
            time.sleep(timeout_s)
            return None
        if not self._unread:
            self._read(timeout_s)
        if self._unread.startswith("\x1b") and not _SEQUENCE.match(self._unread):
            self._read(_REST_S)
        if not self._unread:
            return None
        sequence = _SEQUENCE.match(self._unread)
        key = self._unread[0] if sequence is None else sequence[0]
        self._unread = self._unread[len(key) :]
        if sequence is not None:
            return _NAMES.get(key, "unknown")
        return _CHARACTERS.get(key, key)

    def _read(self, timeout_s: float) -> None:
        if select.select([self._fd], [], [], timeout_s)[0]:
            more = os.read(self._fd, 1024)
            if not more:
                raise EOFError
            self._unread += more.decode("utf-8", "replace")
