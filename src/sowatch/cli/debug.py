"""Queries or commands a running agent, over its unix socket.

  traced         files that some process holds, by rule, and who
  blocked        files whose activation failed, and why
  clear-blocked  forgets those, so that the next load tries again
  attach PID     scan a process once more; activate what a rule wants of it (--rule: only that one)
  detach PID     take away what a process holds
  telemetry      every metric
  inventory      which library is mapped by how many processes
  explain X      why a process (PID) or a file (PATH) is, or is not, covered, and what is attached to it; with --rule
                 and without X: what a rule has attached, has counted, and could not do
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

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, Final

from sowatch.cli._client import Agent
from sowatch.cli._options import DEFAULT_SOCKET
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser, pid
from sowatch.cli._table import write_table
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError
from sowatch.model.escape import one_line, visible

_ROUTES: Final = {
    "traced": "/debug/traced_programs",
    "blocked": "/debug/blocked_processes",
    "clear-blocked": "/debug/clear_blocked",
    "telemetry": "/debug/telemetry",
    "inventory": "/inventory",
    "audit": "/audit",
}
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
    agent = Agent(args.socket)
    if action in _ORDERS:
        return _order(agent, action, _pid(target), args.rule, out, warn)
    if action == "explain":
        key = "rule" if args.rule is not None else "pid" if target.isascii() and target.isdigit() else "path"
        target = target if args.rule is None else args.rule
        found = agent.explain(key, target)
    else:
        found = agent.get(_ROUTES[action])
    if args.json or action == "telemetry":
        lines = found if action == "telemetry" and not args.json else [found]
        for line in lines:
            out.write(dumps(line) + "\n")
    else:
        _SHOW[action](found, out)
    out.flush()
    return 1 if action == "audit" and found["differences"] else 0


def _action(words: list[str], *, has_rule: bool) -> tuple[str, str]:
    known = [*_ROUTES, *_WITH_TARGET]
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


def _order(agent: Agent, action: str, target: int, rule: str | None, out: Out, warn: Callable[[str], None]) -> int:
    """Attach or detach, for one rule or for all; 1 if none of them had anything to do."""
    rules = [rule] if rule is not None else agent.get("/readyz")["rules"]
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
    out.write(f"{found['cleared']} files are not blocked any more\n")


def _inventory(found: Any, out: Out) -> None:
    rows = sorted(
        (visible(one["path"]), str(len(one["processes"])), visible(one["rule"]), (one["build_id"] or "-")[:12])
        for one in found["libraries"]
    )
    table = [(count, rule, build_id, path) for path, count, rule, build_id in rows]
    write_table(out, ("PROCESSES", "RULE", "BUILD ID", "PATH"), table, right=(0,))


def _audit(found: Any, out: Out) -> None:
    for hung in found["unread"]:
        out.write(f"unread   {hung:>8} the kernel does not answer who reads its mappings\n")
    for one in found["differences"]:
        out.write(f"{one['kind']:<8} {one['pid']:>8} {'-'.join(one['range'])} {visible(one['path'])}\n")
    out.write(
        f"{len(found['differences'])} differences; {found['processes']} processes, {found['mappings']} mappings, "
        f"{found['unreadable']} unreadable\n"
    )


def _explain(found: Any, out: Out) -> None:
    for line in outline(found):
        out.write(f"{line}\n")


def outline(value: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested objects as indented lines; what is null or empty is left out."""
    for key, one in value.items():
        if one is None or one in ([], {}, ""):
            continue
        if isinstance(one, dict):
            yield f"{indent}{key}"
            yield from outline(one, indent + "  ")
        elif isinstance(one, list) and isinstance(one[0], dict):
            for item in one:
                yield f"{indent}{key}"
                yield from outline(item, indent + "  ")
        elif isinstance(one, list):
            words = ["-".join(map(str, item)) if isinstance(item, list) else str(item) for item in one]
            yield f"{indent}{key:<14} {visible(' '.join(words))}"
        else:
            text = str(one).lower() if isinstance(one, bool) else str(one)
            yield f"{indent}{key:<14} {visible(text)}"


_SHOW: Final[dict[str, Callable[[Any, Out], None]]] = {
    "traced": _traced,
    "blocked": _blocked,
    "clear-blocked": _cleared,
    "inventory": _inventory,
    "audit": _audit,
    "explain": _explain,
}
