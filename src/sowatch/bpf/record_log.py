"""`RecordLog`: records that wait for the end of a scan, kept as the bytes that they came as.

A parsed record takes five to ten times the memory of its bytes, and how many come during a scan is decided by any user
of the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from sowatch.bpf.records import Record, parse

__all__ = ["Drained", "RecordLog"]

#: A position in a log is the number of the batch, and below these bits the offset in it, in bytes or in records.
_OFFSET_BITS: Final = 32


class Drained(list[Record]):
    """What one drain of a ring brought, beside the bytes that it was parsed from.

    Args:
        data: whole records, one behind the other.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        super().__init__(parse(data))
        self.data = data


class RecordLog:
    """Records in order. Each iteration parses anew what came as bytes. For one thread.

    Args:
        batches: the first ones.

    Attributes:
        size_bytes: what the records take as bytes.
    """

    __slots__ = ("_batches", "_length", "size_bytes")

    def __init__(self, batches: Iterable[Sequence[Record] | RecordLog] = ()) -> None:
        self._batches: list[bytes | Sequence[Record]] = []
        self._length = 0
        self.size_bytes = 0
        for batch in batches:
            self.extend(batch)

    def extend(self, batch: Sequence[Record] | RecordLog) -> None:
        """Adds a batch to the end. A list is not copied, and must not change any more."""
        if not batch:
            return
        self._length += len(batch)
        if isinstance(batch, RecordLog):
            self._batches += batch._batches  # noqa: SLF001 - of another one
            self.size_bytes += batch.size_bytes
        elif isinstance(batch, Drained):
            self._batches.append(batch.data)
            self.size_bytes += len(batch.data)
        else:
            self._batches.append(batch)
            self.size_bytes += sum(record.size for record in batch)

    def take_from(self, batch: Sequence[Record], is_taken: Callable[[Record], bool]) -> list[Record]:
        """Adds some records of a batch; gives the others, in order."""
        others: list[Record] = []
        if isinstance(batch, Drained):
            offset, taken = 0, []
            for record in batch:
                end = offset + record.size
                if is_taken(record):
                    taken.append(batch.data[offset:end])
                else:
                    others.append(record)
                offset = end
            self._length += len(taken)
            if taken:
                self._batches.append(b"".join(taken))
                self.size_bytes += len(self._batches[-1])
        else:
            kept: list[Record] = []
            for record in batch:
                (kept if is_taken(record) else others).append(record)
            self.extend(kept)
        return others

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Record]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[Sequence[Record]]:
        """The records of each batch."""
        for batch in self._batches:
            yield Drained(batch) if isinstance(batch, bytes) else batch

    def numbered(self) -> Iterator[tuple[int, Record]]:
        """Each record behind its position, which rises."""
        for number, batch in enumerate(self._batches):
            position = number << _OFFSET_BITS
            if isinstance(batch, bytes):
                for record in parse(batch):
                    yield position, record
                    position += record.size
            else:
                yield from enumerate(batch, position)

    def at(self, positions: Iterable[int]) -> Iterator[tuple[int, Record]]:
        """The same of some positions."""
        for position in positions:
            batch = self._batches[position >> _OFFSET_BITS]
            offset = position & ((1 << _OFFSET_BITS) - 1)
            if isinstance(batch, bytes):
                size = int.from_bytes(batch[offset : offset + 4], sys.byteorder)
                yield position, parse(batch[offset : offset + size])[0]
            else:
                yield position, batch[offset]
