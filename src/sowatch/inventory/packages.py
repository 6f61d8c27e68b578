"""Whose file is it, who runs it, and is it still the one on disk? Read-only.

A process names its libraries inside its own root, which a container controls. So nothing here follows a link out of
that root, opens anything but regular files and directories, reads without a limit, or runs a container's programs.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from sowatch.linux.openat import open_below, shows_real_inode
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId

__all__ = ["Disk", "Staleness", "is_on_disk"]


_READ_BYTES: Final = 1 << 20
_MAX_LIST_BYTES: Final = 32 << 20
_MAX_DATABASE_BYTES: Final = 512 << 20
_MAX_DATABASE_FILES: Final = 50_000
_RPM_TIMEOUT_S: Final = 20.0

#: Names the kernel gives to memory that was never a file on disk.
_MEMORY_PREFIXES: Final = ("/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage", "/[")

#: Directories that a merged /usr turns into links, and that dpkg knows under either name.
_MERGED: Final = ("/bin/", "/lib/", "/lib32/", "/lib64/", "/libo32/", "/libx32/", "/sbin/")

#: What tells one root from another: its mount namespace, and the device and inode of the root.
_RootKey = tuple[str, int, int]


class Staleness(StrEnum):
    """Why the file on disk is not the one in memory."""

    DELETED = "deleted"
    REPLACED = "replaced"


def _read_below(root_fd: int, path: str, limit_bytes: int) -> bytes | None:
    """The content of a regular file, or ``None`` if it is missing, larger, or something else."""
    try:
        found = open_below(root_fd, path, os.O_PATH)
    except OSError:
        return None
    try:
        # Looked at before it is opened: opening a device or a FIFO may do something.
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            return None
        fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    finally:
        os.close(found)
    try:
        parts = []
        left_bytes = limit_bytes  # it may grow while we read
        while left_bytes and (part := os.read(fd, min(left_bytes, _READ_BYTES))):
            parts.append(part)
            left_bytes -= len(part)
    except OSError:
        return None
    finally:
        os.close(fd)
    return b"".join(parts)


# --- the disk below a process ---------------------------------------------------------------------


def is_on_disk(library: Library) -> bool:
    """Whether it is, or was, a file on disk: not a memfd, SysV memory, ``/dev/zero`` or the like."""
    path = library.path
    return library.kind != "other" and path.startswith("/") and not path.startswith(_MEMORY_PREFIXES)


class Disk:
    """What is on disk where a process looks: for one look around, as it remembers what it saw.

    Processes that share root and mount namespace share the answers.

    Args:
        proc: the proc file system to look through. Default: ``/proc``.

    Raises:
        ProcRootError: ``/proc`` is not mounted.
    """

    def __init__(self, proc: ProcFs | None = None) -> None:
        self._proc = proc or ProcFs()
        self._threads: dict[int, str | None] = {}
        self._keys: dict[int, _RootKey | None] = {}
        self._staleness: dict[tuple[_RootKey, str, FileId, bool], Staleness | None] = {}

    def staleness(self, process: Process, library: Library, ranges: Sequence[tuple[int, int]] = ()) -> Staleness | None:
        """Whether the file that a process has mapped is no longer the one its path names.

        The path is looked up inside the process's own root. What is found there is compared with
        the mapped file as ``/proc/PID/map_files`` shows it, because both are then seen through the
        same overlay or subvolume. Where that cannot be read (it takes CAP_SYS_ADMIN or
        CAP_CHECKPOINT_RESTORE) the kernel's identity of the file is compared, if the file system
        shows that in stat(2).

        Args:
            process: who maps it.
            library: what is mapped.
            ranges: executable ranges of the mapping, as ``(start, end)``.

        Returns:
            ``None`` if it is the same file, was never on disk, or if nothing can be told because
            the process is gone or not ours to look at. The copy-up of an overlay file that is
            mapped from the lower layer is not seen.
        """
        if not is_on_disk(library):
            return None
        key = self._root_key(process.pid)
        if key is None:
            return self._kernels_word(process.pid, library)
        known = (key, library.path, library.id, library.deleted)
        if known not in self._staleness:
            try:
                self._staleness[known] = self._look(process, library, ranges)
            except OSError:  # it ended just now, or openat2 is missing or refused
                return self._kernels_word(process.pid, library)
        return self._staleness[known]

    def owners(self, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
        """The packages that own files, as their package manager names them.

        dpkg's and apk's databases are read in whatever root the process has, each once; ``rpm`` is
        asked about our own root only, because it runs macros, which a container could have written.

        Args:
            wanted: ``(pid, path)``, the path as that process sees it.

        Returns:
            The owner of each; ``None`` if no package has it or the process is gone.

        >>> Disk().owners([(os.getpid(), "/no/such/file")]) == {(os.getpid(), "/no/such/file"): None}
        True
        """
        asked = list(dict.fromkeys(wanted))
        by_root: dict[_RootKey, list[tuple[int, str]]] = {}
        for pid, path in asked:
            key = self._root_key(pid)
            if key is not None:
                by_root.setdefault(key, []).append((pid, path))
        owners: dict[tuple[int, str], str | None] = dict.fromkeys(asked)
        for group in by_root.values():
            paths = list(dict.fromkeys(path for _, path in group))
            for pid in dict.fromkeys(pid for pid, _ in group):
                try:
                    found = self._owners_below(pid, paths)
                except OSError:  # this one ended just now; another has the same root
                    continue
                owners |= {(pid, path): found[path] for pid, path in group}
                break
        return owners

    def _owners_below(self, pid: int, paths: Sequence[str]) -> dict[str, str | None]:
        with self._root(pid) as root_fd:
            owners = _dpkg_owners(root_fd, paths)
            owners |= _apk_owners(root_fd, [path for path in paths if owners[path] is None])
            left = [path for path in paths if owners[path] is None]
            if left and self._root_key(pid) == _our_root_key():
                owners |= _rpm_owners(left)
        return owners

    def _look(self, process: Process, library: Library, ranges: Sequence[tuple[int, int]]) -> Staleness | None:
        with self._root(process.pid) as root_fd:
            try:
                fd = open_below(root_fd, library.path, os.O_PATH)
            except (FileNotFoundError, NotADirectoryError):
                # The event is as old as the load; the name may have gone since. But a name that is not there
                # need not be deleted: it may be out of reach of the root the process has by now.
                is_deleted = library.deleted or self._is_unlinked(process.pid, ranges)
                return Staleness.DELETED if is_deleted else None
            try:
                found = os.fstat(fd)
                is_plain = shows_real_inode(fd)
            finally:
                os.close(fd)
        mapped = self._mapped_identity(process.pid, ranges)
        if mapped is None and is_plain:
            mapped = os.makedev(library.id.major, library.id.minor), library.id.inode
        if mapped is None:
            return Staleness.REPLACED if library.deleted else None
        return None if mapped == (found.st_dev, found.st_ino) else Staleness.REPLACED

    def _mapped_identity(self, pid: int, ranges: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        thread = self._thread_dir(pid)
        for start, end in ranges:
            try:
                status = os.stat(f"{thread}/map_files/{start:x}-{end:x}")
            except OSError:
                continue  # not permitted, or the mapping was split or has gone
            return status.st_dev, status.st_ino
        return None

    def _is_unlinked(self, pid: int, ranges: Sequence[tuple[int, int]]) -> bool:
        rows = self._proc.executable_maps(pid)
        starts = {start for start, _ in ranges}
        return not isinstance(rows, Miss) and any(row.start in starts and row.is_deleted for row in rows)

    def _kernels_word(self, pid: int, library: Library) -> Staleness | None:
        """The answer where we cannot look: the name may be taken again, but was given up."""
        return Staleness.DELETED if library.deleted and self._proc.stat(pid) else None

    def _thread_dir(self, pid: int) -> str | None:
        """The proc directory of a living thread: a leader that has exited shows neither root nor maps.

        Never ``/proc/PID/task/TID``, which has no ``map_files``.
        """
        if pid not in self._threads:
            tid = self._proc.live_thread(pid)
            self._threads[pid] = None if isinstance(tid, Miss) else f"{self._proc.root}/{tid}"
        return self._threads[pid]

    def _root_key(self, pid: int) -> _RootKey | None:
        if pid not in self._keys:
            thread = self._thread_dir(pid)
            try:
                self._keys[pid] = None if thread is None else _root_key_of(thread)
            except OSError:  # gone, or not ours to look at
                self._keys[pid] = None
        return self._keys[pid]

    @contextmanager
    def _root(self, pid: int) -> Iterator[int]:
        fd = os.open(f"{self._thread_dir(pid)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _root_key_of(process_dir: str) -> _RootKey:
    root = os.stat(f"{process_dir}/root")
    return os.readlink(f"{process_dir}/ns/mnt"), root.st_dev, root.st_ino


def _our_root_key() -> _RootKey:
    return _root_key_of("/proc/self")


# --- package databases --------------------------------------------------------------------------


def _aliases(path: str) -> tuple[str, ...]:
    """The names a package manager may know a path by: as it is, then through a merged /usr."""
    if path.startswith("/usr/") and path[4:].startswith(_MERGED):
        return path, path[4:]
    if path.startswith(_MERGED):
        return path, "/usr" + path
    return (path,)


class _Best:
    """The best owner found so far for each path: a literal name beats an alias."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._found: dict[str, tuple[int, str | None]] = dict.fromkeys(paths, (1 << 30, None))

    def offer(self, path: str, rank: int, package: str) -> None:
        if rank < self._found[path][0]:
            self._found[path] = rank, package

    def owners(self) -> dict[str, str | None]:
        return {path: package for path, (_, package) in self._found.items()}


