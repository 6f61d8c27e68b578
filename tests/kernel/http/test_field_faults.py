"""Faults that other tools had in the field, with real clients on this kernel: what is right instead.

docs/http.md has the whole list, and which test has which.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.elf_symbols import read_exports
from support.https_programs import OPENSSL_CLIENT
from support.tls import LIBRARIES, Tap, Tls, library

CONNECT = """
import os, socket, ssl, sys, threading
certificate, port = sys.argv[1], int(sys.argv[2])
context = ssl.create_default_context(cafile=certificate)
def connected():
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost")
def read(tls):
    answer = b""
    while not answer.endswith(b"0123456789"):
        answer += tls.recv(65536)
"""
GET = """
with connected() as tls:
    tls.sendall(b"GET %s HTTP/1.1\\r\\n\\r\\n")
    read(tls)
"""


@pytest.fixture
def tls(tmp_path: Path, spawn: Any, wait_until: Any) -> Tls:
    made = Tls(tmp_path, spawn, wait_until)
    made.hold()
    return made


def run(tls: Tls, program: str, port: int) -> str:
    words = (sys.executable, "-c", CONNECT + program, str(tls.certificate), str(port))
    return tls.run(*words).stdout.decode()


CALLS_OF_MANY_LENGTHS = """
tls = connected()
for head, body in ((b"POST /body HTTP/1.1\\r\\nContent-Length: 5000\\r\\n\\r\\n", 5000),
                   (b"GET /head HTTP/1.1\\r\\nX-Long: " + b"x" * 5000 + b"\\r\\n\\r\\n", 0),
                   (b"GET /next HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n", 0)):
    tls.sendall(head + b"b" * body)
    read(tls)
"""


def test_a_call_that_was_captured_in_part_says_so_and_how_long_it_was(tls: Tls) -> None:
    """OBI #2394: user space inferred from what it had whether that was all of it."""
    server = tls.python()
    with Tap(tls, capture_bytes=256) as tap:
        tap.wait_attached()
        run(tls, CALLS_OF_MANY_LENGTHS, server.port)
        body, head, after = (one.flow for one in tap.wait_for("client", 3))
        assert (body.path, body.status, body.request_bytes, body.is_complete) == ("/body", 200, 5000, True)
        assert (head.path, head.status, head.is_complete) == (None, 200, False)
        assert (after.path, after.status, after.is_complete) == ("/next", 200, True)
        stats = tap.tap.stats()
        assert stats["gaps"] >= 1
        assert stats["lost"] == 0


WANT_WRITE = """
listener, go, number = socket.create_server(("127.0.0.1", 0)), threading.Event(), 20
port = listener.getsockname()[1]
def serve():
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(*sys.argv[1:3])
    tls = own.wrap_socket(listener.accept()[0], server_side=True)
    go.wait()
    for _ in range(number):
        got = b""
        while not got.endswith(b"end"): got += tls.recv(65536)
        tls.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\n\\r\\n0123456789")
threading.Thread(target=serve).start()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
tls, refused = connected(), 0
tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
def send(data):
    global refused
    while data:
        try:
            data = data[tls.send(data):]
        except ssl.SSLWantWriteError:
            refused += 1
            if refused == 100:
                go.set()
for n in range(number):
    tls.settimeout(0)
    send(b"POST /%d HTTP/1.1\\r\\nContent-Length: 1000000\\r\\n\\r\\n" % n + b"x" * 999_997 + b"end")
    tls.settimeout(None)
    read(tls)
print(refused)
"""


def test_a_write_that_has_to_be_tried_again_is_no_data(tls: Tls) -> None:
    """Taps on the entry of SSL_write count each try of a write that WANT_WRITE refuses."""
    with Tap(tls) as tap:
        tap.wait_attached()
        words = (sys.executable, "-c", CONNECT.replace("int(sys.argv[2])", "0") + WANT_WRITE)
        refused = int(tls.run(*words, str(tls.certificate), str(tls.key)).stdout)
        assert refused >= 100
        for side in ("client", "server"):
            found = [one.flow for one in tap.wait_for(side, 20)]
            assert [one.path for one in found] == [f"/{number}" for number in range(20)]
            assert {(one.status, one.request_bytes, one.is_complete) for one in found} == {(200, 1_000_000, True)}


