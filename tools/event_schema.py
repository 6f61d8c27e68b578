#!/usr/bin/env python3
"""Makes `src/sowatch/model/event.schema.json` of the types in `sowatch.model.wire`; `make schema` writes it.

Without arguments the schema goes to standard output.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from sowatch.model import wire, wire_explain, wire_fleet, wire_lists, wire_reports, wire_trace

FILE: Final = Path(__file__).resolve().parents[1] / "src" / "sowatch" / "model" / "event.schema.json"

#: Types that have a definition of their own, as many lines use them.
_SHARED: Final = {
    "seq": wire.Seq,
    "time": wire.Time,
    "t_ns": wire.KernelTime,
    "ranges": wire.Ranges,
    "range_count": wire.RangeCount,
    "rule": wire.RuleName,
}
#: What is no line of `sowatch.model.wire`.
ANSWERS: Final = (
    wire_reports.Audit,
    wire_explain.ProcessReport,
    wire_explain.PathReport,
    wire_explain.RuleReport,
    wire_reports.Doctor,
    wire_reports.Inventory,
    *get_args(wire_trace.TraceLine),
    *get_args(wire_fleet.FleetLine),
    *get_args(wire_lists.ListLine),
)
#: In a type: bytes that are not UTF-8 stand beside this string.
_MARK: Final = "x-bytes"

_BYTES: Final = {
    "bytes": {
        "description": "The exact bytes of the member that it is named after; only there where they are not UTF-8.",
        "type": "string",
        "contentEncoding": "base64",
        "pattern": "^[A-Za-z0-9+/]+={0,2}$",
    },
    "bytes_list": {
        "description": "As `bytes`, for each string of the list that it is named after; null for those that are UTF-8.",
        "type": "array",
        "items": {"oneOf": [{"$ref": "#/$defs/bytes"}, {"type": "null"}]},
    },
}


def event_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of one line of schema 1."""
    lines = (*get_args(wire.Line), *ANSWERS)
    _, components = msgspec.json.schema_components(lines, ref_template="#/$defs/{name}")
    shared = {name: _plain(msgspec.json.schema(type_)) for name, type_ in _SHARED.items()}
    structs = {
        _snake(name): _struct(_plain(_with_enums(node, components)), shared)
        for name, node in components.items()
        if "properties" in node
    }
    kinds = {name: structs[name]["properties"] for name in (_snake(one.__name__) for one in lines)}
    for node in shared.values():
        _take_marks(node)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:sowatch:schema:1",
        "title": "One line of what a command of sowatch prints with --json, schema 1",
        "description": "Fields are only ever added, so readers must ignore those they do not know. A string that is "
        "not UTF-8 has each such byte as \\xff (a backslash, x and two hexadecimal digits), and a member beside it, "
        "named with _bytes at its end, that holds the exact bytes in base64. That member is there only where it is "
        "needed, and then it decides. Of a list of strings it is a list, with null for those that are UTF-8.",
        "type": "object",
        "required": ["schema", "event", "seq"],
        "properties": {
            "schema": {"const": wire.SCHEMA},
            "event": {"enum": list(dict.fromkeys(one["event"]["const"] for one in kinds.values()))},
            "seq": {"$ref": "#/$defs/seq"},
        },
        "allOf": [{"if": _condition(one), "then": {"$ref": f"#/$defs/{name}"}} for name, one in kinds.items()],
        "$defs": {**shared, **structs, **_BYTES},
    }


def _condition(properties: dict[str, Any]) -> dict[str, Any]:
    """What tells a kind of line from the others: its event, and of explanations what they are about."""
    event = properties["event"]["const"]
    if event != "explain":
        return {"properties": {"event": {"const": event}}}
    target = {"const": properties["target"]["const"]}
    return {"properties": {"event": {"const": event}, "target": target}, "required": ["target"]}


def _with_enums(node: Any, components: dict[str, Any]) -> Any:
    """The same with the values of an enumeration in the place of a reference to it."""
    if isinstance(node, list):
        return [_with_enums(one, components) for one in node]
    if not isinstance(node, dict):
        return node
    aimed_at = components.get(str(node.get("$ref", "")).rpartition("/")[2], {})
    if "enum" in aimed_at:
        return {"enum": aimed_at["enum"]}
    return {key: _with_enums(one, components) for key, one in node.items()}


def _plain(node: Any) -> Any:
    """The form people write: ``const`` for one value, null beside the other types, no titles, names of their own."""
    if isinstance(node, list):
        return [_plain(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {key: _plain(one) for key, one in node.items() if key != "title" or not isinstance(one, str)}
    if "$ref" in found:
        found["$ref"] = _snake(found["$ref"])
    match found.get("anyOf"):
        case [{"enum": values, **rest}, {"type": "null"}] if not rest:
            del found["anyOf"]
            found["enum"] = [None, *values]
        case [{"type": str(name), **rest}, {"type": "null"}]:
            del found["anyOf"]
            found |= {"type": [name, "null"], **rest}
    if len(found.get("enum", ())) == 1:
        found["const"] = found.pop("enum")[0]
    if "const" in found:
        found.pop("type", None)
    if isinstance(text := found.get("description"), str):
        # Before version 0.23 msgspec took a docstring as it stands.
        found["description"] = inspect.cleandoc(text)
    return found


def _struct(node: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """An object with a member for bytes beside each name, and with what is defined once."""
    properties: dict[str, Any] = {}
    for key, member in node.pop("properties").items():
        properties[key] = {"$ref": f"#/$defs/{key}"} if shared.get(key) == member else member
        beside = "bytes_list" if "array" in member.get("type", ()) else "bytes"
        if _take_marks(member):
            properties[f"{key}_bytes"] = {"$ref": f"#/$defs/{beside}"}
    return {**node, "required": node.pop("required"), "properties": properties}


def _take_marks(node: dict[str, Any]) -> bool:
    """Removes the mark of a name from a member, or from what its list holds; whether there was one."""
    marks = [one.pop(_MARK, False) for one in (node, node.get("items", {}))]
    return any(marks)


def _snake(name: str) -> str:
    """``LibraryRow`` or a reference to it, as the schema has always named it: ``library_row``."""
    head, slash, last = name.rpartition("/")
    return head + slash + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last).lower()


def text() -> str:
    """What the file holds."""
    return json.dumps(event_schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it in the place of the one that ships")
    if parser.parse_args().write:
        FILE.write_text(text(), encoding="utf-8")
    else:
        sys.stdout.write(text())


if __name__ == "__main__":
    main()
