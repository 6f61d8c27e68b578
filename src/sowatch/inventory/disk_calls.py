"""`DiskCalls`: calls that read what file systems may never give, each within a deadline, and none twice in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, TypeVar

from sowatch.linux.timeout_worker import CallTimeout, TimeoutWorker

__all__ = ["LOOK_TIMEOUT_S", "DiskCalls", "Place"]

T = TypeVar("T")
#: What a call depends on: where one hangs, no other is made.
Place = tuple[object, ...]

#: A read that takes longer hangs. The more do already, the sooner the next one is given up.
LOOK_TIMEOUT_S: Final = 1.0
LEAST_TIMEOUT_S: Final = 0.05
MAX_HANGING: Final = 64


class DiskCalls:
    """Runs calls one after the other on a thread that is left behind where it hangs. One thread uses it.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._worker = TimeoutWorker(name, max_abandoned=MAX_HANGING)
        self._places: set[Place | None] = set()

    @property
    def hanging(self) -> int:
        """Calls that have not returned yet."""
        return self._worker.abandoned

    def hangs(self, place: Place) -> bool:
        """Whether a call for that place has not returned yet."""
        return place in self._places

    def run(
        self, call: Callable[[], T], otherwise: T, timeout_s: float | None = None, *, place: Place | None = None
    ) -> T:
        """What the call returns; ``otherwise`` if it does not in time, and at once where the place hangs."""
        if place in self._places:
            return otherwise
        try:
            return self.run_in_time(call, place, timeout_s)
        except CallTimeout:
            return otherwise

    def run_in_time(self, call: Callable[[], T], place: Place | None, timeout_s: float | None = None) -> T:
        """What the call returns. Where it does not, the place hangs from now on, until the call returns after all.

        Raises:
            CallTimeout: it did not return in time, or was refused.
        """
        has_returned = threading.Event()

        def returned() -> None:
            has_returned.set()
            self._places.discard(place)

        if timeout_s is None:
            timeout_s = max(LEAST_TIMEOUT_S, LOOK_TIMEOUT_S / (1 + self._worker.abandoned))
        try:
            return self._worker.run(call, timeout_s, on_return=returned)
        except CallTimeout as timeout:
            if place is not None and not timeout.is_refused:
                self._places.add(place)
                if has_returned.is_set():  # in this very moment
                    self._places.discard(place)
            raise

    def close(self) -> None:
        """Ends the thread, unless it hangs. Safe to call again."""
        self._worker.close()
