"""Compares the mapping table with an independent scan of /proc.

Watches for --duration seconds (default 1), then reads every live process's maps and prints what
differs. A difference counts if it is still the same after a few scans, so a machine that is busy
gives none either. Ends with 1 if there are any.

Examples:
  sowatch audit                      the whole host
  sowatch audit --duration 60 --json
  sowatch audit --agent              the map of the running agent
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import UNSET, convert
from msgspec.structs import replace

from sowatch.cli._agent import add_agent, refuse_own_watch
from sowatch.cli._options import add_common, selection_of, wants_json
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli.watch import warn_of_fallback
from sowatch.model import wire_explain, wire_reports
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError
from sowatch.model.escape import visible
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.cli._client import Agent

DEFAULT_S = 1.0


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser)
    add_agent(parser)


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Watch, compare, print; returns the exit code."""
    as_json = wants_json(args)
    if args.agent is not None:
        return _ask_agent(args, out, as_json=as_json)
    selection = selection_of(args)
    from sowatch.explain.audit import audit_line
    from sowatch.watcher.watcher import Watcher

    # Not narrowed down to processes: the map that is compared is that of the whole host.
    with Watcher(*selection.rules, config=selection.config) as watcher:
        ready = watcher.ready
        if ready is not None:
            warn_of_fallback(ready, warn)
        watcher.wait(DEFAULT_S if args.duration is None else args.duration)
        found = audit_line(watcher.audit(), watcher.stats)
    return show_audit(found, out, as_json=as_json)


def _ask_agent(args: Namespace, out: Out, *, as_json: bool) -> int:
    """The map that is compared is that of the agent, by its rules; it has watched all the time."""
    refuse_own_watch(args)
    for name in ("kind", "container", "duration"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} is for a watch of its own: the agent compares all that its rules want. Leave it out, or "
                "--agent."
            )
    patterns = [re.compile(rule.pattern) for rule in selection_of(args).rules if rule.pattern]

    def is_asked_for(one: wire_explain.Difference) -> bool:
        return one.pid in (args.pid or (one.pid,)) and (
            not patterns or any(pattern.search(one.path) for pattern in patterns)
        )

    from sowatch.cli._client import Agent

    return show_answer(Agent(args.agent), out, is_asked_for, as_json=as_json)


def show_answer(
    agent: Agent,
    out: Out,
    is_asked_for: Callable[[wire_explain.Difference], bool] = lambda _: True,
    *,
    as_json: bool,
) -> int:
    """Have an agent compare, and write the differences that are asked for; returns the exit code."""
    report = agent.read_as(lambda: convert(agent.get("/audit"), wire_reports.Audit))
    return show_audit(replace(report, differences=list(filter(is_asked_for, report.differences))), out, as_json=as_json)


def show_audit(report: wire_reports.Audit, out: Out, *, as_json: bool) -> int:
    """Write it for programs or for people; returns the exit code."""
    if as_json:
        out.write(dumps(report) + "\n")
    else:
        for pid in report.unread:
            out.write(f"unread   {pid:>8} the kernel does not answer who reads its mappings\n")
        for one in report.differences:
            out.write(f"{one.kind:<8} {one.pid:>8} {'-'.join(one.range)} {visible(one.path)}\n")
        losses = [] if report.lost is UNSET else [f"{report.lost} lost"]
        losses += [] if report.repairs is UNSET else [counted(report.repairs, "repair")]
        counts = [
            counted(report.processes, "process", "processes"),
            counted(report.mappings, "mapping"),
            f"{report.unreadable} unreadable",
        ]
        differences = counted(len(report.differences), "difference")
        out.write(f"{differences}; {', '.join([*counts, *losses])}\n")
    out.flush()
    return 1 if report.differences else 0
