"""`DiskCalls`: calls that read what file systems may never give, each within a deadline, and none twice in vain."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar

from sowatch.linux.timeout_worker import CallTimeout, TimeoutWorker

__all__ = ["LOOK_TIMEOUT_S", "DiskCalls", "HangingCalls", "Place"]

T = TypeVar("T")
#: What a call depends on: where one hangs, no other is made.
Place = tuple[object, ...]

#: A read that takes longer hangs. The more do already, the sooner the next one is given up.
LOOK_TIMEOUT_S: Final = 1.0
LEAST_TIMEOUT_S: Final = 0.05
MAX_HANGING: Final = 64


class HangingCalls:
    """Calls that were given up and have not returned yet, by their places. Any thread.

    Each has a thread and what that has open. Several `DiskCalls`, of one thread each, share one of these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: Counter[Place | None] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, place: Place | None) -> bool:
        return place in self._places

    def add(self, place: Place | None) -> None:
        """A call was given up."""
        with self._lock:
            self._places[place] += 1
            self._count += 1

    def remove(self, place: Place | None) -> None:
        """It has returned after all."""
        with self._lock:
            self._count -= 1
            self._places[place] -= 1
            if not self._places[place]:
                del self._places[place]


class DiskCalls:
    """Runs calls one after the other on a thread that is left behind where it hangs. One thread uses it.

    Args:
        name: of the threads.
        hanging: shared with others, which makes no call where one of theirs hangs, nor beyond `MAX_HANGING` of all
            (one more for each thread that makes calls in that moment). Default: its own.
    """

    def __init__(self, name: str, hanging: HangingCalls | None = None) -> None:
        self._worker = TimeoutWorker(name, max_abandoned=MAX_HANGING)
        self._hanging = HangingCalls() if hanging is None else hanging

    @property
    def hanging(self) -> int:
        """Calls that have not returned yet."""
        return len(self._hanging)

    def hangs(self, place: Place) -> bool:
        """Whether a call for that place has not returned yet."""
        return place in self._hanging

    def run(
        self, call: Callable[[], T], otherwise: T, timeout_s: float | None = None, *, place: Place | None = None
    ) -> T:
        """What the call returns; ``otherwise`` if it does not in time, and at once where the place hangs."""
        if place is not None and place in self._hanging:
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
        hanging = len(self._hanging)
        if hanging >= MAX_HANGING:
            raise CallTimeout(is_refused=True)
        if timeout_s is None:
            timeout_s = max(LEAST_TIMEOUT_S, LOOK_TIMEOUT_S / (1 + hanging))
        given_up = _GivenUp(self._hanging, place)
        try:
            return self._worker.run(call, timeout_s, on_return=given_up.returned)
        except CallTimeout as timeout:
            if not timeout.is_refused:
                given_up.add()
            raise

    def close(self) -> None:
        """Ends the thread, unless it hangs. Safe to call again."""
        self._worker.close()


class _GivenUp:
    """One call that was given up: counted until it returns, not at all if it did in that very moment."""

    def __init__(self, hanging: HangingCalls, place: Place | None) -> None:
        self._hanging = hanging
        self._place = place
        self._lock = threading.Lock()
        self._has_returned = False
        self._is_counted = False

    def add(self) -> None:
        """On the thread that gave it up."""
        with self._lock:
            self._is_counted = not self._has_returned
            if self._is_counted:
                self._hanging.add(self._place)

    def returned(self) -> None:
        """On the thread that was left behind."""
        with self._lock:
            self._has_returned = True
            if self._is_counted:
                self._hanging.remove(self._place)
