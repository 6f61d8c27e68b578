"""The JSON Schema of what --json prints.

Draft 2020-12, with an $id. It has every line that a command prints, each by its "event"; fields are only ever added.
With NAME only that: a command (watch, run, list, top, trace, http, audit, explain, doctor, fleet), debug or serve for
what an agent answers and streams, or one event (load, mapping, ...). What is marked "deprecated" is kept, and its
description names the field that has its place.

Examples:
  sowatch schema > sowatch.schema.json
  sowatch schema list | jq '."$defs".mapping'
  check-jsonschema --schemafile <(sowatch schema audit) audit.json
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from sowatch.cli._out import Out
from sowatch.cli._parser import Parser, did_you_mean
from sowatch.cli._schema import load_schema
from sowatch.model.encoding import dumps
from sowatch.model.errors import UsageError

__all__ = ["EVENTS_OF", "configure", "narrowed", "run"]

_WATCH: Final = ("load", "unload", "activate", "deactivate", "ready", "lost", "repaired", "stopped")
#: By command, the events of the lines that it prints.
EVENTS_OF: Final[dict[str, tuple[str, ...]]] = {
    "watch": _WATCH,
    "run": _WATCH,
    "list": ("head", "mapping", "coverage", "vulnerable", "vulnerability_data", "restart"),
    "top": ("library", "process"),
    "trace": ("trace", "call", "stack", "attach_failed", "function", "lost"),
    "http": ("http", "http_endpoint", "http_stats"),
    "audit": ("audit",),
    "explain": ("explain",),
    "serve": (*_WATCH, "http", "stale", "renewed", "head"),
    "debug": ("inventory", "audit", "explain"),
    "doctor": ("doctor",),
    "fleet": (
        *("fleet_answer", "fleet_host", "fleet_mapping", "fleet_version"),
        *("fleet_history", "fleet_remediation", "fleet_restart"),
    ),
}


def configure(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("patterns", nargs="*", metavar="NAME", help="a command or an event. Default: all of them")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:  # noqa: ARG001 - as every command
    """Print it; returns the exit code."""
    if len(args.patterns) > 1:
        raise UsageError("give one NAME, or none. See `sowatch schema --help`.")
    schema = load_schema()
    if args.patterns:
        schema = _of_name(schema, args.patterns[0])
    out.write(msgspec.json.format(dumps(schema), indent=2) + "\n")
    out.flush()
    return 0


def _of_name(schema: dict[str, Any], name: str) -> dict[str, Any]:
    known = [*EVENTS_OF, *schema["properties"]["event"]["enum"]]
    if name not in known:
        names = ", ".join(dict.fromkeys(known))
        raise UsageError(f"no schema has the name {name!r}.{did_you_mean(name, known)} Use one of: {names}.")
    return narrowed(schema, EVENTS_OF.get(name, (name,)), name)


def narrowed(schema: dict[str, Any], events: Sequence[str], name: str) -> dict[str, Any]:
    """The schema of some kinds of lines, with the definitions that these need."""
    kinds = [one for one in schema["allOf"] if one["if"]["properties"]["event"]["const"] in events]
    needed: dict[str, Any] = {}
    _follow([kinds, schema["properties"]["seq"]], schema["$defs"], needed)
    return {
        **schema,
        "$id": f"{schema['$id']}:{name}",
        "properties": {**schema["properties"], "event": {"enum": list(events)}},
        "allOf": kinds,
        "$defs": {one: definition for one, definition in schema["$defs"].items() if one in needed},
    }


def _follow(node: Any, defs: dict[str, Any], needed: dict[str, Any]) -> None:
    """Adds what a part of a schema refers to, and what that does."""
    if isinstance(node, list):
        for part in node:
            _follow(part, defs, needed)
    elif isinstance(node, dict):
        name = str(node.get("$ref", "")).rpartition("/")[2]
        if name and name not in needed:
            needed[name] = defs[name]
            _follow(defs[name], defs, needed)
        for part in node.values():
            _follow(part, defs, needed)
