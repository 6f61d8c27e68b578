"""The end of a process that is to end, whatever hangs: threads in the kernel cannot be ended, but left."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import Final

__all__ = ["END_S", "LastResort"]

#: What is to end has ended after so long.
END_S: Final = 4.5


class LastResort:
    """Ends the process a while after it was armed, unless it was called off."""

    def __init__(self, seconds: float = END_S) -> None:
        self._seconds = seconds
        self._is_called_off = threading.Event()
        self._is_armed = False

    def arm(self) -> None:
        """From now on the time runs; a second call changes nothing. May be called in a signal handler."""
        if not self._is_armed:
            self._is_armed = True
            threading.Thread(target=self._wait, name="sowatch-last-resort", daemon=True).start()

    def call_off(self) -> None:
        """It has ended in time."""
        self._is_called_off.set()

    def _wait(self) -> None:
        if self._is_called_off.wait(self._seconds):
            return
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, RuntimeError):
                stream.flush()
        with suppress(OSError):
            os.write(2, b"sowatch: something hangs and did not end in time; ended without it.\n")
        os._exit(1)
