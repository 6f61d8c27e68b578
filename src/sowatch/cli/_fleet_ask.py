"""``sowatch fleet``: the questions to a store."""

from __future__ import annotations

from sowatch.cli._parser import Parser

__all__ = ["configure"]


def configure(parser: Parser) -> None:
    """Add the options of questions."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
