"""Columns of text.

Cells are never cut. In a pipe lines are never folded: ``grep`` and ``awk`` need them whole. On a terminal the last
cell of a row that is too wide goes to lines of its own. The caller escapes what it puts in.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from sowatch.cli._out import Out

__all__ = ["Below", "write_table"]

_GAP: Final = "  "
#: Of rows below a row, and of what is folded.
_INDENT: Final = "  "
_FOLDED: Final = "      "


class Below(NamedTuple):
    """Rows below each row of a table, with columns of their own: their head, rows for each row, cells to the right."""

    head: Sequence[str]
    tables: Sequence[Sequence[Sequence[str]]]
    right: Collection[int] = ()


class _Line(NamedTuple):
    """A row as text: all cells but the last one with what is between them, and the last."""

    begin: str
    last: str

    @property
    def text(self) -> str:
        return self.begin + self.last

    def folded(self, width: int) -> str:
        """The text, on several lines if it is wider."""
        if _width(self.text) <= width or not self.begin.strip():
            return self.text
        lines = textwrap.wrap(self.last, max(20, width - len(_FOLDED)), break_long_words=False, break_on_hyphens=False)
        return "\n".join([self.begin.rstrip(), *(_FOLDED + line for line in lines)])


def write_table(
    out: Out,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    warning: int = -1,
    below: Below | None = None,
    has_head: bool = True,
    widths: list[int] | None = None,
) -> None:
    """Write aligned columns and flush.

    Args:
        out: where to.
        head: the column's names.
        rows: the cells; each row as long as ``head``.
        right: columns whose cells are aligned at their right end.
        warning: a column whose cells, other than ``-``, stand out in colour.
        below: rows below each row.
        has_head: write the head, too.
        widths: of the columns at least, of rows that stand above; gets those of these.
    """
    first, *lines = _aligned([head, *rows], right, widths)
    heads, groups = [first], [[line] for line in lines]
    if below is not None:
        flat = [below.head, *(row for table in below.tables for row in table)]
        second, *rest = (_Line(_INDENT + begin, last) for begin, last in _aligned(flat, below.right))
        heads.append(second)
        for group, table in zip(groups, below.tables, strict=True):
            group.extend(rest[: len(table)])
            del rest[: len(table)]
    shown_heads = heads if has_head else []
    if not out.is_terminal:
        out.write("".join(f"{line.text}\n" for line in (*shown_heads, *(line for group in groups for line in group))))
        out.flush()
        return
    from rich.text import Text

    from sowatch.cli._live import terminal_console

    console = terminal_console(out)
    shown = [Text(line.text, "bold") for line in shown_heads]
    start = sum(max(_width(row[column]) for row in (head, *rows)) + len(_GAP) for column in range(warning))
    for row, group in zip(rows, groups, strict=True):
        texts = [Text(line.folded(console.width)) for line in group]
        if warning >= 0 and row[warning] != "-":
            texts[0].stylize("bold yellow", start, start + len(row[warning]))
        shown += texts
    if shown:
        console.print(Text("\n").join(shown))
        out.flush()


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int], at_least: list[int] | None = None) -> list[_Line]:
    """The rows with aligned columns; the last column is not filled up."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    if at_least is not None:
        widths = [max(pair) for pair in zip(widths, at_least, strict=True)] if at_least else widths
        at_least[:] = widths
    lines = []
    for *row, last in rows:
        begin = ""
        for column, cell in enumerate(row):
            space = " " * (widths[column] - _width(cell))
            begin += (space + cell if column in right else cell + space) + _GAP
        space = " " * (widths[-1] - _width(last)) if len(row) in right else ""
        lines.append(_Line(begin, space + last))
    return lines


def _width(text: str) -> int:
    """The terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
