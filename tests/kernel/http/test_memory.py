"""Connections over memory BIOs: what is encrypted is sent later, by another call, and each has its own peer or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.http import capture
from sowatch.http.taps import HttpFlow
from support.tls import ASYNCIO_SERVER, SERVE_BY_ASYNCIO, WAYS_TO_PEERS, Server, Tap, Tls

#: `Memory(port)` is a connection over memory BIOs; what it has encrypted is sent by `flush`.
MEMORY = """
import contextlib, os, socket, ssl, sys
ports = list(map(int, sys.argv[2:]))
context = ssl.create_default_context(cafile=sys.argv[1])
class Memory:
    def __init__(self, port):
        self.port, self.incoming, self.outgoing = port, ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")
        self.plain = socket.create_connection(("127.0.0.1", port))
    def flush(self):
        if self.outgoing.pending:
            self.plain.sendall(self.outgoing.read())
    def run(self, call):
        while True:
            result, wants = None, False
            try:
                result = call()
            except ssl.SSLWantReadError:
                wants = True
            self.flush()
            if not wants:
                return result
            self.incoming.write(self.plain.recv(65536))
    def connect(self):
        self.run(self.tls.do_handshake)
        return self
    def write(self, what=""):
        request = f"GET /{self.port}{what} HTTP/1.1\\r\\nHost: 127.0.0.1:{self.port}\\r\\n\\r\\n"
        self.tls.write(request.encode())
    def read(self):
        answer = b""
        while not answer.endswith(b"0123456789"):
            answer += self.run(lambda: self.tls.read(65536))
    def ask(self, what=""):
        self.write(what)
        self.flush()
        self.read()
def plain(port):
    with socket.create_connection(("127.0.0.1", port)) as other:
        other.sendall(b"not TLS, and as long as a record may be, so that it could be taken for one")
"""

WARM_UP = "Memory(ports[0]).connect().ask()\n"


@pytest.fixture(params=WAYS_TO_PEERS)
def tap(
    request: pytest.FixtureRequest, tmp_path: Path, spawn: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tap]:
    """A tap that compares what is sent with what was encrypted."""
    if request.param == "descriptors":
        monkeypatch.setattr(capture, "_shows_sockets", lambda _: False)
    tls = Tls(tmp_path, spawn, wait_until)
    tls.hold()
    with Tap(tls) as made:
        made.wait_attached()
        # The first flow without a peer is what begins the search in memory.
        tls.run(sys.executable, "-c", MEMORY + WARM_UP, str(tls.certificate), str(tls.python().port))
        made.wait_for("client", 1)
        made.wait_for("server", 1)
        made.flows.clear()
        yield made


def ask(tap: Tap, program: str, *servers: Server, number: int) -> list[HttpFlow]:
    """Runs a client; gives its flows, each with the peer that its path names, or none."""
    ports = [str(server.port) for server in servers]
    tap.tls.run(sys.executable, "-c", MEMORY + program, str(tap.tls.certificate), *ports)
    found = tap.wait_for("client", number)
    assert len(found) == number
    wrong = [one.flow for one in found if one.flow.peer and f"/{one.flow.peer.port}" != (one.flow.path or "")[:6]]
    assert wrong == []
    return found


TWO_ON_A_THREAD = """
a, b = Memory(ports[0]), Memory(ports[1])
for call in (lambda one: one.connect(), lambda one: one.ask()):
    call(a)
    call(b)
for _ in range(3):  # both are encrypted before either is sent, and they are sent the other way round
    a.write()
    b.write()
    b.flush()
    plain(ports[2])
    a.flush()
    b.read()
    a.read()
"""


def test_two_connections_on_one_thread_have_each_its_own_peer(tap: Tap) -> None:
    """OBI #2998, #3250: the last connection of the thread, or one without TLS, was taken for the peer."""
    servers = [tap.tls.python() for _ in range(3)]
    found = ask(tap, TWO_ON_A_THREAD, *servers, number=8)
    assert all(one.flow.peer for one in found)
    assert sorted(one.flow.path or "" for one in found) == sorted(4 * [f"/{one.port}" for one in servers[:2]])


FREED_WITH_BYTES_LEFT = """
for _ in range(4):
    a = Memory(ports[0])
    with contextlib.suppress(ssl.SSLWantReadError):
        a.tls.do_handshake()
    left, way = a.outgoing.read(), a.plain  # is encrypted, and sent after the object is gone
    del a.tls
    b = Memory(ports[1]).connect()
    b.ask("/1")
    way.sendall(left)
    b.ask("/2")
    del b.tls, b
"""


def test_bytes_that_are_sent_after_their_object_was_freed_give_the_next_object_no_peer(tap: Tap) -> None:
    servers = [tap.tls.python() for _ in range(2)]
    found = ask(tap, FREED_WITH_BYTES_LEFT, *servers, number=8)
    assert len({one.flow.key.pointer for one in found}) < 4, "no pointer came again"
    assert [one.flow.path for one in found] == 4 * [f"/{servers[1].port}/1", f"/{servers[1].port}/2"]
    assert all(one.flow.peer for one in found)


