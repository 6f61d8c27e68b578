"""HTTP flows of real clients and servers, on copies of TLS libraries: each request once, as the server's log has it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import http_table
from support.tls import ASYNCIO_SERVER, LIBRARIES, NODE_CLIENT, PYTHON_SERVER, Server, Tap, Tls, find

PATHS = ("/one", "/two?q=1", "/missing", "/four")


@pytest.fixture
def tls(tmp_path: Path, spawn: Any, wait_until: Any) -> Tls:
    made = Tls(tmp_path, spawn, wait_until)
    made.hold()
    return made


@pytest.fixture
def tap(tls: Tls) -> Iterator[Tap]:
    with Tap(tls) as running:
        yield running


def urls(server: Server) -> list[str]:
    return [f"https://127.0.0.1:{server.port}{path}" for path in PATHS]


def curl(tls: Tls, server: Server, *options: str) -> None:
    tls.run(find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(tls.certificate), *options, *urls(server))


def wget(tls: Tls, server: Server) -> None:
    """GnuTLS in Debian."""
    tls.run(find("wget"), "-q", "-O", "/dev/null", "--ca-certificate", str(tls.certificate), *urls(server), check=False)


def urllib(tls: Tls, server: Server) -> None:
    program = (
        "import sys, urllib.request, urllib.error\n"
        "for url in sys.argv[1:]:\n"
        "    try: urllib.request.urlopen(url).read()\n"
        "    except urllib.error.HTTPError as error: error.read()\n"
    )
    tls.run(sys.executable, "-c", program, *urls(server))


def asyncio_client(tls: Tls, server: Server) -> None:
    """TLS over memory BIOs."""
    program = f"""
import asyncio, ssl
async def main():
    reader, writer = await asyncio.open_connection("127.0.0.1", {server.port}, ssl=ssl.create_default_context())
    for path in {PATHS!r}:
        writer.write(b"GET " + path.encode() + b" HTTP/1.1\\r\\nHost: 127.0.0.1:{server.port}\\r\\n\\r\\n")
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        fields = dict(line.lower().split(b": ") for line in head.split(b"\\r\\n")[1:] if line)
        await reader.readexactly(int(fields[b"content-length"]))
    writer.close()
asyncio.run(main())
"""
    tls.run(sys.executable, "-c", program)


def httpx2(tls: Tls, server: Server) -> None:
    program = f"""
import httpx, ssl
with httpx.Client(http2=True, verify=ssl.create_default_context()) as client:
    for path in {PATHS!r}:
        assert client.get("https://127.0.0.1:{server.port}" + path).http_version == "HTTP/2"
"""
    tls.run(sys.executable, "-c", program)


def nghttp(tls: Tls, server: Server) -> None:
    tls.run(find("nghttp"), "-n", *urls(server))


def h2load(tls: Tls, server: Server) -> None:
    for url in urls(server):
        tls.run(find("h2load"), "-n", "1", "-c", "1", url)


def requests_library(tls: Tls, server: Server) -> None:
    program = """
import requests, sys
with requests.Session() as session:
    for url in sys.argv[2:]: session.get(url, verify=sys.argv[1])
