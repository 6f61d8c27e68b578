"""`RecordClock`: the times of records, which rise strictly, and whether the wall clock was set. Pure."""

from __future__ import annotations

from typing import Final

__all__ = ["RecordClock"]

NS: Final = 1_000_000_000
#: The wall clock was set if it went so much further than the monotonic one, or so much less far.
SET_NS: Final = 60 * NS
#: What is further ahead no receiver takes.
AHEAD_NS: Final = 300 * NS


class RecordClock:
    """See `tick` and `next_ns`."""

    __slots__ = ("_high_ns", "_now_ns", "_offset_ns", "_version_ns")

    def __init__(self) -> None:
        self._now_ns = 0
        #: The wall clock less the monotonic one, when that was last looked at as right.
        self._offset_ns: int | None = None
        self._version_ns = 0
        #: The greatest time that was given before times went back; 0: they did not, or it is over.
        self._high_ns = 0

    def tick(self, now_s: float, now_ns: int) -> bool:
        """Time goes on. True: the clock was set, and what follows is no continuation of the records before it.

        Times go back only with a clock that goes back by more than a receiver takes: if it was ahead, the receiver has
        taken none of the records before. If it was right, and is wrong now, the receiver has them, as later than what
        follows; no heartbeat is later, so the host is silent until the clock has passed them, which counts as set, too.
        """
        self._now_ns = now_ns
        offset_ns = now_ns - round(now_s * NS)
        if self._offset_ns is None:
            self._offset_ns = offset_ns
            return False
        has_passed = 0 < self._high_ns < now_ns
        if abs(offset_ns - self._offset_ns) <= SET_NS and not has_passed:
            return False
        self._offset_ns = offset_ns
        if has_passed:
            self._high_ns = 0
        if self._version_ns > now_ns + AHEAD_NS:
            self._high_ns = max(self._high_ns, self._version_ns)
            self._version_ns = now_ns
        return True

    def next_ns(self) -> int:
        """The time of the next record, ns since the epoch."""
        self._version_ns = max(self._version_ns + 1, self._now_ns)
        return self._version_ns
