"""The columns of ``list``, for ``-o`` and CSV: a row for each combination of what they say."""

from __future__ import annotations

import csv
import pwd
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final

from sowatch.cli._list_entries import ListEntry
from sowatch.cli._out import Out
from sowatch.cli._parser import did_you_mean
from sowatch.cli._table import write_table
from sowatch.inventory.restarts import StaleFile
from sowatch.linux.cgroups import Unit
from sowatch.linux.wall_clock import started_ns
from sowatch.model.errors import UsageError
from sowatch.model.escape import one_line, visible
from sowatch.model.lines import stamp

__all__ = ["COLUMNS", "columns_of", "short", "stale_text", "user_name", "word", "write_columns", "write_csv"]

_ID_LENGTH: Final = 12


def word(text: str | None) -> str:
    """A cell of a text that others chose."""
    return "-" if not text else visible(text)


def short(text: str | None) -> str:
    """The begin of an id."""
    return word(text if text is None else text[:_ID_LENGTH])


def _unit_text(unit: Unit | None) -> str:
    """The unit as systemctl takes it, with its backslashes, and whose it is if not the system's."""
    if unit is None:
        return "-"
    return one_line(unit.name if unit.manager is None else f"{unit.name} ({unit.manager})")


def stale_text(one: ListEntry | StaleFile) -> str:
    """The path, with why it is stale, or why that is unknown."""
    notes = [one.answer.reason] if one.answer.reason else []
    if one.answer.is_same_build:
        notes.append("an identical build")
    return visible(one.path) + (f" ({one_line(', '.join(notes))})" if notes else "")


@lru_cache(1024)
def user_name(uid: int | None) -> str:
    """The name that this host has for a user, or the number."""
    if uid is None:
        return "-"
    try:
        return visible(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return str(uid)


def _pod(entry: ListEntry) -> str:
    pod = entry.process.pod
    return "-" if pod is None else word(pod.name or pod.uid)


def _of_pod(field: str) -> Callable[[ListEntry], str]:
    return lambda entry: word(None if entry.process.pod is None else getattr(entry.process.pod, field))


def _started(entry: ListEntry) -> str:
    return stamp(started_ns(entry.process.start_ns))[:-8] + "Z"


#: What stands for a column in tables for people whose columns nobody chose; no name that can be given.
_FOR_PEOPLE: Final = {"path": "path (reason)", "container": "container (short)", "build_id": "build_id (short)"}

#: By name, what a column says of one process and file.
_CELLS: Final[dict[str, Callable[[ListEntry], str]]] = {
    "pid": lambda entry: str(entry.process.pid),
    "comm": lambda entry: word(entry.process.comm),
    "user": lambda entry: user_name(entry.process.uid),
    "uid": lambda entry: "-" if entry.process.uid is None else str(entry.process.uid),
    "exe": lambda entry: word(entry.process.exe),
    "started": _started,
    "unit": lambda entry: _unit_text(entry.unit),
    "container": lambda entry: word(entry.process.container),
    "pod": _pod,
    "pod_uid": _of_pod("uid"),
    "namespace": _of_pod("namespace"),
    "container_name": _of_pod("container"),
    "cgroup": lambda entry: one_line(entry.process.cgroup or "-"),
    "restart": lambda entry: one_line(entry.target.command or "-"),
    "advice": lambda entry: one_line(entry.target.advice or "-"),
    "kind": lambda entry: entry.library.kind,
    "build_id": lambda entry: entry.library.build_id or "-",
    "soname": lambda entry: word(entry.library.soname),
    "dev": lambda entry: entry.library.id.dev,
    "inode": lambda entry: str(entry.library.id.inode),
    "stale": lambda entry: entry.answer.stale or "-",
    "reason": lambda entry: one_line(entry.answer.reason or "-"),
    "package": lambda entry: word(entry.package),
    "path": lambda entry: visible(entry.path),
    "host_path": lambda entry: word(entry.library.host_path),
    "path (reason)": stale_text,
    "container (short)": lambda entry: short(entry.process.container),
    "build_id (short)": lambda entry: short(entry.library.build_id),
}
#: What a column counts in a row.
_COUNTS: Final[dict[str, Callable[[ListEntry], object]]] = {
    "processes": lambda entry: entry.process.id,
    "containers": lambda entry: entry.process.container,
    "pods": lambda entry: entry.process.pod and entry.process.pod.uid,
    "files": lambda entry: entry.library.id,
}
_NUMBERS: Final = frozenset(("pid", "uid", "inode", *_COUNTS))

COLUMNS: Final = tuple(name for name in (*_CELLS, *_COUNTS) if name not in _FOR_PEOPLE.values())


def columns_of(words: Iterable[str]) -> list[str]:
    """The names in the words of ``-o``.

    Raises:
        UsageError: an unknown one, or none.
    """
    names = [one.strip().lower().replace("-", "_") for text in words for one in text.split(",")]
    for name in names:
        if name not in COLUMNS and names != ["help"]:
            raise UsageError(f"unknown column {name!r}.{did_you_mean(name, COLUMNS)} Use one of: {', '.join(COLUMNS)}.")
    return names


def _rows_of(entries: Iterable[ListEntry], names: Sequence[str]) -> list[list[str]]:
    """A row for each combination of cells, in the order of the entries; counts are of the entries of the row."""
    groups: dict[tuple[str, ...], list[ListEntry]] = {}
    cells = [_CELLS[name] for name in names if name in _CELLS]
    for entry in entries:
        groups.setdefault(tuple([cell(entry) for cell in cells]), []).append(entry)
    rows = []
    for key, group in groups.items():
        values = iter(key)
        rows.append([next(values) if name in _CELLS else _count(group, name) for name in names])
    return rows


def _count(group: Iterable[ListEntry], name: str) -> str:
    return str(len({value for entry in group if (value := _COUNTS[name](entry)) is not None}))


def write_columns(
    out: Out, entries: Iterable[ListEntry], names: Sequence[str], *, has_head: bool, is_for_people: bool = False
) -> None:
    """A table of the columns; ``is_for_people``: ids are cut, and paths are followed by why they are stale."""
    right = [at for at, name in enumerate(names) if name in _NUMBERS]
    head = [name.upper().replace("_", " ") for name in names]
    warning = names.index("stale") if "stale" in names else -1
    cells = [_FOR_PEOPLE.get(name, name) if is_for_people else name for name in names]
    rows = _rows_of(entries, cells)
    write_table(out, head, rows, right=right, warning=warning, has_head=has_head)


def write_csv(out: Out, entries: Iterable[ListEntry], names: Sequence[str], *, has_head: bool) -> None:
    """The same as comma-separated values (RFC 4180, with line feeds); what is not known is empty."""
    writer = csv.writer(out, lineterminator="\n")
    if has_head:
        writer.writerow(names)
    writer.writerows(["" if cell == "-" else cell for cell in row] for row in _rows_of(entries, names))
    out.flush()
