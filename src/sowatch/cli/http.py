"""HTTP requests and responses as they pass TLS libraries.

Taps the TLS libraries (OpenSSL and its kin, GnuTLS) of every process, wherever they are or will be loaded, and reports
each request with its response once it is over. Metadata only: no header but the host's name, no body, no query unless
--query is given. HTTP without TLS is not seen; nor are Go and Rust programs that bring a TLS of their own.

PATTERN is a regular expression that the path of the TLS library has to match.

Examples:
  sowatch http                                       every request as it ends
  sowatch http --pid 4711 --json | jq .path
  sowatch http --summary --duration 60               the endpoints of a minute
  sowatch http --status 5xx --side server
"""

# Heavy modules (the watcher, the decoders) are imported only where they are used.

from __future__ import annotations

import re
import threading
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import to_builtins

from sowatch.cli._http_why import Named, why_no_flows
from sowatch.cli._options import add_format, add_selection, add_strategy, config_of, wants_json
from sowatch.cli._out import Out, PipeClosed
from sowatch.cli._parser import Parser, seconds
from sowatch.cli._stop import Stopper
from sowatch.cli._table import write_table
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.proc import ProcFs
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError
from sowatch.model.escape import visible
from sowatch.model.lines import SCHEMA, to_json
from sowatch.model.rules import compile_pattern

if TYPE_CHECKING:
    from sowatch.explain.probing import TlsAnswer
    from sowatch.http.summary import Summary
    from sowatch.http.taps import HttpFlow
    from sowatch.uprobes.records import Failure