"""
    tls.run(sys.executable, "-c", program, str(tls.certificate), *urls(server))


def node_client(tls: Tls, server: Server) -> None:
    tls.run(str(tls.node_binary()), "-e", NODE_CLIENT, str(tls.certificate), *urls(server))


def apache(tls: Tls) -> Server:
    return tls.apache()


def node(tls: Tls) -> Server:
    return tls.node()


def python(tls: Tls) -> Server:
    return tls.python(PYTHON_SERVER)


def asyncio_server(tls: Tls) -> Server:
    return tls.python(ASYNCIO_SERVER)


def nginx(tls: Tls) -> Server:
    return tls.nginx()


def curl1(tls: Tls, server: Server) -> None:
    curl(tls, server, "--http1.1")


def curl2(tls: Tls, server: Server) -> None:
    curl(tls, server, "--http2")


#: As docs/http.md names them.
PROGRAMS: dict[Callable[..., Any], str] = {
    python: "Python http.server",
    asyncio_server: "Python asyncio",
    nginx: "nginx",
    apache: "Apache",
    node: "node",
    curl1: "curl",
    curl2: "curl",
    wget: "wget",
    urllib: "Python urllib",
    asyncio_client: "Python asyncio",
    httpx2: "httpx",
    nghttp: "nghttp",
    h2load: "h2load",
    requests_library: "requests",
    node_client: "node",
}

PAIRS = [
    (python, curl1, "HTTP/1.1"),
    (python, wget, "HTTP/1.1"),
    (python, urllib, "HTTP/1.1"),
    (python, asyncio_client, "HTTP/1.1"),
    (asyncio_server, curl1, "HTTP/1.1"),
    (nginx, curl1, "HTTP/1.1"),
    (nginx, curl2, "HTTP/2"),
    (nginx, wget, "HTTP/1.1"),
    (nginx, httpx2, "HTTP/2"),
    (nginx, nghttp, "HTTP/2"),
    (nginx, h2load, "HTTP/2"),
    (nginx, requests_library, "HTTP/1.1"),
    (apache, curl1, "HTTP/1.1"),
    (apache, curl2, "HTTP/2"),
    (node, curl1, "HTTP/1.1"),
    (python, node_client, "HTTP/1.1"),
]


@pytest.mark.parametrize(
    ("serve", "ask", "protocol"), PAIRS, ids=[f"{serve.__name__}-{ask.__name__}" for serve, ask, _ in PAIRS]
)
def test_each_request_once_on_both_sides_as_the_server_has_it(
    tls: Tls, tap: Tap, serve: Callable[[Tls], Server], ask: Callable[[Tls, Server], None], protocol: str
) -> None:
    files = tls.hold_node() if node_client is ask or serve is node else LIBRARIES
    server = serve(tls)
    tap.wait_attached(files)
    ask(tls, server)
    tls.wait_until(lambda: len(server.answered()) >= len(PATHS), what="the server's log")
    expected = Counter(server.answered())
    assert sum(expected.values()) == len(PATHS)
    for side in ("server", "client"):
        found = tap.wait_for(side, len(PATHS))
        assert Counter((one.flow.method, one.flow.path, one.flow.status) for one in found) == expected, side
        assert {one.flow.protocol for one in found} == {protocol}
        assert all(one.flow.is_complete for one in found)
        assert {one.flow.authority for one in found} == {f"127.0.0.1:{server.port}"}
        assert all(one.library is not None and one.library.path.startswith(str(tls.libraries)) for one in found)
        # Over memory BIOs (asyncio) the first flow shows that there are any; what is sent later is compared. Apache
        # has the first request in a buffer after the handshake, and sends when the call is over.
        name = (ask if side == "client" else serve).__name__
        uses_memory = "asyncio" in name or name in ("node", "node_client", "apache")
        known = [one for one in found if one.flow.peer]
        assert len(known) == len(found) or uses_memory
        assert {one.flow.peer.port if side == "client" else one.flow.local_port for one in known} <= {server.port}
    assert {one.process.pid for one in tap.of("server")} == {server.process.pid}
    tap.tap.close()
    # Nothing comes once more with the end of the connections.
    assert len(tap.flows) == 2 * len(PATHS)
    stats = tap.tap.stats()
    assert {
        name: value for name, value in stats.items() if value and name in ("lost", "resyncs", "gaps", "incomplete")
    } == {}
    for side, function in (("server", serve), ("client", ask)):
        libraries = {one.library.path for one in tap.of(side) if one.library}
        http_table.passed(*libraries, side, PROGRAMS[function], protocol)


def test_returns_that_are_seen_at_their_instructions_give_the_same_flows(
    tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a return probe could end a process below a seccomp filter (6.11 to 6.13)."""
    monkeypatch.setattr("sowatch.uprobes.attacher.safe_returns", lambda: "instructions")
    server = tls.python()  # SSL_read_ex and SSL_write_ex, whose probes are not moved
    with Tap(tls) as tap:
        tap.wait_attached()
        urllib(tls, server)
        for side in ("server", "client"):
            found = tap.wait_for(side, len(PATHS))
            assert Counter((one.flow.method, one.flow.path, one.flow.status) for one in found) == Counter(
                server.answered()
            )


