"""`ScanRecords`: the records that come while processes are scanned, divided by whether the scan concerns them.

A scan is merged with the records of its processes that came meanwhile. Those of all other processes need not wait for
that: a process decides how long its scan takes, and others are not to be reported later for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import ProcessRecord, Record, RecordType

__all__ = ["ScanRecords"]

#: So much may wait for the merge, as much as the ring holds; whatever comes then stays where it is.
MAX_WAITING_BYTES: Final = 8 << 20


class ScanRecords:
    """The records of some processes, kept for the merge of their scans.

    A record concerns the scan if it is of a scanned process, of one that shares an address space with it, or of a child
    that either has forked since.

    Args:
        pids: those processes.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = set(pids)
        self._waiting = RecordLog()

    def take_others(self, drain: Callable[[], list[Record]], apply: Callable[[list[Record]], None]) -> None:
        """Drains while the scan or its merge is under way, and applies what does not concern it."""
        if self._waiting.size_bytes < MAX_WAITING_BYTES:
            apply(self.keep_back(drain()))

    def keep_back(self, records: Sequence[Record]) -> list[Record]:
        """Keeps those that concern the scan; gives the others, in order."""
        return self._waiting.take_from(records, self._concerns)

    def _concerns(self, record: Record) -> bool:
        pids = self._pids
        if record.tgid in pids:
            return True
        if record.type == RecordType.FORK and isinstance(record, ProcessRecord) and record.parent_tgid in pids:
            pids.add(record.tgid)
            return True
        return False

    def apply_kept(self, apply: Callable[[Iterable[Record]], None], take_others: Callable[[], None]) -> None:
        """Applies what was kept, in parts, and between them takes what others do; what is kept meanwhile comes last."""
        for batch in self.take().batches():
            apply(batch)
            take_others()
        for batch in self.take().batches():
            apply(batch)

    def take(self) -> RecordLog:
        """Those that were kept since the last call, in order."""
        taken, self._waiting = self._waiting, RecordLog()
        return taken
