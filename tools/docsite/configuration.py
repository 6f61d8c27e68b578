"""The reference of the agent's configuration, made of the types of its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import NODEFAULT, Struct
from msgspec.structs import fields

from docsite.prose import escaped
from sowatch.agent.daemon import LIVE_KEYS
from sowatch.agent.settings import (
    AttachSettings,
    ExporterSettings,
    FleetSettings,
    HttpSettings,
    RuleSettings,
    Settings,
    SinkSettings,
    VulnerabilitySettings,
)
from sowatch.model.config import Config

__all__ = ["markdown", "meanings"]

#: Each table with its heading and what it is.
_TABLES: Final[tuple[tuple[type[Struct], str, str], ...]] = (
    (Settings, "The file itself", "Keys before the first table."),
    (Config, "[watch]", "How to watch."),
    (
        RuleSettings,
        "[[rules]]",
        "What to watch: the first rule that matches a file wins. Default: every shared library.",
    ),
    (AttachSettings, "attach of a rule", "BPF programs of your own, as a table within `[[rules]]`."),
    (SinkSettings, "[[sinks]]", "Where events go besides HTTP clients."),
    (HttpSettings, "[http]", "Requests and responses that pass TLS libraries. Off by default."),
    (FleetSettings, "[fleet]", "What is mapped on this host, to the receiver of a fleet. Off by default."),
    (VulnerabilitySettings, "[vulnerabilities]", "What is mapped, judged by data that you bring. Off without any."),
    (ExporterSettings, "[[exporters]]", "Where metrics are sent besides being scraped."),
)
_NAMES: Final = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def markdown(_: str) -> str:
    """A section for each table, with its keys: type, default, meaning, and when a change takes effect."""
    return "\n".join(_table(*one) for one in _TABLES)


def meanings(kind: type[Struct]) -> dict[str, str]:
    """By field what its docstring says of it."""
    found: dict[str, str] = {}
    _, _, section = cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    key = ""
    for line in section.splitlines():
        if line.startswith("     "):
            found[key] += f" {line.strip()}"
        elif line.startswith("    "):
            key, _, text = line.strip().partition(": ")
            found[key] = text
        elif line.strip():
            break
    return found


def _table(kind: type[Struct], heading: str, what: str) -> str:
    known, hints = meanings(kind), get_type_hints(kind)
    made = [f"## {escaped(heading)}", what]
    for one in fields(kind):
        hint = hints[one.name]
        if kind is Settings and _is_table(hint):
            continue
        default = "needed" if one.required else f"default {_default(kind, one.name, one.default)}"
        kinds = f"{_type(hint)}; {default}"
        if kind is Settings and one.name not in LIVE_KEYS:
            kinds += "; a change waits for a restart"
        made.append(f"`{one.name}` ({kinds})\n: {escaped(known[one.name])}")
    return "\n\n".join(made) + "\n"


def _is_table(hint: Any) -> bool:
    inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return isinstance(inner, type) and issubclass(inner, Struct)


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{one}`" for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of: {_type(get_args(hint)[0])}"
    if get_origin(hint) is Mapping:
        return "table of texts"
    if isinstance(hint, type) and issubclass(hint, Struct):
        return "table"
    return _NAMES[hint]


def _default(kind: type[Struct], name: str, value: Any) -> str:
    if kind is Config and name == "allow_procfs_fallback":
        value = Settings().watch.allow_procfs_fallback  # the agent's own
    if value is None or value is NODEFAULT or value == () or value == {}:
        return "none"
    return f"`{json.dumps(value)}`"
