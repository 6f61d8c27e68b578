"""The mapping table: which process has which wanted file mapped. Records and scans in, `Effects` out.

Pure: no I/O, no threads, no clock; equal inputs have equal effects. One thread uses it.

An *authoritative* record (of a process that nobody could interfere with) changes the table as it stands. A
*tentative* one (``FLAG_NEEDS_RESCAN``) is applied at once and puts the process into `MappingTable.needs_rescan`: the
owner scans the process and hands the scan to `sowatch.engine.merge.merge`, which corrects the table.
docs/decisions/0002-facts-and-claims.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from collections.abc import Mapping as ReadOnly
from functools import lru_cache
from types import MappingProxyType

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
from sowatch.engine.effects import LIVE, Causes, Effects
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import Cause
from sowatch.model.rules import RuleSet
from sowatch.sources.base import ProcessScan
from sowatch.sources.scan_rows import in_slices

__all__ = ["MappingTable"]

#: Names kept for processes that may come; a name is some 800 bytes.
MAX_NAMES = 10_000


class MappingTable:
    """The table and its rules of change. Whatever changes it returns the `Effects` of that.

    Args:
        rules: which paths are wanted.
        label: container id from a cgroup path.

    Attributes:
        needs_rescan: tgids whose mappings must be scanned, in order, with what the findings are called.
            Records of such a process are applied with reserve, so it belongs to the table; the owner adds
            by `await_rescan` and takes out by `begin_rescans`.
        compat: tgid and start_ns of 32-bit processes, whose calls nobody reports: the owner scans them
            again and again.
    """

    def __init__(self, rules: RuleSet, label: Callable[[str | None], str | None] = lambda _: None) -> None:
        self._rules = rules
        #: Many processes have one cgroup.
        self._label = lru_cache(4096)(label)
        self._processes: dict[int, ProcessState] = {}
        self._names: dict[Hashable, MappedFile] = {}
        self._needs_rescan: dict[int, Causes] = {}
        self._compat: dict[int, int] = {}
        self.needs_rescan: ReadOnly[int, Causes] = MappingProxyType(self._needs_rescan)
        self.compat: ReadOnly[int, int] = MappingProxyType(self._compat)

    # ---- what is known ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def rules(self) -> RuleSet:
        """Which paths are wanted."""
        return self._rules

    def processes(self, pid: int | None = None) -> Iterator[ProcessState]:
        """All processes; or the one with this pid, if it is known."""
        if pid is None:
            return iter(list(self._processes.values()))
        return iter([self._processes[pid]] if pid in self._processes else [])

    def get(self, pid: int) -> ProcessState | None:
        return self._processes.get(pid)

    def find(self, pid: int, start_ns: int) -> ProcessState | None:
        """The process with this pid, unless it is another one that started at another time."""
        known = self._processes.get(pid)
        return known if known is not None and known.id.start_ns == start_ns else None

    def start_of(self, pid: int) -> int | None:
        """The start time of the process that is known by this pid, 32-bit ones of which nothing is wanted included."""
        known = self._processes.get(pid)
        return self._compat.get(pid) if known is None else known.id.start_ns

    def mappings(self, pid: int | None = None) -> Iterator[tuple[ProcessState, Mapping]]:
        """Every (process, mapping) that was announced, or those of one process."""
        for process in self.processes(pid):
            if process.is_announced:
                for mapping in process.space.mappings().values():
                    yield process, mapping

    def loads(self, is_meant: Callable[[Mapping], bool], now_ns: int, pid: int | None = None) -> list[Change]:
        """What is mapped now, in all processes or in one, as loads of now, cause ``snapshot``."""
        return [
            self._change(process, True, "snapshot", now_ns, one) for process, one in self.mappings(pid) if is_meant(one)
        ]

    def unannounced(self, before_ns: int) -> list[ProcessState]:
        """CLONE_VM children that have been silent since before that time."""
        return [one for one in self._processes.values() if not one.is_announced and one.seen_ns < before_ns]

    def is_idle(self, pid: int) -> bool:
        """Whether nothing of the process is wanted, no scan may find something, and nobody shares its address space.

        One that is untracked is forgotten, and what the other then maps would be missed of it.
        """
        if pid in self._compat or pid in self._needs_rescan:
            return False
        known = self._processes.get(pid)
        return known is None or (not known.space.files and len(known.space.sharers) == 1)

    def file_of(self, record: MapRecord) -> MappedFile:
        """The mapped file of a record."""
        name = self._names.get(record.key) or self._mapped_file(record)
        return name if name is not None and name.text == record.text else MappedFile(record, self._rules)

    def _mapped_file(self, record: MapRecord) -> MappedFile | None:
        """What its process has mapped already: of one with very many files not all are kept by key."""
        known = self._processes.get(record.tgid)
        return None if known is None else known.space.file_of(record)

    def sharers_of(self, pid: int) -> list[int]:
        """The processes that share its address space, as far as is known."""
        known = self._processes.get(pid)
        return [] if known is None else [one.id.pid for one in known.space.sharers]

    # ---- inputs -------------------------------------------------------------------------------

    def apply(self, *records: Record) -> Effects:
        """Takes over records, in order, each as authoritative or tentative."""
        effects = Effects()
        step = self.step
        for record in records:
            step(record, effects)
        return self.finish(effects)

    def set_rules(self, rules: RuleSet) -> None:
        """Forgets every answer; the owner raises the epoch and makes a full scan."""
        self._rules = rules
        self._names.clear()

    def learn_only(self, scans: Iterable[ProcessScan]) -> Effects:
        """Takes over who each process is, and nothing else: the kernel introduces nobody twice.

        But not of one that is known otherwise by now, or that was found to have no file.
        """
        effects = Effects()
        for scan in scans:
            known, intro = self._processes.get(scan.tgid), scan.intro
            if intro is None or (known is None and not scan.maps):
                continue
            if known is None or (known.id.start_ns, known.exec_id) == (scan.start_ns, intro.exec_id):
                self.learn(intro, effects)
                self._note_if_idle(scan.tgid, scan.start_ns, scan.activity, effects)
        return self.finish(effects)

    def await_rescan(self, pid: int, causes: Causes = LIVE, *, replaces: bool = False) -> None:
        """The process has to be scanned, for whatever reason the owner has. Earlier causes stay, unless replaced."""
        if replaces or pid not in self._needs_rescan:
            self._needs_rescan[pid] = causes

    def begin_rescans(self, pids: Iterable[int]) -> None:
        """These processes are about to be scanned: their records are applied as they stand, from now on."""
        for pid in pids:
            self._needs_rescan.pop(pid, None)

    def untracked(self, pid: int, start_ns: int) -> Effects:
        """The source does not track it any more: no exit will be reported."""
        return self._forgotten(pid, start_ns, "exit", 0)

    def forget(self, process: ProcessState, cause: Cause, t_ns: int) -> Effects:
        """The process is gone, as somebody outside found out."""
        return self._forgotten(process.id.pid, process.id.start_ns, cause, t_ns)

    def forget_pid(self, pid: int, cause: Cause, t_ns: int) -> Effects:
        """The process that is known by this pid is gone."""
        self._compat.pop(pid, None)
        known = self._processes.get(pid)
        return Effects() if known is None else self._forgotten(pid, known.id.start_ns, cause, t_ns)

    def _forgotten(self, pid: int, start_ns: int, cause: Cause, t_ns: int) -> Effects:
        effects = Effects()
        self._forget(pid, start_ns, cause, t_ns, effects)
        return effects

    # ---- one record at a time: for `apply` and `merge` -------------------------------------------

    def step(self, record: Record, effects: Effects) -> None:
        """Takes over one record; `finish` has to follow."""
        kind = record.type
        if record.flags & FLAG_COMPAT:
            self._compat[record.tgid] = record.start_ns
        if kind == RecordType.MAP:
            assert isinstance(record, MapRecord)
            self._map(record, effects)
        elif kind == RecordType.RANGE:
            assert isinstance(record, RangeRecord)
            self._range(record, effects)
        elif kind == RecordType.EXIT:
            self._compat.pop(record.tgid, None)
            self._forget(record.tgid, record.start_ns, "exit", record.t_ns, effects)
        elif kind == RecordType.EXEC:
            self._compat.pop(record.tgid, None)
            if isinstance(record, ProcessRecord) and (known := self._processes.get(record.tgid)) is not None:
                known.learn_where(record)
            self._forget(record.tgid, record.start_ns, "exec", record.t_ns, effects)
            effects.executed[record.tgid] = record.start_ns
        elif kind == RecordType.FORK:
            assert isinstance(record, ProcessRecord)
            self._fork(record, effects)
        elif kind == RecordType.INTRO:
            assert isinstance(record, ProcessRecord)
            self.learn(record, effects)
        elif kind == RecordType.NEEDS_RESCAN:
            self._mark_needs_rescan(record, effects)
            if record.flags & FLAG_THROTTLED:
                effects.throttled.add(record.tgid)

    def finish(self, effects: Effects) -> Effects:
        """Ends a run of steps: only processes of which still nothing is wanted may be untracked, each once."""
        if effects.untrack:
            effects.untrack = [one for one in dict.fromkeys(effects.untrack) if self.is_idle(one[0])]
        return effects

    def learn(self, record: ProcessRecord, effects: Effects) -> None:
        """Takes over who a process is, and nothing else."""
        self._process(record, effects).learn(record)

    def see(self, record: MapRecord, effects: Effects) -> MappedFile:
        """The mapped file of a record, with the answer that its source may be waiting for."""
        name = self._names.get(record.key) or self._mapped_file(record)
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
            effects.verdicts.append((record.key, name.is_wanted, record.place))
        return name

    def mark(self, pid: int, causes: Causes, effects: Effects) -> None:
        """The process has to be scanned, as an input has shown."""
        if pid not in self._needs_rescan:
            self._needs_rescan[pid] = effects.rescans[pid] = causes

    def _mark_needs_rescan(self, tentative: Record, effects: Effects) -> None:
        self.mark(tentative.tgid, LIVE, effects)
        known = self.find(tentative.tgid, tentative.start_ns)
        if known is not None:
            known.space.needs_rescan = True
        # Of a process of which every sharer is known it is somebody who reads its mappings.
        if tentative.flags & FLAG_SHARED_VM and (known is None or not known.knows_sharers):
            effects.with_untracked_sharers[tentative.tgid] = tentative.start_ns

    def _process(self, record: Record, effects: Effects) -> ProcessState:
        """The process of a record, made if it is new. A pid with another start is another process."""
        known = self._processes.get(record.tgid)
        if known is not None:
            if known.id.start_ns == record.start_ns:
                return known
            self._forget(record.tgid, known.id.start_ns, "repair", record.t_ns, effects)
        new = ProcessState(ProcessId(record.tgid, record.start_ns), record.t_ns, self._label)
        new.exec_id = record.exec_id
        self._processes[record.tgid] = new
        return new

    def _map(self, record: MapRecord, effects: Effects) -> None:
        name = self.see(record, effects)
        if record.flags & (FLAG_NEEDS_RESCAN | FLAG_SHARED_VM):
            self._mark_needs_rescan(record, effects)
        if not name.is_wanted:
            known = self._processes.get(record.tgid)
            if known is not None and known.id.start_ns == record.start_ns and record.tgid not in self._needs_rescan:
                self._take_away(known, record, effects)
            self._note_if_idle(record.tgid, record.start_ns, record.activity, effects)
            return
        process = self._process(record, effects)
        process.rename(record.comm)
        is_image = bool(record.flags & FLAG_IMAGE)
        if record.tgid not in self._needs_rescan:
            self._take_away(process, record, effects, but=name.file_id)
        new, gone = process.space.add(name, record.start, record.end, is_image=is_image)
        if new is not None:
            self._emit(process.space, True, "exec" if is_image else "mmap", record.t_ns, new, effects)
        for mapping in gone:
            self._emit(process.space, False, "munmap", record.t_ns, mapping, effects)

    def _range(self, record: RangeRecord, effects: Effects) -> None:
        if record.flags & (FLAG_NEEDS_RESCAN | FLAG_SHARED_VM):
            self._mark_needs_rescan(record, effects)
        known = self._processes.get(record.tgid)
        if known is not None and known.id.start_ns == record.start_ns:
            self._take_away(known, record, effects)

    def _take_away(
        self, process: ProcessState, record: MapRecord | RangeRecord, effects: Effects, *, but: FileId | None = None
    ) -> None:
        space = process.space
        removal: Removal = space.take_away(record.start, record.end, but=but)
        for mapping in removal.gone:
            self._emit(space, False, "munmap", record.t_ns, mapping, effects)
        if removal.is_unsure:
            self.mark(record.tgid, LIVE, effects)
            space.needs_rescan = True

    def _fork(self, record: ProcessRecord, effects: Effects) -> None:
        if not record.activity:
            return  # the kernel does not track it: nothing of its parent's was wanted
        parent = self.find(record.parent_tgid, record.parent_start_ns)
        child = self._process(record, effects)
        child.learn(record)
        if record.flags & FLAG_NEEDS_RESCAN or (parent is not None and record.parent_tgid in self._needs_rescan):
            self.mark(record.tgid, Causes("fork", "munmap"), effects)
        if parent is None or child.was_read:
            # A child is visible to a scan a moment before its fork is reported: it was copied already.
            if record.flags & FLAG_SHARED_VM:
                effects.with_untracked_sharers[record.tgid] = record.start_ns
            self._note_if_idle(record.tgid, record.start_ns, record.activity, effects)
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
        child.knows_sharers = True
        child.space.sharers.append(child)
        for mapping in child.space.mappings().values():
            self._emit(child.space, True, "fork", record.t_ns, mapping, effects)
        self._note_if_idle(record.tgid, record.start_ns, record.activity, effects)

    def _note_if_idle(self, pid: int, start_ns: int, activity: int, effects: Effects) -> None:
        known = self._processes.get(pid)
        if activity and (known is None or not known.space.files) and pid not in self._needs_rescan:
            effects.untrack.append((pid, start_ns, activity))

    def _announce(self, process: ProcessState, t_ns: int, effects: Effects) -> None:
        """A CLONE_VM child is still there without exec: from now on it has what its parent has."""
        if not process.is_announced:
            process.is_announced = True
            for mapping in process.space.mappings().values():
                effects.changes.append(self._change(process, True, "fork", t_ns, mapping))

    def _forget(self, pid: int, start_ns: int, cause: Cause, t_ns: int, effects: Effects) -> None:
        known = self.find(pid, start_ns)
        if known is None:
            return
        # Once it has asked for a scan it reports no more until that begins, whatever scan of a sharer comes in between.
        is_owed = self._needs_rescan.pop(pid, None) is not None
        effects.rescans.pop(pid, None)
        del self._processes[pid]
        space = known.space
        space.sharers.remove(known)
        if space.sharers and not any(sharer.is_announced for sharer in space.sharers):
            for sharer in space.sharers:
                self._announce(sharer, t_ns, effects)  # it outlives the one whose space it shares
        # Who was kept because it shared its address space with this one is untracked by what a scan finds.
        is_last_idle = len(space.sharers) == 1 and not space.files
        if (space.needs_rescan or is_owed or is_last_idle) and space.sharers:
            self.mark(space.sharers[0].id.pid, LIVE, effects)
        if known.is_announced:
            for mapping in space.mappings().values():
                effects.changes.append(self._change(known, False, cause, t_ns, mapping))
        if not space.sharers:
            space.release()

    def _emit(
        self, space: AddressSpace, is_load: bool, cause: Cause, t_ns: int, mapping: Mapping, effects: Effects
    ) -> None:
        changes = effects.changes
        for sharer in space.sharers:
            if sharer.is_announced:
                changes.append(Change(is_load, cause, t_ns, sharer.record(), sharer.kind_of(mapping), *mapping.where))

    def _change(self, process: ProcessState, is_load: bool, cause: Cause, t_ns: int, mapping: Mapping) -> Change:
        return Change(is_load, cause, t_ns, process.record(), process.kind_of(mapping), *mapping.where)

    # ---- one scan at a time: for `merge` -----------------------------------------------------------

    def take_scan(
        self,
        scan: ProcessScan,
        causes: Causes,
        by_mm: dict[int, ProcessState],
        names: dict[int, MappedFile],
        effects: Effects,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes the table have of one process what a scan found.

        Args:
            scan: of the process; not void.
            causes: what the findings are called.
            by_mm: processes whose scans were taken over together with this one, by address space.
            names: files that such scans have, see `found`.
            effects: gets the difference.
            between: see `sowatch.engine.merge.merge`.
        """
        if scan.is_compat:
            self._compat[scan.tgid] = scan.start_ns
        known = self._processes.get(scan.tgid)
        if known is not None and known.id.start_ns != scan.start_ns:
            self._forget(scan.tgid, known.id.start_ns, "repair", scan.begin_ns, effects)
            known = None
        found = self.found(scan, lambda row: self.see(row, effects), names, between)
        if known is None and not found and not (scan.has_untracked_sharers and scan.intro):
            if scan.intro is not None:
                # The kernel will not introduce it again unless it is untracked, which may fail.
                self.learn(scan.intro, effects)
            self._note_if_idle(scan.tgid, scan.start_ns, scan.activity, effects)
            return
        if known is None:
            known = self._process(scan.intro or scan.maps.first(), effects)
        self._notice_exec(known, scan, effects)  # before it learns from this scan how often it has executed
        if scan.intro is not None:
            known.learn(scan.intro)
        elif scan.maps:
            known.rename(scan.maps.comm)
        known.was_read = True
        self._join(known, scan, causes, by_mm, effects)
        self._announce(known, scan.begin_ns, effects)
        self._replace(known.space, found, causes, scan.end_ns, effects)
        if scan.activity and not found:
            self._note_if_idle(scan.tgid, scan.start_ns, scan.activity, effects)

    @staticmethod
    def found(
        scan: ProcessScan,
        file_of: Callable[[MapRecord], MappedFile],
        names: dict[int, MappedFile],
        between: Callable[[], None],
    ) -> ScannedFiles:
        """What a scan has of each file that is wanted.

        Args:
            scan: of a process.
            file_of: the mapped file of a record, asked once for all rows that share one.
            names: what it has answered, by the number of the object; for as long as the records are there.
            between: see `sowatch.engine.merge.merge`.
        """
        found: ScannedFiles = {}
        for file, flags, t_ns, start, end, unlisted in in_slices(scan.maps.rows(), between):
            name = names.get(id(file))
            if name is None:
                name = names[id(file)] = file_of(file if flags == file.flags else file._replace(flags=flags))
            if name.is_wanted:
                one = found.get(name.file_id)
                if one is None:
                    one = found[name.file_id] = Scanned(name, flags, t_ns)
                one.add(flags, start, end, unlisted)
        return found

    def _join(
        self,
        process: ProcessState,
        scan: ProcessScan,
        causes: Causes,
        by_mm: dict[int, ProcessState],
        effects: Effects,
    ) -> None:
        """Processes with one address space may have been reported each on its own: from now on together."""
        other = by_mm.setdefault(scan.space, process) if scan.space else process
        if self._processes.get(other.id.pid) is not other:
            by_mm[scan.space] = process  # it has gone since, and its space with it
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
                            effects.changes.append(self._change(sharer, is_load, cause, scan.begin_ns, mapping))
            sharer.space = space
        space.sharers += old.sharers
        old.release()

    def _notice_exec(self, process: ProcessState, scan: ProcessScan, effects: Effects) -> None:
        """If its exec was lost, it shares nobody's space any more."""
        if scan.exec_id is not None and scan.exec_id != process.exec_id:
            process.exec_id = scan.exec_id
            process.knows_sharers = False
            if len(process.space.sharers) > 1:
                self._leave(process, effects)

    def _leave(self, process: ProcessState, effects: Effects) -> None:
        """It shares nobody's space any more; what it was reported to have there it has not."""
        space = process.space
        if process.is_announced:
            for mapping in space.mappings().values():
                effects.changes.append(self._change(process, False, "repair", process.seen_ns, mapping))
        space.sharers.remove(process)
        process.space = AddressSpace()
        process.space.sharers.append(process)
        process.is_announced = True

    def _replace(self, space: AddressSpace, found: ScannedFiles, causes: Causes, t_ns: int, effects: Effects) -> None:
        """Makes the space hold what was found, and emits the difference."""
        space.needs_rescan = False
        gone, came = space.replace(found)
        for mapping in gone:
            self._emit(space, False, causes.unload, t_ns, mapping, effects)
        mappings = space.mappings() if came else {}
        for one in came:
            self._emit(space, True, causes.load, one.t_ns, mappings[one.name.file_id], effects)
