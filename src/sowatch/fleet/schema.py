"""The tables of a fleet: the files of ``sql/`` in their order. Needs no extra."""

from __future__ import annotations

from importlib import resources
from typing import Final

__all__ = ["SQL_FILES", "schema_sql"]

#: The files of ``sql/``, in this order.
SQL_FILES: Final = ("otel_logs.sql", "fleet.sql", "fleet_views.sql")


def schema_sql() -> str:
    """The SQL that makes the tables and views; doing it again changes nothing."""
    sql = resources.files("sowatch.fleet") / "sql"
    return "\n".join((sql / name).read_text(encoding="utf-8") for name in SQL_FILES)
