"""`Wake`: ends the wait of a thread that polls descriptors."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

__all__ = ["Wake"]


class Wake:
    """An eventfd that a draining thread polls beside its source. Calling it ends the wait; any thread may, at any time.

    Once it is closed a call does nothing, so that none goes to whatever has the number of the descriptor by then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        #: Polls readable from a call until `clear`.
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __call__(self) -> None:
        """Wakes the thread."""
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Calls so far are heard; on the thread that polls."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Safe to call again, from any thread."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self.fd)
