"""When a process has started, by the wall clock as it goes now: `started_ns`."""

from __future__ import annotations

import time
from typing import Final

__all__ = ["started_ns"]

#: Two clocks are read one after the other: what differs by less is no other time.
_JITTER_NS: Final = 1_000_000
#: Of both, until no more than that lies between them.
_MOST_READS: Final = 5
_booted_ns = 0


def started_ns(start_ns: int) -> int:
    """The wall clock, in ns since the epoch, at a time after boot (CLOCK_BOOTTIME, as a process's ``start_ns``).

    If the clock was set since, it is what it would have shown. Any thread.
    """
    global _booted_ns  # noqa: PLW0603  (so that a process has one start, whenever that is asked for)
    before_ns = now_ns = 0
    for _ in range(_MOST_READS):
        before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        now_ns = time.time_ns()
        if time.clock_gettime_ns(time.CLOCK_BOOTTIME) - before_ns < _JITTER_NS:
            break  # else the thread lost its CPU between the two
    booted_ns = now_ns - before_ns
    if abs(booted_ns - _booted_ns) > _JITTER_NS:
        _booted_ns = booted_ns
    return _booted_ns + start_ns