def _dpkg_owners(root_fd: int, paths: Collection[str]) -> dict[str, str | None]:
    best = _Best(paths)
    diversions = _diversions(root_fd)
    # By the name on dpkg's lists: who asked for it, and which packages do not count.
    asked: dict[bytes, list[tuple[str, int, Callable[[str], bool]]]] = {}
    for path in paths:
        for rank, alias in enumerate(_aliases(path)):
            for name, counts in _names_on_lists(alias, diversions):
                asked.setdefault(os.fsencode(name), []).append((path, rank, counts))
    if asked:
        for package, listing in _dpkg_lists(root_fd):
            for listed in asked.keys() & set(listing.split(b"\n")):
                for path, rank, counts in asked[listed]:
                    if counts(package.partition(":")[0]):
                        best.offer(path, rank, package)
    return best.owners()


def _names_on_lists(path: str, diversions: Sequence[tuple[str, str, str]]) -> list[tuple[str, Callable[[str], bool]]]:
    """Under which names the owner of ``path`` lists it, and which packages may be that owner.

    A diverted file keeps its original name on its package's list, but lies elsewhere; at the
    original name lies the file of the package that diverted it (of none, if that is ``:``).
    """
    here = _aliases(path)
    for original, diverted, package in diversions:
        if diverted in here:
            return [(name, package.__ne__) for name in _aliases(original)]
        if original in here:
            return [(path, package.__eq__)]
    return [(path, lambda _: True)]


