"""`Scanner`: scans single processes or all of them; who cannot be read now is scanned later."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Final

from sowatch.bpf.record_log import RecordLog
from sowatch.engine.effects import Causes
from sowatch.engine.intake import Intake
from sowatch.engine.rescan_schedule import RescanSchedule
from sowatch.engine.sharer_search import SHARERS_REST
from sowatch.engine.table import MappingTable
from sowatch.sources.base import EventSource, ProcessScan
from sowatch.sources.unread import ScanTimeout

__all__ = ["LACK_REST_S", "MANY_RESCANS", "Scanner"]

#: If more processes than this need a rescan, one full scan is made.
MANY_RESCANS: Final = 64
#: A scan for which descriptors or memory were lacking is tried again after this.
LACK_REST_S: Final = 0.25


class Scanner:
    """Scans for one reconciler, on the engine's thread.

    Args:
        source: scans.
        table: gets who has to be scanned later.
        intake: of the same source; is drained meanwhile, and gets what was lacking.
        schedule: gets how long scans take.

    Attributes:
        can_read_one: the source scans single processes by the numbers that it reports.
        has_scanned_all: whether the last full scan was one of all that can be read.
        is_lacking: the last full scan failed for want of descriptors or memory.
        has_spare_memory: a full scan has left some.
    """

    def __init__(self, source: EventSource, table: MappingTable, intake: Intake, schedule: RescanSchedule) -> None:
        self._source = source
        self._table = table
        self._intake = intake
        self._schedule = schedule
        self.can_read_one = self.has_scanned_all = True
        self.has_spare_memory = self.is_lacking = False

    def cpu_s(self) -> float:
        """CPU seconds of this thread and of the helpers that scan."""
        return time.thread_time() + self._source.unread.cpu_s

    def read(self, due: dict[int, Causes], take_others: Callable[[], None]) -> tuple[list[ProcessScan], RecordLog]:
        """Scans some processes, or all if they are many; the scans, and records that ``take_others`` did not take.

        Args:
            due: what the findings of each are called. Those that cannot be read now are in `MappingTable.needs_rescan`
                again.
            take_others: drains; called during the scans, if the source allows a drain then.
        """
        if len(due) > MANY_RESCANS or not self.can_read_one:
            return self._read_many(due, take_others)
        found = []
        for pid, causes in due.items():
            begun_s = self.cpu_s()
            try:
                scan = self._source.scan_process(pid, take_others)
            except ScanTimeout:
                self._table.await_rescan(pid, causes)
            except Exception as error:  # noqa: BLE001 - raised again if it is another one
                self._intake.excuse(error)
                self._table.await_rescan(pid, causes)
                self._schedule.put_off(pid, LACK_REST_S)
            else:
                # The merge costs about as much again.
                self._schedule.rest(pid, 2 * (self.cpu_s() - begun_s))
                if scan is not None:
                    found.append(scan)
        return found, RecordLog()

    def _read_many(
        self, due: dict[int, Causes], take_others: Callable[[], None]
    ) -> tuple[list[ProcessScan], RecordLog]:
        begun_s = self.cpu_s()
        scans, records = self.read_all(take_others)
        if self.can_read_one:
            rest_s = LACK_REST_S if self.is_lacking else SHARERS_REST * (self.cpu_s() - begun_s)
            self._schedule.few_until = time.monotonic() + rest_s
        for pid in due.keys() & set(self._source.unread) if self.has_scanned_all else due:
            self._table.await_rescan(pid, due[pid])
        return scans, records

    def read_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        """The scans of all processes that can be read, and the records drained in the place of ``meanwhile``."""
        self.has_scanned_all = self.is_lacking = False
        drained = RecordLog()
        try:
            scans, records = self._source.scan_all(meanwhile or (lambda: drained.extend(self._intake.drain())))
        except ScanTimeout:
            return [], drained
        except Exception as error:  # noqa: BLE001 - as above
            self._intake.fail(error)
            self.is_lacking = True
            return [], drained
        drained.extend(records)
        self.has_scanned_all = self.has_spare_memory = True
        return scans, drained

    def read_all_with_records(self) -> tuple[list[ProcessScan], RecordLog]:
        """The same, with the records from before and until after it."""
        early = self._intake.drain()
        scans, meanwhile = self.read_all()
        return scans, RecordLog(chain((early, meanwhile), self._intake.drain_all()))
