"""The tables of ``list`` that have rows below rows: who has a library, and what has to be restarted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sowatch.cli._list_columns import short, stale_text, user_name, word
from sowatch.cli._list_entries import ListEntry
from sowatch.cli._out import Out
from sowatch.cli._table import Below, write_table
from sowatch.inventory.restarts import RestartGroup, RestartTarget, StaleFile, restart_groups
from sowatch.model.escape import one_line

__all__ = ["library_table", "restart_table", "who_rows"]


def library_table(out: Out, entries: Iterable[ListEntry], *, has_who: bool, has_package: bool, has_head: bool) -> None:
    """A row for each file, and below it, if asked for, who has it: a line for processes that are alike, pids last."""
    groups: dict[Any, list[ListEntry]] = {}
    for entry in entries:
        library = entry.library
        key = (entry.path, library.id, library.build_id, library.kind, entry.answer[:2], entry.package)
        groups.setdefault(key, []).append(entry)
    rows = []
    for group, place in zip(groups.values(), _places(list(groups.values())), strict=True):
        first = group[0]
        rows.append(
            [
                str(len({one.process.id for one in group})),
                str(len({one.process.container for one in group} - {None})),
                first.library.kind,
                short(first.library.build_id),
                first.answer.stale or "-",
                *([word(first.package)] if has_package else []),
                stale_text(first) + place,
            ]
        )
    head = ["PROCESSES", "CONTAINERS", "KIND", "BUILD ID", "STALE", *(["PACKAGE"] if has_package else []), "PATH"]
    below = _who(groups.values()) if has_who else None
    write_table(out, head, rows, right=(0, 1), warning=4, below=below, has_head=has_head)


def _places(groups: Sequence[Sequence[ListEntry]]) -> list[str]:
    """What distinguishes rows that would look alike: the containers that have the file, or its device and inode."""

    def look(group: Sequence[ListEntry]) -> tuple[object, ...]:
        first = group[0]
        return first.path, first.library.kind, first.library.build_id, first.answer[:2], first.package

    def containers(group: Sequence[ListEntry]) -> str:
        names = sorted({short(one.process.container) if one.process.container else "the host" for one in group})
        return f" (in {', '.join(names)})"

    alike = Counter(map(look, groups))
    in_containers = Counter((look(group), containers(group)) for group in groups)
    found = []
    for group in groups:
        if alike[look(group)] == 1:
            found.append("")
        elif in_containers[look(group), containers(group)] == 1:
            found.append(containers(group))
        else:
            found.append(f" (device {group[0].library.id.dev}, inode {group[0].library.id.inode})")
    return found


def _who(groups: Iterable[Sequence[ListEntry]]) -> Below:
    """The rows below each row."""
    return Below(("COMM", "USER", "UNIT OR CONTAINER", "PIDS"), [who_rows(group) for group in groups])


def who_rows(group: Iterable[ListEntry]) -> list[tuple[str, ...]]:
    """Who has something: a line for processes that are alike, pids last."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for entry in group:
        process = entry.process
        where = "-" if entry.target.kind == "process" else one_line(entry.target.label)
        alike.setdefault((word(process.comm), user_name(process.uid), where), []).append(process.pid)
    return [(*who, ",".join(map(str, sorted(set(pids))))) for who, pids in alike.items()]


def restart_table(out: Out, entries: Iterable[ListEntry], *, by_container: bool, has_head: bool) -> None:
    """A row for each unit or container, and its processes with their stale files below it."""
    groups = restart_groups(entry.stale_file for entry in entries)
    shown = _by_container(groups) if by_container else [(_label(group.target), [group]) for group in groups]
    rows = [
        (
            label,
            str(len({one.process.id for group in below for one in group.files})),
            _restart(below),
        )
        for label, below in shown
    ]
    head = ("CONTAINER" if by_container else "UNIT OR CONTAINER", "PROCESSES", "RESTART")
    tables = [[_file_row(one) for group in below for one in group.files] for _, below in shown]
    files = Below(("PID", "COMM", "STALE", "PACKAGE", "PATH"), tables, right=(0,))
    write_table(out, head, rows, right=(1,), below=files, has_head=has_head)


def _label(target: RestartTarget) -> str:
    return one_line(target.label)


def _by_container(groups: Iterable[RestartGroup]) -> list[tuple[str, list[RestartGroup]]]:
    found: dict[str, list[RestartGroup]] = {}
    for group in groups:
        found.setdefault(short(group.target.container) if group.target.container else "(host)", []).append(group)
    return sorted(found.items())


def _restart(groups: Sequence[RestartGroup]) -> str:
    """The commands, or why there is none."""
    commands = [group.target.command for group in groups if group.target.command and group.why_not is None]
    if commands:
        return one_line("; ".join(commands))
    reasons = dict.fromkeys(group.why_not or group.target.advice or "" for group in groups)
    return one_line(f"- ({'; '.join(reasons)})")


def _file_row(one: StaleFile) -> tuple[str, ...]:
    stale = one.answer.stale or "-"
    return str(one.process.pid), word(one.process.comm), stale, word(one.package), stale_text(one)
