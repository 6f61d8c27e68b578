"""What the agent makes of stale files: events ``stale`` and ``renewed``, and metrics by unit or container."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, Self

from sowatch.inventory.restarts import restart_target
from sowatch.inventory.stale_watch import StaleChange, StaleWatch
from sowatch.inventory.staleness import Staleness
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import SowatchError
from sowatch.model.events import Process, Renewed, Stale
from sowatch.model.stats import Mapped
from sowatch.telemetry import Gauge, MetricRegistry, names
from sowatch.watcher.watcher import Watcher

__all__ = ["StaleFeed"]

LOG = logging.getLogger("sowatch.agent")

#: Units and containers that have a series of their own; the rest is counted together.
MAX_NAMES: Final = 50
#: Events that are published at once: the thread that drains the kernel is not held up by an upgrade of libc.
_BATCH: Final = 256
#: From a minute to a month.
_REMEDIATION_S: Final = (60.0, 300.0, 1800.0, 3600.0, 14_400.0, 86_400.0, 604_800.0, 2_592_000.0)
#: Of a change so many files are logged.
_LOGGED: Final = 5


class StaleFeed:
    """Compares what a watcher has with the disk, and publishes what comes of it. A context manager.

    Args:
        watcher: the agent's; its events get the changes.
        metrics: get the figures.
        proc: the host's.
        interval_s: as of `StaleWatch`.
    """

    def __init__(self, watcher: Watcher, metrics: MetricRegistry, proc: ProcFs, interval_s: float) -> None:
        self._watcher = watcher
        self._metrics = metrics
        self._gauges: dict[tuple[str, str], Gauge] = {}
        #: Its answers are those of `/inventory` and of the page.
        self.watch = StaleWatch(_All(watcher), proc=proc, interval_s=interval_s, on_change=self._publish)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.watch)
        self._stack.callback(self._metrics.add_source(self._sample))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _publish(self, changes: Sequence[StaleChange]) -> None:
        """On the thread that compares."""
        new = [change for change in changes if change.cause is None]
        LOG.info("stale files", extra={"facts": {"stale": len(new), "renewed": len(changes) - len(new)}})
        for change in new[:_LOGGED]:
            process, library = change.mapped.process, change.mapped.library
            facts = {"pid": process.pid, "comm": process.comm, "path": library.path, "why": change.answer.stale}
            LOG.info("a process has a stale file mapped", extra={"facts": facts})
        now_ns = time.time_ns()
        with contextlib.suppress(SowatchError):  # the watch has ended
            for start in range(0, len(changes), _BATCH):
                some = changes[start : start + _BATCH]
                self._watcher.publish([_event(change, now_ns) for change in some]).result()

    def _sample(self) -> None:
        watch = self.watch
        if watch.compared_ns is None:
            return
        answers = watch.answers
        unknown = sum(answer.stale is Staleness.UNKNOWN for answer in answers.values())
        self._metrics.gauge(names.STALE_UNKNOWN.name).set(unknown)
        self._metrics.gauge(names.STALE_SECONDS.name).set(watch.seconds)
        self._metrics.gauge(names.STALE_TIME.name).set(watch.compared_ns / 1e9)
        self._metrics.gauge(names.STALE_OLDEST.name).set((watch.remediations.oldest_ns() or 0) / 1e9)
        remediation = self._metrics.histogram(names.STALE_REMEDIATION_SECONDS.name, bounds=_REMEDIATION_S)
        for one in watch.remediations.take_finished():
            remediation.observe(one.seconds or 0.0)
        counts = _counted({one.process.id: one.process for one, _ in watch.stale()}.values())
        for key in self._gauges.keys() - counts.keys():
            self._metrics.forget(self._gauges.pop(key))
        for (by, name), count in counts.items():
            gauge = self._gauges[by, name] = self._metrics.gauge(names.STALE_PROCESSES.name, f"by:{by}", f"name:{name}")
            gauge.set(count)


class _All:
    """Everything that a watcher has mapped, that of hidden rules, too."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def snapshot(self, *, with_ranges: bool = True) -> list[Mapped]:
        return self._watcher.snapshot(with_ranges=with_ranges, with_hidden=True)


def _event(change: StaleChange, now_ns: int) -> Stale | Renewed:
    one, answer, cause = change
    if cause is not None:
        return Renewed(one.rule, one.library, one.process, cause, now_ns)
    assert answer.stale is not None
    return Stale(one.rule, one.library, one.process, answer.stale, answer.reason, now_ns)


def _counted(processes: Iterable[Process]) -> dict[tuple[str, str], int]:
    """How many there are, by what they belong to. What belongs to nothing is always there."""
    counts = Counter(map(_owner, processes))
    found = {("host", ""): counts.pop(("host", ""), 0)}
    found |= dict(counts.most_common(MAX_NAMES))
    if len(counts) > MAX_NAMES:
        found["other", ""] = counts.total() - sum(count for _, count in counts.most_common(MAX_NAMES))
    return found


def _owner(process: Process) -> tuple[str, str]:
    target = restart_target(process.cgroup)
    if target.container is not None:
        return "container", target.container
    return ("host", "") if target.unit is None else ("unit", target.unit)