@pytest.mark.parametrize("kind", ["boring", "changed"])
def test_a_library_without_ssl_write_ex_is_tapped_by_what_it_has(tls: Tls, kind: str) -> None:
    """node-agent #110: one function that was not there, and none was probed."""
    if kind == "boring":
        path, _ = tls.add(library("android/libssl.so.0")), tls.add(library("android/libcrypto.so.0"))
        missing = [b"SSL_write_ex", b"SSL_read_ex", b"SSL_write_ex2"]
    else:
        path, missing = tls.libraries / "libssl-old.so.3", [b"SSL_peek_ex", b"SSL_write_early_data"]
        data = (tls.libraries / "libssl.so.3").read_bytes()
        for name in missing:  # the names of symbols stand before all other strings
            data = data.replace(b"\0%s\0" % name, b"\0X%s\0" % name[1:], 1)
        path.write_bytes(data)
    with path.open("rb") as file:
        assert not read_exports(file.fileno(), frozenset(name.decode() for name in missing))
    server = tls.python()
    tls.hold(path)
    with Tap(tls) as tap:
        tap.wait_attached(LIBRARIES + (2 if kind == "boring" else 1))
        assert tap.tap.failures == []
        tls.run(sys.executable, "-c", OPENSSL_CLIENT, str(path), str(server.port), "plain", "/1", "/2")
        found = tap.wait_for("client", 2)
        assert [(one.flow.path, one.flow.status, one.flow.is_complete) for one in found] == [
            ("/1", 200, True),
            ("/2", 200, True),
        ]
        assert {one.library and one.library.path for one in found} == {str(path)}


BELOW_ANOTHER_ROOT = """
import encodings.idna, os, socket
path, words = sys.argv[1], sys.argv[2:]
if words[0] == "chroot":
    os.chroot(words[1])
    os.chdir("/")
sys.argv = ["-c", path, *words[2:]]
ctypes.CDLL(path.replace("libssl", "libcrypto"))
ctypes.CDLL(path)
print(flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("way", ["chroot", "/proc/self/root"])
def test_a_library_below_the_root_of_a_process_is_opened_once_and_not_by_a_doubled_path(tls: Tls, way: str) -> None:
    """Pixie #1736: /proc/PID/root stood before a path that had it already."""
    server, root = tls.python(), tls.place / "root"
    seen = f"/ours-{os.getpid()}"
    there = root / seen.strip("/") if way == "chroot" else tls.libraries
    shutil.copytree(tls.libraries, root / seen.strip("/"))
    path = f"{seen}/libssl.so.3" if way == "chroot" else f"/proc/self/root{there}/libssl.so.3"
    with Tap(tls, place=Path(seen) if way == "chroot" else None) as tap:
        program = "import ctypes, sys" + BELOW_ANOTHER_ROOT + OPENSSL_CLIENT
        client = tls.spawn(
            [sys.executable, "-c", program, path, way, str(root), str(server.port), "plain", "/1"],
            env=tls.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdout.readline() == b"\n"
        tap.wait_attached(2)
        client.stdin.close()
        assert client.wait(timeout=60) == 0
        (found,) = tap.wait_for("client", 1)
        assert (found.flow.path, found.flow.status) == ("/1", 200)
        assert found.library is not None
        assert found.library.path == (path if way == "chroot" else str(there / "libssl.so.3"))
        assert tap.tap.failures == []


def test_functions_of_openssl_in_a_library_of_another_name_are_found(tls: Tls) -> None:
    """DD #45393: in libnode.so. Where there are no exports: `test_what_is_linked_into_a_program_is_told`."""
    path = Path(shutil.copyfile(tls.libraries / "libssl.so.3", tls.libraries / "libnode.so.108"))
    server = tls.python()
    tls.hold(path)
    with Tap(tls) as tap:
        tap.wait_attached(LIBRARIES + 1)
        tls.run(sys.executable, "-c", OPENSSL_CLIENT, str(path), str(server.port), "plain", "/1")
        (found,) = tap.wait_for("client", 1)
        assert (found.flow.path, found.library and found.library.path) == ("/1", str(path))


@pytest.mark.parametrize("name", ["connections", "under_way", "encrypted", "sending", "spare"])
def test_maps_full_of_what_nobody_deleted_hide_no_request(tls: Tls, name: str) -> None:
    """Podtrace #395: one missed deletion, and a full map ended the tracer."""
    server = tls.python()
    with Tap(tls) as tap:
        tap.wait_attached()
        table = tap.tap._capture.attacher.map(name)
        spec = table.spec
        for number in range(spec.max_entries * 2):
            table.update(number.to_bytes(spec.key_bytes, "big"), bytes(spec.value_bytes))
        for _ in range(3):
            run(tls, GET % "/1", server.port)
        for side in ("client", "server"):
            found = tap.wait_for(side, 3)
            assert [(one.flow.path, one.flow.is_complete) for one in found] == 3 * [("/1", True)]
            assert all(one.flow.peer for one in found)
        assert tap.tap.stats()["no_room"] == 0


def test_the_last_process_of_a_library_leaves_no_link_and_no_pid_behind(
    tmp_path: Path, spawn: Any, wait_until: Any
) -> None:
    """Podtrace #251: links of processes that were gone, and pids that were another process's by then."""
    tls = Tls(tmp_path, spawn, wait_until)
    server = tls.python()
    with Tap(tls, linger_s=0.1, pids=[server.process.pid]) as tap:
        wanted = tap.tap._capture.attacher.map("wanted")
        tls.wait_until(lambda: tap.tap.attached.files >= 2, what="the server's libraries attached")
        assert [int.from_bytes(key, "little") for key, _ in wanted.items()] == [server.process.pid]
        server.process.terminate()
        server.process.wait()
        tls.wait_until(lambda: (tap.tap.attached.files, tap.tap.attached.attached) == (0, 0), what="all detached")
        tls.wait_until(lambda: list(wanted.items()) == [], what="no pid left")


FLOOD = """
tls = connected()
tls.sendall(b"POST /big HTTP/1.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
for _ in range(1000):
    tls.sendall(b"3e80\\r\\n" + b"x" * 16000 + b"\\r\\n")
"""
SINK = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[2:4])
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    try:
        with context.wrap_socket(listener.accept()[0], server_side=True) as tls:
            while tls.recv(65536): pass
    except OSError: pass