_SIDES: Final = ("client", "server")
_STATUS: Final = re.compile(r"[1-5](?:xx|\d\d)")
#: Flows that wait to be written; a reader that is slower loses the rest, which is counted.
_MAX_WAITING: Final = 65536
#: How long a flow may wait to be shown.
_BATCH_S: Final = 0.05
#: Figures of `FlowStats` and of the program that name no fault.
_TALLIES: Final = frozenset({"calls", "passed", "spared"})
_PERCENTILES: Final = (0.5, 0.95, 0.99)


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help="only libraries whose path matches; of several, any"
    )
    add_format(parser)
    add_strategy(parser)
    parser.add_argument(
        "--duration", type=seconds, metavar="SECONDS", help="end after this time, counted from the start"
    )
    parser.add_argument("--summary", action="store_true", help="endpoints with counts and latencies, at the end")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="endpoints of the summary. Default: 20")
    add_selection(parser)
    parser.add_argument("--path", metavar="REGEX", help="only requests whose path matches")
    parser.add_argument(
        "--status", action="append", default=[], metavar="STATUS", help="only this status (404) or class (5xx)"
    )
    parser.add_argument("--side", metavar="SIDE", help="only requests that a process makes (client) or serves (server)")
    parser.add_argument("--query", action="store_true", help="keep what stands behind ? in a path")
    parser.add_argument(
        "--header", action="append", default=[], metavar="NAME", help="keep this header field of requests and responses"
    )
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Report flows until the end is asked for; returns the exit code."""
    as_json = wants_json(args)
    matches = _filter_of(args)
    pattern = "|".join(f"(?:{one})" for one in args.patterns) or None
    try:
        from sowatch.http.summary import Summary
        from sowatch.http.taps import HttpTap
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and HTTP cannot be decoded without it. "
            "Install it: pip install 'sowatch[http]'."
        ) from error

    config = config_of(args)
    named = Named(ProcFs(config.proc_root), args.pid, pattern, args.container) if args.pid else None
    waiting: deque[HttpFlow] = deque()
    unwritten = [0]

    def take(found: HttpFlow) -> None:
        # Nobody is woken: a thread that is woken by each flow takes the interpreter away from the one that decodes.
        if len(waiting) < _MAX_WAITING:
            waiting.append(found)
        else:
            unwritten[0] += 1

    tap = HttpTap(
        take,
        pids=args.pid,
        container=args.container,
        pattern=pattern,
        config=config,
        keeps_query=args.query,
        headers=args.header,
    )
    summary = Summary() if args.summary else None
    show = _Lines(out, as_json=as_json, has_headers=bool(args.header))
    is_over = threading.Event()
    with Stopper(is_over.set) as stopper:
        try:
            warn_of_fallback(tap.start(), warn)
            if not tap.sees_sockets:
                warn("this kernel does not show which socket a call uses (6.3 and later do): every peer is unknown.")
            if args.duration is not None:
                stopper.stop_after(args.duration)
            while not is_over.wait(_BATCH_S) and not out.reader_is_gone():
                _write(filter(matches, _taken(waiting)), show, summary)
                if tap.watcher.wait(0):
                    warn("the watch ended before it was stopped. What was reported is right.")
                    return 1
            failures = tap.failures
            tap.finish()
            stats = tap.stats() | {"unwritten": unwritten[0]}
            _write(filter(matches, _taken(waiting)), show, summary)
            if summary is not None:
                _show_summary(summary, out, args.top, as_json=as_json)
            without = None if named is None else named.without_flows(tap)
            lines = show.lines if summary is None else len(summary.endpoints)
            _show_stats(stats, failures, without, out, warn, seq=lines + 1 if as_json else None)
        except PipeClosed:
            out.discard()
        finally:
            tap.close()
    return 0


def _filter_of(args: Namespace) -> Callable[[HttpFlow], bool]:
    """What the options ask for.

    Raises:
        UsageError: a side, status, or expression that is none.
    """
    if args.side is not None and args.side not in _SIDES:
        raise UsageError(f"unknown side {args.side!r}. Use one of: {', '.join(_SIDES)}.")
    statuses = [one.lower() for one in args.status]
    for one in statuses:
        if not _STATUS.fullmatch(one):
            raise UsageError(f"{one!r} is no status. Write one (404) or a class (5xx).")
    path = None if args.path is None else compile_pattern(args.path)
    if args.top < 1:
        raise UsageError("--top is at least 1.")

    def matches(found: HttpFlow) -> bool:
        flow = found.flow
        if args.side is not None and flow.side != args.side:
            return False
        shown = "" if flow.status is None else str(flow.status)
        if statuses and not any(shown == one or (one.endswith("xx") and shown[:1] == one[0]) for one in statuses):
            return False
        return path is None or (flow.path is not None and path.search(flow.path) is not None)

    return matches


def _taken(waiting: deque[HttpFlow]) -> Iterator[HttpFlow]:
    """What is there now."""
    for _ in range(len(waiting)):
        yield waiting.popleft()


def _write(flows: Iterator[HttpFlow], show: _Lines, summary: Summary | None) -> None:
    for found in flows:
        if summary is None:
            show.write(found)
        else:
            summary.add(found.flow)
    show.flush()


class _Lines:
    """One line a flow: JSON, or for people."""

    def __init__(self, out: Out, *, as_json: bool, has_headers: bool) -> None:
        self._has_headers = has_headers
        self._out = out
        self._as_json = as_json
        #: Between the clock of the kernel's stamps and the one of the wall.
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self.lines = 0

    def write(self, found: HttpFlow) -> None:
        if self._as_json:
            self.lines += 1
            event = found.event(self._offset_ns, has_headers=self._has_headers)
            self._out.write(to_json(event, self.lines) + "\n")
        else:
            self._out.write(_line(found, self._offset_ns) + "\n")

    def flush(self) -> None:
        self._out.flush()


def _line(found: HttpFlow, offset_ns: int) -> str:
    flow = found.flow
    begin_ns = flow.begin_ns or flow.end_ns or 0
    clock = time.strftime("%H:%M:%S", time.localtime((begin_ns + offset_ns) / 1e9))
    duration = "-" if flow.duration_ns is None else f"{flow.duration_ns / 1e6:.1f}ms"
    peer = "?" if flow.peer is None else f"{flow.peer.address}:{flow.peer.port}"
    url = f"{flow.authority or '?'}{flow.path or ''}"
    headers = [*flow.request_headers, *flow.response_headers]
    note = ("" if flow.is_complete else "  incomplete") + "".join(
        f"  {visible(name)}: {visible(value)}" for name, value in headers
    )
    process = f"{visible(found.process.comm or '?')}[{found.process.pid}]"
    return (
        f"{clock} {flow.side:6} {process:22} {flow.status or '-':>3} {duration:>9} "
        f"{flow.method or '?':7} {visible(url)}  {peer}{note}"
    )


def _show_summary(summary: Summary, out: Out, top: int, *, as_json: bool) -> None:
    rows = sorted(summary.endpoints.items(), key=lambda item: -item[1].flows)
    if as_json:
        for seq, (key, endpoint) in enumerate(rows, 1):
            line = {"schema": SCHEMA, "event": "http_endpoint", "seq": seq, **key._asdict(), "flows": endpoint.flows}
            line["flow_count"] = endpoint.flows
            line["incomplete"] = endpoint.incomplete
            line["request_bytes"], line["response_bytes"] = endpoint.request_bytes, endpoint.response_bytes
            for share in _PERCENTILES:
                value = endpoint.percentile_s(share)
                line[f"p{share * 100:g}_ms"] = None if value is None else round(value * 1e3, 3)
            out.write(dumps(line) + "\n")
    else:
        table = [
            [
                str(endpoint.flows),
                "-" if key.status_class is None else f"{key.status_class}xx",
                *(_shown_s(endpoint.percentile_s(share)) for share in _PERCENTILES),
                key.side,
                key.method or "?",
                visible(f"{key.authority or ''}{key.path}"),
            ]
            for key, endpoint in rows[:top]
        ]
        write_table(out, ["FLOWS", "STATUS", "P50", "P95", "P99", "SIDE", "METHOD", "ENDPOINT"], table, right=range(5))
        if len(rows) > top:
            out.write(f"and {len(rows) - top} more endpoints; --top shows them\n")
    out.flush()


def _shown_s(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f}ms"


def _show_stats(
    stats: dict[str, int],
    failures: Sequence[Failure],
    without: dict[int, TlsAnswer] | None,
    out: Out,
    warn: Callable[[str], None],
    *,
    seq: int | None,
) -> None:
    """What is not known, in every output.

    ``without``: why processes that were named have no flows, by pid; ``seq`` of the line in JSON, None for text.
    """
    from sowatch.explain.probing import tls_line

    if seq is not None:
        line: dict[str, Any] = {"schema": SCHEMA, "event": "http_stats", "seq": seq, "counters": stats, **stats}
        if without is not None:
            line["without_flows"] = [{"pid": pid, **to_builtins(tls_line(answer))} for pid, answer in without.items()]
        out.write(dumps(line) + "\n")
        out.flush()
    else:
        parts = [f"{value} {name.replace('_', ' ')}" for name, value in stats.items() if value and name not in _TALLIES]
        warn(", ".join(parts) + "." if parts else "no HTTP passed a TLS library that is probed.")
        for pid, answer in (without or {}).items():
            warn(f"flows of process {pid}: {why_no_flows(tls_line(answer))}")
    for failure in failures:
        warn(f"not tapped: {visible(failure.library.path)}: {visible(failure.reason)}")
