"""What connections cost before they say anything: how many a listener keeps, and how long a handshake may take."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.web import servers
from sowatch.web.servers import HttpThread, bind_tcp

Connect = Callable[..., socket.socket]
Served = Callable[..., Connect]


async def app(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def served() -> Iterator[Served]:
    """``served(tls=None, **bounds)`` gives what connects to a server, from an address of the loopback network."""
    with contextlib.ExitStack() as stack:

        def served(tls: tuple[str, str] | None = None, **bounds: int) -> Connect:
            listening = bind_tcp("127.0.0.1:0", **bounds)
            where = listening.getsockname()
            server = HttpThread([(listening, app)], distinguishes_clients=False, tls=tls)
            stack.callback(server.stop)
            server.start()

            def connect(source: str = "127.0.0.1") -> socket.socket:
                return stack.enter_context(socket.create_connection(where, 30, (source, 0)))

            return connect

        yield served


def answer(connection: socket.socket) -> bytes:
    """The status; nothing if the connection was ended."""
    try:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return connection.recv(4096)[9:12]
    except ConnectionError:
        return b""


def test_one_address_has_its_share_and_leaves_the_others_theirs(served: Served) -> None:
    connect = served(most_of_one=3)
    held = [connect() for _ in range(5)]
    assert [answer(one) for one in held] == [b"200"] * 3 + [b""] * 2
    assert answer(connect("127.0.0.2")) == b"200"


def test_what_is_kept_is_bounded_and_a_connection_that_ends_makes_room(served: Served, wait_until: Any) -> None:
    connect = served(most=3)
    held = [connect(f"127.0.0.{number}") for number in range(1, 5)]
    assert [answer(one) for one in held] == [b"200"] * 3 + [b""]
    held[0].close()
    wait_until(lambda: answer(connect()) == b"200", 30, "there is room")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    files = os.fspath(tmp_path / "cert"), os.fspath(tmp_path / "key")
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*made, "-subj", "/CN=h", "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_connections_without_a_handshake_are_bounded_and_ended(
    served: Served, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr(servers, "HANDSHAKE_S", 0.5)
    connect = served(certificate, most=2)
    silent = [connect() for _ in range(3)]
    url = f"https://127.0.0.1:{silent[0].getpeername()[1]}"
    # The third one at once, and the others before asyncio's minute.
    assert [one.recv(1) for one in reversed(silent)] == [b""] * 3

    def greeted() -> bool:
        command = ["curl", "-skS", "-o", "/dev/null", "-w", "%{http_code}", url]
        done = subprocess.run(command, capture_output=True, check=False)
        return done.stdout == b"200"

    wait_until(greeted, 30, "a handshake is taken")
