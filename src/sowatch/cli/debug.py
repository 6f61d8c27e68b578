"""Queries or commands a running agent, over its unix socket.

  traced         files that some process holds, by rule, and who
  blocked        files whose activation failed, and why
  clear-blocked  forgets those, so that the next load tries again
  attach PID     scan a process once more; activate what a rule wants of it (--rule: only that one)
  detach PID     take away what a process holds
  telemetry      every metric
  inventory      which library is mapped by how many processes
  remediation    files that were replaced: how long they went on running, or by how many processes they still do
  explain X      why a process (PID) or a file (PATH) is, or is not, covered, and what is attached to it; with --rule
                 and without X: what a rule has attached, has counted, and could not do
  health         whether the agent watches: `ok`, or why not; ends with 1 if not
  ready          the same once every process has been scanned, too
  audit          compare the map with /proc; ends with 1 if they differ

--json gives what the agent answers: one object or list. Ends with 1 if no agent answers or it refuses.

Examples:
  sowatch debug traced
  sowatch debug explain /usr/lib/x86_64-linux-gnu/libssl.so.3
  sowatch debug explain --rule tls
  sowatch debug detach 1234 --rule tls
"""

# Nothing of the agent: its answers are plain JSON, and a client needs no extra.

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Final

from sowatch.cli._client import Agent
from sowatch.cli._options import DEFAULT_SOCKET
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser, pid
from sowatch.cli._table import write_table
from sowatch.cli.audit import show_answer as show_audit
from sowatch.cli.explain import show_answer as show_explanation
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.escape import one_line, visible
from sowatch.model.plural import counted

