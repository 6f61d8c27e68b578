"""`merge`: scans, and the records that came while they were made, in the right order. Pure, as the table is."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import FLAG_NEEDS_RESCAN, MapRecord, ProcessRecord, RangeRecord, Record, RecordType
from sowatch.engine.address_space import AddressSpace, MappedFile, ProcessState
from sowatch.engine.effects import LIVE, Causes, Effects
from sowatch.engine.table import MappingTable
from sowatch.sources.base import ProcessScan
from sowatch.sources.scan_rows import in_slices

__all__ = ["MANY_CHANGES", "merge"]

#: So many changes of a merge are published before it is over.
MANY_CHANGES: Final = 4096

#: A call that a scan has seen is reported after it, but no later than this.
RETURN_NS: Final = 1_000_000


def merge(
    table: MappingTable,
    scans: Iterable[ProcessScan],
    records: Sequence[Record] | RecordLog,
    causes: Causes,
    *,
    own_causes: dict[int, Causes] | None = None,
    is_start: bool = False,
    between: Callable[[Effects], None] = lambda _: None,
) -> Effects:
    """Takes over scans and the records that came while they were made, in the right order.

    A record older than the scan of its process was seen by the scan already; a later one comes
    on top of it. One that falls into the scan may or may not have been seen, and a call is reported
    some time after its work is done: the scan is taken over where it fits in between them, so
    that it reports nothing anew, and the process is scanned once more (`Effects.rescans`).

    Args:
        table: is changed.
        scans: at most one a process.
        records: in ring order, drained until after the last scan ended.
        causes: what the findings are called.
        own_causes: and for some tgids otherwise.
        is_start: nothing was known before, so older records report nothing new.
        between: called after each `SLICE` of work, and once there are many changes, with the effects so far, whose
            changes it may take away. It may apply records of processes that are neither scanned nor share an address
            space with one that is, nor were forked by one since.
    """
    return _Merge(table, list(scans), causes, own_causes or {}, is_start=is_start, between=between).run(
        RecordLog([records])
    )


class _Merge:
    """One merge. ``waiting`` are the scans that were not taken over yet, by tgid."""

    def __init__(
        self,
        table: MappingTable,
        scans: Sequence[ProcessScan],
        causes: Causes,
        own_causes: dict[int, Causes],
        *,
        is_start: bool,
        between: Callable[[Effects], None],
    ) -> None:
        self._table = table
        self._scans = scans
        self._waiting = {scan.tgid: scan for scan in scans if not scan.is_void}
        self._again = {scan.tgid for scan in scans if scan.is_void}
        self._scanned = set(self._waiting)
        self._causes = causes
        self._own_causes = own_causes
        self._is_start = is_start
        self._effects = effects = Effects()
        self._between: Callable[[], None] = lambda: between(effects)
        #: Who was scanned, by address space; the files that scans have; and where each scan belongs among the records.
        self._by_mm: dict[int, ProcessState] = {}
        self._names: dict[int, MappedFile] = {}
        self._places: dict[int, int | None] = {}

    def run(self, records: RecordLog) -> Effects:
        table, waiting, again, effects = self._table, self._waiting, self._again, self._effects
        ends = {(scan.tgid, scan.start_ns): scan.end_ns for scan in waiting.values()}
        later = {} if self._is_start else _since_scan(waiting, records)
        last_type: dict[int, int] = {}
        for position, record in in_slices(records.numbered(), self._between):
            last_type[record.tgid] = record.type
            scan = waiting.get(record.tgid)
            if scan is not None and scan.start_ns == record.start_ns:
                is_inside = scan.begin_ns <= record.t_ns <= scan.end_ns
                if is_inside:
                    again.add(record.tgid)
                if is_inside and record.type in (RecordType.EXIT, RecordType.EXEC):
                    del waiting[record.tgid]  # what it saw is of the past
                elif self._is_start and record.t_ns <= scan.end_ns:
                    self._learn_only(record)
                    continue
                elif record.t_ns >= scan.begin_ns and self._is_next(scan, record, position, records, later):
                    self._take(waiting.pop(record.tgid))
                elif scan.intro is not None and record.type == RecordType.MAP and self._is_new(record):
                    table.learn(scan.intro, effects)  # the kernel introduces nobody twice
            elif record.t_ns <= ends.get((record.tgid, record.start_ns), 0):
                again.add(record.tgid)  # overtaken on its way to the ring: reported after what came later
            if record.type == RecordType.FORK and isinstance(record, ProcessRecord):
                self._before_fork(record)
            table.step(record, effects)
            if scan is not None and record.type == RecordType.EXEC and record.t_ns >= scan.begin_ns:
                self._learn_after_exec(scan, record)
        for scan in waiting.values():
            self._take(scan)
        self._note_open(last_type)
        return table.finish(effects)

    def _learn_after_exec(self, scan: ProcessScan, record: Record) -> None:
        """A scan may have introduced the process after its exec; if it did so before, the kernel does it again."""
        if scan.intro is not None and scan.start_ns == record.start_ns and self._is_new(record):
            self._table.learn(scan.intro, self._effects)

    def _is_new(self, record: Record) -> bool:
        return self._table.find(record.tgid, record.start_ns) is None

    def _take(self, scan: ProcessScan) -> None:
        causes = self._own_causes.get(scan.tgid, self._causes)
        self._table.take_scan(scan, causes, self._by_mm, self._names, self._effects, self._between)
        if len(self._effects.changes) >= MANY_CHANGES:
            self._between()

    def _is_next(
        self, scan: ProcessScan, record: Record, position: int, records: RecordLog, later: dict[int, array[int]]
    ) -> bool:
        """Whether the scan is to be taken over before this record."""
        if self._is_start:
            return record.t_ns > scan.end_ns
        if position == later[record.tgid][0]:
            self._places[record.tgid] = self._place(scan, records.at(later[record.tgid]))
        return position == self._places[record.tgid]

    def _place(self, scan: ProcessScan, records: Iterable[tuple[int, Record]]) -> int | None:
        """The position of the record since its beginning that a scan is to be taken over before; None: after all.

        Where the table, as the records change it, equals what was found. If it does nowhere: before the
        first that came after the scan.
        """
        table = self._table
        known = table.find(scan.tgid, scan.start_ns)
        space = known.space if known is not None else AddressSpace()
        found = table.found(scan, table.file_of, {}, self._between)
        ranges = space.snapshot(found, with_images=table.rules.wants_images)
        first_after = None
        for position, record in records:
            if ranges.is_same:
                return position
            if record.t_ns > scan.end_ns:
                first_after = position if first_after is None else first_after
                # What needs a rescan has to come after a scan, to be scanned again.
                if record.t_ns > scan.end_ns + RETURN_NS or record.flags & FLAG_NEEDS_RESCAN:
                    return first_after
            if isinstance(record, MapRecord):
                name = table.file_of(record)
                ranges.put(name.file_id if name.is_wanted else None, record.start, record.end)
            elif record.type == RecordType.RANGE and isinstance(record, RangeRecord):
                ranges.put(None, record.start, record.end)
            elif record.t_ns > scan.end_ns:
                return first_after
        return None if ranges.is_same else first_after

    def _before_fork(self, record: ProcessRecord) -> None:
        parent = self._waiting.get(record.parent_tgid)
        if parent is None or parent.start_ns != record.parent_start_ns:
            return
        if record.t_ns > parent.end_ns:
            self._take(self._waiting.pop(record.parent_tgid))
        elif record.tgid not in self._scanned:
            # Forked before its parent was scanned, and behind the back of the full scan: it is scanned on its own.
            self._table.learn(record, self._effects)
            self._again.add(record.tgid)

    def _learn_only(self, record: Record) -> None:
        if isinstance(record, ProcessRecord) and record.type in (RecordType.INTRO, RecordType.FORK):
            self._table.learn(record, self._effects)
        elif isinstance(record, MapRecord):
            self._table.see(record, self._effects)

    def _note_open(self, last_type: dict[int, int]) -> None:
        """What the scans have left open; ``last_type`` is that of the last record of each tgid."""
        table, effects = self._table, self._effects
        for scan in self._scans:
            known = table.get(scan.tgid)
            if known is None or known.knows_sharers:
                continue
            if scan.has_untracked_sharers and len(known.space.sharers) == 1:
                effects.with_untracked_sharers[scan.tgid] = scan.start_ns
        for pid in self._again:
            if (known := table.get(pid)) is not None:
                known.space.needs_rescan = True
            if last_type.get(pid) != RecordType.EXIT:
                table.mark(pid, LIVE if self._is_start else self._own_causes.get(pid, self._causes), effects)


def _since_scan(waiting: dict[int, ProcessScan], records: RecordLog) -> dict[int, array[int]]:
    """By tgid, the positions of the records from the beginning of its scan on."""
    found: dict[int, array[int]] = {}
    for position, record in records.numbered():
        scan = waiting.get(record.tgid)
        if scan is not None and scan.start_ns == record.start_ns and record.t_ns >= scan.begin_ns:
            found.setdefault(record.tgid, array("Q")).append(position)
    return found
