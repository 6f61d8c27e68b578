"""The reference of lines of JSON, made of the schema that ships."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from docsite.prose import escaped

__all__ = ["markdown"]


def markdown(_: str) -> str:
    """A section for each line by its ``event``, then one for each object that lines share."""
    schema = json.loads(files("sowatch.model").joinpath("event.schema.json").read_text(encoding="utf-8"))
    lines = {
        one["if"]["properties"]["event"]["const"]: _name(one["then"])
        for one in schema["allOf"]
        if "$ref" in one["then"] and "const" in one["if"]["properties"]["event"]
    }
    definitions = schema["$defs"]
    made = [escaped(schema["description"]), "## Lines"]
    for event, name in lines.items():
        made.append(f"### Line {event}\n\n{_object(definitions, name, 'event')}")
    made.append("## Objects and values in lines")
    for name, definition in definitions.items():
        if name in lines.values():
            continue
        body = _object(definitions, name) if "properties" in definition else _value(definition)
        made.append(f"### Value {name}\n\n{body}")
    return "\n\n".join(made) + "\n"


def _value(definition: dict[str, Any]) -> str:
    return f"{escaped(definition.get('description', ''))} ({_type(definition)})"


def _object(definitions: dict[str, Any], name: str, *left_out: str) -> str:
    """The description of a definition, and a row for each member."""
    definition = definitions[name]
    made = [escaped(definition.get("description", "")), ""]
    members = {
        name: member
        for name, member in definition.get("properties", {}).items()
        if name not in ("schema", *left_out) and not name.endswith("_bytes")
    }
    if not members:
        return made[0]
    made += ["| member | type | meaning |", "|---|---|---|"]
    needed = definition.get("required", ())
    for name, member in members.items():
        shared = definitions[_name(member)] if "$ref" in member else {}
        words = [member.get("description") or shared.get("description", "")]
        if member.get("deprecated"):
            words.insert(0, "Deprecated.")
        if name not in needed:
            words.insert(0, "Not always there.")
        made.append(f"| `{name}` | {_type(member)} | {escaped(' '.join(words))} |")
    return "\n".join(made)


def _type(member: dict[str, Any]) -> str:
    if "$ref" in member:
        return f"[{_name(member)}](#value-{_name(member)})"
    if "const" in member:
        return f"`{json.dumps(member['const'])}`"
    if "enum" in member:
        return ", ".join(f"`{one}`" for one in member["enum"])
    for key in ("oneOf", "anyOf"):
        if key in member:
            return " or ".join(_type(one) for one in member[key])
    if member.get("type") == "array":
        return f"list of {_type(member['items'])}" if member.get("items") else "list"
    kind = member.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _name(member: dict[str, Any]) -> str:
    """Of the definition that a member is."""
    name: str = member["$ref"].rpartition("/")[2]
    return name
