"""How long things took, counted by bucket: what the core records for telemetry to show.

Imports nothing of the package. The packages below ``telemetry`` measure with this and know nothing of
metrics or exporters; ``telemetry`` reads it when somebody asks.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Final, Self

from msgspec import Struct

__all__ = ["BOUNDS_S", "CALLBACKS", "Distribution", "Latency", "RuleTimings"]

#: Upper bounds of the buckets, in seconds: from a callback that only counts to one that hangs.
BOUNDS_S: Final = (1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0)

#: The callbacks of a rule.
CALLBACKS: Final = ("on_load", "on_unload", "on_activate", "on_deactivate")


class Distribution(Struct, frozen=True, gc=False):
    """Values by bucket. ``counts`` has one entry for each bound (values up to it), and one for the rest.

    ``total`` is the sum of the values, in their unit.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def __sub__(self, earlier: Self) -> Distribution:
        """What came after an earlier reading of the same recorder."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Distribution(self.bounds, counts, self.total - earlier.total)


class Latency:
    """Records values into buckets. All methods may be called from any thread.

    Args:
        bounds: upper bounds of the buckets, rising.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_total")

    def __init__(self, bounds: Sequence[float] = BOUNDS_S) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Takes one value, usually seconds; one below zero (two clocks that disagree) counts as zero."""
        if math.isnan(value):
            return
        value = max(0.0, value)
        place = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[place] += 1
            self._total += value

    def add(self, more: Distribution) -> None:
        """Takes values that were recorded elsewhere with the same bounds.

        Raises:
            ValueError: the bounds differ.
        """
        if more.bounds != self._bounds:
            raise ValueError("distributions of different bounds cannot be added")
        with self._lock:
            self._counts = [mine + theirs for mine, theirs in zip(self._counts, more.counts, strict=True)]
            self._total += more.total

    def read(self) -> Distribution:
        """What was recorded so far."""
        with self._lock:
            return Distribution(self._bounds, tuple(self._counts), self._total)


class RuleTimings:
    """How long the callbacks of one rule took.

    Args:
        names: the callbacks that it has, of `CALLBACKS`.

    Attributes:
        callbacks: by name: from the call to its return, also if it raised.
        delays: by name, ``on_load`` and ``on_activate``: from the fact in the kernel to the call.
        attach: from the wish to activate a file to ``on_activate``'s return, opening the file included.
    """

    __slots__ = ("attach", "callbacks", "delays")

    def __init__(self, names: Collection[str] = CALLBACKS) -> None:
        self.callbacks = {name: Latency() for name in names}
        self.delays = {name: Latency() for name in ("on_load", "on_activate") if name in names}
        self.attach = Latency()
