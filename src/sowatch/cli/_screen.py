"""The screen of ``top``: a header, a table that fits, a line of keys. Redrawn a few times a second.

rich asks the terminal for its size with each drawing, so a resized one is right at the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.cells import set_cell_size
from rich.live import Live
from rich.text import Text

from sowatch.cli._keys import Keys
from sowatch.cli._live import terminal_console
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._top import VIEWS, Column, State, press, rows_of, title_of
from sowatch.model.escape import visible
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from rich.console import Console

    from sowatch.inventory.inventory import Inventory, InventoryView

__all__ = ["show"]

_TICK_S: Final = 0.25
#: Between two reads the map, at least; they take a tenth of the time at most.
_LOOK_S: Final = 1.0
_GAP: Final = "  "
#: A path that has less space than this makes other columns go: few names of files are longer.
_LEAST_PATH: Final = 40
#: Lines that are not rows: two of the header, the head of the table, the keys.
_OTHER_LINES: Final = 4
_SPARKS: Final = " ▁▂▃▄▅▆▇█"


def show(inventory: Inventory, state: State, out: Out, *, is_over: Callable[[], bool]) -> None:
    """Shows it until a key, a signal or the end of the watch ends it.

    Raises:
        PipeClosed: the terminal has gone.
    """
    console = terminal_console(out)
    live = Live(
        console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True
    )
    view, due_s = inventory.look(), 0.0
    with Keys() as keys, live:
        while not is_over():
            if time.monotonic() >= due_s:
                begun_s = time.monotonic()
                view = inventory.look()
                due_s = time.monotonic() + max(_LOOK_S, 10 * (time.monotonic() - begun_s))
            live.update(_screen(inventory, view, state, console), refresh=True)
            out.flush()
            if out.reader_is_gone():
                raise PipeClosed
            try:
                key = keys.get(_TICK_S)
            except (EOFError, OSError) as error:
                raise PipeClosed from error
            while key is not None:
                room = max(1, console.size.height - _OTHER_LINES)
                if not press(state, key, room):
                    return
                state.settle([row.number for row in rows_of(view, state)], room)  # for the next key
                key = keys.get(0)


def _screen(inventory: Inventory, view: InventoryView, state: State, console: Console) -> Text:
    width, height = console.size
    rows = rows_of(view, state)
    room = max(1, height - _OTHER_LINES)
    state.settle([row.number for row in rows], room)
    shown = rows[state.first : state.first + room]
    columns = _columns(state, width)
    lines = [*_header(inventory, view, state, len(rows), width), _head(columns, state, width)]
    lines += [_row(row, columns, width, is_selected=row.number == state.selected) for row in shown]
    lines += [Text()] * (room - len(shown))
    lines.append(_keys(state, width))
    # What does not fit a very low terminal goes from the end.
    return Text("\n", no_wrap=True, overflow="crop").join(lines[:height])


def _header(inventory: Inventory, view: InventoryView, state: State, found: int, width: int) -> list[Text]:
    watcher, history = inventory.watcher, inventory.history()
    stats, ready = watcher.stats, watcher.ready
    lost = stats.lost_kernel + stats.lost_queue
    last = history[-1].loads if history else 0.0
    count = len(view.libraries if state.view == "libraries" else view.processes)
    first = Text.assemble(
        ("sowatch ", "bold"),
        "" if ready is None else f"{visible(ready.host)}  {ready.strategy}, {ready.guarantee}  ",
        *_bold(len(view.libraries), "library", "libraries"),
        *_bold(len(view.processes), "process", "processes"),
        *_bold(view.mappings, "mapping"),
        (f"{lost}", "bold yellow" if lost else "bold"),
        " lost" if watcher.is_repaired else " lost, being repaired",
    )
    if view.left_out:
        first.append(f"  {counted(view.left_out, 'mapping')} not shown", "bold yellow")
    sparks = _sparks([second.loads for second in history], max(0, min(60, width - 50)))
    second = Text.assemble(
        (title_of(view, state), "bold"),
        f" {found} of {count}  " if state.of is None else f": {found}  ",
        (f"{last:.0f}", "bold"),
        " loads/s ",
        (sparks, "green"),
    )
    return [_cut(first, width), _cut(second, width)]


def _bold(number: int, one: str, many: str | None = None) -> tuple[tuple[str, str], str]:
    figure, word = counted(number, one, many).split()
    return (figure, "bold"), f" {word}  "


def _sparks(values: Sequence[float], size: int) -> str:
    values = values[-size:] if size else []
    most = max(values, default=0.0) or 1.0
    return "".join(_SPARKS[round(value / most * (len(_SPARKS) - 1))] for value in values)


def _columns(state: State, width: int) -> list[tuple[Column, int, bool]]:
    """The columns that fit, each with its width and whether it is sorted by."""
    chosen = list(VIEWS[state.view])
    sorted_by = chosen[state.column]

    def left() -> int:
        return width - sum(column.width + len(_GAP) for column in chosen if column.width)

    for column in sorted(chosen, key=lambda one: one.importance):
        if left() >= _LEAST_PATH:
            break
        if column.width and len(chosen) > 2 and column is not sorted_by:
            chosen.remove(column)
    return [(column, column.width or max(1, left()), column is sorted_by) for column in chosen]


def _head(columns: Sequence[tuple[Column, int, bool]], state: State, width: int) -> Text:
    line = Text(style="reverse")
    for column, size, is_sorted in columns:
        title = column.title + ("" if not is_sorted else "▼" if state.is_down else "▲")
        line.append(_fit(title, size, is_right=column.is_number), "bold" if is_sorted else "")
        line.append(_GAP)
    line.append(" " * max(0, width - line.cell_len))
    return _cut(line, width)


def _row(row: Any, columns: Sequence[tuple[Column, int, bool]], width: int, *, is_selected: bool) -> Text:
    line = Text(style="reverse" if is_selected else "")
    for column, size, _ in columns:
        text = column.text(row)
        is_warning = column.title == "STALE" and text not in ("-", "0")
        line.append(_fit(text, size, is_right=column.is_number), "bold yellow" if is_warning else "")
        line.append(_GAP)
    line.append(" " * max(0, width - line.cell_len))
    return _cut(line, width)


def _fit(text: str, size: int, *, is_right: bool) -> str:
    """Just so wide. The end of a path says more than its beginning."""
    wide = Text(text).cell_len
    if wide <= size:
        return " " * (size - wide) + text if is_right else text + " " * (size - wide)
    if not text.startswith("/"):
        return set_cell_size(text, size - 1) + "…" if size > 1 else set_cell_size(text, size)
    end = text
    while end and Text(end).cell_len > size - 1:
        end = end[max(1, (Text(end).cell_len - size) // 2) :]
    return _fit("…" + end, size, is_right=is_right)


def _keys(state: State, width: int) -> Text:
    if state.typing:
        return _cut(Text.assemble(("filter: ", "bold"), visible(state.filter), "█"), width)
    if state.filter:
        return _cut(Text.assemble(("filter: ", "bold"), visible(state.filter), "  (/ changes, Escape drops it)"), width)
    is_library = state.view == "libraries"
    keys = [
        "q quit",
        "Escape back" if state.of is not None else "",
        "Enter who has it" if is_library else "Enter what it has",
        "/ filter",
        "tab processes" if is_library else "tab libraries",
        "s sort",
        "r reverse",
        "arrows, page keys move",
    ]
    text = ""
    for key in filter(None, keys):
        if len(text) + len(key) > width:
            break
        text += key + _GAP
    return _cut(Text(text.rstrip(), "dim"), width)


def _cut(line: Text, width: int) -> Text:
    line.truncate(width)
    return line
