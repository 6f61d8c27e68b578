"""`AdaptiveRateLimit`: how many records one process may send, as far as the watch keeps up."""

from __future__ import annotations

import logging
from typing import Final

from sowatch.model.config import NO_GUARD
from sowatch.sources.base import Setting

__all__ = ["AdaptiveRateLimit"]

LOG = logging.getLogger("sowatch")

#: The oldest record that waits is this old: the watch falls behind, and processes may send fewer from now on,
#: down to the least that a process may send; and this young: more again.
LATE_NS: Final = 250_000_000
EARLY_NS: Final = 50_000_000
FEWEST_RECORDS_S: Final = 1_000


class AdaptiveRateLimit:
    """How many records a second one process may send: what the configuration says, fewer while the watch falls behind.

    So that processes that flood, however many they are, cost the others a second or two and no more.
    """

    def __init__(self, limit: Setting | None, max_records_s: int) -> None:
        self._limit = limit
        self._most = self._now = max_records_s

    def adapt(self, oldest_ns: int) -> None:
        """To be called about once a second with the age of the oldest record that waited; 0: none did."""
        before = self._now
        if self._most == NO_GUARD or self._limit is None:
            return
        if oldest_ns > LATE_NS:
            self._now = max(min(FEWEST_RECORDS_S, self._most), min(before, 8 * FEWEST_RECORDS_S) // 2)
        elif oldest_ns < EARLY_NS:
            self._now = min(self._most, 2 * before)
        if self._now == before:
            return
        self._limit.set(self._now)
        if before == self._most:
            LOG.warning(
                "the watch falls behind by %.1f s: until it has caught up, what a process reports beyond some %d "
                "changes a second is counted as lost and read from it instead.",
                oldest_ns / 1e9,
                self._now,
            )
        elif self._now == self._most:
            LOG.info("the watch has caught up")
