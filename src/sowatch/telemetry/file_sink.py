"""Events as JSON lines in a file that rotates."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Sequence
from typing import Final

from sowatch.linux.openat import open_regular
from sowatch.model.errors import ConfigError, SinkError
from sowatch.model.events import Event, Head, Origin
from sowatch.model.lines import to_json

__all__ = ["FileSink", "check_path"]

#: A disk that is full when the agent starts is waited for, as it is later.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def check_path(path: str) -> None:
    """Whether a `FileSink` could write there; makes and opens nothing.

    Raises:
        ConfigError: it could not, and why.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent):
            raise _refused(path, os.strerror(errno.ENOENT)) from None
        may_write = os.access(parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise _refused(path, error.strerror) from error
    else:
        may_write = os.access(path, os.W_OK)
    if not stat.S_ISREG(mode):
        raise _refused(path, "it is not a regular file")
    if os.geteuid() == 0 and not may_write:
        raise _refused(path, os.strerror(errno.EACCES))


def _refused(path: str, why: str | None) -> ConfigError:
    return ConfigError(
        "file sink path",
        f"cannot write {path!r}: {why}. "
        "Give a regular file, not a link, in a directory that exists and that this user may write to.",
    )


class FileSink:
    """A `Sink` that writes schema 1, one line for each event, into ``path``, ``path.1`` and so on.

    A file only ever holds whole lines: when the disk is full in the middle of one, that one is taken
    back and comes again. `reopen` is for logrotate and its kin; to leave the rotation to them, set
    ``max_bytes=0``.

    Args:
        path: the file; appended to if it is there. A new one has ``mode``, whatever the umask.
        max_bytes: a file that would grow beyond it is rotated first; 0: never.
        max_files: how many files there may be, the one being written among them.
        mode: permissions of new files.
        name: what metrics and messages call it.
        origin: written at the head of each file, as the line `sowatch.model.events.Head`; None: no such line.

    Raises:
        ConfigError: the file cannot be opened, or is no regular file, or a limit is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 100 << 20,
        max_files: int = 5,
        mode: int = 0o640,
        name: str = "file",
        origin: Origin | None = None,
    ) -> None:
        if max_bytes < 0 or max_files < 1:
            raise ConfigError(
                "file sink", "max_bytes is at least 0 and max_files at least 1. Leave them out, or fix them."
            )
        self.name = name
        self._path = os.fspath(path)
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._mode = mode
        self._seq = 0
        self._fd = -1
        self._size = 0
        self._origin = origin
        #: How much of the file is its head, which alone does not make it full.
        self._head_size = 0
        self._wants_reopen = threading.Event()
        try:
            self._open()
        except OSError as error:
            if error.errno not in _FULL:
                raise _refused(self._path, error.strerror) from error

    def write(self, events: Sequence[Event]) -> int:
        """Appends all events, rotating as needed.

        Raises:
            SinkError: the disk is full, or the file cannot be written.
        """
        done = 0
        try:
            if self._wants_reopen.is_set():
                self._wants_reopen.clear()
                self.close()
            if self._fd < 0:
                self._open()
            if self._size and not os.fstat(self._fd).st_size:  # a rotation that copies has cut it
                self._size = self._head_size = 0
            while done < len(events):
                if self._origin is not None and not self._size:
                    head = to_json(Head(time.time_ns(), self._origin), self._seq).encode("ascii") + b"\n"
                    self._append([head])
                    self._head_size = len(head)
                lines = self._fitting(events[done:])
                if not lines:
                    self._rotate()
                    continue
                done += self._append(lines)
        except _Short as short:
            done += short.lines  # none of a head: it is one line, which was taken back
            raise self._refusal(short.error, done) from short.error
        except OSError as error:
            raise self._refusal(error, done) from error
        return done

    def reopen(self) -> None:
        """Has the next event written to a file opened anew by its name."""
        self._wants_reopen.set()

    def interrupt(self) -> None:
        """Does nothing: a file that hangs cannot be helped."""

    def close(self) -> None:
        """Closes the file. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _refusal(self, error: OSError, delivered: int) -> SinkError:
        return SinkError(f"{self._path!r} cannot be written: {error.strerror}", delivered=delivered)

    def _fitting(self, events: Sequence[Event]) -> list[bytes]:
        """The lines of the first events, as many as fit; at least one into an empty file."""
        lines: list[bytes] = []
        size = self._size
        for place, event in enumerate(events):
            line = to_json(event, self._seq + place).encode("ascii") + b"\n"
            if self._max_bytes and size > self._head_size and size + len(line) > self._max_bytes:
                break
            lines.append(line)
            size += len(line)
        return lines

    def _append(self, lines: list[bytes]) -> int:
        data = b"".join(lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            whole, end = 0, 0
            while whole < len(lines) and end + len(lines[whole]) <= written:
                end += len(lines[whole])
                whole += 1
            self._take_back(written - end)
            self._count(whole, end)
            raise _Short(error, whole) from error
        self._count(len(lines), written)
        return len(lines)

    def _count(self, lines: int, size: int) -> None:
        self._seq += lines
        self._size += size

    def _take_back(self, size: int) -> None:
        """Cuts the beginning of a line off the end of the file."""
        if size:
            end = os.fstat(self._fd).st_size
            os.ftruncate(self._fd, max(0, end - size))

    def _rotate(self) -> None:
        if self._max_files == 1:
            os.ftruncate(self._fd, 0)
            self._size = self._head_size = 0
            return
        for number in range(self._max_files - 2, 0, -1):
            if os.path.lexists(f"{self._path}.{number}"):
                os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")
        os.replace(self._path, f"{self._path}.1")
        self.close()
        self._open()

    def _open(self) -> None:
        # Not through a link, and nothing but a regular file.
        flags = os.O_RDWR | os.O_APPEND
        try:
            fd = os.open(self._path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self._mode)
            is_new = True
        except FileExistsError:
            fd = open_regular(self._path, flags, follows_link=False)
            is_new = False
        try:
            size = self._prepare(fd, is_new=is_new)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._size, self._head_size = fd, size, 0

    def _prepare(self, fd: int, *, is_new: bool) -> int:
        """Makes sure that the file can be appended to; its size."""
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if is_new:
            os.fchmod(fd, self._mode)
        size = found.st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            # The machine went down within a line: the next one begins on its own.
            size += os.write(fd, b"\n")
        return size


class _Short(Exception):
    """Some lines were written, then the disk refused."""

    def __init__(self, error: OSError, lines: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.lines = lines
