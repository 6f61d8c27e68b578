"""`RangeMap`: what is where in an address space, by address; `Coverage` and `RangeSnapshot`: how two of them differ.

Pure. A process decides how many ranges it has and in which order they come and go, so no operation here costs
more than the logarithm of their number, plus what it takes away, plus a move of memory within a list.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Hashable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar

__all__ = ["MAX_TENTATIVE", "Coverage", "Range", "RangeMap", "RangeSnapshot"]

Range = tuple[int, int]
K = TypeVar("K", bound=Hashable)

#: So many keys may be reported at one address before it was scanned. At most one of them really is there, so the
#: one that was reported first goes: else a list of tentative ones at one address could grow without limit.
MAX_TENTATIVE: Final = 8


@lru_cache(2048)
def _alone(key: Any) -> tuple[Any, ...]:
    """A tuple of one key: the same for all ranges of a file, which many processes have."""
    return (key,)


class RangeMap(Generic[K]):
    """Disjoint ranges in order, each with the keys that are there: mostly one, several while it is not known which.

    Neighbours with the same keys are one range.

    >>> ranges = RangeMap()
    >>> ranges.add("a", 0, 10), ranges.add("a", 10, 20)
    ([], [])
    >>> ranges.take_away(5, 15), ranges.of_each()
    ([], {'a': [(0, 5), (15, 20)]})
    """

    __slots__ = ("_counts", "_ends", "_keys", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._keys: list[tuple[K, ...]] = []
        #: In how many of the ranges a key is.
        self._counts: dict[K, int] = {}

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[int, int, K]]) -> RangeMap[K]:
        """Of (start, end, key), in any order; those that overlap are there together."""
        made = cls()
        for start, end, key in sorted(rows, key=lambda row: row[0]):
            if not made._ends or start > made._ends[-1]:
                made._starts.append(start)
                made._ends.append(end)
                made._keys.append(_alone(key))
                made._counts[key] = made._counts.get(key, 0) + 1
            else:
                made.add(key, start, end)
        return made

    def copy(self) -> RangeMap[K]:
        """Another one with the same ranges."""
        new: RangeMap[K] = RangeMap()
        new._starts, new._ends = self._starts.copy(), self._ends.copy()
        new._keys, new._counts = self._keys.copy(), self._counts.copy()
        return new

    def is_same(self, other: RangeMap[K]) -> bool:
        """Whether the other one has the same ranges with the same keys."""
        return self._starts == other._starts and self._ends == other._ends and self._keys == other._keys

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, key: K) -> bool:
        return key in self._counts

    def count(self, key: K) -> int:
        """In how many ranges it is."""
        return self._counts.get(key, 0)

    def add(self, key: K, start: int, end: int) -> list[K]:
        """The key is there from now on, beside what is there.

        Returns:
            Keys that are nowhere any more: see `MAX_TENTATIVE`.
        """
        if not self._starts and start < end:  # as most processes have it of their first library
            self._starts.append(start)
            self._ends.append(end)
            self._keys.append((key,))
            self._counts[key] = 1
            return []
        first, last = self._overlapped(start, end)
        pieces: list[tuple[int, int, tuple[K, ...]]] = []
        at = start
        for number in range(first, last):
            low, high, keys = self._starts[number], self._ends[number], self._keys[number]
            if low < start:
                pieces.append((low, start, keys))
                low = start
            if low > at:
                pieces.append((at, low, _alone(key)))
            at = min(high, end)
            pieces.append((low, at, keys if key in keys else (*keys[1 - MAX_TENTATIVE :], key)))
            if high > end:
                pieces.append((end, high, keys))
        if at < end:
            pieces.append((at, end, _alone(key)))
        return self._splice(first, last, pieces)

    def take_away(self, start: int, end: int, *, but: K | None = None) -> list[K]:
        """Nothing is there any more, but for one key where it was.

        Returns:
            Keys that are nowhere any more.
        """
        first, last = self._overlapped(start, end)
        if first == last:
            return []
        pieces: list[tuple[int, int, tuple[K, ...]]] = []
        for number in range(first, last):
            low, high, keys = self._starts[number], self._ends[number], self._keys[number]
            if low < start:
                pieces.append((low, start, keys))
            if but is not None and but in keys:
                pieces.append((max(low, start), min(high, end), _alone(but)))
            if high > end:
                pieces.append((end, high, keys))
        return self._splice(first, last, pieces)

    def without(self, left_out: Collection[K]) -> RangeMap[K]:
        """Another one with the same ranges, but not those of some keys."""
        return RangeMap.of_rows(
            (low, high, key)
            for low, high, keys in zip(self._starts, self._ends, self._keys, strict=True)
            for key in keys
            if key not in left_out
        )

    def has_any(self, start: int, end: int) -> bool:
        """Whether anything is there."""
        first, last = self._overlapped(start, end)
        return first < last

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, tuple[K, ...]]]:
        """What is there: (start, end, keys), cut off at both ends."""
        for number in range(*self._overlapped(start, end)):
            yield max(start, self._starts[number]), min(end, self._ends[number]), self._keys[number]

    def of_each(self) -> dict[K, list[Range]]:
        """The ranges of every key, in order."""
        found: dict[K, list[Range]] = {}
        for start, end, keys in zip(self._starts, self._ends, self._keys, strict=True):
            for key in keys:
                ranges = found.setdefault(key, [])
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = (ranges[-1][0], end)
                else:
                    ranges.append((start, end))
        return found

    def _overlapped(self, start: int, end: int) -> tuple[int, int]:
        """The numbers of the ranges that have something of it: from the first, up to the last but without it."""
        return bisect_right(self._ends, start), bisect_left(self._starts, end)

    def _splice(self, first: int, last: int, pieces: list[tuple[int, int, tuple[K, ...]]]) -> list[K]:
        """Puts pieces in the place of ranges, joined with their neighbours; gives the keys that are nowhere now."""
        if first > 0 and pieces and self._ends[first - 1] == pieces[0][0]:
            first -= 1
            pieces.insert(0, (self._starts[first], self._ends[first], self._keys[first]))
        if last < len(self._starts) and pieces and self._starts[last] == pieces[-1][1]:
            pieces.append((self._starts[last], self._ends[last], self._keys[last]))
            last += 1
        joined: list[tuple[int, int, tuple[K, ...]]] = []
        for piece in pieces:
            if joined and joined[-1][1] == piece[0] and joined[-1][2] == piece[2]:
                joined[-1] = (joined[-1][0], piece[1], piece[2])
            else:
                joined.append(piece)
        counts, was_there = self._counts, []
        for keys in self._keys[first:last]:
            for key in keys:
                counts[key] -= 1
                was_there.append(key)
        for _, _, keys in joined:
            for key in keys:
                counts[key] = counts.get(key, 0) + 1
        self._starts[first:last] = [start for start, _, _ in joined]
        self._ends[first:last] = [end for _, end, _ in joined]
        self._keys[first:last] = [keys for _, _, keys in joined]
        nowhere = [key for key in dict.fromkeys(was_there) if not counts[key]]
        for key in nowhere:
            del counts[key]
        return nowhere


class Coverage:
    """How much of any range a set of ranges covers; the set does not change."""

    __slots__ = ("_below", "_ends", "_starts")

    def __init__(self, ranges: Iterable[Range]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        #: How much the ranges before each one cover together.
        self._below: list[int] = [0]
        for start, end in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                if end > self._ends[-1]:
                    self._below[-1] += end - self._ends[-1]
                    self._ends[-1] = end
                continue
            self._starts.append(start)
            self._ends.append(end)
            self._below.append(self._below[-1] + end - start)

    @property
    def total(self) -> int:
        """What they cover together."""
        return self._below[-1]

    def within(self, start: int, end: int) -> int:
        """What they cover of the range."""
        return self._up_to(end) - self._up_to(start)

    def _up_to(self, address: int) -> int:
        number = bisect_right(self._starts, address)
        if not number:
            return 0
        return self._below[number - 1] + min(address, self._ends[number - 1]) - self._starts[number - 1]


class RangeSnapshot(Generic[K]):
    """Ranges that records change, beside those that a scan found; knows at every moment whether they are the same.

    The sum of what differs, in bytes for each key, is kept and corrected: a record costs what it changes.

    Args:
        ranges: the ranges as they are now; they are not changed.
        scanned: (start, end, key) of the scan.
        left_out: keys that are not compared.
    """

    __slots__ = ("_difference", "_left_out", "_ranges", "_scanned")

    def __init__(
        self, ranges: RangeMap[K], scanned: Iterable[tuple[int, int, K]], left_out: Collection[K] = ()
    ) -> None:
        self._left_out = left_out
        by_key: dict[K, list[Range]] = {}
        for start, end, key in scanned:
            if key not in left_out:
                by_key.setdefault(key, []).append((start, end))
        self._scanned = {key: Coverage(found) for key, found in by_key.items()}
        self._ranges = ranges.without(left_out) if left_out else ranges.copy()
        self._difference = sum(one.total for one in self._scanned.values())
        self._difference += self._weight(0, 1 << 64)

    @property
    def is_same(self) -> bool:
        """Whether the scan found just what is there now."""
        return not self._difference

    def put(self, key: K | None, start: int, end: int) -> None:
        """From now on this key is there, and no other; None: none at all."""
        self._difference -= self._weight(start, end)
        self._ranges.take_away(start, end)
        if key is not None and key not in self._left_out:
            self._ranges.add(key, start, end)
            self._difference += self._weight(start, end)

    def _weight(self, start: int, end: int) -> int:
        """What these ranges add to the difference: bytes that the scan has not, less those that it has.

        All that the scan found counts as different from the outset, so what it has is taken off twice: once as it
        is not missing, once as it is not too much.
        """
        weight = 0
        for low, high, keys in self._ranges.within(start, end):
            for key in keys:
                scanned = self._scanned.get(key)
                weight += high - low - (2 * scanned.within(low, high) if scanned is not None else 0)
        return weight
