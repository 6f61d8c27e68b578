"""`merge`: scans, and the records that came while they were made, in the right order. Pure, as the table is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sowatch.bpf.records import FLAG_NEEDS_RESCAN, MapRecord, ProcessRecord, RangeRecord, Record, RecordType
from sowatch.engine.address_space import AddressSpace, ProcessState
from sowatch.engine.effects import LIVE, Causes, Effects
from sowatch.engine.table import MappingTable
from sowatch.sources.base import ProcessScan
from sowatch.sources.scan_rows import in_slices

__all__ = ["merge"]

#: A call that a scan has seen is reported after it, but no later than this.
RETURN_NS: Final = 1_000_000


def merge(
    table: MappingTable,
    scans: Iterable[ProcessScan],
    records: Sequence[Record],
    causes: Causes,
    *,
    own_causes: dict[int, Causes] | None = None,
    is_start: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Effects:
    """Takes over scans and the records that came while they were made, in the right order.

    A record older than the scan of its process was seen by the scan already; a later one comes
    on top of it. One that falls into the scan may or may not have been seen, and a call is reported
    some time after its work is done: the scan is taken over where it fits in between them, so
    that it reports nothing anew, and the process is scanned once more (`Effects.rescans`).

    Args:
        table: is changed.
        scans: at most one a process.
        records: a list, in ring order, drained after the last scan ended.
        causes: what the findings are called.
        own_causes: and for some tgids otherwise.
        is_start: nothing was known before, so older records report nothing new.
        between: called after each `SLICE` of work. It may apply records of processes that are neither scanned nor share
            an address space with one that is, nor were forked by one since.
    """
    return _Merge(table, list(scans), causes, own_causes or {}, is_start=is_start, between=between).run(records)


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
        between: Callable[[], None],
    ) -> None:
        self._table = table
        self._scans = scans
        self._waiting = {scan.tgid: scan for scan in scans if not scan.is_void}
        self._again = {scan.tgid for scan in scans if scan.is_void}
        self._scanned = set(self._waiting)
        self._causes = causes
        self._own_causes = own_causes
        self._is_start = is_start
        self._between = between
        self._effects = Effects()
        #: Who was scanned, by address space; and where each scan belongs among the records.
        self._by_mm: dict[int, ProcessState] = {}
        self._places: dict[int, Record | None] = {}

    def run(self, records: Sequence[Record]) -> Effects:
        table, waiting, again, effects = self._table, self._waiting, self._again, self._effects
        ends = {(scan.tgid, scan.start_ns): scan.end_ns for scan in waiting.values()}
        later = {} if self._is_start else _since_scan(waiting, records)
        for record in in_slices(records, self._between):
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
                elif record.t_ns >= scan.begin_ns and self._is_next(scan, record, later):
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
        self._note_open(records)
        return table.finish(effects)

    def _learn_after_exec(self, scan: ProcessScan, record: Record) -> None:
        """A scan may have introduced the process after its exec; if it did so before, the kernel does it again."""
        if scan.intro is not None and scan.start_ns == record.start_ns and self._is_new(record):
            self._table.learn(scan.intro, self._effects)

    def _is_new(self, record: Record) -> bool:
        return self._table.find(record.tgid, record.start_ns) is None

    def _take(self, scan: ProcessScan) -> None:
        causes = self._own_causes.get(scan.tgid, self._causes)
        self._table.take_scan(scan, causes, self._by_mm, self._effects, self._between)

    def _is_next(self, scan: ProcessScan, record: Record, later: dict[int, list[Record]]) -> bool:
        """Whether the scan is to be taken over before this record."""
        if self._is_start:
            return record.t_ns > scan.end_ns
        if record is later[record.tgid][0]:
            self._places[record.tgid] = self._place(scan, later[record.tgid])
        return record is self._places[record.tgid]

    def _place(self, scan: ProcessScan, records: Sequence[Record]) -> Record | None:
        """Which of the records since it began a scan is to be taken over before; None: after all.

        Where the table, as the records change it, equals what was found. If it does nowhere: before the
        first that came after the scan.
        """
        table = self._table
        known = table.find(scan.tgid, scan.start_ns)
        space = known.space if known is not None else AddressSpace()
        ranges = space.snapshot(table.found(scan, table.file_of, self._between), with_images=table.rules.wants_images)
        first_after = None
        for record in records:
            if ranges.is_same:
                return record
            if record.t_ns > scan.end_ns:
                first_after = first_after or record
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

    def _note_open(self, records: Sequence[Record]) -> None:
        """What the scans have left open."""
        table, effects = self._table, self._effects
        for scan in self._scans:
            known = table.get(scan.tgid)
            if scan.has_untracked_sharers and known is not None and len(known.space.sharers) == 1:
                effects.has_untracked_sharers = True
        last_type = {record.tgid: record.type for record in records}
        for pid in self._again:
            if (known := table.get(pid)) is not None:
                known.space.needs_rescan = True
            if last_type.get(pid) != RecordType.EXIT:
                table.mark(pid, LIVE if self._is_start else self._own_causes.get(pid, self._causes), effects)


def _since_scan(waiting: dict[int, ProcessScan], records: Iterable[Record]) -> dict[int, list[Record]]:
    """By tgid, the records from the beginning of its scan on."""
    found: dict[int, list[Record]] = {}
    for record in records:
        scan = waiting.get(record.tgid)
        if scan is not None and scan.start_ns == record.start_ns and record.t_ns >= scan.begin_ns:
            found.setdefault(record.tgid, []).append(record)
    return found
