"""What ``top`` shows and in which order: columns, sorting, filtering, and what a key does to them. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from sowatch.inventory.inventory import InventoryView, LibraryRow, ProcessRow
from sowatch.model.escape import visible

__all__ = ["VIEWS", "Column", "State", "cells", "head", "press", "rows_of"]

_ID_LENGTH: Final = 12


def _word(text: str | None) -> str:
    return "-" if not text else visible(text)


def _short(text: str | None) -> str:
    return _word(text if text is None else text[:_ID_LENGTH])


def _since(row: LibraryRow | ProcessRow) -> str:
    """How long ago; ``>`` where the watch found it there already."""
    seconds = max(0, int(time.time() - row.since_ns / 1e9))
    sign = ">" if row.is_older else ""
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{sign}{seconds // size}{unit}"
    return f"{sign}{seconds}s"


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
        Column("SINCE", _since, lambda row: -row.since_ns, 8, 2),
        Column("BUILD ID", lambda row: _short(row.library.build_id), lambda row: row.library.build_id or "", 12, 0),
        Column("PATH", lambda row: visible(row.library.path), lambda row: row.library.path, 0, 5),
    ),
    "processes": (
        Column("PID", lambda row: str(row.process.pid), lambda row: row.process.pid, 7, 5, True),
        Column("LIBRARIES", lambda row: str(row.libraries), lambda row: row.libraries, 10, 4, True, True),
        Column("STALE", _stale_count, lambda row: (row.stale_libraries, row.unknown_libraries), 6, 3, True, True),
        Column("SINCE", _since, lambda row: -row.since_ns, 8, 1),
        Column("CONTAINER", lambda row: _short(row.process.container), lambda row: row.process.container or "", 12, 0),
        Column("COMM", lambda row: _word(row.process.comm), lambda row: row.process.comm or "", 15, 2),
        Column("PROGRAM", lambda row: _word(row.process.exe), lambda row: row.process.exe or "", 0, 5),
    ),
}
#: The column that each view is sorted by at first.
_FIRST_ORDER: Final = {"libraries": 0, "processes": 1}


class State:
    """What was chosen with keys. ``typing`` while a filter is being written."""

    def __init__(self, view: str = "libraries") -> None:
        self.filter = ""
        self.typing = False
        self.show(view)

    def show(self, view: str) -> None:
        """Changes to a view, in its own order, from the top."""
        self.view = view
        self.order_by(_FIRST_ORDER[view])

    def order_by(self, column: int) -> None:
        """Sorts by a column, in the direction that suits it."""
        self.column = column % len(VIEWS[self.view])
        self.is_down = VIEWS[self.view][self.column].is_down
        self.first = 0


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
        state.first += moves[key]
    elif key in ("home", "g"):
        state.first = 0
    elif key in ("end", "G"):
        state.first = 1 << 30
    elif key in ("tab", "l", "p"):
        other = "processes" if state.view == "libraries" else "libraries"
        state.show({"tab": other, "l": "libraries", "p": "processes"}[key])
    elif key in ("s", "S"):
        state.order_by(state.column + (1 if key == "s" else -1))
    elif key == "r":
        state.is_down = not state.is_down
    elif key == "/":
        state.typing = True
    elif key == "escape":
        state.filter = ""
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
    state.first = 0


def rows_of(view: InventoryView, state: State) -> list[Any]:
    """The rows that pass the filter, in order. Each word of the filter has to be in some cell."""
    rows: list[Any] = list((view.libraries if state.view == "libraries" else view.processes).values())
    words = state.filter.lower().split()
    if words:
        rows = [row for row in rows if all(word in _text(row) for word in words)]
    rows.sort(key=lambda row: row.number)
    rows.sort(key=VIEWS[state.view][state.column].order, reverse=state.is_down)
    return rows


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
