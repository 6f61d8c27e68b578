"""`Descendants`: the processes that descend from some, and the source that learns of them.

Who forked whom is in the records of forks, which are in the ring before whatever the child does. So a `FollowingSource`
reports the forks of all processes, and takes note of each batch before the mapping table gets it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final, cast

from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import ProcessRecord, Record, RecordType
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Process
from sowatch.model.identity import TICK_NS
from sowatch.sources.base import EventSource, ProcessScan, Report, Setting

__all__ = ["Descendants", "following"]

#: Records of a process that has ended are published by then: facts of files are waited for 2 s, a scan no longer.
_REMEMBERED_S: Final = 30.0

#: A process by its pid and the tick that it started in, which is all that /proc shows.
_Key = tuple[int, int]


class Descendants:
    """Some processes, and whatever they fork from `find` on or had forked before. One thread changes it.

    A process counts as a child of the one that called fork, even if another one adopts it. What is there when `find` is
    called the first time belongs, as far as each parent still lives.

    Args:
        pids: of these processes, in the initial pid namespace.
        proc: the host's ``/proc``.
    """

    def __init__(self, pids: Collection[int], proc: ProcFs) -> None:
        self._proc = proc
        self._roots = frozenset(pids)
        self._keys: set[_Key] = set()
        #: The tick of the last one that had each pid.
        self._ticks: dict[int, int] = {}
        self._ended: deque[tuple[float, _Key]] = deque()

    def __contains__(self, process: Process) -> bool:
        return (process.pid, process.start_ns // TICK_NS) in self._keys

    def find(self) -> None:
        """Adds what ``/proc`` shows as children of those that live."""
        ticks: dict[int, int] = {}
        children: dict[int, list[int]] = {}
        for pid in self._proc.pids():
            stat = self._proc.stat(pid)
            if not isinstance(stat, Miss):
                ticks[pid] = stat.start_ticks
                children.setdefault(stat.ppid, []).append(pid)
        for pid in self._roots & ticks.keys():
            self._add((pid, ticks[pid]))
        self._roots = frozenset()  # whoever has such a pid later is another process
        waiting = [pid for pid, tick in ticks.items() if (pid, tick) in self._keys]
        while waiting:
            for child in children.pop(waiting.pop(), ()):
                self._add((child, ticks[child]))
                waiting.append(child)

    def note(self, records: Iterable[Record]) -> None:
        """Adds whom these records show as forked by one of them."""
        for record in records:
            key = (record.tgid, record.start_ns // TICK_NS)
            if record.type == RecordType.EXIT:
                if key in self._keys:
                    self._ended.append((time.monotonic() + _REMEMBERED_S, key))
            elif isinstance(record, ProcessRecord) and key not in self._keys:
                if self._ticks.get(record.tgid) is not None:
                    del self._ticks[record.tgid]  # another process has the pid now
                if self._is_child(record):
                    self._add(key)
        while self._ended and self._ended[0][0] < time.monotonic():
            self._forget(self._ended.popleft()[1])

    def _is_child(self, record: ProcessRecord) -> bool:
        """Whether it was forked by one of them; of one whose fork was lost, whether that is its parent now."""
        if record.type == RecordType.FORK and record.parent_start_ns:
            return (record.parent_tgid, record.parent_start_ns // TICK_NS) in self._keys
        return (record.parent_tgid or record.ppid) in self._ticks

    def _add(self, key: _Key) -> None:
        self._keys.add(key)
        self._ticks[key[0]] = key[1]

    def _forget(self, key: _Key) -> None:
        self._keys.discard(key)
        if self._ticks.get(key[0]) == key[1]:
            del self._ticks[key[0]]


def following(source: EventSource, descendants: Descendants) -> EventSource:
    """The same source; it reports forks of all processes, and ``descendants`` learns what it reports."""
    return cast("EventSource", _FollowingSource(source, descendants))


class _FollowingSource:
    """Passes on all but what is here."""

    def __init__(self, source: EventSource, descendants: Descendants) -> None:
        self._source = source
        self._descendants = descendants
        self.reports = None if source.reports is None else _WithProcesses(source.reports)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def drain(self) -> list[Record]:
        records = self._source.drain()
        if records and self.reports is None:
            self._descendants.find()  # a poll shows the forks of processes only that have something wanted
        self._descendants.note(records)
        return records

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        self._descendants.find()  # at the start, and after a loss
        scans, records = self._source.scan_all(meanwhile)
        self._descendants.note(records)
        return scans, records


class _WithProcesses:
    """Sets what is reported, and fork, exec and exit of every process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def set(self, value: int) -> None:
        self._setting.set(value | Report.PROCESSES)
