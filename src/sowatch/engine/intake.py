"""`Intake`: takes records from the source, and tells the guard how late they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from sowatch.bpf.records import Record
from sowatch.engine.rate_limit import AdaptiveRateLimit
from sowatch.sources.base import EventSource

__all__ = ["Intake"]

#: The guard is told this often, also within a scan that takes long.
GUARD_S: Final = 1.0
#: Records of two CPUs may stand in the ring in another order than their times by some microseconds.
SLACK_NS: Final = 1_000_000


class Intake:
    """What is drained of one source, on the engine's thread.

    Args:
        source: is drained.
        max_records_s: see `sowatch.model.config.Config`.

    Attributes:
        drained_s: CLOCK_MONOTONIC when it was last drained, in seconds; from any thread.
    """

    def __init__(self, source: EventSource, max_records_s: int) -> None:
        self._source = source
        self._guard = AdaptiveRateLimit(source.record_limit, max_records_s)
        self.drained_s = time.monotonic()
        self._guard_at = self.drained_s + GUARD_S

    def drain(self) -> list[Record]:
        """What the source has, in the order of the ring."""
        records = self._source.drain()
        self.drained_s = now_s = time.monotonic()
        if now_s >= self._guard_at:
            self._guard_at = now_s + GUARD_S
            self._guard.adapt(time.monotonic_ns() - records[0].t_ns if records else 0)
        return records

    def drain_all(self) -> Iterator[list[Record]]:
        """What came until now, in batches: in a flood the ring is never empty."""
        until_ns = time.monotonic_ns() + SLACK_NS
        while more := self.drain():
            yield more
            if more[-1].t_ns > until_ns:
                break
