"""Whose socket a flow passed: by the kernel's tracepoints of sockets (6.3+), and by the descriptors of system calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.http import capture
from support.tls import ASYNCIO_SERVER, WAYS_TO_PEERS, Tap, Tls

#: Asks each server over TLS, and in between another one without TLS on the same thread, by a descriptor that is used
#: again: what a guess by thread or by number would take for the peer.
WITH_DECOYS = """
import http.client, socket, ssl, sys
decoy, *ports = map(int, sys.argv[2:])
context = ssl.create_default_context(cafile=sys.argv[1])
for port in ports:
    with socket.create_connection(("127.0.0.1", decoy)) as plain:
        plain.sendall(b"not TLS")
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
    for _ in range(2):
        connection.request("GET", f"/{port}")
        connection.getresponse().read()
        with socket.create_connection(("127.0.0.1", decoy)) as plain:
            plain.sendall(b"not TLS")
    connection.close()
"""

#: Its socket has the descriptor that many take for "none".
BY_DESCRIPTOR_0 = """
import os, socket, ssl, sys
plain = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
os.dup2(plain.fileno(), 0)
plain.close()
context = ssl.create_default_context(cafile=sys.argv[1])
with context.wrap_socket(socket.socket(fileno=0), server_hostname="localhost") as tls:
    assert tls.fileno() == 0
    tls.sendall(b"GET /0 HTTP/1.1\\r\\n\\r\\n")
    while not tls.recv(65536).endswith(b"0123456789"): pass
"""

#: Asks one server over memory BIOs and becomes itself by exec for the next; all objects stand where they stood before.
OVER_EXEC = """
import ctypes, os, socket, ssl, sys
# As many bytes of arguments and environment each time.
stage, ports = int(os.environ["STAGE"]), sys.argv[2:]
def become_next():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "STAGE": str(stage + 1)})
if not stage:
    assert ctypes.CDLL(None).personality(0x0040000) >= 0  # ADDR_NO_RANDOMIZE
    become_next()
port = ports[stage - 1]
context = ssl.create_default_context(cafile=sys.argv[1])
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
plain = socket.create_connection(("127.0.0.1", int(port)))
def run(call):
    while True:
        result, wants = None, False
        try:
            result = call()
        except ssl.SSLWantReadError:
            wants = True
        if outgoing.pending:
            plain.sendall(outgoing.read())
        if not wants:
            return result
        incoming.write(plain.recv(65536))
run(tls.do_handshake)
run(lambda: tls.write(f"GET /{port} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode()))
answer = b""
while not answer.endswith(b"0123456789"):
    answer += run(lambda: tls.read(65536))
if stage < len(ports):
    become_next()
"""


@pytest.fixture(params=WAYS_TO_PEERS)
def tap(
    request: pytest.FixtureRequest, tmp_path: Path, spawn: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tap]:
    """A tap that finds sockets in one of the two ways."""
    if request.param == "descriptors":
        monkeypatch.setattr(capture, "_shows_sockets", lambda _: False)
    tls = Tls(tmp_path, spawn, wait_until)
    tls.hold()
    with Tap(tls) as made:
        assert made.tap.sees_sockets == (request.param == "sockets")
        made.wait_attached()
        yield made


def test_peers_are_those_of_the_call_and_not_of_the_thread(tap: Tap) -> None:
    """OBI #3250, DD #47330: a connection without TLS, or the last one of the thread, was taken for the peer."""
    servers = [tap.tls.python() for _ in range(2)]
    decoy = tap.tls.python()
    ports = [server.port for server in servers]
    tap.tls.run(
        *(sys.executable, "-c", WITH_DECOYS, str(tap.tls.certificate)), *(str(port) for port in (decoy.port, *ports))
    )
    for side in ("client", "server"):
        found = [one.flow for one in tap.wait_for(side, 4)]
        port = [flow.peer and flow.peer.port if side == "client" else flow.local_port for flow in found]
        assert port == [int((flow.path or "").strip("/")) for flow in found]
        assert all(flow.peer is not None and flow.peer.address == "127.0.0.1" for flow in found)


def test_a_socket_with_descriptor_0_is_a_peer_like_any(tap: Tap) -> None:
    """ECapture #596, #642: 0 stood for a descriptor that is not known."""
    server = tap.tls.python()
    tap.tls.run(sys.executable, "-c", BY_DESCRIPTOR_0, str(tap.tls.certificate), str(server.port))
    (found,) = tap.wait_for("client", 1)
    assert (found.flow.path, found.flow.peer and found.flow.peer.port) == ("/0", server.port)


def test_an_object_at_the_same_address_after_exec_is_another_connection(tap: Tap) -> None:
    script = tap.tls.place / "stages.py"
    script.write_text(OVER_EXEC)
    servers = [tap.tls.python(ASYNCIO_SERVER) for _ in range(2)]
    # The first flow without a peer is what begins the search in memory.
    ports = [servers[0].port, servers[0].port, servers[1].port, servers[0].port]
    tap.tls.environment |= {"PYTHONHASHSEED": "0", "STAGE": "0"}
    tap.tls.run(sys.executable, str(script), str(tap.tls.certificate), *map(str, ports))
    found = [one.flow for one in tap.wait_for("client", 4)]
    assert len({flow.key.process for flow in found}) == 1
    assert [flow.path for flow in found] == [f"/{port}" for port in ports]
    assert len({flow.key for flow in found}) == 4
    assert len({flow.key.pointer for flow in found}) < 4, "no address was used again, so nothing was tested"
    known = [(flow.peer.port, flow.path) for flow in found if flow.peer is not None]
    assert all(f"/{port}" == path for port, path in known)
    assert len(known) >= 2
