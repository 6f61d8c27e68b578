"""The tables beside those that the Collector's clickhouse exporter makes, in each of its forms.

Their statements are those of the exporter (``internal/sql_templates/logs_table.sql``): of 0.107 to 0.150 (with
TimestampTime, before and after EventName came), and from 0.151 on (ordered by five minutes, without TimestampTime).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sowatch.fleet.schema import schema_sql
from support.fleet_records import HostRecords, otlp
from support.fleet_store import group

COLUMNS = """
    TraceId String CODEC(ZSTD(1)),
    SpanId String CODEC(ZSTD(1)),
    TraceFlags UInt8,
    SeverityText LowCardinality(String) CODEC(ZSTD(1)),
    SeverityNumber UInt8,
    ServiceName LowCardinality(String) CODEC(ZSTD(1)),
    Body String CODEC(ZSTD(1)),
    ResourceSchemaUrl LowCardinality(String) CODEC(ZSTD(1)),
    ResourceAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    ScopeSchemaUrl LowCardinality(String) CODEC(ZSTD(1)),
    ScopeName String CODEC(ZSTD(1)),
    ScopeVersion LowCardinality(String) CODEC(ZSTD(1)),
    ScopeAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
    LogAttributes Map(LowCardinality(String), String) CODEC(ZSTD(1)),
"""
INDEXES = """
    INDEX idx_trace_id TraceId TYPE bloom_filter(0.001) GRANULARITY 1,
    INDEX idx_res_attr_key mapKeys(ResourceAttributes) TYPE bloom_filter(0.01) GRANULARITY 1,
    INDEX idx_log_attr_value mapValues(LogAttributes) TYPE bloom_filter(0.01) GRANULARITY 1,
    INDEX idx_body Body TYPE tokenbf_v1(32768, 3, 0) GRANULARITY 8
"""
TIMESTAMP = "Timestamp DateTime64(9) CODEC(Delta(8), ZSTD(1)),"
EVENT_NAME = "EventName String CODEC(ZSTD(1)),"
OLD = (
    "PARTITION BY toDate(TimestampTime) PRIMARY KEY (ServiceName, TimestampTime) "
    "ORDER BY (ServiceName, TimestampTime, Timestamp) TTL TimestampTime + toIntervalDay(3) "
)
NEW = "PARTITION BY toDate(Timestamp) ORDER BY (toStartOfFiveMinutes(Timestamp), ServiceName, Timestamp) "
TIMESTAMP_TIME = "TimestampTime DateTime DEFAULT toDateTime(Timestamp),"
END = "SETTINGS index_granularity = 8192, ttl_only_drop_parts = 1"
MADE = {
    "ours": "",
    "0.107": f"{TIMESTAMP}{TIMESTAMP_TIME}{COLUMNS}{INDEXES}) ENGINE = MergeTree {OLD}{END}",
    "with EventName": f"{TIMESTAMP}{TIMESTAMP_TIME}{COLUMNS}{EVENT_NAME}{INDEXES}) ENGINE = MergeTree {OLD}{END}",
    "0.151": f"{TIMESTAMP}{COLUMNS}{EVENT_NAME}{INDEXES}) ENGINE = MergeTree {NEW}{END}",
}
#: Makes a table as an exporter does, opens a store over it twice, inserts, and prints what it is asked.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from chdb.state.sqlitelike import Connection
from sowatch.fleet.log_requests import decode
from sowatch.fleet.store import Store

place, made, *questions = sys.argv[1:]
os.mkdir(place)
if made:
    before = Connection(place + "/data")
    before.query("CREATE TABLE IF NOT EXISTS otel_logs (" + made)
    before.close()
Store(place).close()
with Store(place) as store:
    store.insert(decode(sys.stdin.buffer.read(), is_json=True, now_ns=time.time_ns()).rows)
    answers = [b"".join(store.ask(one, {})) for one in questions]
print(json.dumps([[json.loads(line) for line in one.splitlines()] for one in answers]))
"""


def asked(place: Path, made: str, body: bytes, *questions: str) -> list[list[dict[str, Any]]]:
    words = [sys.executable, "-c", SCRIPT, place / "store", made, *questions]
    done = subprocess.run(words, input=body, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", MADE)
def test_tables_of_a_fleet_are_fed_by_a_table_of_any_exporter(tmp_path: Path, name: str) -> None:
    host = HostRecords("machine-1", "web1", time.time_ns())
    body = otlp([*host.snapshot_of([group(1), group(2)]), host.heartbeat()])
    state, hosts, streams, types, settings = asked(
        tmp_path,
        MADE[name],
        body,
        "SELECT path, processes FROM fleet_state FINAL ORDER BY path",
        "SELECT host_name FROM fleet_hosts FINAL",
        "SELECT host_id, groupBitmapMerge(seqs) AS n FROM fleet_streams GROUP BY host_id",
        "SELECT name, type FROM system.columns WHERE table = 'otel_logs'",
        "SELECT name, engine_full AS settings FROM system.tables WHERE engine LIKE '%MergeTree'",
    )

    assert state == [{"path": f"/usr/lib/lib{number}.so.1", "processes": 1} for number in (1, 2)]
    assert hosts == [{"host_name": "web1"}]
    assert streams == [{"host_id": "machine-1", "n": 5}]
    assert {"name": "EventName", "type": "String"} in types
    # What was inserted, or merged, is on the disk.
    assert len(settings) >= 6
    for table in settings:
        for one in ("fsync_after_insert", "fsync_part_directory", "min_rows_to_fsync_after_merge"):
            assert f"{one} = 1" in table["settings"], table


def test_our_table_has_the_columns_of_the_exporters_with_their_types() -> None:
    (ours,) = re.findall(r"CREATE TABLE IF NOT EXISTS otel_logs\n\((.*?)\n\)", schema_sql(), re.DOTALL)

    def columns(text: str) -> list[str]:
        return sorted(" ".join(line.split()).rstrip(",") for line in text.splitlines() if line.strip())

    assert columns(ours) == columns(f"{TIMESTAMP}\n{COLUMNS}\n{EVENT_NAME}")
