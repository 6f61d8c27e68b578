"""JSON as the strictest readers take it: a lone surrogate anywhere in a line is refused by both."""

from __future__ import annotations

from typing import Any

import orjson
import pydantic_core

from sowatch.model.encoding import restore

__all__ = ["loads", "loads_wire"]


def loads_wire(text: str | bytes) -> Any:
    """What is written, as it is written."""
    found = orjson.loads(text)
    assert pydantic_core.from_json(text) == found
    return found


def loads(text: str | bytes) -> Any:
    """The same, with names that are not UTF-8 as surrogate escapes again."""
    return restore(loads_wire(text))