_ROUTES: Final = {
    "traced": "/debug/traced_programs",
    "blocked": "/debug/blocked_processes",
    "clear-blocked": "/debug/clear_blocked",
    "telemetry": "/debug/telemetry",
    "inventory": "/inventory",
    "remediation": "/page/stale",
}
#: What probes ask: answered at once, from memory.
_STATES: Final = {"health": "/healthz", "ready": "/readyz"}
_ORDERS: Final = ("attach", "detach")
_WITH_TARGET: Final = (*_ORDERS, "explain")


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("patterns", nargs="*", metavar="ACTION", help="one of those above, with PID, or X")
    parser.add_argument("--socket", default=DEFAULT_SOCKET, metavar="PATH", help=f"default: {DEFAULT_SOCKET}")
    parser.add_argument("--rule", metavar="NAME", help="of attach and detach (default: every rule), or explain")
    parser.add_argument("--json", action="store_true", help="the agent's answer as it is")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Ask, print; returns the exit code."""
    action, target = _action(args.patterns, has_rule=args.rule is not None)
    if args.rule is not None and action not in _WITH_TARGET:
        raise UsageError(f"--rule says nothing to {action}. Leave it out.")
    agent = Agent(args.socket, option="--socket")
    if action in _ORDERS:
        return _order(agent, action, _pid(target), args.rule, out, warn)
    if action in _STATES:
        return _state(agent, _STATES[action], out, as_json=args.json)
    if action == "audit":
        return show_audit(agent, out, as_json=args.json)
    if action == "explain":
        key = "rule" if args.rule is not None else "pid" if target.isascii() and target.isdigit() else "path"
        target = target if args.rule is None else args.rule
        show_explanation(agent, agent.explain(key, target), out, as_json=args.json)
        return 0
    found = agent.get(_ROUTES[action])
    if args.json or action == "telemetry":
        lines = found if action == "telemetry" and not args.json else [found]
        for line in lines:
            out.write(dumps(line) + "\n")
    else:
        _SHOW[action](found, out)
    out.flush()
    return 0


def _action(words: list[str], *, has_rule: bool) -> tuple[str, str]:
    known = [*_ROUTES, *_STATES, "audit", *_WITH_TARGET]
    if not words:
        raise UsageError(f"say what: one of {', '.join(known)}. See `sowatch debug --help`.")
    action, *rest = words
    if action not in known:
        raise UsageError(f"unknown action {action!r}. Use one of: {', '.join(known)}.")
    if len(rest) != (action in _WITH_TARGET and not (action == "explain" and has_rule)):
        needs = {"explain": "one PID or PATH, or --rule NAME", "attach": "one PID", "detach": "one PID"}.get(
            action, "nothing else"
        )
        raise UsageError(f"`sowatch debug {action}` takes {needs}. See `sowatch debug --help`.")
    return action, "".join(rest)


def _pid(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        return pid(text)
    except ArgumentTypeError as error:
        raise UsageError(f"{error}. Give a number, as `ps -e` shows it.") from error


def _state(agent: Agent, route: str, out: Out, *, as_json: bool) -> int:
    """One line for each reason, or `ok`: a kubelet shows what a probe that failed has printed."""
    problems = agent.problems(route)
    if as_json:
        out.write(dumps({"ok": not problems, "problems": problems}) + "\n")
    else:
        out.write("".join(f"{one_line(one)}\n" for one in problems or ["ok"]))
    out.flush()
    return 1 if problems else 0


def _order(agent: Agent, action: str, target: int, rule: str | None, out: Out, warn: Callable[[str], None]) -> int:
    """Attach or detach, for one rule or for all; 1 if none of them had anything to do."""
    known = agent.ready()["rules"]
    if rule is not None and rule not in known:
        raise SowatchError(f"the agent has no rule {rule!r}. Use one of: {', '.join(known)}.")
    rules = known if rule is None else [rule]
    refusals = []
    for name in rules:
        status, text = agent.post(f"/debug/{action}-pid", {"pid": target, "type": name})
        if status == 200:
            out.write(f"{one_line(text)}\n")
        else:
            refusals.append(text)
    out.flush()
    if len(refusals) < len(rules):
        return 0
    for text in dict.fromkeys(refusals):
        warn(text)
    return 1


# ---- text ----------------------------------------------------------------------------------------


def _traced(found: Any, out: Out) -> None:
    rows = [
        (visible(one["ProgramType"]), one["State"], str(len(one["PIDs"])), _pids(one["PIDs"]), visible(one["FilePath"]))
        for one in found or []
    ]
    write_table(out, ("RULE", "STATE", "PROCESSES", "PIDS", "PATH"), rows, right=(2,))


def _pids(pids: list[int], most: int = 5) -> str:
    shown = ",".join(map(str, pids[:most]))
    return shown + (",..." if len(pids) > most else "") or "-"


def _blocked(found: Any, out: Out) -> None:
    rows = [
        (visible(group["ProgramType"]), visible(one["SamplePath"]), one_line(one["Reason"]))
        for group in found or []
        for one in group["PathIdentifiers"]
    ]
    write_table(out, ("RULE", "PATH", "REASON"), rows)


def _cleared(found: Any, out: Out) -> None:
    out.write(f"{counted(found['cleared'], 'file')} {'is' if found['cleared'] == 1 else 'are'} not blocked any more\n")


def _inventory(found: Any, out: Out) -> None:
    """As `sowatch list` has it, with the rule that wants each file."""
    processes = found["processes"]
    rows = [
        (
            str(len(one["processes"])),
            str(len({processes[at]["container"] for at in one["processes"]} - {None})),
            one["kind"],
            (one["build_id"] or "-")[:12],
            one.get("stale") or "-",
            visible(one["rule"]),
            visible(one["path"]),
        )
        for one in sorted(found["libraries"], key=lambda one: (one["path"], one["dev"], one["inode"]))
    ]
    head = ("PROCESSES", "CONTAINERS", "KIND", "BUILD ID", "STALE", "RULE", "PATH")
    write_table(out, head, rows, right=(0, 1), warning=4)


def _remediation(found: Any, out: Out) -> None:
    """Those that still run first."""

    def time_of(ms: int) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms // 1000))

    rows = [
        (
            time_of(one["since_ms"]) + ("" if one["since_known"] else " or before"),
            one["stale"],
            f"{one['left']} of {one['processes']}" if one["until_ms"] is None else str(one["processes"]),
            "goes on" if one["until_ms"] is None else f"{one['seconds']:,.0f} s",
            (one["build_id"] or "-")[:12],
            visible(one["path"]),
        )
        for one in found["remediations"]
    ]
    write_table(out, ("SINCE", "STALE", "PROCESSES", "RAN ON FOR", "BUILD ID", "PATH"), rows, right=(2, 3))


_SHOW: Final[dict[str, Callable[[Any, Out], None]]] = {
    "traced": _traced,
    "blocked": _blocked,
    "clear-blocked": _cleared,
    "inventory": _inventory,
    "remediation": _remediation,
}
