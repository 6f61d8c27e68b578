"""`Roots`: the root directories of processes, as they are during one pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sowatch.linux.descriptors import close_fd
from sowatch.linux.openat import open_below
from sowatch.linux.proc import Miss, ProcFs

__all__ = ["DirectoryState", "RootKey", "Roots", "own_root_key"]

#: What distinguishes one root from another: its mount namespace, and the device and inode of the root.
RootKey = tuple[str, int, int]


class DirectoryState(NamedTuple):
    """What is another one as soon as a name in a directory leads elsewhere, or the path to another directory.

    Of a directory that cannot be read ``inode`` is its errno, negative, and all else 0.
    """

    device: int
    inode: int
    modified_ns: int
    changed_ns: int


class Roots:
    """Finds root directories and remembers what it found. Waits as long as the file systems do.

    Args:
        proc: the proc file system to read.
    """

    def __init__(self, proc: ProcFs) -> None:
        self._proc = proc
        self._threads: dict[int, str | Miss] = {}
        self._keys: dict[int, RootKey | None] = {}

    def thread_dir(self, pid: int) -> str | Miss:
        """The proc directory of a living thread: a leader that has exited shows neither root nor maps.

        Never ``/proc/PID/task/TID``, which has no ``map_files``.
        """
        if pid not in self._threads:
            tid = self._proc.live_thread(pid)
            self._threads[pid] = tid if isinstance(tid, Miss) else f"{self._proc.root}/{tid}"
        return self._threads[pid]

    def key(self, pid: int) -> RootKey | None:
        """What distinguishes the root of a process from others; None if it has ended or may not be read."""
        if pid not in self._keys:
            thread = self.thread_dir(pid)
            try:
                self._keys[pid] = None if isinstance(thread, Miss) else _root_key_of(thread)
            except OSError:
                self._keys[pid] = None
        return self._keys[pid]

    def directories(self, key: RootKey, pids: Sequence[int], paths: Sequence[str]) -> dict[str, DirectoryState] | None:
        """The states of directories, as the first of these processes sees them that has the root; None if none has."""
        for pid in pids:
            with suppress(OSError):
                if self.key(pid) == key:
                    with self.open(pid) as root_fd:
                        return {path: _state_of(root_fd, path) for path in paths}
        return None

    @contextmanager
    def open(self, pid: int) -> Iterator[int]:
        """A descriptor (O_PATH) of the root directory.

        Raises:
            OSError: it cannot be opened, or the process has ended.
        """
        fd = os.open(f"{self.thread_dir(pid)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            close_fd(fd)

    def named_ns(self, pid: int, path: str) -> int | None:
        """The change time of what has a name, or else the modification time of its directory; None: of neither."""
        for name in (path, os.path.dirname(path)):
            with suppress(OSError), self.open(pid) as root_fd:
                fd = open_below(root_fd, name, os.O_PATH)
                try:
                    status = os.fstat(fd)
                finally:
                    close_fd(fd)
                return status.st_ctime_ns if name == path else status.st_mtime_ns
        return None


def _state_of(root_fd: int, path: str) -> DirectoryState:
    try:
        fd = open_below(root_fd, path, os.O_PATH)
    except OSError as error:
        return DirectoryState(0, -(error.errno or 0), 0, 0)
    try:
        found = os.fstat(fd)
    finally:
        close_fd(fd)
    return DirectoryState(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def _root_key_of(process_dir: str) -> RootKey:
    root = os.stat(f"{process_dir}/root")
    return os.readlink(f"{process_dir}/ns/mnt"), root.st_dev, root.st_ino


def own_root_key() -> RootKey:
    """That of this process."""
    return _root_key_of("/proc/self")
