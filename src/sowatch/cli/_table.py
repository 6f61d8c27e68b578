"""Columns of text.

Cells are never cut and lines never folded: a terminal wraps them, ``grep`` and ``awk`` need them
whole. The caller escapes what it puts in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sowatch.cli._out import Out

__all__ = ["write_table"]

_GAP = "  "


def write_table(
    out: Out, head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), warning: int = -1
) -> None:
    """Write aligned columns and flush.

    Args:
        out: where to.
        head: the column's names.
        rows: the cells; each row as long as ``head``.
        right: columns whose cells are aligned at their right end.
        warning: a column whose cells, other than ``-``, stand out in colour.
    """
    widths = [max(_width(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def cells(row: Sequence[str]) -> list[str]:
        padded = []
        for column, cell in enumerate(row):
            space = " " * (widths[column] - _width(cell))
            if column in right:
                padded.append(space + cell)
            else:
                padded.append(cell if column == len(row) - 1 else cell + space)
        return padded

    if out.is_terminal:
        from rich.text import Text

        from sowatch.cli._live import terminal_console

        lines = [Text(_GAP.join(cells(head)), "bold")]
        for row in rows:
            parts = cells(row)
            line = Text(_GAP.join(parts))
            if warning >= 0 and row[warning] != "-":
                start = sum(len(part) + len(_GAP) for part in parts[:warning])
                line.stylize("bold yellow", start, start + len(parts[warning]))
            lines.append(line)
        terminal_console(out).print(Text("\n").join(lines))
    else:
        for row in (head, *rows):
            out.write(_GAP.join(cells(row)) + "\n")
    out.flush()


def _width(text: str) -> int:
    """The terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