FORKED = """
a = Memory(ports[0]).connect()
a.ask("/parent")
if not os.fork():
    a.ask("/child")
    b = Memory(ports[1]).connect()
    b.ask("/child")
    os._exit(0)
os.wait()
a = Memory(ports[1]).connect()
a.write("/encrypted")  # by the parent, and sent by a child
if not os.fork():
    a.flush()
    plain(ports[0])
    os._exit(0)
os.wait()
a.outgoing.read()
a.read()
"""


def test_a_fork_in_the_middle_of_a_connection(tap: Tap) -> None:
    """The child goes on with the same object at the same address; it is another process's connection."""
    servers = [tap.tls.python() for _ in range(2)]
    found = ask(tap, FORKED, *servers, number=4)
    first, second = (server.port for server in servers)
    by_path = {one.flow.path: one for one in found}
    assert set(by_path) == {f"/{first}/parent", f"/{first}/child", f"/{second}/child", f"/{second}/encrypted"}
    assert all(one.flow.is_complete for one in found)
    parent, child = by_path[f"/{first}/parent"], by_path[f"/{first}/child"]
    assert parent.flow.key.process != child.flow.key.process
    assert child.process.pid == by_path[f"/{second}/child"].process.pid
    assert all(by_path[f"/{port}/child"].flow.peer for port in (first, second))


INTO_A_PIPE = """
a = Memory(ports[0])
read, write = os.pipe()
relay = os.fork()
if not relay:  # carries what comes out of the pipe to the server, as ssh or a proxy command does
    os.close(write)
    while data := os.read(read, 65536):
        a.plain.sendall(data)
    os._exit(0)
os.close(read)
a.flush = lambda: a.outgoing.pending and os.write(write, a.outgoing.read())
a.connect()
plain(ports[1])
for _ in range(2):
    a.write()
    a.flush()
    plain(ports[1])
    a.read()
"""


def test_what_is_written_into_a_pipe_gives_no_peer(tap: Tap) -> None:
    """What the thread sends next without TLS was taken for it."""
    servers = [tap.tls.python() for _ in range(2)]
    found = ask(tap, INTO_A_PIPE, *servers, number=2)
    assert [one.flow.peer for one in found] == [None, None]


#: Answers whatever it is asked, without TLS.
PLAIN_SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    with listener.accept()[0] as connection:
        if connection.recv(1000):
            connection.sendall(b"this one")
"""
CALLBACK_SERVER = """
import asyncio, socket, ssl, sys
async def serve(reader, writer):
    try:
        while head := await reader.readuntil(b"\\r\\n\\r\\n"):
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\n\\r\\n0123456789")
            await writer.drain()
    except asyncio.IncompleteReadError:
        writer.close()
def look_up(tls, name, context):
    with socket.create_connection(("127.0.0.1", int(sys.argv[4]))) as other:
        other.sendall(b"which certificate?")
        other.recv(1000)
""" + SERVE_BY_ASYNCIO.replace("    async with", "    context.sni_callback = look_up\n    async with")


def test_a_socket_that_a_callback_of_the_handshake_uses_is_not_the_peer(tap: Tap) -> None:
    """A server that asks a database which certificate to use, within SSL_do_handshake."""
    decoy = tap.tls.python(PLAIN_SERVER)
    server = tap.tls.python(CALLBACK_SERVER, str(decoy.port))
    found = ask(tap, "a = Memory(ports[0]).connect()\nfor _ in range(3): a.ask()\n", server, number=3)
    served = [one for one in tap.wait_for("server", 3) if one.process.pid == server.process.pid]
    assert len(served) == 3
    ends = {(one.flow.local_port, one.flow.peer and one.flow.peer.port) for one in served}
    assert ends == {(server.port, client_port(found))}


def client_port(found: list[HttpFlow]) -> int | None:
    """Of the one connection that they are of."""
    (port,) = {one.flow.local_port for one in found}
    return port


READ_FROM_THE_BUFFER = """
with context.wrap_socket(socket.create_connection(("127.0.0.1", ports[0])), server_hostname="localhost") as tls:
    for _ in range(2):
        tls.sendall(f"GET /{ports[0]} HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n".encode())
        answer = b""
        while not answer.endswith(b"0123456789"):
            answer += tls.recv(5)  # but for the first of a record that is there: no system call
            plain(ports[1])
"""


def test_what_a_thread_sends_without_tls_is_not_the_peer_of_what_it_reads_from_a_buffer(tap: Tap) -> None:
    servers = [tap.tls.python(ASYNCIO_SERVER) for _ in range(2)]  # sends each answer in one record
    found = ask(tap, READ_FROM_THE_BUFFER, *servers, number=2)
    assert [one.flow.peer and one.flow.peer.port for one in found] == [servers[0].port, servers[0].port]
