"""Answers of a fleet for people: a sentence with what it holds for, then tables that are written as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final

from sowatch.cli._out import Out
from sowatch.cli._table import write_table
from sowatch.fleet.answers import Answer
from sowatch.model.escape import one_line, visible
from sowatch.model.plural import counted
from sowatch.model.wire_fleet import (
    FleetAnswer,
    FleetHistory,
    FleetHost,
    FleetHosts,
    FleetLine,
    FleetMapping,
    FleetRemediation,
    FleetVersion,
)

__all__ = ["hosts_text", "show"]

#: Rows whose columns are aligned with each other; later ones get at least their widths.
_ALIGNED: Final = 1000
#: Of the number of hosts over time for people: JSON has all.
_STEPS: Final = 20

_COLUMNS: Final[dict[type[FleetLine], tuple[str, ...]]] = {
    FleetMapping: (
        *("HOST", "ANSWER", "UNIT OR CONTAINER", "EXECUTABLE", "PROCESSES", "LISTENS", "STALE SINCE", "PACKAGE"),
        *("BUILD ID", "PATH"),
    ),
    FleetHost: ("HOST", "STATE", "ANSWER", "HEARD", "REASON"),
    FleetVersion: ("BUILD ID", "NAME", "HOSTS", "NOT OBSERVED", "STALE ON", "PROCESSES", "PACKAGES"),
    FleetHistory: ("HOST", "ANSWER", "FIRST MAPPED", "LAST GONE", "STALE SINCE", "REMEDIATED IN"),
}
_NUMBERS: Final[dict[type[Any], tuple[int, ...]]] = {FleetMapping: (4,), FleetVersion: (2, 3, 4, 5), FleetHistory: (5,)}


def show(answer: Answer, out: Out) -> None:
    """Write it, as its rows come."""
    out.write("".join(f"{one_line(line)}\n" for line in _sentences(answer.head)))
    out.flush()
    kind: type[FleetLine] | None = None
    widths: list[int] = []
    lines = iter(answer.lines)
    while some := list(islice(lines, _ALIGNED)):
        for part in _parts(some):
            is_new = type(part[0]) is not kind
            if is_new:
                kind, widths = type(part[0]), []
            if isinstance(part[0], FleetRemediation):
                _show_remediation(part[0], out)
                continue
            columns = _COLUMNS[type(part[0])]
            write_table(
                out,
                columns,
                [_cells(one) for one in part],
                right=_NUMBERS.get(type(part[0]), ()),
                has_head=is_new,
                widths=widths,
            )


def hosts_text(hosts: FleetHosts) -> str:
    """For how many hosts an answer holds."""
    others = [(hosts.silent, "silent"), (hosts.lossy, "lossy"), (hosts.unsupported, "unsupported")]
    total = hosts.answered + sum(number for number, _ in others)
    text = f"{hosts.answered} of {counted(total, 'host')} answered"
    return text + "".join(f", {number} {word}" for number, word in others if number)


def _sentences(head: FleetAnswer) -> Iterator[str]:
    asked = ", ".join(f"{one.kind.replace('_', ' ')} {visible(one.text)}" for one in head.targets)
    if head.answer is not None:
        numbers = (
            f"mapped on {counted(head.mapped_host_count, 'host')}, not mapped on {head.not_mapped_host_count}, "
            f"not observed on {head.not_observed_host_count}"
        )
        yield f"{head.answer}: {asked}: {numbers}"
    elif asked:
        yield asked
    yield f"{hosts_text(head.hosts)}, at {_time(head.time)}"
    if head.question in ("who", "history", "remediated"):
        for build in head.builds:
            names = dict.fromkeys((*map(visible, build.sonames), *map(_package, build.purls)))
            yield f"build {build.build_id or '(not known)'} {' '.join(names)}"
        if head.unknown_builds:
            unknown = counted(len(head.unknown_builds), "build")
            yield f"of {unknown} it is not known: --json has them. A host that maps one of them is not observed"
        elif head.targets and not head.builds:
            yield "no host has ever reported such a file"


def _parts(lines: Sequence[FleetLine]) -> Iterator[list[Any]]:
    """Lines of one kind after each other."""
    part: list[Any] = []
    for line in lines:
        if part and type(line) is not type(part[0]):
            yield part
            part = []
        part.append(line)
    yield part


def _cells(one: Any) -> tuple[str, ...]:
    match one:
        case FleetMapping():
            return (
                visible(one.host_name),
                one.answer,
                _place(one),
                _word(one.exe),
                str(one.process_count),
                _word(",".join(one.listen)),
                _time(one.stale_since),
                _package(one.purl),
                one.build_id or "-",
                visible(one.path),
            )
        case FleetHost():
            answer = one.answer if isinstance(one.answer, str) else "-"
            return visible(one.host_name), one.state, answer, _time(one.heard), one_line(one.reason or "-")
        case FleetVersion():
            return (
                one.build_id or "-",
                ",".join(map(visible, one.sonames)),
                str(one.mapped_host_count),
                str(one.not_observed_host_count),
                str(one.stale_host_count),
                str(one.process_count),
                " ".join(dict.fromkeys(map(_package, one.purls))) or "-",
            )
        case FleetHistory():
            return (
                visible(one.host_name),
                one.answer,
                _time(one.first_mapped),
                _time(one.last_gone),
                _time(one.stale_since),
                _duration(one.remediated_s),
            )
    raise TypeError(one)


def _place(one: FleetMapping) -> str:
    """The pod, container or unit."""
    from msgspec import UNSET

    if one.pod is not UNSET:
        name = visible(one.pod.name or one.pod.pod_uid)
        return f"{visible(one.pod.namespace)}/{name}" if one.pod.namespace else name
    return _word(one.container or one.unit)


def _show_remediation(one: FleetRemediation, out: Out) -> None:
    text = f"remediated on {counted(one.remediated_host_count, 'host')}, open on {one.open_host_count}"
    if one.median_s is not None:
        text += f"; median {_duration(one.median_s)}, 95 % {_duration(one.p95_s)}"
    steps = one.hosts_over_time
    shown = steps if len(steps) <= _STEPS else [steps[at * (len(steps) - 1) // (_STEPS - 1)] for at in range(_STEPS)]
    out.write(f"\n{text}\n")
    if shown:
        write_table(out, ("FROM", "HOSTS"), [(_time(step.time), str(step.host_count)) for step in shown], right=(1,))
    out.flush()


def _package(purl: str) -> str:
    """Without architecture and distribution, which JSON has."""
    return _word(purl.partition("?")[0])


def _word(text: str) -> str:
    return visible(text) if text else "-"


def _time(text: str | None) -> str:
    return "-" if text is None else f"{text[:19]}Z"


def _duration(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    minutes, seconds = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [
        f"{number}{unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")) if number
    ]
    return " ".join(parts[:2]) or "0s"
