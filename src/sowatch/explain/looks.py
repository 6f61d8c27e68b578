"""Files that others control: can the very file be opened, and what are its facts?

The file is found by `sowatch.linux.mapped_file.find_mapped`, as everywhere; here each way that was tried is kept.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from msgspec.structs import replace

from sowatch.explain.records import FileLook, Range, Try
from sowatch.linux import disk_calls
from sowatch.linux.descriptors import close_fd
from sowatch.linux.disk_calls import DiskCalls, HangingCalls
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import search_exports
from sowatch.linux.mapped_file import NOT_REGULAR, Place, build_id_of_copied_up, find_mapped, mapped_build_id
from sowatch.linux.openat import file_system_of, reopen
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.timeout_worker import CallTimeout
from sowatch.model.identity import FileId
from sowatch.model.wire_explain import By, ElfState

__all__ = ["Subject", "TimeoutWorker", "look_at", "look_at_place"]

T = TypeVar("T")

#: A file system that does not answer within this time is reported not to.
PATIENCE_S: Final = 2.0
#: After so many of them nothing more is tried.
MAX_STUCK: Final = 3
#: include/uapi/linux/magic.h
HUGETLBFS_MAGIC: Final = 0x958458F6
#: _IOR('v', 1, long), linux/fs.h; what comes back has 4 bytes.
FS_IOC_GETVERSION: Final = 0x80087601


class TimeoutWorker:
    """Does what may hang on a thread of its own, and leaves that behind if it does. A context manager.

    Args:
        patience_s: how long it waits.
        hanging: what does not answer, shared with other workers in any thread. Default: its own.
    """

    def __init__(self, patience_s: float = PATIENCE_S, hanging: HangingCalls | None = None) -> None:
        self._patience_s = patience_s
        self._calls = DiskCalls("sowatch-explain", hanging)
        self._stuck = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.close()

    def run(self, job: Callable[[], T], place: disk_calls.Place | None = None) -> T | None:
        """What the job returns or raises; None if it takes too long, or others did before.

        Args:
            job: what to do.
            place: what it depends on: where a job of anybody hangs, no other is begun.
        """
        if self._stuck >= MAX_STUCK or (place is not None and self._calls.hangs(place)):
            return None
        try:
            return self._calls.run_in_time(job, place, self._patience_s)
        except CallTimeout:
            self._stuck += 1
            return None


class Subject(NamedTuple):
    """A file, by one process that has it mapped; ``path`` is as that process sees it.

    ``changed_ns``: the change time of the mapped inode, 0 where nobody knows it.
    """

    pid: int
    path: str
    file_id: FileId
    ranges: tuple[Range, ...]
    is_own_view: bool
    is_deleted: bool
    changed_ns: int = 0


def look_at(proc: ProcFs, subject: Subject, exports: Collection[str]) -> FileLook:
    """Opens a mapped file in each way there is until one works, and reads it.

    Args:
        proc: the host's.
        subject: which.
        exports: symbols to search for.
    """
    tries: list[Try] = []
    is_refused = False

    def on_try(place: Place | None, path: str, why: OSError | Miss | str | None) -> None:
        nonlocal is_refused
        is_refused |= why is Miss.DENIED or isinstance(why, PermissionError)
        tries.append(Try(_BY[place], path, _text_of(why)))

    found = find_mapped(
        proc,
        subject.pid,
        subject.file_id,
        subject.path,
        subject.ranges,
        is_own_view=subject.is_own_view,
        is_deleted=subject.is_deleted,
        changed_ns=subject.changed_ns,
        on_try=on_try,
    )
    if found is not None:
        try:
            fd = reopen(found.fd, os.O_RDONLY)
        except OSError as error:
            tries[-1] = replace(tries[-1], error=_text_of(error))
            is_refused |= isinstance(error, PermissionError)
        else:
            try:
                look = _read(fd, tries[-1].by, tuple(tries), exports)
                build_id = None
                if not subject.changed_ns:
                    build_id = build_id_of_copied_up(proc, subject.pid, subject.ranges, fd, look.build_id)
                if build_id is None:
                    return look
                tries[-1] = replace(tries[-1], error=_COPIED_UP)
                return FileLook("partial", f"only its build id can be read: {_COPIED_UP}", None, tuple(tries), build_id)
            finally:
                close_fd(fd)
        finally:
            close_fd(found.fd)
    if any(one.error == NOT_REGULAR for one in tries):
        return FileLook("not_regular", tries=tuple(tries))
    if build_id := mapped_build_id(proc, subject.pid, subject.ranges):
        return FileLook("partial", tries[0].error, build_id=build_id, tries=tuple(tries))
    return FileLook("not_permitted" if is_refused else "gone", tries[0].error, tries=tuple(tries))


def look_at_place(place: int, path: str, exports: Collection[str]) -> FileLook:
    """The same for a file that nobody needs to have mapped, by a descriptor (O_PATH) of it; ``path`` is to be shown."""
    if not stat.S_ISREG(os.fstat(place).st_mode):
        return FileLook("not_regular")
    try:
        fd = reopen(place, os.O_RDONLY)
    except OSError as error:
        attempt = Try("own_view", path, os.strerror(error.errno or 0))
        return FileLook("not_permitted" if isinstance(error, PermissionError) else "gone", tries=(attempt,))
    try:
        return _read(fd, "own_view", (Try("own_view", path, None),), exports)
    finally:
        close_fd(fd)


_BY: Final[Mapping[Place | None, By]] = {"link": "map_files", "root": "root", "own": "own_view", None: "layer"}
_COPIED_UP: Final = "the overlay shows a copy of it, or another file"
_MISSING: Final = {
    Miss.GONE: "the process is gone",
    Miss.DENIED: "not permitted",
    Miss.ABSENT: "the process has ended",
    Miss.HUNG: "the kernel does not answer",
}


def _text_of(why: OSError | Miss | str | None) -> str | None:
    if isinstance(why, OSError):
        return why.strerror or os.strerror(why.errno or 0)
    return _MISSING[why] if isinstance(why, Miss) else why


def _generation(fd: int) -> int | None:
    """What distinguishes this inode from others that had its number (ext4, xfs, btrfs, f2fs)."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETVERSION, bytes(8))[:4], sys.byteorder)
    except OSError:
        return None


def _read(fd: int, by: By, tries: tuple[Try, ...], wanted: Collection[str]) -> FileLook:
    return replace(_read_elf(fd, by, tries, wanted), is_hugetlb=file_system_of(fd) == HUGETLBFS_MAGIC)


def _read_elf(fd: int, by: By, tries: tuple[Try, ...], wanted: Collection[str]) -> FileLook:
    generation = _generation(fd)
    try:
        facts = read_facts(fd)
    except ElfError as error:
        return FileLook("unreadable", error.reason, by, tries, generation=generation)
    if facts is None:
        return FileLook("not_regular", None, by, tries)
    if not facts.is_elf:
        return FileLook("not_elf", None, by, tries, exports=frozenset(), generation=generation)
    exports: frozenset[str] | None = frozenset()
    reason = "it contradicts itself, or passes a limit" if facts.is_partial else None
    has_given_up = False
    try:
        exports, gave_up = search_exports(fd, wanted) if wanted else (frozenset(), None)
        has_given_up = gave_up is not None
        reason = gave_up or reason
    except ElfError as error:
        exports = None  # it could not be read, and may be tried again, as the inspector has it
        reason = error.reason
    elf: ElfState = "partial" if reason else "elf"
    return FileLook(
        elf, reason, by, tries, facts.build_id, facts.soname, exports, generation, has_given_up, facts.image_kinds
    )
