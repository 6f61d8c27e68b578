"""Address spaces: the files in one, where they are mapped, and the processes that hold it.

Pure values and sums, no policy: `tracker` decides what changes when.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sowatch.bpf.records import FLAG_DELETED, FLAG_PARTIAL, MapRecord, ProcessRecord, file_id_of, path_of, paths_of
from sowatch.linux.cgroups import choose_cgroup
from sowatch.model.events import Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import RuleSet

__all__ = ["Change", "Found", "Mapping", "Name", "Range", "Sketch", "Space", "Tracked", "subtract"]

Range = tuple[int, int]


class Name:
    """A file under one name in one view of the file system: what the kernel's verdicts are about."""

    __slots__ = (
        "changed_ns",
        "file_id",
        "is_deleted",
        "is_partial",
        "is_regular",
        "is_wanted",
        "key",
        "path",
        "text",
        "view",
    )

    def __init__(self, record: MapRecord, rules: RuleSet) -> None:
        key = record.key
        self.key = key
        self.text = record.text
        self.file_id = file_id_of(key) if isinstance(key, bytes) else FileId(*key)  # type: ignore[misc]
        self.changed_ns = record.changed_ns
        self.path = path_of(record.text)
        self.is_deleted = bool(record.flags & FLAG_DELETED)
        self.is_partial = bool(record.flags & FLAG_PARTIAL)
        self.is_regular = stat.S_ISREG(record.mode)
        #: The process's root, as the kernel's pointers: two equal ones see the same paths.
        self.view = key[40:56] if isinstance(key, bytes) else b""
        self.is_wanted = rules.could_match(self.path)

    @property
    def is_anonymous(self) -> bool:
        """A memfd, SysV segment or shared anonymous memory: its one component may hold slashes."""
        is_alone = self.text.count(b"\0") == 1
        has_such_a_name = self.text.startswith((b"memfd:", b"SYSV", b"dev/zero"))
        return self.is_deleted and ((is_alone and has_such_a_name) or self.path == "/dev/zero")


class Mapping:
    """One file in one address space, with its executable ranges, sorted by nothing."""

    __slots__ = ("is_image", "name", "ranges")

    def __init__(self, name: Name, ranges: list[Range], *, is_image: bool) -> None:
        self.name = name
        self.ranges = ranges
        self.is_image = is_image


#: What a reading found: the name, the ranges and one row of each wanted file.
Found = dict[FileId, tuple[Name, list[Range], MapRecord]]


class Space:
    """An address space: the files in it, and the processes that hold it (several after CLONE_VM)."""

    __slots__ = ("files", "high", "holders", "is_doubted", "low")

    def __init__(self) -> None:
        self.files: dict[FileId, Mapping] = {}
        self.holders: list[Tracked] = []
        #: A holder has claimed something since the last reading. If that one is gone before it was
        #: read, another one has to be.
        self.is_doubted = False
        #: Bounds of all ranges ever added: what lies outside touches nothing.
        self.low = 1 << 64
        self.high = 0

    def copy(self) -> Space:
        """What fork makes of it."""
        new = Space()
        new.low, new.high = self.low, self.high
        new.files = {
            file_id: Mapping(mapping.name, list(mapping.ranges), is_image=mapping.is_image)
            for file_id, mapping in self.files.items()
        }
        return new

    def add(self, mapping: Mapping, start: int, end: int) -> None:
        """Gives a file of this space one more range; what it had there already is not counted twice."""
        if start < self.low:
            self.low = start
        if end > self.high:
            self.high = end
        for known_start, known_end in mapping.ranges:
            if start < known_end and end > known_start:
                mapping.ranges = subtract(mapping.ranges, start, end)
                break
        mapping.ranges.append((start, end))

    def take_away(self, start: int, end: int, *, but: FileId | None = None) -> list[FileId]:
        """Removes a range; gives the files that have nothing left."""
        if start >= self.high or end <= self.low:
            return []
        emptied = []
        for file_id, mapping in self.files.items():
            if file_id != but and any(start < known_end and end > known for known, known_end in mapping.ranges):
                mapping.ranges = subtract(mapping.ranges, start, end)
                if not mapping.ranges:
                    emptied.append(file_id)
        return emptied


def subtract(ranges: Iterable[Range], start: int, end: int) -> list[Range]:
    """The ranges without [start, end).

    >>> subtract([(0, 10), (20, 30)], 5, 25)
    [(0, 5), (25, 30)]
    """
    left = []
    for known_start, known_end in ranges:
        if start >= known_end or end <= known_start:
            left.append((known_start, known_end))
            continue
        if known_start < start:
            left.append((known_start, start))
        if known_end > end:
            left.append((end, known_end))
    return left