@pytest.mark.parametrize("side", ["client", "server"])
def test_peers_of_connections_over_memory_are_those_that_the_bytes_go_to(tls: Tls, tap: Tap, side: str) -> None:
    """OBI #2998: asyncio's spans had the address of another connection; two servers, so that a guess would show."""
    servers = [tls.python(ASYNCIO_SERVER if side == "server" else PYTHON_SERVER) for _ in range(2)]
    tap.wait_attached()
    ask = asyncio_client if side == "client" else curl1
    ask(tls, servers[0])  # shows that there are memory BIOs
    tap.wait_for(side, len(PATHS))
    del tap.flows[:]
    for server in servers:
        ask(tls, server)
    found = tap.wait_for(side, 2 * len(PATHS))
    assert all(one.flow.peer is not None for one in found[1:])
    ports = [one.flow.peer.port if side == "client" else one.flow.local_port for one in found if one.flow.peer]
    authorities = [int(one.flow.authority.rpartition(":")[2]) for one in found if one.flow.peer]
    assert ports == authorities


#: Rounds of requests to each of some servers at once, on one thread, each over a connection of its own that is freed.
NODE_AT_ONCE = """
const https = require("https"), fs = require("fs"), [, ca, rounds, ...ports] = process.argv;
const agent = new https.Agent({keepAlive: false, ca: fs.readFileSync(ca), maxCachedSessions: 0});
const ask = (port, round) => new Promise((resolve) =>
  https.get(`https://127.0.0.1:${port}/${port}/${round}`, {agent}, (response) => {
    response.resume(); response.on("end", resolve);
  }));
(async () => {
  for (let round = 0; round < Number(rounds); round++) await Promise.all(ports.map((port) => ask(port, round)));
})();
"""


def test_connections_of_node_that_go_on_at_once_have_each_its_own_peer(tls: Tls, tap: Tap) -> None:
    """OBI #2998: TLSWrap of node encrypts into memory; objects are freed, and their addresses come again."""
    files = tls.hold_node()
    servers = [tls.python() for _ in range(3)]
    tap.wait_attached(files)
    words = (str(tls.node_binary()), "-e", NODE_AT_ONCE, str(tls.certificate), "8", *(str(one.port) for one in servers))
    tls.run(*words)
    found = [one.flow for one in tap.wait_for("client", 24)]
    assert len(found) == 24
    assert Counter(one.path for one in found) == Counter(
        f"/{one.port}/{round_}" for one in servers for round_ in range(8)
    )
    known = [one for one in found if one.peer]
    assert all(one.path and one.peer and one.path.startswith(f"/{one.peer.port}/") for one in known)
    # The first flow without a peer shows that there are memory BIOs; those under way then may have none, either.
    assert len(known) >= 24 - 6
    assert len({one.key.pointer for one in found}) < 24, "no address was used again, so nothing was tested"


def test_sizes_are_those_of_the_bodies_however_large(tls: Tls, tap: Tap) -> None:
    server = tls.nginx()
    tap.wait_attached()
    tls.run(
        find("curl"),
        "-sS",
        "--http1.1",
        "--cacert",
        str(tls.certificate),
        "-o",
        "/dev/null",
        f"https://127.0.0.1:{server.port}/big",
    )
    for side in ("client", "server"):
        (found,) = tap.wait_for(side, 1)
        assert (found.flow.path, found.flow.response_bytes, found.flow.is_complete) == ("/big", 3_000_000, True)
        assert found.flow.ttfb_ns is not None
        assert found.flow.duration_ns is not None
        assert 0 < found.flow.ttfb_ns <= found.flow.duration_ns


