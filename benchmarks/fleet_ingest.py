"""How many records a second `sowatch fleet receive` takes: HTTP, gzip, decoding, insert with all tables, on the disk.

Records are those of the snapshots of hosts: 300 builds in 40 executables, with packages and some containers. Clients
send requests that were made before, each on its own connection, so that those that come together are one insert. The
rate on two cores is that of the receiver's own CPU time: records for each second of it, twice. Formats are compared
without the receiver: the same records made into rows and inserted by the store, merges stopped.
"""

from __future__ import annotations

import gzip
import http.client
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from benchmarks.common import Command, Figure, main, median, spread
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from sowatch.fleet.log_requests import decode
from sowatch.fleet.store import COLUMNS, Store
from sowatch.fleet.store_client import SOCKET_NAME, StoreClient

CLIENTS: Final = 8
RECORDS: Final = 2000
AIM: Final = 20_000.0
_DRAW = random.Random(16)  # noqa: S311  (the same in each run)
BUILDS: Final = [f"{_DRAW.getrandbits(160):040x}" for _ in range(340)]
PODS: Final = [f"{_DRAW.getrandbits(256):064x}" for _ in range(20)]


def snapshot(host: str, records: int = RECORDS) -> bytes:
    """A request with so many states of a host."""
    request = ExportLogsServiceRequest()
    logs = request.resource_logs.add()
    now_ns = time.time_ns()
    of_host = {"host.id": host, "host.name": host, "service.name": "sowatch", "service.version": "1.0"}
    for key, value in (of_host | {"sowatch.boot.id": "b" * 36, "sowatch.fleet.epoch": str(now_ns)}).items():
        logs.resource.attributes.add(key=key).value.string_value = value
    scope = logs.scope_logs.add()
    scope.scope.name = "sowatch.fleet"
    for number in range(records):
        record = scope.log_records.add(time_unix_nano=now_ns + number, event_name="sowatch.library.state")
        for key, value in attributes(number, now_ns).items():
            record.attributes.add(key=key).value.string_value = value
    return bytes(request.SerializeToString())


