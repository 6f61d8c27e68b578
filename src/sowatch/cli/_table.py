"""Columns of text.

Cells are never cut and lines never folded: a terminal wraps them, ``grep`` and ``awk`` need them
whole. The caller escapes what it puts in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sowatch.cli._out import Out

__all__ = ["aligned", "write_table"]

_GAP = "  "


def write_table(
    out: Out,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    warning: int = -1,
    below: tuple[str, Sequence[Sequence[str]]] | None = None,
    has_head: bool = True,
) -> None:
    """Write aligned columns and flush.

    Args:
        out: where to.
        head: the column's names.
        rows: the cells; each row as long as ``head``.
        right: columns whose cells are aligned at their right end.
        warning: a column whose cells, other than ``-``, stand out in colour.
        below: a line for below the head, and for each row the lines below it.
        has_head: write the head, too.
    """
    texts = aligned([head, *rows], right=right)
    heads = [texts[0], *([below[0]] if below is not None else [])] if has_head else []
    lines = [[text, *(below[1][at] if below is not None else ())] for at, text in enumerate(texts[1:])]
    if not out.is_terminal:
        out.write("".join(f"{line}\n" for line in (*heads, *(line for group in lines for line in group))))
        out.flush()
        return
    from rich.text import Text

    from sowatch.cli._live import terminal_console

    shown = [Text(line, "bold") for line in heads]
    start = sum(max(_width(row[column]) for row in (head, *rows)) + len(_GAP) for column in range(warning))
    for row, group in zip(rows, lines, strict=True):
        line = Text(group[0])
        if warning >= 0 and row[warning] != "-":
            line.stylize("bold yellow", start, start + len(row[warning]))
        shown += [line, *map(Text, group[1:])]
    if shown:
        terminal_console(out).print(Text("\n").join(shown))
        out.flush()


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """The rows as lines with aligned columns; the last column is not filled up."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            space = " " * (widths[column] - _width(cell))
            if column in right:
                cells.append(space + cell)
            else:
                cells.append(cell if column == len(row) - 1 else cell + space)
        lines.append(_GAP.join(cells))
    return lines


def _width(text: str) -> int:
    """The terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