class Sketch:
    """Which file is where in an address space, and nothing else: to compare, and to try out what records do."""

    def __init__(self, mappings: Iterable[Mapping] = ()) -> None:
        self._ranges: dict[FileId, list[Range]] = {one.name.file_id: list(one.ranges) for one in mappings}

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[FileId, int, int]]) -> Sketch:
        """Of files and where they are mapped."""
        made = cls()
        for file_id, start, end in rows:
            made._ranges.setdefault(file_id, []).append((start, end))
        return made

    def put(self, file_id: FileId | None, start: int, end: int) -> None:
        """From now on this file is there, and no other; None: none at all."""
        self._ranges = {known: left for known, ranges in self._ranges.items() if (left := subtract(ranges, start, end))}
        if file_id is not None:
            self._ranges.setdefault(file_id, []).append((start, end))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketch) and self._whole() == other._whole()

    __hash__ = None  # type: ignore[assignment]

    def _whole(self) -> dict[FileId, list[Range]]:
        """Without seams: neighbours are one range."""
        whole: dict[FileId, list[Range]] = {}
        for file_id, ranges in self._ranges.items():
            joined = whole[file_id] = []
            for start, end in sorted(ranges):
                if joined and start <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
                else:
                    joined.append((start, end))
        return whole


class Tracked:
    """A process the kernel follows for us, and what is known of it."""

    __slots__ = (
        "_record",
        "cgroup",
        "comm",
        "exe",
        "exe_id",
        "exec_id",
        "id",
        "interpreter_base",
        "is_announced",
        "label",
        "ns_pid",
        "ppid",
        "seen_ns",
        "space",
        "uid",
        "was_read",
    )

    def __init__(self, process_id: ProcessId, seen_ns: int, label: Callable[[str | None], str | None]) -> None:
        self.id = process_id
        self.seen_ns = seen_ns
        self.label = label
        self.comm: bytes | None = None
        self.exe: str | None = None
        self.exe_id: FileId | None = None
        self.interpreter_base = 0
        self.cgroup: str | None = None
        self.ns_pid: int | None = None
        self.ppid: int | None = None
        self.uid: int | None = None
        #: False for a CLONE_VM child until it has shown that it stays: vfork and posix_spawn make one
        #: that lives in its parent's space for a moment only.
        self.is_announced = True
        #: How often it has executed a program, as the kernel counts: tells a lost exec.
        self.exec_id = 0
        #: A reading has shown its mappings.
        self.was_read = False
        self.space = Space()
        self.space.holders.append(self)
        self._record: Process | None = None

    def learn(self, record: ProcessRecord) -> None:
        """Takes over what a process record says."""
        self._record = None
        self.exec_id = record.exec_id
        self.comm = record.comm
        self.ppid = record.ppid
        self.uid = record.uid
        self.ns_pid = record.ns_pid
        self.cgroup = choose_cgroup(paths_of(record.cgroup))
        if record.path:
            self.exe = path_of(record.path)
        self.exe_id = file_id_of(record.exe)
        self.interpreter_base = record.interpreter_base

    def rename(self, comm: bytes) -> None:
        """Takes over a newer name of the process."""
        if comm != self.comm:
            self.comm = comm
            self._record = None

    def record(self) -> Process:
        """The frozen record that events carry."""
        if self._record is None:
            comm = self.comm
            self._record = Process(
                pid=self.id.pid,
                start_ns=self.id.start_ns,
                ns_pid=self.ns_pid,
                ppid=self.ppid,
                comm=None if comm is None else comm.rstrip(b"\0").decode("utf-8", "surrogateescape"),
                exe=self.exe,
                uid=self.uid,
                container=self.label(self.cgroup),
                cgroup=self.cgroup,
            )
        return self._record

    def kind_of(self, mapping: Mapping) -> str:
        """What the file is to this process, as far as its mapping shows (ELF facts may say ``other``)."""
        name = mapping.name
        if name.file_id == self.exe_id:
            return "executable"
        if mapping.is_image:
            return "interpreter"
        if not name.is_regular or (name.is_anonymous and not name.path.startswith("/memfd:")):
            return "other"
        return "library"


class Change(NamedTuple):
    """One file came to or left one process. ``ranges`` are those at that moment."""

    is_load: bool
    cause: str
    t_ns: int
    process: Process
    kind: str
    name: Name
    ranges: tuple[Range, ...]