def attributes(number: int, now_ns: int) -> dict[str, str]:
    build, exe = number % 300, number % 40
    found = {
        "sowatch.fleet.snapshot": "1",
        "sowatch.fleet.seq": str(number),
        "sowatch.library.key": f"{_DRAW.getrandbits(64):016x}",
        "sowatch.library.build_id": BUILDS[build],
        "sowatch.library.soname": f"lib{build}.so.1",
        "sowatch.library.path": f"/usr/lib/x86_64-linux-gnu/lib{build}.so.1.2.{build}",
        "sowatch.library.kind": "library",
        "sowatch.library.processes": str(number % 7 + 1),
        "sowatch.library.pids": ",".join(str(_DRAW.randrange(1 << 20)) for _ in range(number % 5 + 1)),
        "sowatch.library.short_lived": "0",
        "sowatch.library.since": str(now_ns - number * 1_000_000),
        "process.executable.path": f"/usr/bin/program-{exe}",
        "process.executable.build_id.gnu": BUILDS[300 + exe],
        "sowatch.unit": f"program-{exe}.service",
        "sowatch.package.name": f"lib{build}",
        "sowatch.package.version": "1.2-3",
        "sowatch.package.source": f"source{build % 200}",
        "sowatch.package.purl": f"pkg:deb/debian/lib{build}@1.2-3?arch=amd64&distro=debian-12",
        "sowatch.package.identified_by": "dpkg",
    }
    return found | ({"container.id": PODS[exe // 2]} if number % 3 == 0 else {})


class _Receiver(Command):
    """``sowatch fleet receive``, which answers where it listens."""

    PORT: Final = 44318

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        address = f"127.0.0.1:{self.PORT}"
        super().__init__(directory, "fleet", "receive", "--store", str(self.store), "--listen", address)
        end_s = time.monotonic() + 60
        while (client := StoreClient.reach(self.store / SOCKET_NAME)) is None:
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError("the receiver did not begin to listen")
            time.sleep(0.05)
        self.client = client

    @property
    def worker(self) -> int:
        return self.process.pid

    def send(self, bodies: Sequence[bytes]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.PORT, timeout=120)
        headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
        for body in bodies:
            connection.request("POST", "/v1/logs", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if (answer.status, text) != (200, b""):
                raise RuntimeError(f"{answer.status}: {text!r}")
        connection.close()

    def stored(self) -> int:
        (line,) = self.client.ask("SELECT count() AS count FROM otel_logs")
        return int(msgspec.json.decode(line)["count"])


def ingest(directory: Path, rounds: int, requests: int) -> list[Figure]:
    of_cpu, of_wall = [], []
    with _Receiver(directory) as receiver:
        at_rest, _ = receiver.memory_mb()
        total = 0
        for number in range(rounds):
            sent = [
                [gzip.compress(snapshot(f"{number}-{client}-{one}"), 1) for one in range(requests)]
                for client in range(CLIENTS)
            ]
            threads = [threading.Thread(target=receiver.send, args=(bodies,)) for bodies in sent]
            cpu_s, begun_s = receiver.cpu_s(), time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            records = CLIENTS * requests * RECORDS
            of_wall.append(records / (time.monotonic() - begun_s))
            of_cpu.append(2 * records / (receiver.cpu_s() - cpu_s))
            total += records
            if receiver.stored() != total:
                raise RuntimeError(f"{receiver.stored()} records are stored of {total} that were accepted")
        now, most = receiver.memory_mb()
    rate = median(of_cpu)
    return [
        Figure(f"records a second on two cores (aim ≥ {AIM:.0f})", rate, "", spread(of_cpu), met=rate >= AIM),
        Figure("... by the clock, clients on the same cores", median(of_wall), "", spread(of_wall)),
        Figure("resident memory, nothing received yet", at_rest, "MB"),
        Figure("... after the last round", now, "MB"),
        Figure("... at most", most, "MB"),
    ]


# ---- formats --------------------------------------------------------------------------------------


def _records(body: bytes) -> list[tuple[int, dict[str, str], str, str, dict[str, str]]]:
    found = []
    for logs in ExportLogsServiceRequest.FromString(body).resource_logs:
        of_resource = {one.key: one.value.string_value for one in logs.resource.attributes}
        for scope in logs.scope_logs:
            for record in scope.log_records:
                of_record = {one.key: one.value.string_value for one in record.attributes}
                found.append((record.time_unix_nano, of_resource, scope.scope.name, record.event_name, of_record))
    return found


def row_binary(bodies: Sequence[bytes]) -> list[bytes]:
    return [b"".join(decode(one, is_json=False, now_ns=time.time_ns()).rows) for one in bodies]


def json_each_row(bodies: Sequence[bytes]) -> list[bytes]:
    encoder = msgspec.json.Encoder()
    return [
        encoder.encode_lines(
            [
                {
                    "Timestamp": f"{time_ns // 10**9}.{time_ns % 10**9:09}",
                    "ResourceAttributes": resource,
                    "ServiceName": "sowatch",
                    "ScopeName": scope,
                    "EventName": event,
                    "LogAttributes": record,
                }
                for time_ns, resource, scope, event, record in _records(body)
            ]
        )
        for body in bodies
    ]


def arrow_stream(bodies: Sequence[bytes]) -> list[bytes]:
    import pyarrow as pa

    pairs = pa.map_(pa.string(), pa.string())
    types = [pa.timestamp("ns"), pairs, pa.string(), pa.string(), pa.string(), pairs]
    schema = pa.schema(list(zip(_SOME, types, strict=True)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for body in bodies:
            columns = zip(*_records(body), strict=True)
            time_ns, resource, scope, event, record = columns
            values: list[list[Any]] = [
                list(time_ns),
                [list(one.items()) for one in resource],
                ["sowatch"] * len(time_ns),
                list(scope),
                list(event),
                [list(one.items()) for one in record],
            ]
            arrays = [pa.array(one, kind) for one, kind in zip(values, types, strict=True)]
            stream.write_batch(pa.record_batch(arrays, schema=schema))
    return [sink.getvalue().to_pybytes()]


_SOME: Final = ("Timestamp", "ResourceAttributes", "ServiceName", "ScopeName", "EventName", "LogAttributes")
FORMATS: Final[dict[str, tuple[Callable[[Sequence[bytes]], list[bytes]], Sequence[str]]]] = {
    "RowBinary": (row_binary, COLUMNS),
    "JSONEachRow": (json_each_row, _SOME),
    "ArrowStream": (arrow_stream, _SOME),
}


def formats(directory: Path, rounds: int, requests: int) -> list[Figure]:
    making: dict[str, list[float]] = {name: [] for name in FORMATS}
    inserting: dict[str, list[float]] = {name: [] for name in FORMATS}
    with Store(directory / "formats") as store:
        writer = store._writer  # noqa: SLF001  (formats that `insert` does not take)
        writer.query("SYSTEM STOP MERGES")
        for number in range(rounds):
            bodies = [snapshot(f"{number}-{one}") for one in range(requests)]
            for name, (make, columns) in FORMATS.items():
                begun_s = time.thread_time()
                data = make(bodies)
                making[name].append((time.thread_time() - begun_s) / requests / RECORDS * 1e6)
                begun_s = time.process_time()
                with writer.send_insert(f"INSERT INTO otel_logs ({', '.join(columns)})", name) as insert:
                    for one in data:
                        insert.append(one)
                    insert.finish()
                inserting[name].append((time.process_time() - begun_s) / requests / RECORDS * 1e6)
    figures = []
    for name in FORMATS:
        figures.append(
            Figure(f"{name}: a record made into a row", median(making[name]), "µs CPU", spread(making[name]))
        )
        figures.append(Figure("... and inserted", median(inserting[name]), "µs CPU", spread(inserting[name])))
    return figures


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    found = ingest(directory, 1 if is_quick else 5, 1 if is_quick else 6)
    shutil.rmtree(directory / "store")
    return [*found, *formats(directory, 1 if is_quick else 5, 1 if is_quick else 6)]


if __name__ == "__main__":
    sys.setswitchinterval(0.001)
    main("fleet_ingest", measure)
