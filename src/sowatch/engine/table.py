"""The map: which process has which wanted file mapped. Records and readings in, changes out.

Pure: no I/O, no threads, no clock; one thread uses it.

A *fact* (a record of a process that nobody could interfere with) changes the map as it stands. A
*claim* (``FLAG_NEEDS_RESCAN``) is applied at once and puts the process into `MappingTable.needs_rescan`: its owner
reads the process's real mappings and hands the reading to `MappingTable.merge`, which corrects the map.
docs/decisions/0002-facts-and-claims.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from sowatch.bpf.records import (
    FLAG_ASK,
    FLAG_COMPAT,
    FLAG_DELETED,
    FLAG_IMAGE,
    FLAG_NEEDS_RESCAN,
    FLAG_SHARED_VM,
    FLAG_THROTTLED,
    MapRecord,
    ProcessRecord,
    RangeRecord,
    Record,
    RecordType,
)
from sowatch.engine.address_space import (
    AddressSpace,
    Change,
    MappedFile,
    Mapping,
    ProcessState,
    Removal,
    Scanned,
    ScannedFiles,
)
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import Cause, LoadCause, UnloadCause
from sowatch.model.rules import RuleSet
from sowatch.sources.core import ProcessScan

__all__ = ["LIVE", "Causes", "MappingTable"]

#: A call that a reading has seen is told after the visit, but no later than this.
RETURN_NS = 1_000_000
#: Names kept for processes that may come; a name is some 800 bytes.
MAX_NAMES = 10_000


class Causes(NamedTuple):
    """What a reading's findings are called: a mapping it found, and one it did not find."""

    load: LoadCause
    unload: UnloadCause


#: What was not seen as it happened, but is not the repair of a loss either.
LIVE = Causes("mmap", "munmap")


