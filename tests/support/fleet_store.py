"""A real ``sowatch fleet receive`` as a process of its own, HTTP to its port, and questions to its store."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sowatch.fleet.store_client import SOCKET_NAME, StoreClient
from support.agent import Answer
from support.fleet_records import SECOND, Group, HostRecords, Record, otlp

__all__ = ["JSON", "PROTOBUF", "Receiving", "group", "numbered", "store_rows"]

JSON = {"Content-Type": "application/json"}
PROTOBUF = {"Content-Type": "application/x-protobuf"}


@dataclass
class Receiving:
    """A running receiver.

    Args:
        spawn: starts processes that end with the test.
        wait_until: waits for a condition.
        directory: has the store, and the log.
        options: of the command.
        environment: added to ours.
        prefix: a command that runs it.
    """

    spawn: Any
    wait_until: Any
    directory: Path
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    listen: str = "127.0.0.1:0"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        self.store = self.directory / "store"
        self.log_path = self.directory / "log"
        self.process: Any = None
        self.port = 0

    def start(self) -> Receiving:
        words = [*self.prefix, sys.executable, "-m", "sowatch", "fleet", "receive", "--store", os.fspath(self.store)]
        before = len(self.log)
        with self.log_path.open("ab") as log:
            self.process = self.spawn(
                [*words, "--listen", self.listen, *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

        def port() -> int:
            found = re.findall(r"receiving on https?://[^ ]*:(\d+)/v1/logs", self.log[before:])
            assert found or self.process.poll() is None, f"the receiver ended:\n{self.log}"
            return int(found[0]) if found else 0

        self.port = self.wait_until(port, 60, "the receiver listens")
        return self

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return int(self.process.wait(self.timeout_s))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)

    def post(self, body: bytes, headers: Mapping[str, str] = JSON, path: str = "/v1/logs") -> Answer:
        return self.ask("POST", path, body, headers)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = self.connect()
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """What is answered to these bytes until the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), self.timeout_s) as connection:
            connection.sendall(data)
            found = b""
            while piece := connection.recv(65536):
                found += piece
            return found

    def rows(self, sql: str, **parameters: str) -> list[dict[str, Any]]:
        """What the receiver answers over the socket in its directory."""
        client = StoreClient.reach(self.store / SOCKET_NAME)
        assert client is not None
        return [json.loads(line) for piece in client.ask(sql, parameters) for line in piece.splitlines()]

    def count(self, table: str = "otel_logs") -> int:
        return int(self.rows(f"SELECT count() AS n FROM {table}")[0]["n"])

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def store_rows(store: Path, *questions: str, timeout_s: float = 60) -> list[list[dict[str, Any]]]:
    """The answers of a store that nobody has open: in a process of its own, as the engine keeps threads and files."""
    code = (
        "import json, sys\n"
        "from sowatch.fleet.store import connect\n"
        "store = connect(sys.argv[1])\n"
        "answers = [b''.join(store.ask(sql, {})) for sql in sys.argv[2:]]\n"
        "rows = [[json.loads(line) for line in one.splitlines()] for one in answers]\n"
        "store.close()\n"
        "print(json.dumps(rows))\n"
    )
    words = [sys.executable, "-c", code, os.fspath(store), *questions]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def group(number: int = 0) -> Group:
    """A group of a host."""
    return Group(path=f"/usr/lib/lib{number}.so.1", build_id=f"{number:040x}", soname=f"lib{number}.so.1")


def numbered(first: int, count: int, now_ns: int, event: str = "number") -> bytes:
    """A request with records of nobody in particular, each with a number."""
    records = [
        {
            "timeUnixNano": str(now_ns),
            "eventName": event,
            "attributes": [{"key": "number", "value": {"intValue": str(number)}}],
        }
        for number in range(first, first + count)
    ]
    return json.dumps({"resourceLogs": [{"scopeLogs": [{"scope": {"name": "test"}, "logRecords": records}]}]}).encode()


__all__ += ["SECOND", "HostRecords", "Record", "otlp"]
