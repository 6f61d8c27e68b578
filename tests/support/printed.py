"""Lines of ``--json`` as a reader takes them: checked against the schema, which knows each of their members."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

import jsonschema

from sowatch.cli._schema import load_schema

__all__ = ["VALIDATOR", "printed", "rest_of"]

VALIDATOR: Final = jsonschema.Draft202012Validator(load_schema(strict=True))
#: Of the last line of ``http`` the counters stand beside each other, and grow with the program.
_OPEN: Final = jsonschema.Draft202012Validator(load_schema())


def printed(line: str | bytes) -> dict[str, Any]:
    """The object in a line."""
    found: dict[str, Any] = json.loads(line)
    (_OPEN if found["event"] == "http_stats" else VALIDATOR).validate(found)
    return found


def rest_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    """What a process that ends prints until then. Not communicate(): what was read ahead is in the stream's buffer."""
    assert process.stdout is not None
    rest = process.stdout.read()
    process.wait(timeout_s)
    return rest
