"""Lines of ``--json`` as a reader takes them: checked against the schema, which knows each of their members."""

from __future__ import annotations

import json
from typing import Any, Final

import jsonschema

from sowatch.cli._schema import load_schema

__all__ = ["VALIDATOR", "printed"]

VALIDATOR: Final = jsonschema.Draft202012Validator(load_schema(strict=True))
#: Of the last line of ``http`` the counters stand beside each other, and grow with the program.
_OPEN: Final = jsonschema.Draft202012Validator(load_schema())


def printed(line: str | bytes) -> dict[str, Any]:
    """The object in a line."""
    found: dict[str, Any] = json.loads(line)
    (_OPEN if found["event"] == "http_stats" else VALIDATOR).validate(found)
    return found
