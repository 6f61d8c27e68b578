"""`AddressBook`: who had which file mapped where, so that an address has a name also when its process has gone.

It is filled by a rule for every file, and keeps descriptors of files for a while, for those that are deleted.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from sowatch.engine.workers import ActiveFile
from sowatch.linux.descriptors import close_fd
from sowatch.linux.function_table import FunctionTable, Place, function_table
from sowatch.model.events import Library, Load, Unload
from sowatch.model.identity import TICK_NS, FileId, ProcessId

__all__ = ["AddressBook", "Frame", "process_key"]

#: Descriptors of files that are kept, and what share of those that a process may have; a host has some hundred files
#: mapped.
_MAX_FILES, _SHARE_OF_FILES = 512, 4
#: Processes that are gone and whose addresses are still known.
_MAX_GONE: Final = 4_096


class Frame(NamedTuple):
    """One address: in which file, where in it, in which function and how far in it; None: it is not known."""

    address: int
    library: Library | None = None
    place: Place | None = None


def process_key(process: ProcessId) -> tuple[int, int]:
    """What one process has in common by the kernel's clock and by that of ``/proc``, which counts in ticks."""
    return process.pid, process.start_ns // TICK_NS


class _Mapped(NamedTuple):
    library: Library
    ranges: tuple[tuple[int, int], ...]
    is_there: bool


class AddressBook:
    """Any thread may use it; `frames` reads files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[tuple[int, int], dict[FileId, _Mapped]] = {}
        self._gone: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._files: OrderedDict[FileId, int] = OrderedDict()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_files = min(_MAX_FILES, soft // _SHARE_OF_FILES) if soft > 0 else _MAX_FILES

    def note(self, event: Load | Unload) -> None:
        """For `on_load` and `on_unload` of a rule."""
        process = process_key(event.process.id)
        with self._lock:
            files = self._mapped.setdefault(process, {})
            if event.event == "load":
                self._gone.pop(process, None)
                files[event.library.id] = _Mapped(event.library, event.ranges, is_there=True)
                return
            known = files.get(event.library.id)
            if known is not None:
                files[event.library.id] = known._replace(is_there=False)
            if event.cause == "exit":
                self._gone[process] = None
                if len(self._gone) > _MAX_GONE:
                    self._mapped.pop(self._gone.popitem(last=False)[0], None)

    def hold(self, file: ActiveFile) -> None:
        """For `on_activate`: keeps the file, for when it is deleted; as many as there is space for."""
        try:
            fd = os.dup(file.fileno())
        except OSError:
            return  # it is opened by its name then
        with self._lock:
            dropped = [self._files.pop(file.library.id, -1)]
            self._files[file.library.id] = fd
            if len(self._files) > self._max_files:
                dropped.append(self._files.popitem(last=False)[1])
        for old in dropped:
            close_fd(old)

    def close(self) -> None:
        """Closes the files. Safe to call again."""
        with self._lock:
            files, self._files = list(self._files.values()), OrderedDict()
        for fd in files:
            close_fd(fd)

    def frames(self, process: ProcessId, addresses: Sequence[int]) -> tuple[Frame, ...]:
        """What is at addresses that calls of a process return to."""
        with self._lock:
            # What is mapped now goes before what was there once.
            files = sorted(self._mapped.get(process_key(process), {}).values(), key=lambda one: not one.is_there)
        return tuple(self._frame(files, address) for address in addresses)

    def _frame(self, files: Sequence[_Mapped], address: int) -> Frame:
        for mapped in files:
            if any(start <= address - 1 < end for start, end in mapped.ranges):
                table = self._table(mapped.library)
                if table is None:
                    return Frame(address, mapped.library)
                # The call ends where it returns to, which may be behind the end of a function that never goes on.
                place = table.place(address - 1, mapped.ranges)
                return Frame(address, mapped.library, Place(place.offset + 1, place.symbol, place.inside + 1))
        return Frame(address)

    def _table(self, library: Library) -> FunctionTable | None:
        with self._lock:
            fd = self._files.get(library.id, -1)
            fd = os.dup(fd) if fd >= 0 else -1
        if fd < 0:
            fd = _opened(library)
        if fd < 0:
            return None
        try:
            return function_table(fd)
        finally:
            close_fd(fd)


def _opened(library: Library) -> int:
    """The file by its name, if that still leads to it; -1: it does not."""
    if library.host_path is None:
        return -1
    try:
        fd = os.open(library.host_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return -1
    try:
        if os.fstat(fd).st_ino == library.id.inode:
            return fd
    except OSError:  # a file system may refuse it, or be gone
        pass
    close_fd(fd)
    return -1
