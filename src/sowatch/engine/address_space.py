"""Address spaces: the files in one, where they are mapped, and the processes that share it.

Pure values and sums, no policy: `table` decides what changes when.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, KeysView, Sequence
from typing import Final, NamedTuple

from sowatch.bpf.records import (
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_MANY,
    FLAG_PARTIAL,
    MAX_FILE_RANGES,
    MapRecord,
    ProcessRecord,
    path_of,
    paths_of,
)
from sowatch.engine.range_map import Range, RangeMap, RangeSnapshot
from sowatch.linux.cgroups import choose_cgroup
from sowatch.linux.pods import pod_in
from sowatch.model.events import Pod, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import Cause, Kind
from sowatch.model.rules import RuleSet

__all__ = [
    "AddressSpace",
    "Change",
    "MappedFile",
    "Mapping",
    "ProcessState",
    "Range",
    "Removal",
    "Scanned",
    "ScannedFiles",
]


class MappedFile:
    """A file under one name in one view of the file system: what the kernel's verdicts are about."""

    __slots__ = (
        "_entries",
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
        self.key = record.key
        self.text = record.text
        self.file_id = record.file_id
        #: Of a scan of maps below 0: no change time, but another number for each version that was met.
        self.changed_ns = record.changed_ns
        #: That of a detached mount of a single file is its root.
        self.path = path_of(record.text) or "/"
        self.is_deleted = bool(record.flags & FLAG_DELETED)
        self.is_partial = bool(record.flags & FLAG_PARTIAL)
        self.is_regular = stat.S_ISREG(record.mode)
        #: The process's view of the file system: two equal ones see the same paths.
        self.view = record.view
        self.is_wanted = rules.could_match(self.path)
        self._entries: tuple[Mapping, Mapping] | None = None

    def entry(self, *, is_image: bool) -> Mapping:
        """It without ranges, one value for every address space that has it."""
        entries = self._entries
        if entries is None:
            entries = self._entries = (Mapping(self, False), Mapping(self, True))
        return entries[is_image]

    @property
    def is_anonymous(self) -> bool:
        """A memfd, SysV segment or shared anonymous memory: its one component may hold slashes."""
        is_single_user = self.text.count(b"\0") == 1
        has_such_a_name = self.text.startswith((b"memfd:", b"SYSV", b"dev/zero"))
        return self.is_deleted and ((is_single_user and has_such_a_name) or self.path == "/dev/zero")


class Mapping(NamedTuple):
    """One file in one address space, with its executable ranges in order.

    ``range_count`` is None where these are all ranges. A file that has more than `MAX_FILE_RANGES` has two: the
    first one, and what spans the others; then ``range_count`` is how many there are, at the least.
    """

    name: MappedFile
    is_image: bool
    ranges: tuple[Range, ...] = ()
    range_count: int | None = None

    @property
    def where(self) -> tuple[MappedFile, tuple[Range, ...], int | None]:
        """Name, ranges and their number, as a `Change` has them."""
        return self.name, self.ranges, self.range_count


class Scanned:
    """One file as a scan found it: its ranges, of which ``unlisted`` more have no row, and when the first was seen."""

    __slots__ = ("has_more", "is_image", "name", "ranges", "t_ns", "unlisted")

    def __init__(self, name: MappedFile, flags: int, t_ns: int) -> None:
        self.name = name
        self.is_image = bool(flags & FLAG_IMAGE)
        self.t_ns = t_ns
        self.ranges: list[Range] = []
        self.has_more = False
        self.unlisted = 0

    def add(self, flags: int, start: int, end: int, unlisted: int) -> None:
        """Takes one more row of it."""
        self.ranges.append((start, end))
        if flags & FLAG_MANY:
            self.has_more = True
            self.unlisted += unlisted

    @property
    def is_wide(self) -> bool:
        """Whether it has more ranges than are kept."""
        return self.has_more or len(self.ranges) > MAX_FILE_RANGES


#: What a scan found of each wanted file.
ScannedFiles = dict[FileId, Scanned]


class _Wide(NamedTuple):
    """The ranges of a file that has too many: the first, what spans the others, and how many at the least."""

    first: Range
    rest: Range
    number: int

    @classmethod
    def of(cls, ranges: Iterable[Range], unlisted: int = 0) -> _Wide:
        first, *others = sorted(ranges)
        rest = (others[0][0] if others else first[1], max((end for _, end in others), default=first[1]))
        return cls(first, rest, 1 + len(others) + unlisted)

    def with_range(self, start: int, end: int) -> _Wide:
        first, rest = self.first, self.rest
        if start < first[0]:
            return _Wide((start, min(end, first[0])), (first[0], max(end, rest[1])), self.number + 1)
        return _Wide(first, (max(first[1], min(start, rest[0])), max(end, rest[1])), self.number + 1)


class _Layout:
    """What is where in an address space. Shared by those that fork has made alike, until one of them changes."""

    __slots__ = ("entries", "mappings", "ranges", "sharers", "wide")

    def __init__(self) -> None:
        #: Each file, without its ranges.
        self.entries: dict[FileId, Mapping] = {}
        self.ranges: RangeMap[FileId] = RangeMap()
        self.wide: dict[FileId, _Wide] = {}
        #: The same with their ranges, once asked for while several have it.
        self.mappings: dict[FileId, Mapping] | None = None
        self.sharers = 1

    def copy(self) -> _Layout:
        new = _Layout()
        new.entries, new.ranges, new.wide = self.entries.copy(), self.ranges.copy(), self.wide.copy()
        return new

    def widen(self, files: Iterable[FileId]) -> None:
        """Keeps less of those that have more ranges than are kept."""
        counts = {file_id: self.ranges.count(file_id) for file_id in files}
        # A mapping within a range divides it, though it is still one; so not each time, as this reads all ranges.
        if not any(count > MAX_FILE_RANGES and count % 64 < 3 for count in counts.values()):
            return
        ranges = self.ranges.of_each()
        many = {file_id for file_id in counts if len(ranges[file_id]) > MAX_FILE_RANGES}
        self.wide.update((file_id, _Wide.of(ranges[file_id])) for file_id in many)
        self.ranges = self.ranges.without(many)


class Removal(NamedTuple):
    """The files that lost their last range; ``is_unsure``: whether others did, only a scan can show."""

    gone: Sequence[Mapping]
    is_unsure: bool


_NOTHING: Final = Removal((), False)


class AddressSpace:
    """An address space: the files in it, and the processes that share it (several after CLONE_VM)."""

    __slots__ = ("_layout", "needs_rescan", "sharers")

    def __init__(self) -> None:
        self._layout = _Layout()
        self.sharers: list[ProcessState] = []
        #: A tentative record of a sharer was applied since the last scan. If that process ends before it
        #: is scanned, another sharer has to be.
        self.needs_rescan = False

    def copy(self) -> AddressSpace:
        """What fork makes of it: the same until either changes."""
        new = AddressSpace()
        new._layout = self._layout
        self._layout.sharers += 1
        return new

    def release(self) -> None:
        """No process has it any more: its layout is left to the copies that share it."""
        self._layout.sharers -= 1

    @property
    def files(self) -> KeysView[FileId]:
        """Which files are in it."""
        return self._layout.entries.keys()

    def file_of(self, record: MapRecord) -> MappedFile | None:
        """The file of a record, if it is in it under that name."""
        entry = self._layout.entries.get(record.file_id)
        return entry.name if entry is not None and entry.name.key == record.key else None

    def mappings(self) -> dict[FileId, Mapping]:
        """Its files with their ranges. Not to be changed: others may have it, too."""
        layout = self._layout
        if layout.mappings is not None:
            return layout.mappings
        ranges = layout.ranges.of_each()
        mappings = {
            file_id: Mapping(entry.name, entry.is_image, (wide.first, wide.rest), wide.number)
            if (wide := layout.wide.get(file_id))
            else Mapping(entry.name, entry.is_image, tuple(ranges.get(file_id, ())))
            for file_id, entry in layout.entries.items()
        }
        if layout.sharers > 1:  # the next fork needs it, too; of every other space it would be 200 bytes a file
            layout.mappings = mappings
        return mappings

    def add(self, name: MappedFile, start: int, end: int, *, is_image: bool) -> tuple[Mapping | None, list[Mapping]]:
        """Gives a file one more range, beside what is there; the file if it is new here, and files that are gone."""
        file_id = name.file_id
        layout = self._writable()
        new = None
        if file_id not in layout.entries:
            layout.entries[file_id] = name.entry(is_image=is_image)
            new = Mapping(name, is_image, ((start, end),))
        wide = layout.wide.get(file_id)
        if wide is not None:
            layout.wide[file_id] = wide.with_range(start, end)
            return None, []
        nowhere = layout.ranges.add(file_id, start, end)
        if layout.ranges.count(file_id) > MAX_FILE_RANGES:
            layout.widen({file_id})
        return new, [layout.entries.pop(one) for one in nowhere]

    def take_away(self, start: int, end: int, *, but: FileId | None = None) -> Removal:
        """Nothing is there any more, but for one file where it was."""
        layout = self._layout
        if not layout.entries:
            return _NOTHING
        # Where the last ranges of a file with many end is not known.
        is_unsure = bool(layout.wide) and any(
            end > wide.first[0] and file_id != but for file_id, wide in layout.wide.items()
        )
        if not layout.ranges.has_any(start, end):
            return Removal([], is_unsure)
        layout = self._writable()
        gone = [layout.entries.pop(one) for one in layout.ranges.take_away(start, end, but=but)]
        if layout.ranges:
            # What goes from the middle of a range leaves two.
            layout.widen({file_id for _, _, keys in layout.ranges.within(start - 1, end + 1) for file_id in keys})
        return Removal(gone, is_unsure)

    def replace(self, found: ScannedFiles) -> tuple[list[Mapping], list[Scanned]]:
        """Makes it hold what a scan found; the files that are gone, and those that came."""
        old = self._layout
        new = _Layout()
        rows = []
        came = []
        for file_id, one in found.items():
            entry = old.entries.get(file_id)
            if entry is None:
                entry = one.name.entry(is_image=one.is_image)
                came.append(one)
            new.entries[file_id] = entry
            if one.is_wide:
                new.wide[file_id] = _Wide.of(one.ranges, one.unlisted)
            else:
                rows += [(start, end, file_id) for start, end in one.ranges]
        new.ranges = RangeMap.of_rows(rows)
        if new.entries == old.entries and new.wide == old.wide and new.ranges.is_same(old.ranges):
            return [], []  # it goes on sharing with those that fork has made alike
        old.sharers -= 1
        self._layout = new
        return [entry for file_id, entry in old.entries.items() if file_id not in found], came

    def snapshot(self, found: ScannedFiles, *, with_images: bool) -> RangeSnapshot[FileId]:
        """Its ranges beside those of a scan; of files that have too many it is not known where they are.

        Without ``with_images`` what exec has mapped is left out: scans show it, and no record reports it.
        """
        wide = {*self._layout.wide, *(file_id for file_id, one in found.items() if one.is_wide)}
        if not with_images:
            wide.update(file_id for file_id, one in found.items() if one.is_image)
            wide.update(file_id for file_id, one in self._layout.entries.items() if one.is_image)
        rows = ((start, end, file_id) for file_id, one in found.items() for start, end in one.ranges)
        return RangeSnapshot(self._layout.ranges, rows, wide)

    def _writable(self) -> _Layout:
        layout = self._layout
        if layout.sharers > 1:
            layout.sharers -= 1
            layout = self._layout = layout.copy()
        layout.mappings = None
        return layout


class ProcessState:
    """A tracked process, and what is known of it."""

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
        "knows_sharers",
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
        #: How often it has executed a program, as the kernel counts: shows a lost exec.
        self.exec_id = 0
        #: Its address space was made by a fork that was reported, so each process that shares it was reported, too.
        self.knows_sharers = False
        #: A scan has shown its mappings.
        self.was_read = False
        self.space = AddressSpace()
        self.space.sharers.append(self)
        self._record: Process | None = None

    def learn(self, record: ProcessRecord) -> None:
        """Takes over what a process record has."""
        self._record = None
        self.exec_id = record.exec_id
        self.comm = record.comm
        self.ppid = record.ppid
        self.uid = record.uid
        self.ns_pid = record.ns_pid
        self.cgroup = choose_cgroup(paths_of(record.cgroup))
        if record.path:
            self.exe = path_of(record.path)
        if record.exe is not None:  # a process that ends has none any more
            self.exe_id = record.exe
            self.interpreter_base = record.interpreter_base

    def learn_where(self, record: ProcessRecord) -> None:
        """Takes over whose it is by now, and where, but not which program it runs: an exec ends the old one."""
        if record.start_ns == self.id.start_ns:
            self._record = None
            self.ppid, self.uid = record.ppid, record.uid
            self.cgroup = choose_cgroup(paths_of(record.cgroup))

    def rename(self, comm: bytes) -> None:
        """Takes over a newer name of the process."""
        if comm != self.comm:
            self.comm = comm
            self._record = None

    def record(self) -> Process:
        """The frozen record that events carry."""
        if self._record is None:
            comm, place = self.comm, pod_in(self.cgroup)
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
                pod=None if place is None else Pod(place.uid),
            )
        return self._record

    def kind_of(self, mapping: Mapping) -> Kind:
        """What the file is to this process."""
        return kind_of(mapping, self.exe_id)


def kind_of(mapping: Mapping, exe_id: FileId | None) -> Kind:
    """What a file is to a process whose executable is ``exe_id``, as far as its mapping shows.

    ELF facts may say ``other`` later.
    """
    name = mapping.name
    if name.file_id == exe_id:
        return "executable"
    if mapping.is_image:
        return "interpreter"
    if not name.is_regular or (name.is_anonymous and not name.path.startswith("/memfd:")):
        return "other"
    return "library"


class Change(NamedTuple):
    """One file came to or left one process. ``ranges`` of a load are those at that moment, as `Mapping` has them."""

    is_load: bool
    cause: Cause
    t_ns: int
    process: Process
    kind: Kind
    name: MappedFile
    ranges: tuple[Range, ...]
    range_count: int | None = None
