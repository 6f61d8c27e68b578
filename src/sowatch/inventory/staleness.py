"""Is a mapped file still the one on disk? `Disk` answers with yes, no and how, or unknown and why. Read-only.

A process names its libraries inside its own root, which a container controls: no link is taken out of that root, and
nothing is opened but with O_PATH, except for the build id of what has the place of a mapped file, and what an overlay
shows: `sowatch.inventory.copied_up` reads regular files.
Every read has a deadline, for a file system may not answer.
docs/decisions/0026-staleness.md has the rules.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from msgspec import Struct

from sowatch.inventory.copied_up import Copies, build_id_of
from sowatch.inventory.file_names import given_up_name
from sowatch.inventory.owners import owners
from sowatch.inventory.roots import DirectoryState, RootKey, Roots
from sowatch.linux.descriptors import close_fd
from sowatch.linux.disk_calls import LOOK_TIMEOUT_S, DiskCalls, HangingCalls
from sowatch.linux.file_times import FileTimes, file_times
from sowatch.linux.mapped_file import is_on_overlay, mapped_build_id
from sowatch.linux.memory_files import is_memory
from sowatch.linux.openat import open_below, shows_real_inode
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.linux.proc_parse import MapRow, seen_path
from sowatch.linux.timeout_worker import CallTimeout
from sowatch.linux.wall_clock import started_ns
from sowatch.model.events import Library, Process
from sowatch.model.identity import TICK_NS, FileId, ProcessId
from sowatch.model.literals import Staleness
from sowatch.model.stats import Mapped

__all__ = [
    "FRESH",
    "NOT_PERMITTED",
    "Disk",
    "StaleAnswer",
    "Staleness",
    "badness",
    "seen_at",
]

T = TypeVar("T")

#: Package databases are large, and may lie on a slow disk.
OWNERS_TIMEOUT_S: Final = 60.0
#: Processes whose mappings are kept: each may have a hundred thousand. Ask for one process after the other.
MAX_SIGHTS: Final = 8
_DELETED: Final = " (deleted)"


class StaleAnswer(NamedTuple):
    """Whether a mapped file is stale.

    ``stale`` is None if its path leads to it, or if it never was a file on disk. ``reason`` is given for ``unknown``
    and ``modified``, and where the name of the file decided; ``path`` is the name under which it is stale if that is
    not its own. ``is_same_build``: of a ``replaced`` file, whether both have the same build id; None if unknown.
    """

    stale: Staleness | None
    reason: str | None = None
    path: str | None = None
    is_same_build: bool | None = None


FRESH: Final = StaleAnswer(None)


def badness(answer: StaleAnswer) -> int:
    """The worst of several answers has the highest."""
    order = (Staleness.UNKNOWN, Staleness.MODIFIED, Staleness.DELETED, Staleness.REPLACED)
    return order.index(answer.stale or Staleness.UNKNOWN)


_NO_ANSWER: Final = "its file system does not answer"
_TOO_MANY: Final = "too many file systems do not answer"
NOT_PERMITTED: Final = "this user may not read the process"
_OUTSIDE: Final = "it lies outside the root directory that the process has now"
_COVERED: Final = "its path leads to another mount: its own was covered or unmounted"
_NOWHERE: Final = (
    "its path leads nowhere, but its name was not deleted: its file system was unmounted, or is out of reach"
)
_NO_PATH: Final = "the kernel shows no path of it"
_COPIED_UP: Final = "an overlay has its path: it may have been copied up and changed since it was mapped"
_MASKED: Final = "its file system does not show which file is mapped"


class _Found(Enum):
    """What a path leads to, compared with the mapped file."""

    SAME = "same"
    #: Another file, where the mapped one was.
    OTHER = "other"
    #: Another file, on another mount.
    COVERED = "covered"
    ABSENT = "absent"


class _Mapped(NamedTuple):
    """The mapped file as its link in ``map_files`` shows it."""

    device: int
    inode: int
    mount: int | None


class _Sight(NamedTuple):
    """What can be seen of a process. ``trouble`` says why nothing can, ``is_gone`` that there is nothing to see."""

    key: RootKey | None = None
    root: str = "/"
    starts: Mapping[int, MapRow] = {}
    files: Mapping[tuple[int, int, int], MapRow] = {}
    trouble: str | None = None
    is_gone: bool = False


class _Subject(Struct, frozen=True):
    """A mapped file, under the name it has now."""

    pid: int
    library: Library
    ranges: tuple[tuple[int, int], ...]
    path: str
    is_deleted: bool
    is_outside: bool
    row: MapRow | None


class _Looked(NamedTuple):
    """What was found out of a file, whoever maps it; ``times`` are those of the file if its path leads to it."""

    answer: StaleAnswer
    times: FileTimes | None = None


class Disk:
    """What is on disk where a process would open its files, for one pass: answers are kept. A context manager.

    For a further pass `begin_pass` forgets them, but not what does not answer.

    Processes that share root and mount namespace share the answers. One thread uses it.

    Args:
        proc: the proc file system to read. Default: ``/proc``.
        hanging: what does not answer, shared with other disks in any thread. Default: its own.

    Raises:
        ProcRootError: ``/proc`` is not mounted.
    """

    def __init__(self, proc: ProcFs | None = None, hanging: HangingCalls | None = None) -> None:
        self._proc = proc or ProcFs()
        self._roots = Roots(self._proc)
        self._calls = DiskCalls("sowatch-disk", hanging)
        self._sights: dict[ProcessId, _Sight] = {}
        self._answers: dict[tuple[object, ...], _Looked] = {}
        #: The keys of answers that hold for the mappings of one process only.
        self._is_of_process: set[tuple[object, ...]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread that reads, unless it hangs. Safe to call again."""
        self._calls.close()

    def begin_pass(self) -> None:
        """Forgets what was found, as all of it may have changed."""
        self._roots = Roots(self._proc)
        self.forget_processes()
        self._answers.clear()
        self._is_of_process.clear()

    def forget_processes(self) -> None:
        """Frees what was read of the mappings of processes."""
        self._sights.clear()

    def has_ended(self, process: Process) -> bool:
        """Whether a process is there no more, asked anew."""
        found = self._proc.stat(process.pid)
        return found is Miss.GONE or (not isinstance(found, Miss) and found.start_ticks != process.start_ns // TICK_NS)

    def root_of(self, pid: int) -> RootKey | None:
        """What distinguishes the root of a process from others; None if it has ended or may not be read."""
        return self._calls.run(partial(self._roots.key, pid), None, place=("root", pid))

    def directories(self, root: RootKey, pids: Sequence[int], paths: Sequence[str]) -> dict[str, DirectoryState | None]:
        """The states of directories; None of one that does not answer, or if no process has that root any more.

        Args:
            root: as `root_of` gave it.
            pids: of processes that had it.
            paths: as these see them.
        """
        found: dict[str, DirectoryState | None] = dict.fromkeys(paths)
        asked = [path for path in paths if not self._calls.hangs((root, path))]
        abandoned = self._calls.hanging
        together = self._calls.run(partial(self._roots.directories, root, pids, asked), None)
        if together is not None:
            return found | together
        if self._calls.hanging > abandoned:  # one of them hangs
            for path in asked:
                alone = self._calls.run(partial(self._roots.directories, root, pids, [path]), None, place=(root, path))
                found |= alone or {}
        return found

    def staleness(
        self,
        process: Process,
        library: Library,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        loaded_ns: int | None = None,
    ) -> StaleAnswer:
        """Whether the file that a process has mapped is no longer the one its path names.

        The path is the one that the mapping has now, so a file that was renamed is judged under its new name. It is
        looked up inside the process's own root. What is found there is compared with the mapped file as
        ``/proc/PID/map_files`` shows it, because both are then seen through the same overlay or subvolume. Where that
        cannot be read (it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE) the kernel's identity of the file is
        compared, if the file system shows that in stat(2). Where an overlay shows the same file, it is also asked
        whether that is a copy of what is mapped.

        A file that its path leads to is ``modified`` if it was written to after it was mapped. Where that moment is
        unknown it is after the process has started, and the file must be older than the process: one that was made
        since was loaded later, and may not have changed.

        Args:
            process: who maps it.
            library: what is mapped.
            ranges: executable ranges of the mapping, as ``(start, end)``.
            loaded_ns: when it was mapped, by the wall clock, if that was seen; see `seen_at`.

        Returns:
            `FRESH`, too, if the process has ended.
        """
        if is_memory(library.id):
            return FRESH
        if not library.path.startswith("/"):
            return FRESH if library.kind == "other" else StaleAnswer(Staleness.UNKNOWN, _NO_PATH)
        sight = self._sight(process)
        if sight.is_gone:
            return FRESH
        subject = _subject(process.pid, library, tuple(ranges), sight)
        if sight.key is None:
            return _cannot_tell(subject, sight.trouble or NOT_PERMITTED)
        known: tuple[object, ...] = (
            *(sight.key, subject.path, library.path, library.id),
            *(library.changed_ns, subject.is_deleted, subject.is_outside),
        )
        if known in self._is_of_process:
            known = (*known, process.id)
        if known not in self._answers:
            copies = Copies(self._proc, process.pid, library, subject.row)
            answer = self._look_with_deadline(subject, sight.key, copies)
            if copies.depends_on_mapping:
                self._is_of_process.add(known)
                known = (*known, process.id)
            self._answers[known] = answer
        looked = self._answers[known]
        if looked.answer.stale is None and looked.times is not None:
            return _modified(looked.times, process, loaded_ns)
        return looked.answer

    def staleness_of_all(self, mapped: Sequence[Mapped]) -> list[StaleAnswer]:
        """The answer for each, in the same order; the mappings of each process are read once."""
        found: dict[int, StaleAnswer] = {}
        for index in sorted(range(len(mapped)), key=lambda index: mapped[index].process.id):
            one = mapped[index]
            loaded_ns = seen_at(one.cause, one.time_ns)
            found[index] = self.staleness(one.process, one.library, one.ranges, loaded_ns=loaded_ns)
        return [found[index] for index in range(len(mapped))]

    def replaced_ns(self, pid: int, path: str) -> int | None:
        """When a file was replaced or deleted, as the disk shows it; None where that cannot be seen.

        That is when what has its name now got it (the change time, which a rename sets), or, if nothing has it, when
        its directory was changed last.

        Args:
            pid: a process that had it.
            path: as that process sees it.
        """
        return self._calls.run(
            partial(self._roots.named_ns, pid, path), None, place=("replaced", os.path.dirname(path))
        )

    def owners(self, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
        """The packages that own files; see `sowatch.inventory.owners.owners`.

        >>> Disk().owners([(os.getpid(), "/no/such/file")]) == {(os.getpid(), "/no/such/file"): None}
        True
        """
        asked = list(dict.fromkeys(wanted))
        found: dict[tuple[int, str], str | None] = dict.fromkeys(asked)
        by_root: dict[RootKey | None, list[tuple[int, str]]] = {}
        for pid, path in asked:
            by_root.setdefault(self.root_of(pid), []).append((pid, path))
        for root, group in by_root.items():
            # A database on a file system that hangs keeps nobody else from being answered.
            timeout_s = LOOK_TIMEOUT_S if self._calls.hanging else OWNERS_TIMEOUT_S
            look = partial(owners, self._roots, group)
            found |= self._calls.run(look, dict.fromkeys(group), timeout_s, place=("owners", root))
        return found

    def _sight(self, process: Process) -> _Sight:
        sight = self._sights.pop(process.id, None)
        if sight is None:
            hangs = _Sight(trouble=_NO_ANSWER)
            look = partial(self._look_at_process, process)
            sight = self._calls.run(look, hangs, place=("process", process.id))
            while len(self._sights) >= MAX_SIGHTS:
                del self._sights[next(iter(self._sights))]
        self._sights[process.id] = sight  # the one that was asked for last is the last
        return sight

    def _look_at_process(self, process: Process) -> _Sight:
        try:
            stat = self._proc.stat(process.pid)
            # Hidden by hidepid is not gone, but nobody can know.
            if stat is Miss.DENIED:
                return _Sight(trouble=NOT_PERMITTED)
            if isinstance(stat, Miss) or stat.start_ticks != process.start_ns // TICK_NS:
                return _Sight(is_gone=True)
            thread = self._roots.thread_dir(process.pid)
            if isinstance(thread, Miss):
                return _Sight(trouble=NOT_PERMITTED) if thread is Miss.DENIED else _Sight(is_gone=True)
            rows = self._proc.executable_maps(process.pid)
            key = self._roots.key(process.pid)
            root = os.readlink(f"{thread}/root")
        except (OSError, ProcReadError) as error:
            gone = isinstance(error, (FileNotFoundError, ProcessLookupError))
            return _Sight(is_gone=gone, trouble=_reason_of(error))
        # What looks like a newline may be a backslash and three digits. The rest is asked where one row is read.
        found = [self._proc.resolve(process.pid, [row])[0] if b"\n" in row.path else row for row in rows or ()]
        return _Sight(
            key,
            root,
            {row.start: row for row in found},
            {(row.major, row.minor, row.inode): row for row in found},
            None if key else NOT_PERMITTED,
        )

    # ---- a file -------------------------------------------------------------------------------

    def _look_with_deadline(self, subject: _Subject, key: RootKey, copies: Copies) -> _Looked:
        file_id = subject.library.id
        place = (key, os.path.dirname(subject.path), file_id.major, file_id.minor)
        if self._calls.hangs(place) or self._calls.hangs(place[:2]):
            return _Looked(_cannot_tell(subject, _NO_ANSWER))
        try:
            looked = self._calls.run_in_time(lambda: self._look(subject, copies), place)
        except CallTimeout as timeout:
            return _Looked(_cannot_tell(subject, _TOO_MANY if timeout.is_refused else _NO_ANSWER))
        except OSError as error:  # it ended just now, or openat2 is missing or refused
            if self._proc.stat(subject.pid) is Miss.GONE:
                return _Looked(FRESH)
            return _Looked(_cannot_tell(subject, _reason_of(error)))
        if looked.answer.stale is not Staleness.REPLACED:
            return looked
        # With a deadline of its own: a file system that has names, and no content, keeps nothing of the answer back.
        is_same_build = self._calls.run(partial(self._is_same_build, looked.answer.path, subject), None, place=place)
        return looked._replace(answer=looked.answer._replace(is_same_build=is_same_build))

    def _look(self, subject: _Subject, copies: Copies) -> _Looked:
        if subject.is_outside:
            return _Looked(_cannot_tell(subject, _OUTSIDE))
        mapped = self._mapped(subject)
        times: FileTimes | None = None

        def on_same(fd: int) -> None:
            nonlocal times
            times = file_times(fd)

        with self._roots.open(subject.pid) as root_fd:

            def compare(path: str) -> _Found | str:
                return _compare(root_fd, path, subject, mapped, copies, on_same)

            # What looks like the kernel's mark may be the end of a name.
            if subject.is_deleted and compare(subject.path + _DELETED) is _Found.SAME:
                return _Looked(FRESH, times)
            found = compare(subject.path)
            if found is _Found.ABSENT and not subject.is_deleted and subject.library.path != subject.path:
                # Of nested overlays maps shows the inner path, where the event has the one that the process sees.
                found = compare(subject.library.path)
                if found not in (_Found.SAME, _Found.ABSENT):
                    found = _Found.ABSENT
            return _Looked(_judge(subject, found, compare), times)

    def _is_same_build(self, path: str | None, subject: _Subject) -> bool | None:
        """Whether what has the file's place now has its build id, too."""
        # The pages first: with a file that was copied up in an overlay, what was read of the file may be the copy's.
        ranges = subject.ranges if subject.row is None else ((subject.row.start, subject.row.end),)
        mapped = mapped_build_id(self._proc, subject.pid, ranges) or subject.library.build_id
        if mapped is None:
            return None
        try:
            with self._roots.open(subject.pid) as root_fd:
                fd = open_below(root_fd, path or subject.path, os.O_PATH)
            try:
                shown = build_id_of(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else ""
            finally:
                close_fd(fd)
        except OSError:  # a FUSE server may answer with any error, at any step
            return None
        return None if shown is None else shown == mapped

    def _mapped(self, subject: _Subject) -> _Mapped | None:
        thread = self._roots.thread_dir(subject.pid)
        ranges = subject.ranges if subject.row is None else ((subject.row.start, subject.row.end), *subject.ranges)
        for start, end in ranges:
            try:
                fd = os.open(f"{thread}/map_files/{start:x}-{end:x}", os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # not permitted, or the mapping was split or has gone
            try:
                status = os.fstat(fd)
                return _Mapped(status.st_dev, status.st_ino, _mount_of(fd))
            finally:
                close_fd(fd)
        return None


def _subject(pid: int, library: Library, ranges: tuple[tuple[int, int], ...], sight: _Sight) -> _Subject:
    """The file under the name that the mapping has now; that of the load where the mapping is not found."""
    row = _row_of(library.id, ranges, sight)
    if row is None or not row.path.startswith(b"/"):
        return _Subject(pid, library, ranges, library.path, library.deleted, False, None)
    text = os.fsdecode(row.path)
    path = seen_path(text, sight.root)
    is_outside = len(sight.root) > 1 and path == text
    return _Subject(pid, library, ranges, path, row.is_deleted, is_outside, row)


def _row_of(file_id: FileId, ranges: Sequence[tuple[int, int]], sight: _Sight) -> MapRow | None:
    for start, _ in ranges:
        row = sight.starts.get(start)
        # Another file may have been mapped there since. On overlayfs and btrfs maps shows another device.
        if row is not None and (row.inode == file_id.inode or (row.major, row.minor) != (file_id.major, file_id.minor)):
            return row
    return sight.files.get((file_id.major, file_id.minor, file_id.inode))


def seen_at(cause: str | None, time_ns: int) -> int | None:
    """When a file was mapped, as `Disk.staleness` takes it; None if the watch did not see that.

    A process inherits by fork what was mapped before, and a snapshot or a repair finds what is there.

    Args:
        cause: that of the load.
        time_ns: that of the load, in ns since the epoch.
    """
    return time_ns if cause in ("mmap", "exec") and time_ns else None


def _modified(times: FileTimes, process: Process, loaded_ns: int | None) -> StaleAnswer:
    """Of a file that its path leads to."""
    now_ns = time.time_ns()
    # The start may be rounded down to a tick, and the file system's clock lags behind by one.
    since_ns = started_ns(process.start_ns) if loaded_ns is None else loaded_ns
    after_ns = since_ns + TICK_NS
    # A time to come was set by somebody: nobody knows when that was.
    if not after_ns < times.written_ns <= now_ns:
        return FRESH
    if loaded_ns is None and times.born_ns is not None and times.born_ns >= since_ns - TICK_NS:
        return FRESH  # it may have been made after the start, and written before it was mapped
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(times.written_ns // 10**9))
    since = "its process had started" if loaded_ns is None else "it was mapped"
    return StaleAnswer(Staleness.MODIFIED, f"it was written to at {when}, after {since}")


def _judge(subject: _Subject, found: _Found | str, compare: Callable[[str], _Found | str]) -> StaleAnswer:
    """From what the path leads to, to an answer."""
    name = given_up_name(subject.path)
    base = None if name is None else name.base
    if isinstance(found, str):
        return _cannot_tell(subject, found)
    if found is _Found.SAME:
        if name is None:
            return FRESH
        if base is None:
            return StaleAnswer(Staleness.DELETED, "an NFS client keeps it under this name until nobody has it open")
        at_base = compare(base)
        reason = f"{os.path.basename(subject.path)} is what was left of it"
        if at_base in (_Found.OTHER, _Found.COVERED):
            return StaleAnswer(Staleness.REPLACED, reason, base)
        if not name.is_certain or at_base is _Found.SAME:
            return FRESH
        if at_base is _Found.ABSENT:
            return StaleAnswer(Staleness.DELETED, reason, base)
        return StaleAnswer(Staleness.UNKNOWN, str(at_base), base)
    if found is _Found.OTHER:
        return StaleAnswer(Staleness.REPLACED)
    if not subject.is_deleted:
        return StaleAnswer(Staleness.UNKNOWN, _COVERED if found is _Found.COVERED else _NOWHERE)
    if base is not None and compare(base) is _Found.OTHER:
        return StaleAnswer(Staleness.REPLACED, None, base)
    return StaleAnswer(Staleness.DELETED, None, base)


def _cannot_tell(subject: _Subject, reason: str) -> StaleAnswer:
    """Where we cannot read the kernel's mark still stands: the name may be taken again, but was given up."""
    return StaleAnswer(Staleness.DELETED) if subject.is_deleted else StaleAnswer(Staleness.UNKNOWN, reason)


def _compare(
    root_fd: int,
    path: str,
    subject: _Subject,
    mapped: _Mapped | None,
    copies: Copies,
    on_same: Callable[[int], None],
) -> _Found | str:
    """What a path leads to below a root; a text says why that cannot be determined.

    ``on_same`` gets a descriptor (O_PATH) of the very file.
    """
    try:
        fd = open_below(root_fd, path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError):
        return _Found.ABSENT
    except OSError as error:
        return _reason_of(error)
    try:
        found = _compare_inodes(fd, subject, mapped)
        # An overlay shows a copy under the inode number of what was copied, through the link of the mapping as well.
        if found is not _Found.SAME:
            return found
        if not is_on_overlay(fd):
            on_same(fd)
            return found
        is_it = copies.is_mapped(fd, path)
        if is_it:
            on_same(fd)
    finally:
        close_fd(fd)
    if is_it is None:
        return _COPIED_UP
    return _Found.SAME if is_it else _Found.OTHER


def _compare_inodes(fd: int, subject: _Subject, mapped: _Mapped | None) -> _Found | str:
    found = os.fstat(fd)
    mount = _mount_of(fd)
    file_id, row = subject.library.id, subject.row
    if mapped is None:
        if shows_real_inode(fd):
            mapped = _Mapped(os.makedev(file_id.major, file_id.minor), file_id.inode, None)
        elif row is not None and os.makedev(row.major, row.minor) == found.st_dev:
            mapped = _Mapped(found.st_dev, row.inode, None)
        elif found.st_ino in (file_id.inode, None if row is None else row.inode):
            return _Found.SAME
        else:
            return _Found.OTHER if subject.is_deleted else _MASKED
    if (mapped.device, mapped.inode) == (found.st_dev, found.st_ino):
        return _Found.SAME
    is_same_place = mapped.device == found.st_dev if mapped.mount is None else mapped.mount == mount
    # A name that is gone cannot be covered; the mounts of a namespace of its own are copies.
    is_same_place |= subject.is_deleted and mapped.device == found.st_dev
    return _Found.OTHER if is_same_place else _Found.COVERED


def _mount_of(fd: int) -> int | None:
    """The id of the mount that a descriptor is on."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            for line in file:
                if line.startswith(b"mnt_id:"):
                    return int(line[7:])
    except (OSError, ValueError):
        pass
    return None


def _reason_of(error: Exception) -> str:
    number = error.errno if isinstance(error, (OSError, ProcReadError)) else None
    return os.strerror(number) if number else str(error)