def test_a_process_that_ran_before_the_tap_and_its_connection(tls: Tls) -> None:
    server = tls.python()
    client, ask = tls.keep_alive(server)

    ask("/before")
    with Tap(tls) as tap:
        tap.wait_attached()
        ask("/first")
        ask("/second")
        assert [one.flow.path for one in tap.wait_for("client", 2)] == ["/first", "/second"]
        # The server was within SSL_read when the probes came: of that call nobody sees the return.
        first, second = tap.wait_for("server", 2)
        assert (first.flow.path, first.flow.status, first.flow.is_complete) == (None, 200, False)
        assert (second.flow.path, second.flow.status, second.flow.is_complete) == ("/second", 200, True)
        assert tap.tap.stats()["joined_late"] == 1
    client.stdin.close()
    client.wait(timeout=20)


def test_workers_that_were_forked(tls: Tls, tap: Tap) -> None:
    server = tls.nginx(workers=2)
    tap.wait_attached()
    for _ in range(6):
        curl(tls, server, "--http1.1")
    found = tap.wait_for("server", 6 * len(PATHS))
    assert len(found) == 6 * len(PATHS)
    assert server.process.pid not in {one.process.pid for one in found}


def test_a_library_that_was_upgraded_by_rename(tls: Tls, tap: Tap) -> None:
    old = tls.python()
    tap.wait_attached()
    for name in ("libssl.so.3", "libcrypto.so.3", "libgnutls.so.30"):
        shutil.copyfile(tls.libraries / name, tls.libraries / "new")
        (tls.libraries / "new").rename(tls.libraries / name)
    curl(tls, old, "--http1.1")
    found = tap.wait_for("server", len(PATHS))
    assert {one.process.pid for one in found} == {old.process.pid}
    tls.hold()
    tap.wait_attached(2 * LIBRARIES)
    curl(tls, old, "--http1.1")
    tap.wait_for("server", 2 * len(PATHS))
    ids = {one.library.id for one in tap.of("client") if one.library} | {
        one.library.id for one in tap.of("server") if one.library
    }
    assert len(ids) == 2


def test_a_library_as_a_wheel_names_it(tls: Tls, tap: Tap) -> None:
    """Auditwheel copies libssl.so.3 as libssl-3e69114b.so.3."""
    server = tls.python()
    tap.wait_attached()
    copies = [shutil.copyfile(tls.libraries / one, tls.libraries / new) for one, new in WHEEL_NAMES.items()]
    environment = {**tls.environment, "LD_LIBRARY_PATH": "", "LD_PRELOAD": " ".join(map(str, copies))}
    command = [find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(tls.certificate), *urls(server)]
    with subprocess.Popen(["/usr/bin/sleep", "60"], env=environment) as holder:
        tap.wait_attached(LIBRARIES + 2)
        subprocess.run(command, env=environment, check=True, timeout=60)
        holder.terminate()
    found = tap.wait_for("client", len(PATHS))
    assert [one.flow.path for one in found] == list(PATHS)
    assert {one.library.path for one in found if one.library} == {str(copies[0])}


WHEEL_NAMES = {"libssl.so.3": "libssl-3e69114b.so.3", "libcrypto.so.3": "libcrypto-0a1b2c3d.so.3"}


def test_containers_that_share_a_lower_file_count_each_request_once(tls: Tls, tmp_path: Path) -> None:
    merged: list[Path] = []
    servers: list[Server] = []
    try:
        for number in range(2):
            upper, work, at = (tmp_path / f"{name}{number}" for name in ("upper", "work", "merged"))
            for directory in (upper, work, at):
                directory.mkdir()
            options = f"lowerdir={tls.libraries},upperdir={upper},workdir={work}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(at)], check=True)
            merged.append(at)
        with Tap(tls, place=tmp_path) as tap:
            for at in merged:
                tls.environment["LD_LIBRARY_PATH"] = str(at)
                servers.append(tls.python())
            tls.environment["LD_LIBRARY_PATH"] = str(tls.libraries)
            tap.wait_attached()
            for server in servers:
                curl1(tls, server)
            found = tap.wait_for("server", 2 * len(PATHS))
            assert Counter(one.process.pid for one in found) == {server.process.pid: len(PATHS) for server in servers}
            assert tap.tap.attached.files == LIBRARIES
    finally:
        for server in servers:
            server.process.terminate()
            server.process.wait()
        for at in merged:
            subprocess.run(["umount", str(at)], check=True)


