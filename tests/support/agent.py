"""A real agent: ``sowatch serve`` as a process of its own, and HTTP to its sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import strict

__all__ = ["Agent", "Answer", "NewAgent", "Stream", "UnixConnection", "short_directory"]

#: Ours, whatever is on PATH.
SOWATCH = [sys.executable, "-m", "sowatch"]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return strict.loads(self.body)


class Stream:
    """Server-sent events, read one by one."""

    def __init__(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._answer = answer
        self.last_id: str | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The events, until the agent ends the stream."""
        while line := self._answer.readline():
            word, _, value = line.decode().rstrip("\n").partition(": ")
            if word == "id":
                self.last_id = value
            elif word == "data":
                yield strict.loads(value)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The events up to the one that is wanted; that one is the last of them."""
        found = []
        for event in self:
            found.append(event)
            if wanted(event):
                return found
        raise AssertionError(f"the stream ended after {len(found)} events")

    def hang_up(self) -> None:
        """Ends the stream for whoever reads it on another thread."""
        with contextlib.suppress(OSError):
            if self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@dataclass
class Agent:
    """A running ``sowatch serve``.

    Args:
        spawn: starts processes that end with the test.
        wait_until: waits for a condition.
        directory: a short path, for the socket, the configuration and the log.
        config: text of the configuration file; None: without one.
        options: of the command.
        environment: added to ours.
        prefix: a command that runs it.
    """

    spawn: Any
    wait_until: Any
    directory: Path
    config: str | None = None
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        self.socket = self.directory / "s.sock"
        self.config_path = self.directory / "config.toml"
        self.log_path = self.directory / "log"
        if self.config is not None:
            self.config_path.write_text(self.config, encoding="utf-8")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Agent:
        words = [*self.prefix, *SOWATCH, "serve", "--socket", os.fspath(self.socket), *self.options]
        if self.config is not None:
            words += ["--config", os.fspath(self.config_path)]
        with self.log_path.open("ab") as log:
            self.process = self.spawn(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.environment}
            )
        if wait:
            self.wait_until(self.is_ready, 30, "the agent is ready")
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return int(self.process.pid)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the agent ended:\n{self.log}"
        with contextlib.suppress(OSError):
            return self.get("/readyz").status == 200
        return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal to it and waits for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        return int(self.process.wait(self.timeout_s))

    def connect(self) -> http.client.HTTPConnection:
        return UnixConnection(self.socket, self.timeout_s)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        return ask(self.connect(), method, path, body, headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body: object) -> Answer:
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())

    def events(self, query: str = "", **headers: str) -> Stream:
        connection = self.connect()
        connection.request("GET", f"/events{query}", headers=_named(headers))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return Stream(connection, answer)


def _named(headers: Mapping[str, str]) -> dict[str, bytes]:
    """``Last_Event_ID`` as the header that it stands for."""
    return {name.replace("_", "-"): value.encode() for name, value in headers.items()}


def ask(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> Answer:
    """One request on a connection of its own."""
    try:
        connection.request(method, path, body, _named(headers))
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


#: The type of a fixture.
NewAgent = Callable[..., Agent]


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory that any user may enter, with a name that leaves room for a socket's; gone afterwards."""
    made = Path(tempfile.mkdtemp(prefix="sow-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)
