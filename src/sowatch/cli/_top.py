"""What ``top`` shows and in which order: columns, sorting, filtering, and what a key does to them. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from msgspec import Struct

from sowatch.inventory.inventory import InventoryView, LibraryRow, ProcessRow
from sowatch.model.escape import visible

__all__ = ["VIEWS", "Column", "State", "cells", "head", "press", "rows_of", "title_of"]

_ID_LENGTH: Final = 12


def _word(text: str | None) -> str:
    return "-" if not text else visible(text)


def _short(text: str | None) -> str:
    return _word(text if text is None else text[:_ID_LENGTH])


def _since(row: LibraryRow | ProcessRow) -> str:
    """How long ago the process began; of a library, how long some process has had it, as far as that is known."""
    return _age(_begun_ns(row))


def _begun_ns(row: LibraryRow | ProcessRow) -> int:
    """When, in ns since boot: a library that was there before the watch is as old as the oldest process that has it."""
    if isinstance(row, ProcessRow):
        return row.process.start_ns
    if row.is_older:
        return row.oldest_start_ns
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.time_ns() + row.since_ns


def _age(begun_ns: int) -> str:
    seconds = max(0, (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - begun_ns) // 1_000_000_000)
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _stale_count(row: ProcessRow) -> str:
    """How many are stale; with a question mark where it cannot be determined of others."""
    return f"{row.stale_libraries}{'?' if row.unknown_libraries else ''}"


class Column(Struct, frozen=True):
    """One column: its title, the text of a row's cell, and what it is sorted by.

    ``width`` is in terminal columns, 0 takes what is left; ``importance`` says which go first where there
    is little space, the lowest ones.
    """

    title: str
    text: Callable[[Any], str]
    order: Callable[[Any], Any]
    width: int
    importance: int
    is_number: bool = False
    is_down: bool = False


VIEWS: Final[dict[str, tuple[Column, ...]]] = {
    "libraries": (
        Column("PROCESSES", lambda row: str(len(row.holders)), lambda row: len(row.holders), 10, 4, True, True),
        Column("CONTAINERS", lambda row: str(len(row.containers)), lambda row: len(row.containers), 11, 1, True, True),
        Column("STALE", lambda row: _word(row.staleness), lambda row: row.staleness or "", 8, 3, False, True),
        Column("SINCE", _since, lambda row: -_begun_ns(row), 8, 2),
        Column("BUILD ID", lambda row: _short(row.library.build_id), lambda row: row.library.build_id or "", 12, 0),
        Column("PATH", lambda row: visible(row.library.path), lambda row: row.library.path, 0, 5),
    ),
    "processes": (
        Column("PID", lambda row: str(row.process.pid), lambda row: row.process.pid, 7, 5, True),
        Column("LIBRARIES", lambda row: str(row.libraries), lambda row: row.libraries, 10, 4, True, True),
        Column("STALE", _stale_count, lambda row: (row.stale_libraries, row.unknown_libraries), 6, 3, True, True),
        Column("SINCE", _since, lambda row: -_begun_ns(row), 8, 1),
        Column("CONTAINER", lambda row: _short(row.process.container), lambda row: row.process.container or "", 12, 0),
        Column("COMM", lambda row: _word(row.process.comm), lambda row: row.process.comm or "", 15, 2),
        Column("PROGRAM", lambda row: _word(row.process.exe), lambda row: row.process.exe or "", 0, 5),
    ),
}
#: The column that each view is sorted by at first.
_FIRST_ORDER: Final = {"libraries": 0, "processes": 1}


class State:
    """What was chosen with keys.

    Attributes:
        view: ``libraries`` or ``processes``.
        of: the number of the row whose processes or libraries these are; None: all.
        filter: words, each of which has to be in a row; ``typing`` while they are being written.
        column: which one is sorted by, ``is_down`` from the greatest on.
        cursor: the place of the row that the cursor is on, ``selected`` its number once it is drawn.
        first: the place of the first row on the screen.
    """

    def __init__(self, view: str = "libraries") -> None:
        self._below: list[dict[str, Any]] = []
        self.typing = False
        self._begin(view, None)

    def _begin(self, view: str, of: int | None) -> None:
        self.view, self.of, self.filter = view, of, ""
        #: The cursor stays with its row where that moves; not before it was moved to it.
        self._is_placed = False
        self.selected: int | None = None
        self.order_by(_FIRST_ORDER[view])

    def show(self, view: str) -> None:
        """Changes to a view of everything, in its own order, from the top."""
        filter_before = self.filter
        self._below.clear()
        self._begin(view, None)
        self.filter = filter_before

    def open(self) -> None:
        """Changes to who has the library that the cursor is on, or to what the process has."""
        if self.selected is None:
            return
        number = self.selected
        kept = ("view", "of", "filter", "column", "is_down", "cursor", "first", "selected", "_is_placed")
        self._below.append({name: getattr(self, name) for name in kept})
        self._begin("processes" if self.view == "libraries" else "libraries", number)

    def back(self) -> None:
        """Drops the filter; without one, returns to where `open` was called."""
        if self.filter:
            self.filter = ""
        elif self._below:
            for name, value in self._below.pop().items():
                setattr(self, name, value)

    def order_by(self, column: int) -> None:
        """Sorts by a column, in the direction that suits it."""
        self.column = column % len(VIEWS[self.view])
        self.is_down = VIEWS[self.view][self.column].is_down
        self.go_to(0, is_placed=False)

    def go_to(self, place: int, *, is_placed: bool = True) -> None:
        """Moves the cursor."""
        self.cursor, self._is_placed = place, is_placed
        self.selected = None
        if not place:
            self.first = 0

    def settle(self, numbers: Sequence[int], page_rows: int) -> None:
        """Puts the cursor on one of these rows, and on the screen; to be called with what is drawn."""
        if self._is_placed and self.selected in numbers:
            self.cursor = numbers.index(self.selected)
        self.cursor = max(0, min(self.cursor, len(numbers) - 1))
        self.selected = numbers[self.cursor] if numbers else None
        self.first = max(0, min(self.first, len(numbers) - page_rows, self.cursor))
        self.first = max(self.first, self.cursor - page_rows + 1)


def press(state: State, key: str, page_rows: int) -> bool:
    """Does what a key says. Keys are characters, or names like ``up``, ``page down``, ``escape``.

    Args:
        state: is changed.
        key: as `sowatch.cli._keys` reads them.
        page_rows: rows that fit on the screen.

    Returns:
        Whether to go on; False for the key that ends.
    """
    if state.typing:
        _type(state, key)
        return True
    moves = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page_rows, "page down": page_rows, " ": page_rows}
    if key in moves:
        state.go_to(max(0, state.cursor + moves[key]))
    elif key in ("home", "g"):
        state.go_to(0, is_placed=False)
    elif key in ("end", "G"):
        state.go_to(1 << 30)
    elif key in ("tab", "l", "p"):
        other = "processes" if state.view == "libraries" else "libraries"
        state.show({"tab": other, "l": "libraries", "p": "processes"}[key])
    elif key in ("s", "S"):
        state.order_by(state.column + (1 if key == "s" else -1))
    elif key == "r":
        state.is_down = not state.is_down
    elif key == "/":
        state.typing = True
    elif key == "enter":
        state.open()
    elif key == "escape":
        state.back()
    return key not in ("q", "Q")


def _type(state: State, key: str) -> None:
    if key == "enter":
        state.typing = False
    elif key == "escape":
        state.filter, state.typing = "", False
    elif key == "backspace":
        state.filter = state.filter[:-1]
    elif len(key) == 1 and key.isprintable():
        state.filter += key
    state.go_to(0, is_placed=False)


def rows_of(view: InventoryView, state: State) -> list[Any]:
    """The rows that pass the filter, in order.

    Each word of the filter has to be in a library, or in a process that has it; where the rows are those of one
    library or process, in the row.
    """
    rows: list[Any] = list((view.libraries if state.view == "libraries" else view.processes).values())
    if state.of is not None:
        rows = _belonging(view, state.view, state.of)
    for word in state.filter.lower().split():
        rows = _with_word(view, rows, word, is_own=state.of is not None)
    rows.sort(key=lambda row: row.number)
    rows.sort(key=VIEWS[state.view][state.column].order, reverse=state.is_down)
    return rows


def _belonging(view: InventoryView, name: str, of: int) -> list[Any]:
    if name == "libraries":
        return [row for row in view.libraries.values() if of in row.holders]
    library = view.libraries.get(of)
    return [] if library is None else [view.processes[number] for number in library.holders]


def _with_word(view: InventoryView, rows: list[Any], word: str, *, is_own: bool) -> list[Any]:
    found = [row for row in rows if word in _text(row)]
    if is_own or not rows:
        return found
    numbers = {row.number for row in found}
    if isinstance(rows[0], LibraryRow):
        holders = {row.number for row in view.processes.values() if word in _text(row)}
        return [row for row in rows if row.number in numbers or not holders.isdisjoint(row.holders)]
    numbers.update(holder for row in view.libraries.values() if word in _text(row) for holder in row.holders)
    return [row for row in rows if row.number in numbers]


def title_of(view: InventoryView, state: State) -> str:
    """What the rows are, safe to show: ``libraries``, or of which process; ``processes``, or with which library."""
    if state.of is None:
        return state.view
    if state.view == "libraries":
        holder = view.processes.get(state.of)
        return "libraries of " + ("a process that ended" if holder is None else _who(holder))
    library = view.libraries.get(state.of)
    name = "a library that nobody has any more" if library is None else visible(library.library.path.rpartition("/")[2])
    return f"processes with {name}"


def _who(row: ProcessRow) -> str:
    return f"{_word(row.process.comm)} {row.process.pid}"


def head(view: str) -> list[str]:
    """The titles of a view's columns."""
    return [column.title for column in VIEWS[view]]


def cells(row: LibraryRow | ProcessRow, view: str) -> list[str]:
    """The cells of a row, safe to show."""
    return [column.text(row) for column in VIEWS[view]]


def _text(row: LibraryRow | ProcessRow) -> str:
    if isinstance(row, LibraryRow):
        found = [row.library.path, visible(row.library.path), row.library.build_id, row.staleness, *row.containers]
    else:
        process = row.process
        found = [str(process.pid), process.comm, process.exe, visible(process.exe or ""), process.container]
    return "\n".join(filter(None, found)).lower()
