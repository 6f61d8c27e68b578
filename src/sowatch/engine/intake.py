"""`Intake`: takes records from the source, adapts the guard to how late they are, and outlives a lack of resources."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Final

from sowatch.bpf.records import Record
from sowatch.engine.rate_limit import AdaptiveRateLimit
from sowatch.linux.descriptors import is_lack_of_resources
from sowatch.model.stats import Losses
from sowatch.sources.base import EventSource

__all__ = ["Intake"]

LOG = logging.getLogger("sowatch")

#: The guard is adapted this often, also within a scan that takes long.
GUARD_S: Final = 1.0
#: Records of two CPUs may stand in the ring in another order than their times by some microseconds.
SLACK_NS: Final = 1_000_000
#: Between two lines about what is lacking.
LOG_EVERY_S: Final = 60.0
#: A drain that failed is not tried again at once.
PAUSE_S: Final = 0.05


class Intake:
    """What is drained of one source, on the engine's thread.

    Who uses up the descriptors of the process or the memory of the host (a client with many connections is enough) is
    not to end the watch: what fails for that reason is counted, and tried again.

    Args:
        source: is drained.
        max_records_s: see `sowatch.model.config.Config`.

    Attributes:
        drained_s: CLOCK_MONOTONIC when it was last drained, in seconds; from any thread.
        error: what was lacking last; None: nothing ever was.
    """

    def __init__(self, source: EventSource, max_records_s: int) -> None:
        self._source = source
        self._guard = AdaptiveRateLimit(source.record_limit, max_records_s)
        self._failures = 0
        self._logged_s = float("-inf")
        self.error: Exception | None = None
        self.drained_s = time.monotonic()
        self._guard_at = self.drained_s + GUARD_S

    def drain(self) -> list[Record]:
        """What the source has, in the order of the ring."""
        try:
            records = self._source.drain()
        except Exception as error:  # noqa: BLE001 - raised again if it is another one
            self.fail(error)
            time.sleep(PAUSE_S)
            records = []
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

    def losses(self) -> Losses:
        """What was lost so far, by where."""
        losses = self._source.losses()
        return losses._replace(unread=losses.unread + self._failures)

    def fail(self, error: Exception) -> None:
        """Takes an error that may have cost records: a loss. Raises it again unless it is a lack of resources."""
        self.excuse(error)
        self._failures += 1

    def excuse(self, error: Exception) -> None:
        """Takes an error that has cost no record, and logs it. Raises it again unless it is a lack of resources."""
        if not is_lack_of_resources(error):
            raise error
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            LOG.error(
                "processes cannot be read, which is tried again: %s Raise LimitNOFILE, or find who uses up "
                "descriptors or memory.",
                error,
            )
        # Without the frames, which have what a scan has found so far.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error = error
