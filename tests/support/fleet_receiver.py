"""A receiver of a fleet's records for tests: OTLP over HTTP, decoded by opentelemetry-proto. It can refuse and go away.

`Replica` applies what docs/decisions/0069-fleet-records.md says to the records of one host.
"""

from __future__ import annotations

import gzip
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2

__all__ = ["FleetReceiver", "Replica", "Sent", "fleet_receiver", "sent_of"]


class Sent(NamedTuple):
    """A record as it arrived; values of attributes as they were encoded."""

    event: str
    version: int
    epoch: int
    snapshot: int
    seq: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]


def sent_of(request: Any) -> list[Sent]:
    """The records of an ``ExportLogsServiceRequest``."""
    found = []
    for of_resource in request.resource_logs:
        resource = _values(of_resource.resource.attributes)
        for of_scope in of_resource.scope_logs:
            assert of_scope.scope.name == "sowatch.fleet"
            for one in of_scope.log_records:
                attributes = _values(one.attributes)
                found.append(
                    Sent(
                        one.event_name,
                        one.time_unix_nano,
                        int(resource["sowatch.fleet.epoch"]),
                        attributes.pop("sowatch.fleet.snapshot"),
                        attributes.pop("sowatch.fleet.seq"),
                        attributes,
                        resource,
                    )
                )
    return found


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@dataclass
class FleetReceiver:
    """What came. ``answers`` are given first, each once: a status and headers; records count where that is 200."""

    url: str = ""
    records: list[Sent] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    #: Of each request that was taken: the size of its body, and the last parts of the names of its records.
    bodies: list[tuple[int, list[str]]] = field(default_factory=list)
    #: And the request, decoded.
    messages: list[Any] = field(default_factory=list)
    requests: int = 0
    #: While it is set every request is answered so.
    refusal: tuple[int, dict[str, str]] | None = None

    def of(self, event: str) -> list[Sent]:
        """Records of one event, by the last part of its name."""
        return [one for one in list(self.records) if one.event.endswith(f".{event}")]

    def replica(self) -> Replica:
        """What a store would know of all that came."""
        found = Replica()
        found.take(list(self.records))
        return found


@dataclass
class Replica:
    """What a store knows of one host. Order and repetition of what it takes do not matter."""

    rows: dict[str, Sent] = field(default_factory=dict)
    seqs: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    ends: dict[tuple[int, int], int] = field(default_factory=dict)
    firsts: dict[tuple[int, int], int] = field(default_factory=dict)
    lasts: dict[tuple[int, int], int] = field(default_factory=dict)
    begins: dict[tuple[int, int], int] = field(default_factory=dict)
    heartbeat: Sent | None = None

    def take(self, records: Iterable[Sent]) -> None:
        for one in records:
            stream = one.epoch, one.snapshot
            self.seqs.setdefault(stream, set()).add(one.seq)
            self.firsts[stream] = min(one.version, self.firsts.get(stream, one.version))
            self.lasts[stream] = max(one.version, self.lasts.get(stream, one.version))
            if one.event == "sowatch.fleet.snapshot_end":
                self.ends[stream] = one.version
            elif one.event == "sowatch.fleet.snapshot_begin":
                self.begins[stream] = one.attributes.get("sowatch.fleet.records", 0)
            elif one.event == "sowatch.fleet.heartbeat":
                if self.heartbeat is None or self.heartbeat.version < one.version:
                    self.heartbeat = one
            else:
                key = one.attributes["sowatch.library.key"]
                if key not in self.rows or self.rows[key].version < one.version:
                    self.rows[key] = one

    @property
    def in_force(self) -> dict[str, Sent]:
        """By key what is mapped, by the newest snapshot whose end arrived."""
        if not self.ends:
            return {}
        newest = max(self.ends, key=self.ends.__getitem__)
        since = self.firsts[newest]
        return {
            key: row
            for key, row in self.rows.items()
            if row.version >= since and row.attributes["sowatch.library.processes"] > 0
        }

    @property
    def is_lossy(self) -> bool:
        """Whether something may be missing, as far as the records say."""
        if not self.ends or self.heartbeat is None:
            return True
        newest = max(self.ends, key=self.ends.__getitem__)
        # Another run that has sent since then: its records are not all known.
        later = sorted(stream for stream in self.seqs if self.lasts[stream] >= self.firsts[newest])
        if self.heartbeat.epoch != newest[0] or any(stream[0] != newest[0] for stream in later):
            return True
        if any(self.seqs[one] != set(range(len(self.seqs[one]))) for one in later):
            return True
        for one, after in itertools.pairwise(later):
            if one[0] == after[0] and self.begins.get(after, 0) > len(self.seqs[one]):
                return True
        beat = self.heartbeat.attributes
        return bool(beat["sowatch.watch.lost"]) and not beat["sowatch.watch.is_repaired"]


@contextmanager
def fleet_receiver(port: int = 0) -> Iterator[FleetReceiver]:
    """A receiver on a port of the loopback address; what it holds outlives it."""
    found = FleetReceiver()
    with receiving(found, port):
        yield found


@contextmanager
def receiving(found: FleetReceiver, port: int = 0) -> Iterator[int]:
    """Has a receiver listen; its port."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                found.requests += 1
                found.headers.append({name.lower(): value for name, value in self.headers.items()})
                status, headers = found.refusal or (found.answers.pop(0) if found.answers else (200, {}))
                if self.path != "/v1/logs":
                    status = 404
                if status == 200:
                    text = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                    message = logs_service_pb2.ExportLogsServiceRequest.FromString(text)
                    found.messages.append(message)
                    made = sent_of(message)
                    found.bodies.append((len(body), [one.event.rpartition(".")[2] for one in made]))
                    found.records += made
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True

        def log_message(self, *words: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = False  # joined by server_close, so that none is left
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
