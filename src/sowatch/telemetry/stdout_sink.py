"""Events as JSON lines on standard output, or another descriptor."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Sequence
from typing import Final

from sowatch.model.errors import SinkError
from sowatch.model.events import Event
from sowatch.model.lines import to_json

__all__ = ["StdoutSink"]

#: A pipe that polls writable takes this much without making the writer wait (PIPE_BUF).
_PIECE_BYTES: Final = 4096
#: How long one write waits for a reader that is behind.
_PATIENCE_S: Final = 1.0
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.EIO})


class StdoutSink:
    """A `Sink` that writes schema 1, one line for each event.

    A reader that is slow is waited for in small steps, so the thread never hangs in a write; one that
    is gone ends the sink. The descriptor stays the caller's and keeps its mode: it may be shared.

    Args:
        fd: where to write.
        name: what metrics and messages call it.
    """

    def __init__(self, fd: int = 1, *, name: str = "stdout") -> None:
        self.name = name
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._seq = 0
        # Of a line whose beginning was written; its event is the first of the next call.
        self._rest = b""

    def write(self, events: Sequence[Event]) -> int:
        """Writes all events; waits a second for a reader that does not read.

        Raises:
            SinkError: the reader is behind, or gone (``is_final``).
        """
        for place, event in enumerate(events):
            if not self._rest:
                self._rest = to_json(event, self._seq).encode("ascii") + b"\n"
            self._drain(place)
            self._seq += 1
        return len(events)

    def reopen(self) -> None:
        """Does nothing: there is no file."""

    def interrupt(self) -> None:
        """Does nothing: it never waits for longer than a second."""

    def close(self) -> None:
        """Does nothing: the descriptor is the caller's."""

    def _drain(self, delivered: int) -> None:
        """Writes what is left of a line; ``delivered`` events came before it."""
        while self._rest:
            try:
                ready = self._poll.poll(int(_PATIENCE_S * 1000))
                if not ready:
                    raise SinkError(f"the reader of {self.name} is behind", delivered=delivered)
                written = os.write(self._fd, self._rest[:_PIECE_BYTES])
            except BlockingIOError:
                continue  # its other owner made it non-blocking; poll waits
            except OSError as error:
                is_final = error.errno in _GONE
                raise SinkError(
                    f"{self.name} cannot be written: {error.strerror}", delivered=delivered, is_final=is_final
                ) from error
            self._rest = self._rest[written:]
