"""`CallTally`: from the kernel's counts, by function and process, to metrics by library, function and container.

No metric has a process as a label, so counts outlive their processes: what a process has called stays in the sum, and
its place in the kernel's table is given back. Keeps nothing on disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import add
from typing import Final, NamedTuple

from sowatch.linux.containers import container_id
from sowatch.linux.liveness import process_is_alive
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Load, Unload
from sowatch.model.histogram import Distribution
from sowatch.model.identity import TICK_NS, FileId, ProcessId
from sowatch.telemetry import Counter, Histogram, MetricRegistry, names
from sowatch.telemetry.metrics import OVERFLOW_TAG
from sowatch.uprobes import CallCounter, Calls, Site
from sowatch.uprobes.calls import BUCKETS, percentile_ns

__all__ = ["CallTally", "SymbolCalls"]

#: Powers of two of nanoseconds: upper bounds of the kernel's buckets, each second of them, 1 us to 17 s.
_BOUND_BITS: Final = tuple(range(10, 36, 2))
BOUNDS_S: Final = tuple((1 << bits) / 1e9 for bits in _BOUND_BITS)
#: A series that nothing has counted into for so long goes, so that its place is free; longer than people scrape.
_IDLE_S: Final = 600.0
#: Processes are known by the events of the rule; who is not heard of any more is searched for this often.
_LOOK_S: Final = 10.0
_Key = tuple[int, ProcessId]


class SymbolCalls(NamedTuple):
    """Calls of one function of one file by all processes, since it was attached; times are upper bounds."""

    symbol: str
    calls: int
    timed: int
    sum_ns: int
    p50_ns: int | None
    p99_ns: int | None


@dataclass(slots=True)
class _Series:
    calls: Counter
    seconds: Histogram | None
    used_s: float

    def metrics(self) -> Iterator[Counter | Histogram]:
        yield self.calls
        if self.seconds is not None:
            yield self.seconds


@dataclass(slots=True)
class _Sum:
    calls: int = 0
    timed: int = 0
    sum_ns: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, calls: int, timed: int, sum_ns: int, latency: Iterable[int]) -> None:
        self.calls += calls
        self.timed += timed
        self.sum_ns += sum_ns
        self.latency = list(map(add, self.latency, latency))


class _Counted:
    """One counter that is tracked. ``sites`` has those of files that are detached, too, until their counts are in."""

    def __init__(self, rule: str, counter: CallCounter) -> None:
        self.rule = rule
        self.counter = counter
        self.sites: dict[int, Site] = {}
        self.before: dict[_Key, Calls] = {}
        self.deferred: set[_Key] = set()


class CallTally:
    """Sums up the calls of any number of counters. All methods may be called from any thread.

    Args:
        metrics: where the sums go.
        proc: the host's.
        cpu_share: of one CPU that it takes at most; a full table of counts takes some tenths of a second each time.
    """

    def __init__(self, metrics: MetricRegistry, proc: ProcFs, *, cpu_share: float = 0.1) -> None:
        self._metrics = metrics
        self._cpu_share = cpu_share
        self._proc = proc
        self._lock = threading.Lock()
        self._counted: dict[CallCounter, _Counted] = {}
        #: Who counts the calls of a function: of two rules that meet one file by two paths, the first.
        self._owners: dict[tuple[FileId, str], _Counted] = {}
        self._sums: dict[tuple[FileId, str], _Sum] = {}
        self._series: dict[tuple[str, ...], _Series] = {}
        self._containers: dict[int, tuple[int, str]] = {}
        self._ended: dict[ProcessId, None] = {}
        self._looked_s = time.monotonic()
        self._not_before_s = 0.0

    def follow(self, rule: str, counter: CallCounter) -> None:
        """Counts by this counter from now on."""
        with self._lock:
            self._counted[counter] = _Counted(rule, counter)

    def unfollow(self, counter: CallCounter) -> None:
        """Takes the last figures of a counter, before it is closed. Safe to call again."""
        with self._lock:
            counted = self._counted.pop(counter, None)
            if counted is not None:
                self._take(counted, is_last=True)
                for key in [key for key, owner in self._owners.items() if owner is counted]:
                    del self._owners[key]
                    self._sums.pop(key, None)

    def note_sites(self, counter: CallCounter) -> None:
        """After a file was attached: it may be detached before the next `take`."""
        with self._lock:
            counted = self._counted.get(counter)
            if counted is not None:
                counted.sites |= counter.attacher.sites

    def note(self, event: Load | Unload) -> None:
        """A load or an unload of a rule that counts."""
        process = event.process
        with self._lock:
            if event.event == "load":
                self._containers[process.pid] = (process.start_ns, process.container or "")
                self._ended.pop(process.id, None)
            elif event.cause == "exit":
                self._ended[process.id] = None

    def take(self) -> None:
        """Brings the metrics up to date with the kernel; soon after a time that took long it does nothing."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._not_before_s:
                return
            is_looking = now_s - self._looked_s >= _LOOK_S
            if is_looking:
                self._looked_s = now_s
            ended = list(self._ended)
            for counted in self._counted.values():
                self._take(counted, is_looking=is_looking)
            counting = {process for one in self._counted.values() for _, process in one.before}
            for process in ended:
                if process not in counting:  # all it has called is in
                    self._ended.pop(process, None)
                    self._forget_process(process)
            if is_looking:
                self._forget_idle(now_s)
                for process in [ProcessId(pid, start_ns) for pid, (start_ns, _) in self._containers.items()]:
                    if process not in counting and not process_is_alive(process, self._proc):
                        self._forget_process(process)
            end_s = time.monotonic()
            self._not_before_s = end_s + (end_s - now_s) * (1 / self._cpu_share - 1)

    def sums(self) -> dict[FileId, list[SymbolCalls]]:
        """What is counted of files that are attached now."""
        found: dict[FileId, list[SymbolCalls]] = {}
        with self._lock:
            for (file, symbol), one in self._sums.items():
                p50_ns, p99_ns = (percentile_ns(one.latency, share) for share in (0.5, 0.99))
                found.setdefault(file, []).append(SymbolCalls(symbol, one.calls, one.timed, one.sum_ns, p50_ns, p99_ns))
        return found

    # ---- inside, with the lock held ---------------------------------------------------------------

    def _take(self, counted: _Counted, *, is_last: bool = False, is_looking: bool = False) -> None:
        attached = counted.counter.attacher.sites
        counted.sites |= attached
        unseen = set(counted.before)
        waiting = set()
        #: What is new, by site and container.
        fresh: dict[tuple[int, str], tuple[Site, _Sum]] = {}
        for now in list(counted.counter.calls_at(counted.sites)):
            key = (now.site.cookie, now.process)
            unseen.discard(key)
            before = counted.before.get(key)
            is_detached = now.site.cookie not in attached
            if now == before:
                is_over = is_detached or now.process in self._ended
                if is_over or (is_looking and not process_is_alive(now.process, self._proc)):
                    counted.counter.forget(now)
                    del counted.before[key]
                elif is_detached:
                    waiting.add(now.site.cookie)
                continue
            waiting.add(now.site.cookie)
            container = self._container_of(now.process)
            # Its load may still be on its way to us, with the container, and the facts of a file that was armed.
            is_known = container is not None and (before is not None or now.site.library.build_id is not None)
            if not is_known and not is_last and key not in counted.deferred:
                counted.deferred.add(key)
                continue
            counted.deferred.discard(key)
            counted.before[key] = now
            more = fresh.setdefault((now.site.cookie, container or ""), (now.site, _Sum()))[1]
            more.add(now.calls, now.timed, now.sum_ns, now.latency)
            if before is not None:
                more.add(-before.calls, -before.timed, -before.sum_ns, [-one for one in before.latency])
        for (_, container), (site, more) in fresh.items():
            self._add(counted, site, container, more)
        for key in unseen:  # went with its site's own program
            del counted.before[key]
        for cookie in counted.sites.keys() - attached.keys() - waiting:
            self._release(counted, counted.sites.pop(cookie))

    def _release(self, counted: _Counted, site: Site) -> None:
        """Its file is detached, and all it counted is in: others that count the function go on."""
        key = (site.library.id, site.symbol)
        if self._owners.get(key) is counted:
            del self._owners[key]
            self._sums.pop(key, None)

    def _add(self, counted: _Counted, site: Site, container: str, more: _Sum) -> None:
        key = (site.library.id, site.symbol)
        if self._owners.setdefault(key, counted) is not counted:
            return
        self._sums.setdefault(key, _Sum()).add(more.calls, more.timed, more.sum_ns, more.latency)
        series = self._series_of(site, container, is_timed=counted.counter.is_timed)
        series.used_s = time.monotonic()
        series.calls.add(more.calls)
        if series.seconds is not None and any(more.latency):
            series.seconds.add(_distribution(more.latency, more.sum_ns))

    def _series_of(self, site: Site, container: str, *, is_timed: bool) -> _Series:
        library = site.library
        tags = (
            f"library:{library.soname or os.path.basename(library.path)}",
            f"build_id:{library.build_id or ''}",
            f"symbol:{site.symbol}",
            f"container:{container}",
        )
        series = self._series.get(tags)
        if series is None:
            counter = self._metrics.counter(names.CALLS.name, *tags)
            series = self._series[tags] = _Series(counter, None, time.monotonic())
        if is_timed and series.seconds is None:
            series.seconds = self._metrics.histogram(names.CALL_SECONDS.name, *tags, bounds=BOUNDS_S)
        return series

    def _forget_idle(self, now_s: float) -> None:
        for tags, series in list(self._series.items()):
            if now_s - series.used_s < _IDLE_S:
                continue
            del self._series[tags]
            for metric in series.metrics():
                if OVERFLOW_TAG not in metric.tags:
                    self._metrics.forget(metric)

    def _forget_process(self, process: ProcessId) -> None:
        if self._containers.get(process.pid, (None,))[0] == process.start_ns:
            del self._containers[process.pid]

    def _container_of(self, process: ProcessId) -> str | None:
        """None: it is not known, and the process is not there to be asked."""
        known = self._containers.get(process.pid)
        if known is not None and known[0] // TICK_NS == process.start_ns // TICK_NS:
            return known[1]
        if not process_is_alive(process, self._proc):
            return None
        about = self._proc.process(process.pid, container_of=container_id)
        if about is None:
            return None
        self._containers[process.pid] = (process.start_ns, about.container or "")
        return about.container or ""


def _distribution(latency: list[int], sum_ns: int) -> Distribution:
    """The kernel's buckets in those of the metric; sums in seconds."""
    upto = [0, *accumulate(latency)]
    edges = [0, *(upto[bits] for bits in _BOUND_BITS), upto[-1]]
    return Distribution(BOUNDS_S, tuple(b - a for a, b in pairwise(edges)), sum_ns / 1e9)
