"""The JSON Schema of what ``--json`` prints."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

__all__ = ["load_schema"]


def load_schema(*, strict: bool = False) -> dict[str, Any]:
    """The schema (draft 2020-12) of one line of ``--json``, of every command.

    Args:
        strict: refuse fields the schema does not name. The file itself allows them, because
            schema 1 may grow; a producer's tests want to hear of each.

    >>> load_schema()["$schema"]
    'https://json-schema.org/draft/2020-12/schema'
    """
    text = resources.files("sowatch.model").joinpath("event.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    if strict:
        _close(schema["$defs"])
    return schema


def _close(node: Any) -> None:
    if isinstance(node, list):
        for part in node:
            _close(part)
    elif isinstance(node, dict):
        if node.get("type") == "object" and "properties" in node:
            node["additionalProperties"] = False
        for part in node.values():
            _close(part)
