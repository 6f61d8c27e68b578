"""A server with the part of ClickHouse's HTTP interface that `sowatch.fleet.clickhouse` uses, on chdb.

There is no ClickHouse to test with: its server is in no registry that the tests may use. chdb is the same engine, with
the same parameters. It runs in a process of its own: it starts threads and opens files that stay.

  python clickhouse_server.py DIRECTORY PASSWORD      prints its port, and answers until its input ends
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

__all__ = ["PASSWORD", "Server", "clickhouse_server"]

USER = "reader"
PASSWORD = "a secret of the tests"
SCHEMA = ("otel_logs.sql", "fleet.sql", "fleet_views.sql")


class Server:
    """One that runs; tests insert with it what a Collector would."""

    def __init__(self, url: str) -> None:
        self.url = url

    def insert(self, table: str, rows: Iterable[str]) -> None:
        """Rows as lines of JSON."""
        self.execute(f"INSERT INTO {table} FORMAT JSONEachRow\n" + "\n".join(rows))

    def execute(self, sql: str) -> bytes:
        """What is no question."""
        request = Request(f"{self.url}/execute", sql.encode(), {"X-ClickHouse-Key": PASSWORD})
        with urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def clear(self) -> None:
        """Empty tables."""
        for table in ("state", "builds", "history", "streams", "hosts", "refused"):
            self.execute(f"TRUNCATE TABLE fleet_{table}")


@contextmanager
def clickhouse_server(directory: Path) -> Iterator[Server]:
    """One with the tables of a fleet, that ends with the block."""
    command = [sys.executable, __file__, directory, PASSWORD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin
        assert running.stdout
        try:
            yield Server(f"http://127.0.0.1:{int(running.stdout.readline())}")
        finally:
            running.stdin.close()


def main(directory: str, password: str) -> None:
    """The server."""
    from chdb.session import Session

    session = Session(directory)
    for name in SCHEMA:
        for statement in resources.files("sowatch.fleet").joinpath("sql", name).read_text("utf-8").split(";\n"):
            if any(line and not line.startswith("--") for line in statement.splitlines()):
                session.query(statement)

    def answer(headers: Mapping[str, str], path: str, body: bytes) -> tuple[int, Iterable[bytes]]:
        if headers.get("X-ClickHouse-Key") != password:
            return 403, [b"Code: 516. DB::Exception: default: Authentication failed. (AUTHENTICATION_FAILED)\n"]
        if path == "/execute":
            return 200, [bytes(session.query(body.decode(), "JSONEachRow").bytes())]
        assert parse_qs(urlsplit(path).query)["readonly"] == ["1"]
        fields = _form(headers["Content-Type"], body)
        query = fields.pop("query").removesuffix("FORMAT JSONEachRow")
        given = {name.removeprefix("param_"): value for name, value in fields.items()}
        pieces = iter(session.send_query(query, "JSONEachRow", params=given))
        first = next(pieces, None)  # a query that is refused raises here
        return 200, (bytes(one.bytes()) for one in ([first] if first else []) + list(pieces))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                status, pieces = answer(self.headers, self.path, body)
            except Exception as error:  # noqa: BLE001  (its text is the answer, as that of the server)
                status, pieces = 500, [f"{error}\n".encode()]
            self.send_response(status)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    session.close()


def _form(kind: str, body: bytes) -> dict[str, str]:
    message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    found = {}
    for part in message.get_payload():
        assert not isinstance(part, str)
        name = part.get_param("name", header="content-disposition")
        found[str(name)] = bytes(part.get_payload(decode=True)).decode()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
