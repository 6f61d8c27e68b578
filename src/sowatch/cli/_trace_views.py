"""What `sowatch trace` shows: lines of JSON, or tables for people."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sowatch.cli._out import Out
from sowatch.cli._table import write_table
from sowatch.model.encoding import dumps
from sowatch.model.escape import visible
from sowatch.model.lines import SCHEMA, library_line, process_line, stamp
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.uprobes.address_book import Frame
    from sowatch.uprobes.call_records import Call
    from sowatch.uprobes.calls import Calls
    from sowatch.uprobes.records import Failure
    from sowatch.uprobes.trace import Trace, TracedCall, TracedCalls, TracedStack

__all__ = ["GROUPS", "Json", "Table"]

GROUPS: Final = ("process", "library", "build", "container", "symbol")
_ID_LENGTH: Final = 12
_UNITS: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "us"))
#: Rows of processes that are gone; further ones are one row of each function.
_MAX_FINISHED: Final = 10_000
_MAX_TEXTS: Final = 10_000


def time_text(value_ns: float | None) -> str:
    """A time for people: ``1.2us``.

    >>> time_text(1234), time_text(5e6), time_text(12), time_text(None)
    ('1.2us', '5ms', '12ns', '-')
    """
    if value_ns is None:
        return "-"
    for size, unit in _UNITS:
        if value_ns >= size:
            return f"{value_ns / size:.1f}".removesuffix(".0") + unit
    return f"{value_ns:.0f}ns"


class Json:
    """One object a line for each function and process in each interval, for each call, and for each failure.

    Args:
        out: where to.
        stacks: how many callers of each function are written when their numbers have changed; 0: none.
    """

    def __init__(self, out: Out, *, stacks: int = 0) -> None:
        self._out = out
        self._stacks = stacks
        self._failed: set[Failure] = set()
        self._written: dict[tuple[Any, ...], int] = {}
        #: Libraries and processes as text, for calls: there are many of few.
        self._texts: dict[Any, str] = {}
        self.has_calls = False
        self._seq = 0

    def calls(self, taken: Sequence[TracedCall]) -> None:
        """Each call."""
        if not taken:
            return
        to_wall_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if len(self._texts) > _MAX_TEXTS:
            self._texts.clear()
        for one in taken:
            self._out.write(self._call(one, to_wall_ns) + "\n")
        self._out.flush()

    def figures(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        """What is there now."""
        now_ns = time.time_ns()
        for failure in failures:
            if failure not in self._failed:
                self._failed.add(failure)
                self._write(
                    {
                        "schema": SCHEMA,
                        "event": "attach_failed",
                        "time": stamp(now_ns),
                        "library": library_line(failure.library),
                        "symbol": failure.symbol,
                        "reason": failure.reason,
                        "permanent": failure.is_permanent,
                    }
                )
        for one in taken:
            self.has_calls = True
            self._write(trace_dict(one, now_ns))
        for stack in trace.stacks(self._stacks) if self._stacks else ():
            key = (stack.symbol, stack.library.id, stack.frames)
            if self._written.get(key) != stack.calls:
                self._written[key] = stack.calls
                self._write(stack_dict(stack, now_ns))
        self._out.flush()

    def end(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        """The last figures, and what was lost."""
        self.figures(trace, taken, failures)
        for what, count in (("calls", trace.lost), ("records", trace.records_lost), ("stacks", trace.stacks_lost)):
            if count:
                line = {"schema": SCHEMA, "event": "lost", "time": stamp(time.time_ns())}
                self._write({**line, "count": count, "where": "kernel", "what": what})
        self._out.flush()

    def _call(self, one: TracedCall, to_wall_ns: int) -> str:
        """As `call_dict`, with the parts that are the same for many calls made once."""
        call = one.call
        found = self._texts.get(call.site.cookie)
        if found is None:
            found = dumps({"symbol": call.site.symbol, "library": library_line(call.site.library)})[1:-1]
            self._texts[call.site.cookie] = found
        process = self._texts.get(one.process)
        if process is None:
            process = self._texts[one.process] = dumps({"process": process_line(one.process)})[1:-1]
        rest = dumps(_call_values(call))[1:]
        head = f'"schema":{SCHEMA},"event":"call","time":"{stamp(call.t_ns + to_wall_ns)}"'
        self._seq += 1
        return f'{{{head},"seq":{self._seq},{found},{process},{rest}'

    def _write(self, line: dict[str, Any]) -> None:
        self._seq += 1
        self._out.write(dumps({**line, "seq": self._seq}) + "\n")


def _call_values(call: Call) -> dict[str, Any]:
    return {
        "tid": call.tid,
        "t_ns": call.t_ns,
        "arguments": None if call.arguments is None else [_value(one) for one in call.arguments],
        "result": _value(call.result),
        "returned": call.has_returned,
        "duration_ns": call.spent_ns,
    }


def _value(value: Any) -> Any:
    """A value as JSON has it: a number, a string, or an object where it is not all there."""
    from sowatch.uprobes.call_format import Text, Unreadable

    if isinstance(value, Unreadable):
        return {"unreadable": hex(value.pointer)}
    if isinstance(value, Text):
        text = value.value.hex() if isinstance(value.value, bytes) else value.value
        return {"text": text, "cut": True} if value.is_cut else text
    return value


def stack_dict(stack: TracedStack, now_ns: int) -> dict[str, Any]:
    """Callers of a function, innermost first."""
    return {
        "schema": SCHEMA,
        "event": "stack",
        "time": stamp(now_ns),
        "symbol": stack.symbol,
        "library": library_line(stack.library),
        "calls": stack.calls,
        "frames": [
            {
                "address": hex(frame.address) if frame.address else None,
                "path": frame.library and frame.library.path,
                "build_id": frame.library and frame.library.build_id,
                "offset": frame.place and frame.place.offset,
                "symbol": frame.place and frame.place.symbol,
                "inside": frame.place and frame.place.inside,
            }
            for frame in stack.frames
        ],
    }


def trace_dict(one: TracedCalls, now_ns: int) -> dict[str, Any]:
    """One function in one process as the contract has it."""
    from sowatch.uprobes.calls import percentile_ns

    calls = one.calls
    return {
        "schema": SCHEMA,
        "event": "trace",
        "time": stamp(now_ns),
        "symbol": calls.site.symbol,
        "library": library_line(calls.site.library),
        "process": process_line(one.process),
        "calls": calls.calls,
        "latency_ns": {
            "count": calls.timed,
            "sum": calls.sum_ns,
            "p50": percentile_ns(calls.latency, 0.5),
            "p99": percentile_ns(calls.latency, 0.99),
            "buckets": [[1 << (at + 1), number] for at, number in enumerate(calls.latency) if number],
        },
        "final": one.is_final,
    }


class Table:
    """Figures for people: anew each time on a terminal that shows nothing else, elsewhere once at the end.

    Args:
        out: where to.
        by: one of `GROUPS`.
        is_timed: whether there are times.
        stacks: how many callers of each function are shown; 0: none.
        is_live: show the figures again and again.
    """

    def __init__(self, out: Out, by: str, *, is_timed: bool, stacks: int = 0, is_live: bool = False) -> None:
        self._out = out
        self._by = by
        self._is_timed = is_timed
        self._stacks = stacks
        self._is_live = is_live
        self._before: dict[tuple[str, ...], int] = {}
        self._since = self._at = time.monotonic()
        #: Of processes that are gone.
        self._finished: dict[tuple[str, ...], _Row] = {}
        self._clock = (0, "")
        self.has_calls = False

    def calls(self, taken: Sequence[TracedCall]) -> None:
        """A line for each call."""
        from sowatch.uprobes.call_format import value_text

        to_wall_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for call, process, call_format in taken:
            second, fraction = divmod(call.t_ns + to_wall_ns, 10**9)
            if second != self._clock[0]:
                self._clock = second, time.strftime("%H:%M:%S", time.localtime(second))
            listed = "..." if call.arguments is None else ", ".join(map(value_text, call.arguments))
            text = f"{self._clock[1]}.{fraction // 1000:06} {process.pid} {visible(process.comm or '?')} "
            text += f"{visible(call.site.symbol)}({listed})"
            if call_format.result is not None:
                text += f" = {value_text(call.result)} <{time_text(call.spent_ns)}>" if call.has_returned else " = ?"
            self._out.write(text + "\n")
        if taken:
            self._out.flush()

    def figures(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        """What is there now."""
        for one in taken:
            if one.is_final:
                key = self._key(one)
                if key not in self._finished and len(self._finished) >= _MAX_FINISHED:
                    key = tuple("(more)" if at else symbol for at, symbol in enumerate(key))
                self._finished.setdefault(key, _Row()).add(one.calls)
        if self._is_live:
            self._out.write("\x1b[H\x1b[J")
            self._show(trace, [one for one in taken if not one.is_final], failures, since=self._at)
            self._at = time.monotonic()

    def end(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        """The last figures; rates are those of the whole time."""
        if self._is_live:
            self._out.write("\x1b[H\x1b[J")
        self._before.clear()
        self._show(trace, taken, failures, since=self._since)

    def _show(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure], *, since: float) -> None:
        from sowatch.uprobes.calls import percentile_ns

        rows = {key: _Row(row.calls, list(row.latency)) for key, row in self._finished.items()}
        for one in taken:
            rows.setdefault(self._key(one), _Row()).add(one.calls)
        self.has_calls = bool(rows)
        elapsed_s = max(time.monotonic() - since, 1e-3)
        table = []
        for key, row in sorted(rows.items(), key=lambda item: -item[1].calls):
            cells = [str(row.calls), f"{max(0, row.calls - self._before.get(key, 0)) / elapsed_s:.0f}"]
            if self._is_timed:
                cells += [time_text(percentile_ns(row.latency, share)) for share in (0.5, 0.99)]
            table.append([*cells, *key])
        self._before = {key: row.calls for key, row in rows.items()}
        head = ["CALLS", "RATE/S", *(["P50<", "P99<"] if self._is_timed else []), *self._head()]
        write_table(self._out, head, table, right=range(len(head) - len(self._head())))
        self._write_stacks(trace)
        losses = [
            f"{counted(trace.lost, 'call')} lost",
            *([f"{trace.records_lost} of them not shown one by one"] if trace.records_lost else []),
            *([f"{trace.stacks_lost} without callers"] if trace.stacks_lost else []),
        ]
        self._out.write(f"{trace.attached} of {trace.expected} probes attached, {', '.join(losses)}\n")
        for failure in failures:
            again = "" if failure.is_permanent else " (it is tried again)"
            self._out.write(
                f"not attached: {visible(failure.library.path)}: {visible(failure.symbol)}: "
                f"{visible(failure.reason)}{again}\n"
            )
        self._out.flush()

    def _write_stacks(self, trace: Trace) -> None:
        for stack in trace.stacks(self._stacks) if self._stacks else ():
            self._out.write(f"{counted(stack.calls, 'call')} of {visible(stack.symbol)} by\n")
            for frame in stack.frames:
                self._out.write(f"    {frame_text(frame)}\n")
            if not stack.frames:
                self._out.write("    others\n")

    def _head(self) -> list[str]:
        return {
            "process": ["SYMBOL", "PID", "COMM", "CONTAINER", "LIBRARY"],
            "library": ["SYMBOL", "BUILD ID", "LIBRARY"],
            "build": ["SYMBOL", "BUILD ID"],
            "container": ["SYMBOL", "CONTAINER"],
            "symbol": ["SYMBOL"],
        }[self._by]

    def _key(self, one: TracedCalls) -> tuple[str, ...]:
        site, process = one.calls.site, one.process
        symbol = visible(site.symbol)
        container = (process.container or "-")[:_ID_LENGTH]
        build = (site.library.build_id or "-")[:_ID_LENGTH]
        return {
            "process": (symbol, str(process.pid), visible(process.comm or "?"), container, visible(site.library.path)),
            "library": (symbol, build, visible(site.library.path)),
            "build": (symbol, build),
            "container": (symbol, container),
            "symbol": (symbol,),
        }[self._by]


@dataclass(slots=True)
class _Row:
    """The sum of some figures."""

    calls: int = 0
    latency: list[int] = field(default_factory=list)

    def add(self, calls: Calls) -> None:
        self.calls += calls.calls
        mine = self.latency or [0] * len(calls.latency)
        self.latency = [one + other for one, other in zip(mine, calls.latency, strict=True)]


def frame_text(frame: Frame) -> str:
    """A caller for people: function, how far in it, file and place in the file."""
    if frame.library is None:
        return f"{frame.address:#x} (in no file that is known)"
    path = visible(frame.library.path)
    build = f" {frame.library.build_id[:_ID_LENGTH]}" if frame.library.build_id else ""
    if frame.place is None:
        return f"{frame.address:#x} ({path}{build}, which cannot be read any more)"
    name = "?" if frame.place.symbol is None else f"{visible(frame.place.symbol)}+{frame.place.inside:#x}"
    return f"{name} ({path}+{frame.place.offset:#x}{build})"
