"""Many hosts: who still maps a build, asked of a store that agents send to.

  who WHAT          who maps it: a build id (from 8 digits on), a purl, a soname, a path or a CVE
  stale             who runs on files that are not the ones on disk any more; with --plan what to restart, and how
  versions LIB      how many builds there are of a library, on how many hosts, of which packages
  history WHAT      who mapped a library or a build from when to when, and how long it took until nobody did
  coverage          each host with its state: an answer holds for those that answered
  remediated WHAT   is it gone? By its exit code, for Ansible and CI
  receive           takes what agents send, by OTLP over HTTP, into the store
  schema            the SQL of the tables

An answer is `mapped`, `not mapped` or `not observed`, for each host and for all: `not mapped` only where nothing that
the host has could be missing. --json gives one object a line; the first one, event "fleet_answer", names for how many
hosts it holds. Asked is the store that `sowatch fleet receive` fills; with --url a ClickHouse, as the user of
CLICKHOUSE_USER with the password of CLICKHOUSE_PASSWORD, or of the file CLICKHOUSE_PASSWORD_FILE.

Exit codes: 0 done; 1 could not do it; 2 wrong usage; 3 not permitted. Of remediated: 0 nobody maps it, and every host
answered; 1 somebody does, or could not do it; 3 nobody that is known, but there are hosts that did not answer.

Examples:
  sowatch fleet who libssl.so.3 --store /var/lib/sowatch
  sowatch fleet who pkg:deb/debian/openssl@3.0.11-1 --url http://clickhouse:8123
  sowatch fleet stale --plan
  sowatch fleet remediated 7c1d8a4e6f --expect hosts.txt
"""

# Neither chdb nor a client of HTTP is imported before an action needs it.

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Final

from sowatch.cli._out import Out
from sowatch.cli._parser import Parser, did_you_mean
from sowatch.model.errors import UsageError

__all__ = ["ACTIONS", "DEFAULT_STORE", "configure", "run"]

#: Of `sowatch fleet receive`, and of questions without another one.
DEFAULT_STORE: Final = "/var/lib/sowatch/fleet"
#: By action, the module that does it: with OPTIONS, the options that it takes beside those of every action, and `run`.
ACTIONS: Final = {
    **dict.fromkeys(("who", "stale", "versions", "history", "coverage", "remediated"), "sowatch.cli._fleet_ask"),
    **dict.fromkeys(("receive", "schema"), "sowatch.cli._fleet_receive"),
}


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("patterns", nargs="*", metavar="ACTION", help="one of those above, with what it asks for")
    parser.add_argument(
        "--store",
        metavar="DIR",
        help=f"the directory that `sowatch fleet receive` fills. Default: {DEFAULT_STORE}",
    )
    for module in dict.fromkeys(ACTIONS.values()):
        import_module(module).configure(parser)


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Do what is asked for; returns the exit code."""
    if not args.patterns:
        raise UsageError(f"say what: one of {', '.join(ACTIONS)}. See `sowatch fleet --help`.")
    action, *words = args.patterns
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS)
        raise UsageError(f"unknown action {action!r}.{hint} Use one of: {', '.join(ACTIONS)}.")
    return int(import_module(ACTIONS[action]).run(action, words, args, out=out, warn=warn))
