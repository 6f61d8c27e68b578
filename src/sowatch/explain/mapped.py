"""The files of one process as the rows of ``/proc/PID/maps`` show them, and which of the mapping table they are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from sowatch.bpf.records import MAX_FILE_RANGES
from sowatch.engine.queries import KnownFile, KnownProcess
from sowatch.explain.records import Range
from sowatch.linux.proc_parse import MapRow, seen_path
from sowatch.model.identity import FileId

__all__ = ["FilesByAddress", "Group", "Shown", "group_rows"]


class Shown(NamedTuple):
    """A file as ``/proc`` or stat shows it: no FileId on overlayfs and btrfs, which invent devices."""

    major: int
    minor: int
    inode: int
    generation: int | None = None

    @property
    def file_id(self) -> FileId:
        """The identity as far as it is known."""
        return FileId(self.major, self.minor, self.inode, self.generation or 0)

    @property
    def dev(self) -> str:
        """As that of a FileId."""
        return f"{self.major}:{self.minor}"

    def could_be(self, file_id: FileId) -> bool:
        """Whether a kernel identity may be what is shown here."""
        return (
            file_id.inode == self.inode
            and (file_id.dev == self.dev or self.major == 0)
            and self.generation in (None, file_id.generation)
        )


class Group(NamedTuple):
    """The rows of one file in one process. ``path`` is as the process sees it."""

    path: str
    major: int
    minor: int
    inode: int
    is_deleted: bool
    rows: tuple[MapRow, ...]

    @property
    def file_id(self) -> FileId:
        """As the rows show it: without generation."""
        return FileId(self.major, self.minor, self.inode, subvolume=self.rows[0].subvolume)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Their addresses, as pairs of start and end."""
        return tuple((row.start, row.end) for row in self.rows)

    @property
    def where(self) -> tuple[tuple[Range, ...], int | None]:
        """The same as events have it: of very many the first, what spans the others, and how many."""
        ranges = self.ranges
        if len(ranges) <= MAX_FILE_RANGES:
            return ranges, None
        return (ranges[0], (ranges[1][0], ranges[-1][1])), len(ranges)

    def shown(self, generation: int | None = None) -> Shown:
        """The file as these rows show it."""
        return Shown(self.major, self.minor, self.inode, generation)


def group_rows(rows: Iterable[MapRow], root: str) -> tuple[Group, ...]:
    """The rows of each file together, in the order of their addresses."""
    found: dict[MapRow, list[MapRow]] = {}
    for row in rows:
        found.setdefault(row._replace(start=0, end=0, perms="", offset_bytes=0), []).append(row)
    return tuple(
        Group(
            seen_path(one.path.decode("utf-8", "surrogateescape"), root),
            one.major,
            one.minor,
            one.inode,
            one.is_deleted,
            tuple(same),
        )
        for one, same in found.items()
    )


class FilesByAddress:
    """The files of one process by the mapping table, to be found by what ``/proc`` shows of them."""

    __slots__ = ("_ends", "_spans", "_wide")

    def __init__(self, process: KnownProcess | None) -> None:
        files = () if process is None else process.files
        # Ranges of one address space do not overlap, so in the order of their ends they begin in order too.
        self._spans = sorted(
            ((end, start, file) for file in files if file.range_count is None for start, end in file.ranges),
            key=lambda span: span[0],
        )
        # Those that are not all distinguished lie around others.
        self._wide = [file for file in files if file.range_count is not None]
        self._ends = [end for end, _, _ in self._spans]

    def find(self, group: Group) -> KnownFile | None:
        """The file that is what the rows show; compared as the audit does."""
        for row in group.rows:
            for at in range(bisect_right(self._ends, row.start), len(self._spans)):
                _, start, file = self._spans[at]
                if start >= row.end:
                    break
                file_id = file.name.file_id
                if file_id.inode == group.inode or (file_id.major, file_id.minor) != (group.major, group.minor):
                    return file
        return next((file for file in self._wide if file.name.file_id.inode == group.inode), None)
