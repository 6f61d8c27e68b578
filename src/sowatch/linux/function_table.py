"""`FunctionTable`: which function of a file an address is in; made of ``.dynsym`` and ``.symtab``."""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from sowatch.linux.elf_file import Segment
from sowatch.linux.symbols import Symbol, SymbolError, code_segments, list_functions, tables_digest

__all__ = ["FunctionTable", "Place", "function_table"]

#: Functions of all tables that are kept: some 50 bytes each.
_MAX_FUNCTIONS: Final = 500_000
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Place(NamedTuple):
    """Where an address is in a file: ``offset`` in the file, ``inside`` the function in bytes, if it is in one."""

    offset: int
    symbol: str | None
    inside: int


class FunctionTable:
    """The functions of one file, by their offsets in it.

    Args:
        functions: in any order; a name that is none but for debuggers loses against one that was there before.
        segments: the executable ones that are loaded.
    """

    __slots__ = ("_ends", "_names", "_places", "_segments", "_starts")

    def __init__(self, functions: Sequence[Symbol], segments: Sequence[Segment]) -> None:
        ordered = sorted(functions, key=lambda one: one.offset)
        self._starts = array("Q", (one.offset for one in ordered))
        self._ends = array("Q", (one.offset + one.size for one in ordered))
        names = [one.name.encode("utf-8", "surrogateescape") for one in ordered]
        self._names = b"".join(names)
        self._places = array("I", [0])
        for name in names:
            self._places.append(self._places[-1] + len(name))
        self._segments = sorted(segments, key=lambda one: one.vaddr)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, address: int, ranges: Sequence[tuple[int, int]]) -> Place:
        """Where an address of a process is in the file.

        Args:
            address: in memory.
            ranges: where the process has the executable parts of the file; the lowest begins with the page that the
                lowest executable segment begins in, as ld.so and the kernel map them.
        """
        start = min(start for start, _ in ranges)
        if not self._segments:
            return Place(address - start, None, 0)
        first = self._segments[0]
        vaddr = address - start + first.vaddr // _PAGE_BYTES * _PAGE_BYTES
        segment = next((one for one in reversed(self._segments) if one.vaddr <= vaddr), first)
        offset = vaddr - segment.vaddr + segment.offset
        at = bisect_right(self._starts, offset) - 1
        # Written by hand in assembler, a function may have no size; then it goes up to the next one.
        if at < 0 or not (offset < self._ends[at] or self._ends[at] == self._starts[at]):
            return Place(offset, None, 0)
        name = self._names[self._places[at] : self._places[at + 1]].decode("utf-8", "surrogateescape")
        return Place(offset, name, offset - self._starts[at])


class _Kept:
    """Tables by the digest of what they were made of; any thread may ask."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tables: OrderedDict[bytes, FunctionTable] = OrderedDict()
        self.functions = 0


_KEPT: Final = _Kept()


def function_table(fd: int) -> FunctionTable | None:
    """The functions of a file; None if it cannot be read.

    Takes some milliseconds, for a hundred thousand functions half a second: never on the thread that drains the kernel.
    """
    try:
        digest = tables_digest(fd)
        with _KEPT.lock:
            found = _KEPT.tables.get(digest)
            if found is not None:
                _KEPT.tables.move_to_end(digest)
                return found
        made = FunctionTable(list_functions(fd), code_segments(fd))
    except SymbolError:
        return None
    with _KEPT.lock:
        if digest not in _KEPT.tables:
            _KEPT.tables[digest] = made
            _KEPT.functions += len(made)
        while _KEPT.functions > _MAX_FUNCTIONS and len(_KEPT.tables) > 1:
            _KEPT.functions -= len(_KEPT.tables.popitem(last=False)[1])
    return made
