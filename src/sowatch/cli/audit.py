"""Compares the mapping table with an independent scan of /proc.

Watches for --duration seconds (default 1), then reads every live process's maps and prints what
differs. A difference counts if it is still the same after a few scans, so a machine that is busy
gives none either. Ends with 1 if there are any.

Examples:
  sowatch audit                      the whole host
  sowatch audit --duration 60 --json
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from sowatch.cli._options import add_common, selection_of, wants_json
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli.watch import warn_of_fallback
from sowatch.model.encoding import dumps
from sowatch.model.escape import visible
from sowatch.model.lines import SCHEMA

DEFAULT_S = 1.0


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser)


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Watch, compare, print; returns the exit code."""
    as_json = wants_json(args)
    selection = selection_of(args)
    from sowatch.watcher.watcher import Watcher

    # Not narrowed down to processes: the map that is compared is that of the whole host.
    with Watcher(*selection.rules, config=selection.config) as watcher:
        ready = watcher.ready
        if ready is not None:
            warn_of_fallback(ready, warn)
        watcher.wait(DEFAULT_S if args.duration is None else args.duration)
        report = watcher.audit()
        stats = watcher.stats
    if as_json:
        line = {
            "schema": SCHEMA,
            "event": "audit",
            "processes": report.processes,
            "mappings": report.mappings,
            "unreadable": report.unreadable,
            "unread": list(report.unread),
            "seconds": round(report.seconds, 6),
            "lost": stats.lost_kernel,
            "repairs": stats.repairs,
            "differences": [
                {
                    "kind": one.kind,
                    "pid": one.pid,
                    "path": one.path,
                    "inode": one.inode,
                    "range": [f"{one.start:x}", f"{one.end:x}"],
                }
                for one in report.differences
            ],
        }
        out.write(dumps(line) + "\n")
    else:
        for pid in report.unread:
            out.write(f"unread   {pid:>8} the kernel does not answer who reads its mappings\n")
        for one in report.differences:
            out.write(f"{one.kind:<8} {one.pid:>8} {one.start:x}-{one.end:x} {visible(one.path)}\n")
        out.write(
            f"{len(report.differences)} differences; {report.processes} processes, {report.mappings} mappings, "
            f"{report.unreadable} unreadable, {stats.lost_kernel} lost, {stats.repairs} repairs\n"
        )
    out.flush()
    return 1 if report.differences else 0