class MappingTable:
    """The map and its rules of change.

    Args:
        rules: which paths are wanted.
        label: container id from a cgroup path.

    Attributes:
        changes: what happened since `take_changes`, in order.
        dirty: tgids whose mappings must be read, in order, with what the findings are called.
        answers: keys the kernel asked about, and whether they are wanted.
        idle: (tgid, start_ns, activity) of processes the kernel follows although nothing of theirs
            is wanted, as far as that activity generation goes.
        narrow: tgid and start_ns of 32-bit processes, whose calls nobody reports: their owner reads
            them again and again.
        throttled: tgids whose changes were dropped in the kernel, being too many; their owner
            empties it.
        has_untracked_sharers: a process was told of whose address space another one holds, nobody knows
            who: the owner reads all, and clears it.
    """

    def __init__(self, rules: RuleSet, label: Callable[[str | None], str | None] = lambda _: None) -> None:
        self._rules = rules
        #: Many processes have one cgroup.
        self._label = lru_cache(4096)(label)
        self._processes: dict[int, ProcessState] = {}
        self._names: dict[Hashable, MappedFile] = {}
        self._causes: tuple[Causes, dict[int, Causes]] = (Causes("repair", "repair"), {})
        self.changes: list[Change] = []
        self.needs_rescan: dict[int, Causes] = {}
        self.answers: list[tuple[Hashable, bool]] = []
        self.idle: list[tuple[int, int, int]] = []
        self.compat: dict[int, int] = {}
        self.throttled: set[int] = set()
        self.has_untracked_sharers = False
        #: In `merge`: who was read, by address space; and where each reading belongs among the records.
        self._by_mm: dict[int, ProcessState] = {}
        self._places: dict[int, Record | None] = {}
        #: Forks of a parent that were copied before a reading could confirm them, and never were.
        self.unverified = 0

    # ---- what is known ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._processes)

    def processes(self) -> Iterator[ProcessState]:
        return iter(list(self._processes.values()))

    def get(self, pid: int) -> ProcessState | None:
        return self._processes.get(pid)

    def mappings(self) -> Iterator[tuple[ProcessState, Mapping]]:
        """Every (process, mapping) that was announced."""
        for process in self.processes():
            if process.is_announced:
                for mapping in process.space.mappings().values():
                    yield process, mapping

    def take_changes(self) -> list[Change]:
        taken, self.changes = self.changes, []
        return taken

    def take_answers(self) -> tuple[list[Hashable], list[Hashable]]:
        """Keys to answer with yes, and with no."""
        taken, self.answers = self.answers, []
        # Renamed meanwhile, a file may have been asked about under a wanted name and under one that is not.
        wanted = [key for key, is_wanted in taken if is_wanted]
        return wanted, [key for key, is_wanted in taken if not is_wanted and key not in wanted]

    # ---- records ------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Takes over one record, as a fact or as a claim."""
        kind = record.type
        if record.flags & FLAG_COMPAT:
            self.compat[record.tgid] = record.start_ns
        if kind == RecordType.MAP:
            assert isinstance(record, MapRecord)
            self._map(record)
        elif kind == RecordType.RANGE:
            assert isinstance(record, RangeRecord)
            self._range(record)
        elif kind == RecordType.EXIT:
            self.compat.pop(record.tgid, None)
            self._forget(record.tgid, record.start_ns, "exit", record.t_ns)
        elif kind == RecordType.EXEC:
            self.compat.pop(record.tgid, None)
            if isinstance(record, ProcessRecord) and (known := self._processes.get(record.tgid)) is not None:
                known.learn_where(record)
            self._forget(record.tgid, record.start_ns, "exec", record.t_ns)
        elif kind == RecordType.FORK:
            assert isinstance(record, ProcessRecord)
            self._fork(record)
        elif kind == RecordType.INTRO:
            assert isinstance(record, ProcessRecord)
            self._process(record).learn(record)
        elif kind == RecordType.NEEDS_RESCAN:
            self._mark_needs_rescan(record)
            if record.flags & FLAG_THROTTLED:
                self.throttled.add(record.tgid)

    def _mark_needs_rescan(self, tentative: Record) -> None:
        """The process has to be read."""
        self.needs_rescan.setdefault(tentative.tgid, LIVE)
        known = self._processes.get(tentative.tgid)
        if known is not None and known.id.start_ns == tentative.start_ns:
            known.space.needs_rescan = True
        if tentative.flags & FLAG_SHARED_VM:
            self.has_untracked_sharers = True

    def _process(self, record: Record) -> ProcessState:
        """The process of a record, made if it is new. A pid with another start is another process."""
        known = self._processes.get(record.tgid)
        if known is not None:
            if known.id.start_ns == record.start_ns:
                return known
            self._forget(record.tgid, known.id.start_ns, "repair", record.t_ns)
        new = ProcessState(ProcessId(record.tgid, record.start_ns), record.t_ns, self._label)
        new.exec_id = record.exec_id
        self._processes[record.tgid] = new
        return new

    def _see(self, record: MapRecord) -> MappedFile:
        """The name of a mapped file, with the answer the kernel may be waiting for."""
        name = self._names.get(record.key)
        if (
            name is None
            or name.text != record.text
            or name.changed_ns != record.changed_ns
            or name.is_deleted != bool(record.flags & FLAG_DELETED)
        ):
            if len(self._names) >= MAX_NAMES:
                self._names.clear()  # a cache; the kernel sends each path again
            name = MappedFile(record, self._rules)
            if name.is_wanted:
                self._names[record.key] = name
            else:
                self._names.pop(record.key, None)
        if record.flags & FLAG_ASK or not name.is_wanted:
            self.answers.append((record.key, name.is_wanted))
        return name

    def _map(self, record: MapRecord) -> None:
        name = self._see(record)
        if record.flags & (FLAG_NEEDS_RESCAN | FLAG_SHARED_VM):
            self._mark_needs_rescan(record)
        if not name.is_wanted:
            known = self._processes.get(record.tgid)
            if known is not None and known.id.start_ns == record.start_ns and record.tgid not in self.needs_rescan:
                self._take_away(known, record)
            self._note_if_idle(record.tgid, record.start_ns, record.activity)
            return
        process = self._process(record)
        process.rename(record.comm)
        cause: LoadCause = "exec" if record.flags & FLAG_IMAGE else "mmap"
        if record.tgid not in self.needs_rescan:
            self._take_away(process, record, but=name.file_id)
        is_image = bool(record.flags & FLAG_IMAGE)
        new, gone = process.space.add(name, record.start, record.end, is_image=is_image)
        if new is not None:
            self._emit(process.space, True, cause, record.t_ns, new)
        for mapping in gone:
            self._emit(process.space, False, "munmap", record.t_ns, mapping)

    def _range(self, record: RangeRecord) -> None:
        if record.flags & (FLAG_NEEDS_RESCAN | FLAG_SHARED_VM):
            self._mark_needs_rescan(record)
        known = self._processes.get(record.tgid)
        if known is not None and known.id.start_ns == record.start_ns:
            self._take_away(known, record)

    def _take_away(self, process: ProcessState, record: MapRecord | RangeRecord, *, but: FileId | None = None) -> None:
        space = process.space
        removal: Removal = space.take_away(record.start, record.end, but=but)
        for mapping in removal.gone:
            self._emit(space, False, "munmap", record.t_ns, mapping)
        if removal.is_unsure:
            self.needs_rescan.setdefault(record.tgid, LIVE)
            space.needs_rescan = True

    def _fork(self, record: ProcessRecord) -> None:
        if not record.activity:
            return  # the kernel does not follow it: nothing of its parent's was wanted
        parent = self._processes.get(record.parent_tgid)
        child = self._process(record)
        child.learn(record)
        is_known = parent is not None and parent.id.start_ns == record.parent_start_ns
        if record.flags & FLAG_NEEDS_RESCAN or (is_known and record.parent_tgid in self.needs_rescan):
            self.needs_rescan.setdefault(record.tgid, Causes("fork", "munmap"))
        if parent is None or not is_known or child.was_read:
            # A child is visible to a reading a moment before its fork is told: it was copied already.
            if record.flags & FLAG_SHARED_VM:
                self.has_untracked_sharers = True
            self._note_if_idle(record.tgid, record.start_ns, record.activity)
            return
        if not record.path:
            child.exe = parent.exe
        if record.flags & FLAG_SHARED_VM:
            child.space = parent.space
            child.space.sharers.append(child)
            child.is_announced = False
            return
        child.space.release()
        child.space = parent.space.copy()
        child.space.sharers.append(child)
        for mapping in child.space.mappings().values():
            self._emit(child.space, True, "fork", record.t_ns, mapping)
        self._note_if_idle(record.tgid, record.start_ns, record.activity)

    def _note_if_idle(self, pid: int, start_ns: int, activity: int) -> None:
        known = self._processes.get(pid)
        if activity and (known is None or not known.space.files) and pid not in self.needs_rescan:
            self.idle.append((pid, start_ns, activity))

    def take_idle(self) -> list[tuple[int, int, int]]:
        """Processes to settle, each once."""
        taken, self.idle = self.idle, []
        return [one for one in dict.fromkeys(taken) if self._is_idle(one[0])]

    def _is_idle(self, pid: int) -> bool:
        if pid in self.compat or pid in self.needs_rescan:
            return False
        known = self._processes.get(pid)
        return known is None or not known.space.files

    def untracked(self, pid: int, start_ns: int) -> None:
        """The kernel does not follow it any more: no exit will be told."""
        self._forget(pid, start_ns, "exit", 0)

    def announce(self, process: ProcessState, t_ns: int) -> None:
        """A CLONE_VM child is still there without exec: from now on it has what its parent has."""
        if not process.is_announced:
            process.is_announced = True
            for mapping in process.space.mappings().values():
                self.changes.append(self._change(process, True, "fork", t_ns, mapping))

    def unannounced(self, before_ns: int) -> list[ProcessState]:
        """CLONE_VM children that have been silent since before that time."""
        return [one for one in self._processes.values() if not one.is_announced and one.seen_ns < before_ns]

    def forget(self, process: ProcessState, cause: Cause, t_ns: int) -> None:
        """The process is gone, as somebody outside found out."""
        self._forget(process.id.pid, process.id.start_ns, cause, t_ns)

    def start_of(self, pid: int) -> int | None:
        """The start time of the process that is known by this pid, 32-bit ones of which nothing is wanted included."""
        known = self._processes.get(pid)
        return self.compat.get(pid) if known is None else known.id.start_ns

    def forget_pid(self, pid: int, cause: Cause, t_ns: int) -> None:
        """Whoever is known by this pid is gone."""
        self.compat.pop(pid, None)
        if known := self._processes.get(pid):
            self.forget(known, cause, t_ns)

    def _forget(self, pid: int, start_ns: int, cause: Cause, t_ns: int) -> None:
        known = self._processes.get(pid)
        if known is None or known.id.start_ns != start_ns:
            return
        if pid in self.needs_rescan and self.needs_rescan[pid].load == "fork":
            self.unverified += 1
        self.needs_rescan.pop(pid, None)
        del self._processes[pid]
        space = known.space
        space.sharers.remove(known)
        if not any(sharer.is_announced for sharer in space.sharers):
            for sharer in space.sharers:
                self.announce(sharer, t_ns)  # it outlives the one whose space it shares
        if space.needs_rescan and space.sharers:
            self.needs_rescan.setdefault(space.sharers[0].id.pid, LIVE)
        if known.is_announced:
            for mapping in space.mappings().values():
                self.changes.append(self._change(known, False, cause, t_ns, mapping))
        if not space.sharers:
            space.release()

    def _emit(self, space: AddressSpace, is_load: bool, cause: Cause, t_ns: int, mapping: Mapping) -> None:
        for sharer in space.sharers:
            if sharer.is_announced:
                self.changes.append(self._change(sharer, is_load, cause, t_ns, mapping))

    def _change(self, process: ProcessState, is_load: bool, cause: Cause, t_ns: int, mapping: Mapping) -> Change:
        return Change(is_load, cause, t_ns, process.record(), process.kind_of(mapping), *mapping.where)

    # ---- readings -----------------------------------------------------------------------------

    def merge(
        self,
        scans: Iterable[ProcessScan],
        records: Sequence[Record],
        causes: Causes,
        *,
        own_causes: dict[int, Causes] | None = None,
        is_start: bool = False,
    ) -> set[int]:
        """Takes over readings and the records that came while they were made, in the right order.

        A record older than its process's visit was seen by the reading already; a later one comes
        on top of it. One that falls into the visit may or may not have been seen, and a call is told
        some time after its work is done: the reading is taken over where it fits in between them, so
        that it tells nothing anew, and the process is read once more.

        Args:
            scans: at most one a process.
            records: a list, in ring order, drained after the last reading ended.
            causes: what the findings are called.
            own_causes: and for some tgids otherwise.
            is_start: nothing was known before, so older records tell nothing new.

        Returns:
            tgids to read again.
        """
        scans = list(scans)
        waiting = {scan.tgid: scan for scan in scans if not scan.is_void}
        void = {scan.tgid for scan in scans if scan.is_void}
        self._causes = (causes, own_causes or {})
        self._by_mm.clear()
        self._places.clear()
        scanned = set(waiting)
        ends = {(scan.tgid, scan.start_ns): scan.end_ns for scan in waiting.values()}
        again: set[int] = set()
        later = None if is_start else _since_scan(waiting, records)
        for record in records:
            scan = waiting.get(record.tgid)
            if scan is not None and scan.start_ns == record.start_ns:
                is_inside = scan.begin_ns <= record.t_ns <= scan.end_ns
                if is_inside:
                    again.add(record.tgid)
                if is_inside and record.type in (RecordType.EXIT, RecordType.EXEC):
                    del waiting[record.tgid]  # what it saw is of the past
                elif is_start and record.t_ns <= scan.end_ns:
                    self._learn_only(record)
                    continue
                elif record.t_ns >= scan.begin_ns and self._is_next(scan, record, later):
                    self._take_scan(waiting.pop(record.tgid))
                elif scan.intro is not None and record.type == RecordType.MAP and self._is_new(record):
                    self._process(scan.intro).learn(scan.intro)  # the kernel introduces nobody twice
            elif record.t_ns <= ends.get((record.tgid, record.start_ns), 0):
                again.add(record.tgid)  # overtaken on its way to the ring: told after what came later
            if record.type == RecordType.FORK and isinstance(record, ProcessRecord):
                self._merge_fork(record, waiting, scanned, again)
            self.apply(record)
        for scan in waiting.values():
            self._take_scan(scan)
        self._note_open(scans, void | again)
        last_word = {record.tgid: record.type for record in records}
        return {pid for pid in void | again if last_word.get(pid) != RecordType.EXIT}

    def _is_new(self, record: Record) -> bool:
        known = self._processes.get(record.tgid)
        return known is None or known.id.start_ns != record.start_ns

    def _is_next(self, scan: ProcessScan, record: Record, later: dict[int, list[Record]] | None) -> bool:
        """Whether the reading is to be taken over before this record; ``later`` is None at the start."""
        if later is None:
            return record.t_ns > scan.end_ns
        if record is later[record.tgid][0]:
            self._places[record.tgid] = self._place(scan, later[record.tgid])
        return record is self._places[record.tgid]

    def _place(self, scan: ProcessScan, records: Sequence[Record]) -> Record | None:
        """Which of the records since its visit began a reading is to be taken over before; None: after all.

        Where the map, as the records change it, equals what was read. If it does nowhere: before the
        first that came after the visit.
        """
        known = self._processes.get(scan.tgid)
        is_known = known is not None and known.id.start_ns == scan.start_ns
        space = known.space if known is not None and is_known else AddressSpace()
        ranges = space.snapshot(self._found(scan, self._name_of), with_images=self._rules.wants_images)
        first_after = None
        for record in records:
            if ranges.is_same:
                return record
            if record.t_ns > scan.end_ns:
                first_after = first_after or record
                # What is in doubt has to come after a reading, to be read again.
                if record.t_ns > scan.end_ns + RETURN_NS or record.flags & FLAG_NEEDS_RESCAN:
                    return first_after
            if isinstance(record, MapRecord):
                name = self._name_of(record)
                ranges.put(name.file_id if name.is_wanted else None, record.start, record.end)
            elif record.type == RecordType.RANGE and isinstance(record, RangeRecord):
                ranges.put(None, record.start, record.end)
            elif record.t_ns > scan.end_ns:
                return first_after
        return None if ranges.is_same else first_after

    @staticmethod
    def _found(scan: ProcessScan, name_of: Callable[[MapRecord], MappedFile]) -> ScannedFiles:
        """What a reading has of each file that is wanted."""
        found: ScannedFiles = {}
        for row in scan.maps:
            name = name_of(row)
            if name.is_wanted:
                one = found.get(name.file_id)
                if one is None:
                    one = found[name.file_id] = Scanned(name, row)
                one.add(row)
        return found

    def _name_of(self, record: MapRecord) -> MappedFile:
        name = self._names.get(record.key)
        return name if name is not None and name.text == record.text else MappedFile(record, self._rules)

    def _note_open(self, scans: Iterable[ProcessScan], again: Iterable[int]) -> None:
        """What the readings have left open."""
        for scan in scans:
            known = self._processes.get(scan.tgid)
            if scan.has_untracked_sharers and known is not None and len(known.space.sharers) == 1:
                self.has_untracked_sharers = True
        for pid in again:
            if pid in self._processes:
                self._processes[pid].space.needs_rescan = True

    def _merge_fork(
        self, record: ProcessRecord, waiting: dict[int, ProcessScan], scanned: set[int], again: set[int]
    ) -> None:
        parent = waiting.get(record.parent_tgid)
        if parent is None or parent.start_ns != record.parent_start_ns:
            return
        if record.t_ns > parent.end_ns:
            self._take_scan(waiting.pop(record.parent_tgid))
        elif record.tgid not in scanned:
            # Forked before its parent was read, and behind the reader's back: look at it on its own.
            self._process(record).learn(record)
            again.add(record.tgid)

    def _learn_only(self, record: Record) -> None:
        if isinstance(record, ProcessRecord) and record.type in (RecordType.INTRO, RecordType.FORK):
            self._process(record).learn(record)
        elif isinstance(record, MapRecord):
            self._see(record)

    def _take_scan(self, scan: ProcessScan) -> None:
        causes = self._causes[1].get(scan.tgid, self._causes[0])
        if scan.is_compat:
            self.compat[scan.tgid] = scan.start_ns
        known = self._processes.get(scan.tgid)
        if known is not None and known.id.start_ns != scan.start_ns:
            self._forget(scan.tgid, known.id.start_ns, "repair", scan.begin_ns)
            known = None
        found = self._found(scan, self._see)
        if known is None and not found and not (scan.has_untracked_sharers and scan.intro):
            if scan.intro is not None:
                # The kernel will not introduce it again unless it is settled, which may fail.
                self._process(scan.intro).learn(scan.intro)
            self._note_if_idle(scan.tgid, scan.start_ns, scan.activity)
            return
        if known is None:
            known = self._process(scan.intro or scan.maps.first())
        self._notice_exec(known, scan)  # before it learns from this reading how often it has executed
        if scan.intro is not None:
            known.learn(scan.intro)
        elif scan.maps:
            known.rename(scan.maps.first().comm)
        known.was_read = True
        self._join(known, scan, causes)
        self.announce(known, scan.begin_ns)
        self._replace(known.space, found, causes, scan.end_ns)
        if scan.activity and not found:
            self._note_if_idle(scan.tgid, scan.start_ns, scan.activity)

    def _join(self, process: ProcessState, scan: ProcessScan, causes: Causes) -> None:
        """Processes with one address space may have been told of each on its own: from now on together."""
        other = self._by_mm.setdefault(scan.space, process) if scan.space else process
        if self._processes.get(other.id.pid) is not other:
            self._by_mm[scan.space] = process  # it has gone since, and its space with it
            return
        old, space = process.space, other.space
        if space is old:
            return
        for sharer in old.sharers:
            if sharer.is_announced:
                for is_load, ours, theirs in ((False, old, space), (True, space, old)):
                    for file_id, mapping in ours.mappings().items():
                        if file_id not in theirs.files:
                            cause: Cause = causes.load if is_load else causes.unload
                            self.changes.append(self._change(sharer, is_load, cause, scan.begin_ns, mapping))
            sharer.space = space
        space.sharers += old.sharers
        old.release()

    def _notice_exec(self, process: ProcessState, scan: ProcessScan) -> None:
        """If its exec was lost, it shares nobody's space any more."""
        if scan.exec_id is not None and scan.exec_id != process.exec_id:
            process.exec_id = scan.exec_id
            if len(process.space.sharers) > 1:
                self._leave(process)

    def _leave(self, process: ProcessState) -> None:
        """It shares nobody's space any more; what it was told to have there it has not."""
        space = process.space
        if process.is_announced:
            for mapping in space.mappings().values():
                self.changes.append(self._change(process, False, "repair", process.seen_ns, mapping))
        space.sharers.remove(process)
        process.space = AddressSpace()
        process.space.sharers.append(process)
        process.is_announced = True

    def _replace(self, space: AddressSpace, found: ScannedFiles, causes: Causes, t_ns: int) -> None:
        """Makes the space hold what was found, and tells the difference."""
        space.needs_rescan = False
        gone, came = space.replace(found)
        for mapping in gone:
            self._emit(space, False, causes.unload, t_ns, mapping)
        mappings = space.mappings() if came else {}
        for one in came:
            self._emit(space, True, causes.load, one.row.t_ns, mappings[one.name.file_id])

    # ---- rules --------------------------------------------------------------------------------

    def set_rules(self, rules: RuleSet) -> None:
        """Forgets every answer; the owner raises the epoch and makes a reading of all."""
        self._rules = rules
        self._names.clear()


def _since_scan(waiting: dict[int, ProcessScan], records: Iterable[Record]) -> dict[int, list[Record]]:
    """By tgid, the records from the beginning of its reading's visit on."""
    found: dict[int, list[Record]] = {}
    for record in records:
        scan = waiting.get(record.tgid)
        if scan is not None and scan.start_ns == record.start_ns and record.t_ns >= scan.begin_ns:
            found.setdefault(record.tgid, []).append(record)
    return found
