"""Is what an overlay shows under a path the file that is mapped, or a copy that was made of it since?

A process that writes to a file of a lower layer, or changes its mode, gets a copy in the upper one. The overlay shows
it under the same path and inode number, while who had the lower file mapped still has that. Only what both files say of
themselves distinguish them: the change time, the build id, the layer, the content.
docs/decisions/0026-staleness.md has the rules.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from sowatch.linux.descriptors import close_fd
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.mapped_file import file_version, find_in_layers, mapped_build_id, shows_a_lower_file
from sowatch.linux.openat import reopen
from sowatch.linux.proc import ProcFs
from sowatch.linux.proc_parse import MapRow
from sowatch.model.events import Library

__all__ = ["BuildIds", "Copies", "build_id_of", "is_mapped_file"]

#: Larger files are not compared byte by byte.
MAX_CONTENT: Final = 64 << 20
_CHUNK: Final = 1 << 20


class BuildIds(NamedTuple):
    """That of the mapped pages, None if unknown; that of the shown file, "" if it has none, None if unknown."""

    mapped: str | None
    shown: str | None


def is_mapped_file(
    mapped_ns: int, shown_ns: int, build_ids: Callable[[], BuildIds], layers: Callable[[], bool | None]
) -> bool | None:
    """Whether the shown file is the mapped one, or a copy with the same program in it.

    Args:
        mapped_ns: the change time of the mapped inode when it was mapped, 0 if unknown.
        shown_ns: that of the inode that the overlay shows now.
        build_ids: what both say of themselves.
        layers: whether the layers have the mapped inode, and its content where the path leads; None if unknown.

    Returns:
        None if that cannot be determined.
    """
    # Another change time does not mean another file: chmod changes it, too.
    if mapped_ns and mapped_ns == shown_ns:
        return True
    mapped, shown = build_ids()
    if mapped and shown is not None:
        return mapped == shown
    return layers()


class Copies:
    """What is asked about the copies of one mapped file.

    Args:
        proc: the host's.
        pid: who maps it.
        library: what is mapped.
        row: the mapping as it is now, None if it was not found.
    """

    def __init__(self, proc: ProcFs, pid: int, library: Library, row: MapRow | None) -> None:
        self._proc = proc
        self._pid = pid
        self._library = library
        self._row = row
        #: Two processes may have different files mapped of which nothing but the build ids differ.
        self.depends_on_mapping = False

    def is_mapped(self, fd: int, path: str) -> bool | None:
        """Whether a file that an overlay shows, under a path as the process sees it, is the mapped one."""
        shown = os.fstat(fd)
        if not stat.S_ISREG(shown.st_mode):
            return False
        self.depends_on_mapping = self._library.changed_ns != shown.st_ctime_ns
        return is_mapped_file(
            self._library.changed_ns, shown.st_ctime_ns, lambda: self._build_ids(fd), lambda: self._layers(fd, path)
        )

    def _build_ids(self, fd: int) -> BuildIds:
        ranges = () if self._row is None else ((self._row.start, self._row.end),)
        mapped = mapped_build_id(self._proc, self._pid, ranges)
        return BuildIds(mapped, None if mapped is None else build_id_of(fd))

    def _layers(self, fd: int, path: str) -> bool | None:
        found = find_in_layers(self._proc, self._pid, self._library.id, path)
        if found is None:
            return shows_a_lower_file(self._proc, self._pid, path, os.fstat(fd)) or None
        try:
            return file_version(os.fstat(found.fd)) == file_version(os.fstat(fd)) or _has_same_content(found.fd, fd)
        finally:
            close_fd(found.fd)


def build_id_of(place: int) -> str | None:
    """That of a regular file, by an O_PATH descriptor; "" if it has none, None if it cannot be read."""
    try:
        fd = reopen(place, os.O_RDONLY)
    except OSError:
        return None
    try:
        facts = read_facts(fd)
    except (ElfError, OSError):
        return None
    finally:
        close_fd(fd)
    if facts is None or (facts.is_partial and not facts.build_id):
        return None
    return facts.build_id or ""


def _has_same_content(place: int, other_place: int) -> bool | None:
    """Of two regular files; None if they are too large, or one cannot be read."""
    size = os.fstat(place).st_size
    if size != os.fstat(other_place).st_size:
        return False
    if size > MAX_CONTENT:
        return None
    try:
        with (
            open(reopen(place, os.O_RDONLY), "rb", buffering=0) as file,
            open(reopen(other_place, os.O_RDONLY), "rb", buffering=0) as other,
        ):
            for at in range(0, size, _CHUNK):
                if os.pread(file.fileno(), _CHUNK, at) != os.pread(other.fileno(), _CHUNK, at):
                    return False
    except OSError:
        return None
    return True