def _diversions(root_fd: int) -> list[tuple[str, str, str]]:
    """``(original, diverted to, package)``; the package is ``:`` for local diversions."""
    data = _read_below(root_fd, "/var/lib/dpkg/diversions", _MAX_LIST_BYTES) or b""
    lines = [os.fsdecode(line) for line in data.splitlines()]
    return list(zip(lines[0::3], lines[1::3], lines[2::3], strict=False))


def _dpkg_lists(root_fd: int) -> Iterator[tuple[str, bytes]]:
    """Each package's list of files. Stops at a size no honest database has."""
    try:
        fd = open_below(root_fd, "/var/lib/dpkg/info", os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    left_bytes = _MAX_DATABASE_BYTES
    try:
        with os.scandir(fd) as entries:
            for number, entry in enumerate(entries):
                if number >= _MAX_DATABASE_FILES or left_bytes <= 0:
                    return
                if entry.name.endswith(".list"):
                    listing = _read_below(fd, entry.name, _MAX_LIST_BYTES) or b""
                    left_bytes -= len(listing)
                    yield entry.name.removesuffix(".list"), listing
    finally:
        os.close(fd)


def _apk_owners(root_fd: int, paths: Collection[str]) -> dict[str, str | None]:
    """Owners from apk's database: ``P:`` names a package, ``F:`` a directory, ``R:`` a file in it."""
    best = _Best(paths)
    asked: dict[bytes, list[tuple[str, int]]] = {}
    for path in paths:
        for rank, alias in enumerate(_aliases(path)):
            asked.setdefault(os.fsencode(alias.lstrip("/")), []).append((path, rank))
    # apk-tools 3 may keep it below /usr.
    for place in ("/lib/apk/db/installed", "/usr/lib/apk/db/installed") if asked else ():
        package, directory = b"", b""
        for line in (_read_below(root_fd, place, _MAX_LIST_BYTES) or b"").split(b"\n"):
            key, value = line[:2], line[2:]
            if key == b"P:":
                package = value
            elif key == b"F:":
                directory = value + b"/" if value else b""
            elif key == b"R:":
                for path, rank in asked.get(directory + value, ()):
                    best.offer(path, rank, os.fsdecode(package))
    return best.owners()


def _rpm_owners(paths: Sequence[str]) -> dict[str, str | None]:
    owners: dict[str, str | None] = dict.fromkeys(paths)
    for path in paths:
        try:
            done = subprocess.run(
                ["rpm", "-qf", "--qf", "%{NAME}\\n", "--", path],  # noqa: S607  (the system's own, wherever it is)
                capture_output=True,
                timeout=_RPM_TIMEOUT_S,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            break  # there is no rpm, or its database is locked: the next path would fare no better
        names = done.stdout.split()
        if done.returncode == 0 and names:
            owners[path] = os.fsdecode(names[0])
    return owners
