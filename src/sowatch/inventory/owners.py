"""Which package owns a file. Read-only.

A process names its libraries inside its own root, which a container controls. So nothing here takes a link out of
that root, opens anything but regular files and directories, reads without a limit, or runs a container's programs.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

from sowatch.inventory.roots import RootKey, Roots, own_root_key
from sowatch.linux.descriptors import close_fd
from sowatch.linux.openat import open_below, reopen

__all__ = ["owners"]


_READ_BYTES: Final = 1 << 20
_MAX_LIST_BYTES: Final = 32 << 20
_MAX_DATABASE_BYTES: Final = 512 << 20
_MAX_DATABASE_FILES: Final = 50_000
_RPM_TIMEOUT_S: Final = 20.0

#: Directories that a merged /usr turns into links, and that dpkg knows under either name.
_MERGED: Final = ("/bin/", "/lib/", "/lib32/", "/lib64/", "/libo32/", "/libx32/", "/sbin/")


def _read_below(root_fd: int, path: str, limit_bytes: int) -> bytes | None:
    """The content of a regular file, or ``None`` if it is missing, larger, or something else."""
    try:
        found = open_below(root_fd, path, os.O_PATH)
    except OSError:
        return None
    try:
        # Checked before it is opened: opening a device or a FIFO may do something.
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            return None
        fd = reopen(found, os.O_RDONLY)
    except OSError:
        return None
    finally:
        close_fd(found)
    try:
        parts = []
        left_bytes = limit_bytes  # it may grow while we read
        while left_bytes and (part := os.read(fd, min(left_bytes, _READ_BYTES))):
            parts.append(part)
            left_bytes -= len(part)
    except OSError:
        return None
    finally:
        close_fd(fd)
    return b"".join(parts)


def owners(roots: Roots, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
    """The packages that own files, as their package manager names them.

    dpkg's and apk's databases are read in whatever root the process has, each once; ``rpm`` is
    asked about our own root only, because it runs macros, which a container could have written.

    Args:
        roots: knows the root directories.
        wanted: ``(pid, path)``, the path as that process sees it.

    Returns:
        The owner of each; ``None`` if no package has it or the process is gone.
    """
    asked = list(dict.fromkeys(wanted))
    by_root: dict[RootKey, list[tuple[int, str]]] = {}
    for pid, path in asked:
        key = roots.key(pid)
        if key is not None:
            by_root.setdefault(key, []).append((pid, path))
    found: dict[tuple[int, str], str | None] = dict.fromkeys(asked)
    for key, group in by_root.items():
        paths = list(dict.fromkeys(path for _, path in group))
        for pid in dict.fromkeys(pid for pid, _ in group):
            try:
                with roots.open(pid) as root_fd:
                    by_path = _owners_below(root_fd, paths, is_own_root=key == own_root_key())
            except OSError:  # this one ended just now; another has the same root
                continue
            found |= {(pid, path): by_path[path] for pid, path in group}
            break
    return found


def _owners_below(root_fd: int, paths: Sequence[str], *, is_own_root: bool) -> dict[str, str | None]:
    found = _dpkg_owners(root_fd, paths)
    found |= _apk_owners(root_fd, [path for path in paths if found[path] is None])
    left = [path for path in paths if found[path] is None]
    if left and is_own_root:
        found |= _rpm_owners(left)
    return found


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
        close_fd(fd)


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
