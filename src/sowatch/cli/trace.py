"""Count and time calls of library functions, wherever that library is or will be loaded.

A target is LIB:SYMBOL. LIB is a path, the stem of a soname (libz finds /usr/lib/.../libz.so.1, and
libz-3e69114b.so.1.2, as wheels name it), a prefix of a build id, or a regular expression for the path. SYMBOL
is a name, a pattern (SSL_*), a place in a function (f+0x10), or cpp:ns::f. Processes that run already and those
that start later are both counted. Times are taken in the kernel, by powers of two.

Examples:
  sowatch trace libz:deflate libz:inflate           who compresses, and how long it takes
  sowatch trace 'libssl:SSL_*' --duration 10 --by library
  sowatch trace libssl:SSL_write --json --interval 5 | jq .calls
  sowatch trace --list /usr/lib/x86_64-linux-gnu/libz.so.1
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sowatch.cli._options import add_format, add_strategy, config_of, wants_json
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser, pid, seconds
from sowatch.cli._stop import Stopper
from sowatch.cli._table import write_table
from sowatch.cli.watch import warn_of_fallback
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError
from sowatch.model.escape import visible
from sowatch.model.lines import SCHEMA, library_line, process_line, stamp

if TYPE_CHECKING:
    from sowatch.uprobes.records import Failure
    from sowatch.uprobes.trace import Trace, TracedCalls

_GROUPS: Final = ("process", "library", "container", "symbol")
_ID_LENGTH: Final = 12
_UNITS: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "us"))


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("targets", nargs="*", metavar="LIB:SYMBOL", help="what to count; several may be given")
    add_format(parser, default="text")
    add_strategy(parser)
    parser.add_argument(
        "--duration", type=seconds, metavar="SECONDS", help="end after this time, counted from the start"
    )
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="how often figures are shown. Default: 1"
    )
    parser.add_argument(
        "--pid", type=pid, action="append", default=[], metavar="PID", help="only this process; may be repeated"
    )
    parser.add_argument("--container", metavar="ID", help="only the container whose id begins with ID")
    parser.add_argument(
        "--by", metavar="GROUP", default="process", help=f"a row for each {', '.join(_GROUPS)}. Default: process"
    )
    parser.add_argument("--no-latency", action="store_true", help="count only: half the cost for each call")
    parser.add_argument("--list", metavar="FILE", help="show the functions of a file that can be traced, and end")
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Trace until told to stop; returns the exit code."""
    if args.list is not None:
        return _list(args, out)
    if not args.targets:
        raise UsageError("nothing to trace. Give a library and a function: sowatch trace libz:deflate.")
    if args.by not in _GROUPS:
        raise UsageError(f"unknown group {args.by!r}. Use one of: {', '.join(_GROUPS)}.")
    if args.interval < 0.1:
        raise UsageError("--interval is at least 0.1 seconds.")
    from sowatch.uprobes.trace import Trace, parse_target

    as_json = wants_json(args, out, when_piped=False)
    trace = Trace(
        [parse_target(text) for text in args.targets],
        config=config_of(args),
        pids=args.pid,
        container=args.container,
        is_timed=not args.no_latency,
        linger_s=max(5.0, 2 * args.interval),
    )
    show = _Json(out) if as_json else _Table(out, args.by, is_timed=not args.no_latency)
    # What cannot be attached is part of the answer; the registry's log would say it once more.
    logging.getLogger("sowatch.registry").setLevel(logging.ERROR)
    is_over = threading.Event()
    with Stopper(is_over.set) as stopper:
        try:
            warn_of_fallback(trace.start(), warn)
            if args.duration is not None:
                stopper.stop_after(args.duration)
            while not is_over.wait(args.interval) and not out.reader_is_gone():
                show.figures(trace, trace.take(), trace.failures())
                if trace.watcher.wait(0):
                    warn("the watch ended before it was stopped. The figures so far are right.")
                    return 1
            # Before anything is detached: counts go with what is attached.
            show.end(trace, trace.take(is_last=True), trace.failures())
        except PipeClosed:
            out.discard()
        finally:
            trace.close()
    return 0


