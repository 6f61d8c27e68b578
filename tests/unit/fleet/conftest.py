"""A store of a fleet behind HTTP, with chdb in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from sowatch.fleet.clickhouse import ClickHouse
from sowatch.fleet.questions import Fleet
from support.clickhouse_server import PASSWORD, Server, clickhouse_server
from support.fleet_records import Record, row


class Store:
    """Takes records as a Collector does, and is asked."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.asks = ClickHouse(server.url, password=PASSWORD)

    def take(self, *records: Record | list[Record]) -> None:
        """Records as one batch, in this order."""
        flat = [one for part in records for one in ([part] if isinstance(part, Record) else part)]
        self.server.insert("otel_logs", (json.dumps(row(one)) for one in flat))

    def at(self, now_ns: int, **options: object) -> Fleet:
        """The fleet at that time."""
        return Fleet(self.asks, now_ns, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with clickhouse_server(tmp_path_factory.mktemp("clickhouse")) as running:
        yield running


@pytest.fixture
def store(server: Server) -> Store:
    server.clear()
    return Store(server)
