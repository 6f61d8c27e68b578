"""Looks at files that others control: can the very file be opened, and what does it say of itself?

The ways are those of `sowatch.engine.file_inspector.open_mapped`, in its order, but each says what became of it. A
file is looked up before it is opened, so that no device is.
"""

from __future__ import annotations

import fcntl
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from msgspec.structs import replace

from sowatch.explain.records import By, ElfState, FileLook, Range, Try
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import search_exports
from sowatch.linux.openat import file_system_of, open_below, reopen
from sowatch.linux.proc import Miss, ProcFs

__all__ = ["Subject", "TimeoutWorker", "look_at", "look_at_place"]

T = TypeVar("T")

#: A file system that does not answer within this time is said not to.
PATIENCE_S: Final = 2.0
#: After so many of them nothing more is tried.
MAX_STUCK: Final = 3
#: A file may have thousands of ranges; the link of each leads to the same file.
MAX_LINKS: Final = 4
#: include/uapi/linux/magic.h
HUGETLBFS_MAGIC: Final = 0x958458F6
#: _IOR('v', 1, long), linux/fs.h; what comes back has 4 bytes.
FS_IOC_GETVERSION: Final = 0x80087601


class TimeoutWorker:
    """Does what may hang on a thread of its own, and leaves that behind if it does. A context manager."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None
        self._stuck = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(wait=True)

    def run(self, job: Callable[[], T]) -> T | None:
        """What the job returns or raises; None if it takes too long, or others did before."""
        if self._stuck >= MAX_STUCK:
            return None
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            # A daemon: what hangs must not keep the process.
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="sowatch-explain", daemon=True)
            self._thread.start()
        answer: Future[T] = Future()

        def do() -> None:
            try:
                answer.set_result(job())
            except BaseException as error:  # noqa: BLE001 - it goes to whoever asked
                answer.set_exception(error)

        self._jobs.put(do)
        try:
            return answer.result(self._patience_s)
        except TimeoutError:
            if answer.done():
                return answer.result()
            self._stuck += 1
            self._leave(wait=False)
            return None

    def _leave(self, *, wait: bool) -> None:
        jobs, self._jobs = self._jobs, None
        thread, self._thread = self._thread, None
        if jobs is not None:
            jobs.put(None)  # a thread that is stuck ends as soon as it is not any more
        if thread is not None and wait:
            thread.join()


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


class Subject(NamedTuple):
    """A file to look at, by one process that has it mapped; ``path`` is as that process sees it."""

    pid: int
    path: str
    inode: int
    ranges: tuple[Range, ...]
    is_own_view: bool
    is_deleted: bool


def look_at(proc: ProcFs, subject: Subject, exports: Collection[str]) -> FileLook:
    """Opens a mapped file in each way there is until one works, and reads it.

    Args:
        proc: the host's.
        subject: which.
        exports: symbols to look for.
    """
    tries: list[Try] = []
    is_refused = False
    for found in _ways(proc, subject):
        tries.append(found.attempt)
        is_refused |= found.is_refused
        if found.is_other_type:
            return FileLook("not_regular", tries=tuple(tries))
        if found.fd is not None:
            try:
                return _read(found.fd, found.attempt.by, tuple(tries), exports)
            finally:
                os.close(found.fd)
    return FileLook("not_permitted" if is_refused else "gone", tries=tuple(tries))


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
        os.close(fd)


class _Way(NamedTuple):
    attempt: Try
    fd: int | None = None
    is_other_type: bool = False
    is_refused: bool = False


def _failed(by: By, path: str, why: OSError | Miss | str) -> _Way:
    if isinstance(why, OSError):
        return _Way(Try(by, path, os.strerror(why.errno or 0)), is_refused=isinstance(why, PermissionError))
    if isinstance(why, Miss):
        return _Way(Try(by, path, _MISSING[why]), is_refused=why is Miss.DENIED)
    return _Way(Try(by, path, why))


_MISSING: Final = {
    Miss.GONE: "the process is gone",
    Miss.DENIED: "not permitted",
    Miss.ABSENT: "the process has ended",
    Miss.HUNG: "the kernel does not answer",
}


def _ways(proc: ProcFs, subject: Subject) -> Iterator[_Way]:
    yield _by_link(proc, subject)
    root = proc.root_dir(subject.pid)
    below = f"{proc.root}/{subject.pid}/root" if isinstance(root, Miss) else root
    if subject.is_deleted:
        yield _failed("root", below + subject.path, "its name is gone")
        return
    yield _failed("root", below + subject.path, root) if isinstance(root, Miss) else _by_path("root", root, subject)
    if subject.is_own_view:
        yield _by_path("own_view", "/", subject)


def _by_link(proc: ProcFs, subject: Subject) -> _Way:
    links = proc.map_files_dir(subject.pid)
    if isinstance(links, Miss):
        return _failed("map_files", f"{proc.root}/{subject.pid}/map_files", links)
    way = _failed("map_files", links, "nothing is mapped any more")
    for start, end in subject.ranges[:MAX_LINKS]:
        path = f"{links}/{start:x}-{end:x}"
        try:
            # The link leads to the file itself; a device is not opened by looking at it, and what is mapped in its
            # place meanwhile is not opened either.
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(place).st_mode):
                    return _Way(Try("map_files", path, "not a regular file"), is_other_type=True)
                return _Way(Try("map_files", path, None), reopen(place, os.O_RDONLY))
            finally:
                os.close(place)
        except OSError as error:
            way = _failed("map_files", path, error)
    return way


def _by_path(by: By, root: str, subject: Subject) -> _Way:
    """Below a root that no link leads out of; counts only if the inode number is the one mapped."""
    path = subject.path if root == "/" else root + subject.path
    try:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = open_below(directory, subject.path, os.O_PATH, follows_links=False)
        finally:
            os.close(directory)
        try:
            status = os.fstat(place)
            if status.st_ino != subject.inode:
                return _failed(by, path, "another file has that name now")
            if not stat.S_ISREG(status.st_mode):
                return _Way(Try(by, path, "not a regular file"), is_other_type=True)
            return _Way(Try(by, path, None), reopen(place, os.O_RDONLY))
        finally:
            os.close(place)
    except OSError as error:
        return _failed(by, path, error)


def _generation(fd: int) -> int | None:
    """What tells this inode from others that had its number (ext4, xfs, btrfs, f2fs)."""
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
