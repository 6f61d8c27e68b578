"""When to read ``/proc`` again, and of which processes: what everything that polls shares.

Works for every user; starts no thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from sowatch.model.config import Config
from sowatch.model.errors import SowatchError

__all__ = ["PollTimer"]

LOG = logging.getLogger("sowatch")

# <linux/timerfd.h>, <bits/types/struct_itimerspec.h>; os.timerfd_create replaces this from Python 3.13 on.
CLOCK_MONOTONIC: Final = 1
TFD_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
ItimerSpec = ctypes.c_long * 4


class PollTimer:
    """When to poll: every ``poll_interval_s``, or as much rarer as ``poll_cpu_percent`` asks for.

    Args:
        config: both.
        what: for the log.
        others_s: CPU seconds that other threads have spent on polls so far.

    Raises:
        SowatchError: there is no descriptor left.
    """

    def __init__(self, config: Config, what: str, others_s: Callable[[], float] = lambda: 0.0) -> None:
        self._least_s = config.poll_interval_s
        self._share = config.poll_cpu_percent / 100
        self._what = what
        self._cpu_s: Callable[[], float] = lambda: time.thread_time() + others_s()
        self._is_asked = False
        self._has_warned = False
        #: Seconds between the beginnings of two polls, as it is now.
        self.interval_s = config.poll_interval_s
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_FLAGS)
        if self._fd < 0:
            reason = os.strerror(ctypes.get_errno())
            raise SowatchError(f"cannot make a timer: {reason}. Check the limits of this process (`ulimit -n`).")

    def fileno(self) -> int:
        """Polls readable when it is time."""
        return self._fd

    def ask(self) -> None:
        """Makes it time now."""
        self._is_asked = True

    def is_due(self) -> bool:
        """Whether it is time; once for each time."""
        is_due, self._is_asked = self._is_asked, False
        with suppress(BlockingIOError):
            is_due |= len(os.read(self._fd, 8)) > 0
        return is_due

    @contextmanager
    def look(self, *, counts: bool = True) -> Iterator[None]:
        """Takes the time of a poll, and sets the next one. ``counts`` is false for the first, which costs most."""
        begun, used = time.monotonic(), self._cpu_s()
        try:
            yield
        finally:
            if counts:
                self._pace(self._cpu_s() - used)
            self._set(begun + self.interval_s - time.monotonic())

    def _pace(self, cpu_s: float) -> None:
        self.interval_s = max(self._least_s, cpu_s / self._share)
        if self.interval_s > self._least_s and not self._has_warned:
            self._has_warned = True
            LOG.warning(
                "%s took %.0f ms of CPU, so the next one is in %.1f s, not %g s. Raise poll_cpu_percent (%g) for more",
                self._what, 1000 * cpu_s, self.interval_s, self._least_s, 100 * self._share,
            )  # fmt: skip

    def _set(self, seconds: float) -> None:
        # 0 would disarm it.
        whole, rest = divmod(max(1_000_000, int(seconds * 1e9)), 1_000_000_000)
        self._libc.timerfd_settime(self._fd, 0, ItimerSpec(0, 0, whole, rest), None)

    def close(self) -> None:
        """Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
