"""``sowatch fleet``: the questions to a store, from the command line to lines and tables."""

from __future__ import annotations

import calendar
import contextlib
import os
import re
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.model.errors import UsageError

if TYPE_CHECKING:
    from sowatch.fleet.answers import Answer
    from sowatch.fleet.asks import Asks
    from sowatch.fleet.questions import Fleet
    from sowatch.fleet.resolved import VulnerableBuilds

__all__ = ["KINDS", "configure", "run"]

#: By action, the words that it takes: at least, at most.
_WORDS: Final = {"who": (1, 1), "stale": (0, 0), "versions": (1, 1), "history": (1, 1), "coverage": (0, 0)}
_MANY: Final = 1000
#: Which actions an option is for; the others are for every one.
_ONLY_FOR: Final = {
    "kind": ("who", "versions", "history", "remediated"),
    "osv": ("who", "history", "remediated"),
    "build_ids": ("who", "history", "remediated"),
    "vex": ("who", "history", "remediated"),
    "plan": ("stale",),
    "since": ("history",),
    "ignore_silent": ("remediated",),
}
#: Of `--kind`; as `sowatch.fleet.targets`, which is not imported for a parser.
KINDS: Final = ("build_id", "purl", "soname", "path", "cve")
_UNITS_S: Final = {"m": 60, "h": 3600, "d": 86400}
#: Lines of JSON that leave together.
_FLUSHED: Final = 1000


def configure(parser: Parser) -> None:
    """Add the options of questions."""
    parser.add_argument(
        "--url", metavar="URL", help="of a ClickHouse that has the tables: http://HOST:8123, with ?database=NAME"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--kind", metavar="KIND", help=f"as what WHAT is taken: {', '.join(KINDS)}. Default: by its form"
    )
    parser.add_argument(
        "--expect",
        metavar="FILE",
        help="names or ids of hosts that should be there, one a line: those that never sent anything are silent",
    )
    parser.add_argument(
        "--at",
        type=_time_ns,
        metavar="TIME",
        help="which hosts were silent then, of a store that is not filled any more: 2026-11-29T12:00:00Z. Default: now",
    )
    parser.add_argument(
        "--since", type=_time_ns, metavar="TIME", help="of history: not what ended before; a time, or 90m, 12h, 7d ago"
    )
    parser.add_argument("--plan", action="store_true", help="of stale: only the commands that restart, by host")
    parser.add_argument(
        "--ignore-silent",
        action="store_true",
        help="of remediated: hosts that are silent do not leave the answer open",
    )
    for name, metavar, text in (
        ("--osv", "PATH", "of a CVE: advisories of OSV, as a JSON file, a zip archive, or a directory with such"),
        ("--build-ids", "FILE", "of a CVE: lines BUILD_ID,ID[,NOTE], of builds that are affected"),
        ("--vex", "FILE", "of a CVE: statements of OpenVEX"),
    ):
        parser.add_argument(name, action="append", default=[], metavar=metavar, help=text)


