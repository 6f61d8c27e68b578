"""Between an agent and a receiver another implementation of OTLP: rotel, a collector in Rust, as its wheel has it."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.fleet_records import HostRecords, otlp
from support.fleet_store import JSON, PROTOBUF, Receiving, group
from support.receivers import free_port

found = importlib.util.find_spec("rotel")
#: Its wheel is for x86-64, glibc 2.34 and Python up to 3.13.
pytestmark = pytest.mark.skipif(found is None, reason="there is no rotel for this machine or this Python")


@pytest.mark.parametrize("encoding", [JSON, PROTOBUF], ids=["json", "protobuf"])
def test_what_another_collector_passes_on_is_what_was_sent(
    place: Path, spawn: Any, wait_until: Any, encoding: dict[str, str]
) -> None:
    from google.protobuf import json_format
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    assert found is not None
    assert found.origin is not None
    receiver = Receiving(spawn, wait_until, place).start()
    port = free_port()
    words = ["start", "--otlp-http-endpoint", f"127.0.0.1:{port}", "--otlp-grpc-endpoint", f"127.0.0.1:{free_port()}"]
    words += ["--exporter", "otlp", "--otlp-exporter-endpoint", f"http://127.0.0.1:{receiver.port}"]
    words += ["--otlp-exporter-protocol", "http", "--batch-timeout", "100ms"]
    with (place / "rotel").open("wb") as log:
        program = Path(found.origin).parent / "rotel-agent"
        spawn([program, *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=place, env=os.environ)

    def listens() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, 30, "rotel listens")
    host = HostRecords("machine-1", "web1", time.time_ns())
    body = otlp([*host.snapshot_of([group(number) for number in range(50)]), host.heartbeat()])
    if encoding is PROTOBUF:
        body = json_format.Parse(body, ExportLogsServiceRequest()).SerializeToString()
    sender = Receiving(spawn, wait_until, place)
    sender.port = port
    assert sender.post(body, encoding).status == 200
    coverage = "SELECT state FROM fleet_coverage(now = {now:UInt64})"
    # The table of logs has them before those that follow from it.
    wait_until(
        lambda: receiver.rows(coverage, now=str(time.time_ns())) == [{"state": "answered"}], 60, "all is passed on"
    )

    assert receiver.count() == 53
    assert receiver.rows("SELECT count() AS n, uniqExact(key) AS keys FROM fleet_state FINAL") == [
        {"n": 50, "keys": 50}
    ]