HTTP2_KEEP_ALIVE = """
import httpx, ssl, sys
with httpx.Client(http2=True, verify=ssl.create_default_context()) as client:
    for line in sys.stdin:
        assert client.get(line.strip()).http_version == "HTTP/2"
        print("done", flush=True)
"""


def test_fields_of_a_connection_that_the_probes_came_into_are_unknown_until_they_are_sent_again(tls: Tls) -> None:
    """Beyla #1530, OBI #2772. HTTP/2 sends the host by its place in a table that begins before the probes."""
    server = tls.nginx()
    client = tls.spawn(
        [sys.executable, "-c", HTTP2_KEEP_ALIVE], env=tls.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def ask(path: str) -> None:
        client.stdin.write(f"https://127.0.0.1:{server.port}{path}\n".encode())
        client.stdin.flush()
        assert client.stdout.readline() == b"done\n"

    ask("/before")
    with Tap(tls) as tap:
        tap.wait_attached()
        for path in ("/one", "/one", "/before"):
            ask(path)
        # The server was within SSL_read when the probes came, and nobody sees the return of that: a request is missing.
        for side, number in (("client", 3), ("server", 3)):
            found = [one.flow for one in tap.wait_for(side, number)]
            paths = ["/one", "/one", "<unknown>"]
            assert [one.path for one in found if one.method] == paths[-sum(1 for one in found if one.method) :]
            assert {one.authority for one in found} <= {"<unknown>", None}
            assert {one.status for one in found} == {200}
        assert [one.flow.method for one in tap.of("client")] == 3 * ["GET"]
        stats = tap.tap.stats()
        assert stats["joined_late"] >= 2
        assert stats["unknown_fields"] >= 4
        assert (stats["resyncs"], stats["lost"]) == (0, 0)
    client.stdin.close()
    client.wait(timeout=20)


def test_a_tap_that_starts_anew_in_the_middle_of_a_connection(tls: Tls) -> None:
    server = tls.python()
    client, ask = tls.keep_alive(server)
    for number in range(3):
        with Tap(tls) as tap:
            tap.wait_attached()
            for path in (f"/{number}/first", f"/{number}/second"):
                ask(path)
            found = tap.wait_for("client", 2)
            assert [(one.flow.path, one.flow.is_complete) for one in found] == [
                (f"/{number}/first", True),
                (f"/{number}/second", True),
            ]
    client.stdin.close()
    client.wait(timeout=20)


def test_what_is_no_http_is_reported_nowhere(tls: Tls, tap: Tap) -> None:
    echo = """
import socket, ssl, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain(*sys.argv[2:4])
while True:
    connection, _ = listener.accept()
    try:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            while data := wrapped.recv(100): wrapped.sendall(b"+" + data)
    except OSError: pass
"""
    server = tls.python(echo)
    tap.wait_attached()
    client = f"""
import socket, ssl
plain = socket.create_connection(("127.0.0.1", {server.port}))
with ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1") as wrapped:
    for _ in range(50):
        wrapped.sendall(b"PING\\r\\n"); wrapped.recv(100)
"""
    tls.run(sys.executable, "-c", client)
    curl_error = tls.run(
        find("curl"),
        "-sS",
        "--max-time",
        "2",
        "--cacert",
        str(tls.certificate),
        f"https://127.0.0.1:{server.port}/x",
        check=False,
    )
    assert curl_error.returncode != 0
    tls.wait_until(lambda: tap.tap.stats()["undecoded"] >= 1, what="a connection that shows no HTTP")
    assert [one.flow.path for one in tap.flows if one.flow.is_complete] == []