def run(action: str, words: Sequence[str], args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Ask, print; returns the exit code."""
    _check(action, words, args)
    from sowatch.fleet.answers import exit_code
    from sowatch.fleet.questions import Fleet
    from sowatch.fleet.targets import target_of

    targets = [target_of(word, args.kind) for word in words]
    vulnerable = _vulnerable(args) if any(one.kind == "cve" for one in targets) else None
    expected = _expected(args.expect)
    now_ns = time.time_ns() if args.at is None else args.at
    with _asks(args) as asks:
        fleet = Fleet(asks, now_ns, expected=expected, vulnerable=vulnerable)
        if action == "stale" and args.plan:
            return _plan(fleet, out, warn, as_json=args.json)
        answers: dict[str, Callable[[], Answer]] = {
            "who": lambda: fleet.who(targets[0]),
            "stale": fleet.stale,
            "versions": lambda: fleet.versions(targets[0]),
            "history": lambda: fleet.history(targets[0], since_ns=args.since or 0),
            "coverage": fleet.coverage,
            "remediated": lambda: fleet.remediated(targets, ignore_silent=args.ignore_silent),
        }
        answer = answers[action]()
        if args.json:
            _write_json(answer, out)
        else:
            from sowatch.cli._fleet_views import show

            show(answer, out)
    if action != "remediated":
        return 0
    assert answer.head.answer is not None
    return exit_code(answer.head.answer)


def _check(action: str, words: Sequence[str], args: Namespace) -> None:
    """Refuses what does not belong to the action.

    Raises:
        UsageError: it does not.
    """
    least, most = _WORDS.get(action, (1, _MANY))
    if not least <= len(words) <= most:
        needs = "nothing else" if most == 0 else "one WHAT" if most == 1 else "what may be mapped no more"
        raise UsageError(f"`sowatch fleet {action}` takes {needs}. See `sowatch fleet --help`.")
    for name, actions in _ONLY_FOR.items():
        if getattr(args, name) not in (None, False, []) and action not in actions:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is for {' and '.join(actions)}, not for {action}. Leave it out.")
    if args.store is not None and args.url is not None:
        raise UsageError("--store and --url name two stores. Give one of them.")


@contextlib.contextmanager
def _asks(args: Namespace) -> Iterator[Asks]:
    """What answers: a ClickHouse, or the store of a directory."""
    if args.url is not None:
        from sowatch.fleet.clickhouse import ClickHouse

        yield ClickHouse(args.url, user=os.environ.get("CLICKHOUSE_USER"), password=_password())
        return
    from sowatch.cli.fleet import DEFAULT_STORE
    from sowatch.fleet.store import connect

    asks = connect(args.store or DEFAULT_STORE)
    try:
        yield asks
    finally:
        asks.close()


def _password() -> str | None:
    path = os.environ.get("CLICKHOUSE_PASSWORD_FILE")
    if path is None:
        return os.environ.get("CLICKHOUSE_PASSWORD")
    return _text(path, "the password").strip("\r\n")


def _expected(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = (line.partition("#")[0].strip() for line in _text(path, "the hosts of --expect").splitlines())
    found = [line for line in lines if line]
    if not found:
        raise UsageError(f"{path!r} names no host. Write one name or id a line.")
    return found


def _text(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"cannot read {what} in {path!r}: {reason}. Give a file of text.") from error


def _vulnerable(args: Namespace) -> VulnerableBuilds:
    if not args.osv and not args.build_ids and not args.vex:
        raise UsageError(
            "which builds a CVE is in is data of yours. Name them: --osv PATH, --build-ids FILE, --vex FILE."
        )
    from sowatch.fleet.vulnerable import builds_with
    from sowatch.inventory.vulnerabilities import load_vulnerabilities

    return builds_with(load_vulnerabilities(args.osv, args.build_ids, args.vex, packs=False))


def _time_ns(text: str) -> int:
    """A time of the command line, in ns since the epoch."""
    ago = re.fullmatch(r"(\d{1,9})([mhd])", text)
    if ago is not None:
        return max(0, time.time_ns() - int(ago[1]) * _UNITS_S[ago[2]] * 1_000_000_000)
    try:
        moment = datetime.fromisoformat(text)
        at_s = calendar.timegm(moment.utctimetuple()) if moment.tzinfo else moment.timestamp()
    except (ValueError, OverflowError) as error:
        raise ArgumentTypeError(f"{text!r} is no time: write 2026-11-29T12:00:00Z, or 90m, 12h or 7d ago") from error
    if not 0 <= at_s < 1 << 33:
        raise ArgumentTypeError(f"{text!r} is no time that a record can have")
    return int(at_s) * 1_000_000_000 + moment.microsecond * 1000


def _write_json(answer: Answer, out: Out) -> None:
    from sowatch.model.encoding import dumps, dumps_lines

    out.write(dumps(answer.head) + "\n")
    waiting = []
    for line in answer.lines:
        waiting.append(line)
        if len(waiting) == _FLUSHED:
            out.write(dumps_lines(waiting))
            out.flush()
            waiting.clear()
    out.write(dumps_lines(waiting))
    out.flush()


def _plan(fleet: Fleet, out: Out, warn: Callable[[str], None], *, as_json: bool) -> int:
    """What has to be restarted; what is in force of hosts that do not answer is in it, too."""
    from sowatch.cli._fleet_views import hosts_text
    from sowatch.fleet.plans import plan_line, planned, restart_line
    from sowatch.model.encoding import dumps

    head = fleet.head("stale")
    if as_json:
        out.write(dumps(head) + "\n")
    shown = set()
    for one in planned(fleet.stale_groups()):
        if as_json:
            out.write(dumps(restart_line(one, fleet.next_seq())) + "\n")
        elif one.target != "pod" or one.command not in shown:  # one command of a cluster is for all its pods
            out.write(plan_line(one) + "\n")
        shown.add(one.command)
    out.flush()
    if not as_json:
        warn(hosts_text(head.hosts))
    return 0
