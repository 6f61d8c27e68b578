"""Standard output that never blocks for good and never ends in a traceback.

Python's own ``sys.stdout`` is not used for data: it blocks in one long write when the reader stops reading, and
complains at exit when the reader went away.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
import time

from sowatch.model.errors import SowatchError

__all__ = ["Out", "PipeClosed", "reserve_standard_fds"]

#: A pipe that polls as writable takes this much without blocking (PIPE_BUF, pipe(7)).
_PIPE_BUF_BYTES = 4096
#: How often a write that waits for its reader looks whether it should give up.
_WAIT_MS = 200
_GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL


class PipeClosed(Exception):
    """The reader of the output has gone away; the command ends quietly."""


def reserve_standard_fds() -> None:
    """Make sure that stdin and stderr are open, so that nothing else gets their numbers.

    A descriptor of the kernel's that landed on 2 would be written to by every warning. A closed
    stdout is refused instead (see `Out`): its data would go nowhere.

    Raises:
        SowatchError: stdout is closed.
    """
    for fd, flags in ((0, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is the one asked for, unless stdin and stdout are both closed.
            opened = os.open(os.devnull, flags)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
    try:
        os.fstat(1)
    except OSError as error:
        raise SowatchError("standard output is closed. Redirect it to a file, a pipe or /dev/null.") from error


class Out:
    """A buffered text writer on a file descriptor it does not own.

    Text is collected by `write` and leaves with `flush`. A reader that stopped reading is waited
    for, but once `finish_within` was called only that long: a signal must be able to end us.

    Attributes:
        written_bytes: so far; any thread may read it.

    Raises:
        SowatchError: the descriptor is not open for writing.
    """

    def __init__(self, fd: int = 1, *, encoding: str | None = None) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise SowatchError("standard output is not open for writing. Redirect it to a file, a pipe or /dev/null.")
        self._fd = fd
        self.encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
        self.is_terminal = os.isatty(fd)
        self._may_block = not stat.S_ISREG(os.fstat(fd).st_mode)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._parts: list[str] = []
        self.written_bytes = 0
        self._deadline_s: float | None = None

    def write(self, text: str) -> int:
        """Keep ``text`` for the next `flush`; returns its length, as rich takes this for a file."""
        self._parts.append(text)
        return len(text)

    def isatty(self) -> bool:
        """Whether this is a terminal, in the words of a Python file."""
        return self.is_terminal

    def fileno(self) -> int:
        """The descriptor, so that rich can ask the terminal for its size."""
        return self._fd

    def flush(self) -> None:
        """Write what was kept.

        Raises:
            PipeClosed: the reader went away.
            SowatchError: the output cannot be written, or its reader does not read.
        """
        if not self._parts:
            return
        data = "".join(self._parts).encode(self.encoding, "backslashreplace")
        self._parts.clear()
        view = memoryview(data)
        while view:
            size = len(view)
            if self._may_block:
                self._wait_for_reader(size)
                size = min(size, _PIPE_BUF_BYTES)
            try:
                written = os.write(self._fd, view[:size])
            except BlockingIOError:
                continue  # somebody else shares the pipe and was faster
            except BrokenPipeError as error:
                raise PipeClosed from error
            except OSError as error:
                if self.is_terminal and error.errno == errno.EIO:
                    raise PipeClosed from error  # the terminal has gone
                raise SowatchError(
                    f"cannot write to standard output: {error.strerror}. Give it somewhere that takes the data."
                ) from error
            view = view[written:]
            self.written_bytes += written

    def discard(self) -> None:
        """Forget what was not written yet."""
        self._parts.clear()

    def reader_is_gone(self) -> bool:
        """Whether a pipe or terminal lost its other end, without writing anything."""
        return self._may_block and any(events & _GONE for _, events in self._poll.poll(0))

    def finish_within(self, seconds: float) -> None:
        """From now on wait at most this long for a reader that does not read. Any thread."""
        if self._deadline_s is None:
            self._deadline_s = time.monotonic() + seconds

    def _wait_for_reader(self, size_bytes: int) -> None:
        while True:
            for _, events in self._poll.poll(_WAIT_MS):
                if events & select.POLLOUT:
                    return
                if events & _GONE:
                    raise PipeClosed
            if self._deadline_s is not None and time.monotonic() > self._deadline_s:
                raise SowatchError(
                    f"the reader of standard output does not read; the last {size_bytes} bytes or more were not "
                    "written. Let it read, or write to a file."
                )
