"""Log lines for machines: logfmt or JSON on stderr, one line a record.

Names come from containers, so whatever a message holds stays in its line.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Final, Literal

from sowatch.model.encoding import dumps, readable

__all__ = ["set_up_logging"]

_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/+@%,")


class _Lines(logging.Formatter):
    """``extra={"facts": {...}}`` of a record become fields of the line."""

    def __init__(self, style: Literal["logfmt", "json"]) -> None:
        super().__init__()
        self._is_json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": stamp.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = "".join(traceback.format_exception(*record.exc_info))
        if self._is_json:
            return dumps(fields, default=str)
        return " ".join(f"{key}={_word(value)}" for key, value in fields.items())


def _word(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(readable(text))


def set_up_logging(level: str, style: Literal["logfmt", "json"]) -> None:
    """Sends everything from ``level`` on to stderr; may be called again to change either."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(style))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A line for each malformed request would let any client fill the disk.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # watchfiles logs each poll that finds nothing.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