"""


def test_what_a_full_ring_did_not_take_is_counted_and_nothing_else_is_missing(tls: Tls) -> None:
    """DD #15424, #22145: the ring was full, and nothing said how much was missing."""
    sink, server = tls.python(SINK), tls.python()
    with Tap(tls) as tap:
        tap.wait_attached()
        tap.held_by = "/hold"
        run(tls, GET % "/hold", server.port)
        assert tap.is_held.wait(60)
        run(tls, FLOOD, sink.port)
        tap.goes_on.set()
        tls.wait_until(lambda: tap.tap.stats()["calls"] > 500, what="what the ring took")
        run(tls, GET % "/after", server.port)
        tls.wait_until(lambda: [one for one in tap.of("client") if one.flow.path == "/after"], what="the next request")
        tap.tap.finish()
        stats = tap.tap.stats()
        assert stats["lost"] > 100
        assert stats["passed"] == stats["calls"] + stats["lost"] + stats["spared"] + stats["no_room"]


BETWEEN = """
tls = connected()
tls.sendall(b"GET /1 HTTP/1.1\\r\\n\\r\\n")
print(flush=True)
sys.stdin.readline()
read(tls)
"""


def test_a_connection_that_only_reads_has_its_peer(tls: Tls) -> None:
    """DD #24303: sockets were learned on SSL_write and not on SSL_read."""
    server = tls.python()
    client = tls.spawn(
        [sys.executable, "-c", CONNECT + BETWEEN, str(tls.certificate), str(server.port)],
        env=tls.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout.readline() == b"\n"
    with Tap(tls) as tap:
        tap.wait_attached()
        client.stdin.close()
        client.wait(timeout=60)
        (found,) = tap.wait_for("client", 1)
        assert (found.flow.method, found.flow.status, found.flow.is_complete) == (None, 200, False)
        assert found.flow.peer is not None
        assert found.flow.peer.port == server.port


THREADS = """
def ask(number):
    with connected() as tls:
        for _ in range(2):
            tls.sendall(b"GET /%d HTTP/1.1\\r\\n\\r\\n" % number)
            read(tls)
sys.stdin.readline()
threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
for one in threads: one.start()
for one in threads: one.join()
"""


def test_every_thread_of_a_process_that_is_named_counts_and_no_other_process(tls: Tls) -> None:
    """DD #50718: before 6.10 the kernel's own filter by pid left out every thread but the first."""
    server = tls.python()
    named, other = (
        tls.spawn(
            [sys.executable, "-c", CONNECT + THREADS, str(tls.certificate), str(server.port)],
            env=tls.environment,
            stdin=subprocess.PIPE,
        )
        for _ in range(2)
    )
    with Tap(tls, pids=[named.pid]) as tap:
        tls.wait_until(lambda: tap.tap._capture.attacher.map("wanted").items(), what="the process is selected")
        tls.wait_until(lambda: tap.tap.attached.files >= 2, what="its libraries attached")
        for one in (other, named):
            one.stdin.close()
            assert one.wait(timeout=60) == 0
        found = tap.wait_for("client", 16)
        assert sorted(one.flow.path or "" for one in found) == sorted(2 * [f"/{number}" for number in range(8)])
        assert {one.process.pid for one in tap.flows} == {named.pid}
