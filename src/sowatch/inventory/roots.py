"""`Roots`: the root directories of processes, as they are during one pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sowatch.linux.descriptors import close_fd
from sowatch.linux.proc import Miss, ProcFs

__all__ = ["RootKey", "Roots", "own_root_key"]

#: What distinguishes one root from another: its mount namespace, and the device and inode of the root.
RootKey = tuple[str, int, int]


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


def _root_key_of(process_dir: str) -> RootKey:
    root = os.stat(f"{process_dir}/root")
    return os.readlink(f"{process_dir}/ns/mnt"), root.st_dev, root.st_ino


def own_root_key() -> RootKey:
    """That of this process."""
    return _root_key_of("/proc/self")