def _list(args: Namespace, out: Out) -> int:
    from sowatch.linux.symbols import list_functions, open_checked

    if args.targets:
        raise UsageError("--list takes a file only. Leave out the targets.")
    fd = open_checked(args.list)
    try:
        found = list_functions(fd)
    finally:
        os.close(fd)
    if wants_json(args, out, when_piped=False):
        for one in found:
            line = {"schema": SCHEMA, "event": "function", "symbol": one.name, "offset": one.offset, "size": one.size}
            out.write(dumps(line) + "\n")
    else:
        for one in found:
            out.write(f"{visible(one.name)}\n")
    out.flush()
    return 0


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


class _Json:
    """One object a line for each function and process in each interval, and one for what could not be attached."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._failed: set[Failure] = set()

    def figures(self, _: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
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
            self._write(trace_dict(one, now_ns))
        self._out.flush()

    def end(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        self.figures(trace, taken, failures)

    def _write(self, line: dict[str, Any]) -> None:
        self._out.write(dumps(line) + "\n")


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


class _Table:
    """Figures for people: on a terminal anew each time, elsewhere once at the end."""

    def __init__(self, out: Out, by: str, *, is_timed: bool) -> None:
        self._out = out
        self._by = by
        self._is_timed = is_timed
        self._before: dict[tuple[str, ...], int] = {}
        self._at = time.monotonic()
        self._finished: list[TracedCalls] = []

    def figures(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        self._finished += [one for one in taken if one.is_final]
        if self._out.is_terminal:
            self._out.write("\x1b[H\x1b[J")
            self._show(trace, [*self._finished, *(one for one in taken if not one.is_final)], failures)

    def end(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        if self._out.is_terminal:
            self._out.write("\x1b[H\x1b[J")
        self._show(trace, [*self._finished, *taken], failures)

    def _show(self, trace: Trace, taken: Sequence[TracedCalls], failures: Iterable[Failure]) -> None:
        from sowatch.uprobes.calls import percentile_ns

        now = time.monotonic()
        rows: dict[tuple[str, ...], list[Any]] = {}
        for one in taken:
            row = rows.setdefault(self._key(one), [0, 0, [0] * len(one.calls.latency)])
            row[0] += one.calls.calls
            row[1] += one.calls.sum_ns
            row[2] = [mine + theirs for mine, theirs in zip(row[2], one.calls.latency, strict=True)]
        table = []
        for key, (calls, _, latency) in sorted(rows.items(), key=lambda item: -item[1][0]):
            rate = (calls - self._before.get(key, 0)) / max(now - self._at, 1e-3)
            cells = [str(calls), f"{rate:.0f}"]
            if self._is_timed:
                cells += [time_text(percentile_ns(latency, share)) for share in (0.5, 0.99)]
            table.append([*cells, *key])
            self._before[key] = calls
        self._at = now
        head = ["CALLS", "RATE/S", *(["P50<", "P99<"] if self._is_timed else []), *self._head()]
        write_table(self._out, head, table, right=range(len(head) - len(self._head())))
        self._out.write(f"{trace.attached} of {trace.expected} probes attached, {trace.lost} calls lost\n")
        for failure in failures:
            self._out.write(
                f"not attached: {visible(failure.library.path)}: {failure.symbol}: {visible(failure.reason)}\n"
            )
        self._out.flush()

    def _head(self) -> list[str]:
        return {
            "process": ["SYMBOL", "PID", "COMM", "CONTAINER", "LIBRARY"],
            "library": ["SYMBOL", "BUILD ID", "LIBRARY"],
            "container": ["SYMBOL", "CONTAINER"],
            "symbol": ["SYMBOL"],
        }[self._by]

    def _key(self, one: TracedCalls) -> tuple[str, ...]:
        site, process = one.calls.site, one.process
        symbol = visible(site.symbol)
        container = (process.container or "-")[:_ID_LENGTH]
        if self._by == "process":
            return symbol, str(process.pid), visible(process.comm or "?"), container, visible(site.library.path)
        if self._by == "library":
            return symbol, (site.library.build_id or "-")[:_ID_LENGTH], visible(site.library.path)
        return (symbol, container) if self._by == "container" else (symbol,)
