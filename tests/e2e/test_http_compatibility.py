"""HTTP flows of many programs, libraries and uses of HTTP under one tap: each request once, as the server has it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sowatch.explain.probing import tls_answer
from sowatch.http.capture import Activity
from sowatch.http.taps import HttpFlow
from sowatch.linux.proc import ProcFs
from sowatch.linux.tls_libraries import TlsLook, look_for_tls
from support import http_table
from support import https_programs as programs
from support.http_bench import Bench
from support.tls import Server, Tap, Tls, find, free_port, library

PATHS = ("/one", "/two?q=1", "/missing", "/four")


def _can_be_had(package: str) -> bool:
    """Whether the distribution has a package."""
    return subprocess.run(["apt-cache", "show", package], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def module_bench(
    tmp_path_factory: pytest.TempPathFactory, module_spawn: Any, wait_until: Callable[..., Any]
) -> Iterator[Bench]:
    bench = Bench(Tls(tmp_path_factory.mktemp("http"), module_spawn, wait_until))
    with bench.tap:
        bench.tap.wait_attached(bench.files)
        # The first flow over memory shows that there are any: from then on what is sent is compared.
        server = bench.python[programs.AIOHTTP_SERVER]
        bench.curl(f"https://127.0.0.1:{server.port}/warm")
        bench.tap.wait_for("server", 1)
        yield bench


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    """The same for each test; what was lost or resynchronised in it is its fault."""
    before = module_bench.tap.tap.stats()
    del module_bench.tap.flows[:]
    yield module_bench
    after = module_bench.tap.tap.stats()
    names = ("lost", "resyncs", "gaps", "unreadable", "dropped", "unknown_fields")
    assert {name: after[name] - before[name] for name in names} == dict.fromkeys(names, 0)


def urls(server: Server) -> list[str]:
    return [f"https://127.0.0.1:{server.port}{path}" for path in PATHS]


def shape(found: Sequence[HttpFlow]) -> Counter[tuple[Any, ...]]:
    return Counter(
        (one.flow.method, one.flow.path, one.flow.status, one.flow.request_bytes, one.flow.response_bytes)
        for one in found
    )


def as_logged(
    bench: Bench, server: Server, protocol: str, number: int, client: str, ask: Callable[[], Any], *names: str
) -> None:
    """Both sides have each request once, as the server has it.

    ``client`` is the file of the client's library; ``names`` are those of server and client in docs/http.md.
    """
    before = len(server.rows())
    ask()
    bench.tls.wait_until(lambda: len(server.rows()) >= before + number, what="the server's log")
    expected = Counter(server.rows()[before:])
    assert sum(expected.values()) == number
    for side in ("server", "client"):
        found = bench.flows(side, server, number)
        assert shape(found) == expected, side
        assert {one.flow.protocol for one in found} == {protocol}
        (library_path,) = {one.library.path for one in found if one.library}
        assert side == "server" or Path(library_path).name == client
        if names:
            http_table.passed(library_path, side, names[side == "client"], protocol)


SERVERS = {
    "aiohttp": programs.AIOHTTP_SERVER,
    "hypercorn": programs.HYPERCORN_SERVER,
    "uvicorn": programs.UVICORN_SERVER,
}


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("aiohttp", "HTTP/1.1"), ("hypercorn", "HTTP/1.1"), ("hypercorn", "HTTP/2"), ("uvicorn", "HTTP/1.1")],
)
def test_servers_in_python(bench: Bench, name: str, protocol: str) -> None:
    server = bench.python[SERVERS[name]]
    option = "--http2" if protocol == "HTTP/2" else "--http1.1"
    as_logged(
        bench,
        server,
        protocol,
        4,
        "libssl.so.3",
        lambda: bench.curl(option, "-o", "/dev/null", *urls(server)),
        name,
        "curl",
    )


def test_the_aiohttp_client(bench: Bench) -> None:
    server = bench.nginx
    as_logged(
        bench,
        server,
        "HTTP/1.1",
        4,
        "libssl.so.3",
        lambda: bench.ask(programs.AIOHTTP_CLIENT, *urls(server)),
        "nginx",
        "aiohttp",
    )


#: Debian 13 has no libcurl with NSS any more; scripts/setup installs it where there is one.
LIBCURLS = [kind for kind in ("gnutls", "nss") if kind == "gnutls" or _can_be_had("libcurl3-nss")]


@pytest.mark.parametrize("kind", LIBCURLS)
def test_libcurl_with_another_library(bench: Bench, kind: str) -> None:
    server = bench.nginx
    path = str(library(f"libcurl-{kind}.so.4"))
    used = {"gnutls": "libgnutls.so.30", "nss": "libnspr4.so"}[kind]
    as_logged(
        bench,
        server,
        "HTTP/2",
        4,
        used,
        lambda: bench.ask(programs.LIBCURL_CLIENT, path, *urls(server)),
        "nginx",
        "libcurl",
    )


@pytest.mark.parametrize(("kind", "form"), [("boring", "plain"), ("wheel", "plain"), ("wheel", "ex"), ("wheel", "ex2")])
def test_libraries_with_the_functions_of_openssl(bench: Bench, kind: str, form: str) -> None:
    server, path = bench.nginx, bench.boring if kind == "boring" else bench.wheel

    def ask() -> None:
        bench.ask(programs.OPENSSL_CLIENT, str(path), str(server.port), form, *PATHS)

    name = "SSL_write" if form == "plain" else f"SSL_write_{form}"
    as_logged(bench, server, "HTTP/1.1", 4, path.name, ask, "nginx", f"{name} by ctypes")


def test_a_proxy_between_tls_and_tls_is_server_and_client(bench: Bench) -> None:
    proxy = bench.nghttpx
    as_logged(
        bench,
        proxy,
        "HTTP/2",
        4,
        "libssl.so.3",
        lambda: bench.curl("--http2", "-o", "/dev/null", *urls(proxy)),
        "nghttpx",
        "curl",
    )
    pids = Counter((one.flow.side, one.process.pid) for one in bench.tap.flows)
    assert pids["server", proxy.process.pid] == pids["client", proxy.process.pid] == 4
    assert pids["server", bench.nginx.process.pid] == 4
    for one in bench.tap.of("client"):
        if one.process.pid == proxy.process.pid:
            assert one.library is not None
            http_table.passed(one.library.path, "client", "nghttpx", one.flow.protocol)


def test_grpc_has_its_method_and_the_status_of_its_trailers(bench: Bench) -> None:
    server = bench.python[programs.GRPC_SERVER]
    bench.ask(programs.GRPC_CLIENT, str(server.port))
    for side in ("server", "client"):
        found = bench.flows(side, server, 2)
        assert [(one.flow.method, one.flow.path, one.flow.status, one.flow.grpc_status) for one in found] == [
            ("POST", "/demo.Demo/Hello", 200, 0),
            ("POST", "/demo.Demo/Missing", 200, 5),
        ]
        # Five bytes stand before each message (PROTOCOL-HTTP2.md of gRPC).
        assert [(one.flow.request_bytes, one.flow.response_bytes) for one in found] == [(10, 15), (10, 0)]
        assert found[0].library is not None
        http_table.passed(found[0].library.path, side, "grpclib", "HTTP/2")


def test_a_client_of_grpcio_has_no_flows_and_its_server_has(bench: Bench, spawn: Any) -> None:
    """Its BoringSSL is within one of its own files, and stripped; libssl, which Python loads, too, is not called."""
    server = bench.python[programs.GRPC_SERVER]
    client = spawn(
        [sys.executable, "-c", programs.GRPCIO_CLIENT, str(server.port), str(bench.tls.certificate)],
        env=bench.tls.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout.readline() == b"\n"
    (found,) = bench.flows("server", server, 1)
    assert (found.flow.path, found.flow.status, found.flow.grpc_status) == ("/demo.Demo/Hello", 200, 0)
    assert (found.flow.request_bytes, found.flow.response_bytes) == (10, 15)
    assert bench.tap.of("client") == []
    look = look_for_tls(ProcFs(), client.pid)
    assert isinstance(look, TlsLook)
    assert [one for one in look.files if "cygrpc" in one.path] == []
    assert tls_answer(look, ()).files in ((), (str(bench.tls.libraries / "libssl.so.3"),))
    process = ProcFs().process(client.pid)
    assert process is not None
    assert (bench.tap.tap.activity(process.id) or Activity()).calls == 0


def test_a_websocket_ends_the_flow(bench: Bench) -> None:
    """What follows the upgrade is no HTTP, even where it looks like that."""
    server = bench.python[programs.WEBSOCKET_SERVER]

    def ask() -> None:
        bench.ask(programs.WEBSOCKET_CLIENT, f"wss://127.0.0.1:{server.port}/chat")

    as_logged(bench, server, "HTTP/1.1", 1, "libssl.so.3", ask)
    assert len(bench.tap.flows) == 2


def test_events_have_a_first_and_a_last_byte(bench: Bench) -> None:
    server = bench.python[programs.AIOHTTP_SERVER]
    url = f"https://127.0.0.1:{server.port}"
    program = """
import socket, ssl, sys, time
context, port = ssl.create_default_context(), int(sys.argv[1])
def connect(target):
    tls = context.wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="127.0.0.1")
    tls.sendall(f"GET {target} HTTP/1.1\\r\\nHost: 127.0.0.1:{port}\\r\\n\\r\\n".encode())
    return tls
def read(tls, end):
    data = b""
    while end not in data: data += tls.recv(65536)
with connect("/events") as events:
    read(events, b"data: 1")
    print(time.monotonic_ns(), flush=True)
    with connect("/go") as go: read(go, b"0123456789")
    read(events, b"0\\r\\n\\r\\n")
"""
    middle_ns = int(bench.run(sys.executable, "-c", program, str(server.port)).stdout)
    for side in ("server", "client"):
        (events,) = [one.flow for one in bench.flows(side, server, 2) if one.flow.path == "/events"]
        assert (events.status, events.response_bytes, events.is_complete) == (200, 18, True), url
        assert events.begin_ns is not None
        assert events.first_byte_ns is not None
        assert events.end_ns is not None
        assert events.begin_ns < events.first_byte_ns < middle_ns < events.end_ns


def test_connect_through_a_proxy_behind_tls(bench: Bench) -> None:
    """TLS within TLS: the request to the proxy is one flow, what is asked through the tunnel are others."""
    proxy, server = bench.python[programs.CONNECT_PROXY], bench.nginx
    before = len(server.rows())
    certificate = str(bench.tls.certificate)
    bench.curl(
        *("--http1.1", "--proxy", f"https://127.0.0.1:{proxy.port}", "--proxy-cacert", certificate, "--proxytunnel"),
        *("-o", "/dev/null", *urls(server)),
    )
    bench.tls.wait_until(lambda: len(server.rows()) >= before + 4, what="the server's log")

    def flows(side: str, method: str) -> list[HttpFlow]:
        return [one for one in bench.tap.of(side) if one.flow.method == method]

    for side in ("server", "client"):
        bench.tls.wait_until(lambda: len(bench.tap.of(side)) >= 5, what=f"five flows of the {side}")  # noqa: B023
        (connect,) = flows(side, "CONNECT")
        assert (connect.flow.authority, connect.flow.path) == (f"127.0.0.1:{server.port}", None)
        assert (connect.flow.status, connect.flow.is_complete) == (200, True)
        assert shape(flows(side, "GET")) == Counter(server.rows()[before:])
    assert {one.process.pid for one in flows("server", "GET")} == {server.process.pid}
    # The socket of both is the one to the proxy.
    assert {one.flow.peer.port for one in bench.tap.of("client") if one.flow.peer} == {proxy.port}


def test_heads_only_expectations_chunks_and_pipelines(bench: Bench) -> None:
    server = bench.python[programs.AIOHTTP_SERVER]
    url = f"https://127.0.0.1:{server.port}"
    (body := bench.tls.place / "body").write_bytes(b"b" * 70_000)

    def ask() -> None:
        bench.curl("-I", f"{url}/head")
        bench.curl("-H", "Expect: 100-continue", "--data-binary", f"@{body}", f"{url}/continue", "-o", "/dev/null")
        bench.curl("-H", "Transfer-Encoding: chunked", "--data-binary", f"@{body}", f"{url}/chunks", "-X", "PUT")

    as_logged(bench, server, "HTTP/1.1", 3, "libssl.so.3", ask)
    assert {one.flow.path: one.flow.request_bytes for one in bench.tap.of("client")} == {
        "/head": 0,
        "/continue": 70_000,
        "/chunks": 70_000,
    }


def test_requests_that_are_pipelined(bench: Bench) -> None:
    server = bench.nginx
    as_logged(
        *(bench, server, "HTTP/1.1", 4, "libssl.so.3"),
        lambda: bench.ask(programs.PIPELINING_CLIENT, str(server.port), *PATHS),
    )
    assert [one.flow.path for one in bench.tap.of("client")] == list(PATHS)


def test_early_data_of_openssl(bench: Bench) -> None:
    """SSL_write_early_data at the client, SSL_read_early_data at nginx."""
    server, session = bench.nginx, bench.tls.place / "session.pem"
    request = f"GET /early HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
    (early := bench.tls.place / "early").write_text(request)
    client = [find("openssl"), "s_client", "-connect", f"127.0.0.1:{server.port}", "-tls1_3", "-ign_eof"]

    def ask() -> None:
        for words, text in (
            (["-sess_out", str(session)], request.replace("/early", "/late")),
            (["-sess_in", str(session), "-early_data", str(early)], ""),
        ):
            done = subprocess.run(  # noqa: PLW1510 - its output says more
                [*client, *words], input=text, env=bench.tls.environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0
        assert "Early data was accepted" in done.stdout

    as_logged(bench, server, "HTTP/1.1", 2, "libssl.so.3", ask)


def test_early_data_of_gnutls(bench: Bench) -> None:
    server = bench.gnutls
    request = f"GET /gnutls HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
    (early := bench.tls.place / "early-gnutls").write_text(request)
    subprocess.run(
        [
            *(
                find("gnutls-cli"),
                "--insecure",
                "--resume",
                f"--earlydata={early}",
                f"--port={server.port}",
                "127.0.0.1",
            ),
            *("--priority", "NORMAL:-VERS-ALL:+VERS-TLS1.3"),
        ],
        input=request.replace("/gnutls", "/late"),
        env=bench.tls.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for side in ("server", "client"):
        bench.tls.wait_until(lambda: [one for one in bench.tap.of(side) if one.flow.path == "/gnutls"])  # noqa: B023
        (found,) = [one.flow for one in bench.tap.of(side) if one.flow.path == "/gnutls"]
        assert (found.method, found.status, found.is_complete) == ("GET", 200, True), side
        assert found.response_bytes > 0


def test_servers_of_gnutls_and_nss_have_no_log_so_the_client_counts(bench: Bench) -> None:
    for server, name in ((bench.gnutls, "libgnutls.so.30"), (bench.nss_server, "libnspr4.so")):
        del bench.tap.flows[:]
        answered = bench.curl(
            "-k", "-w", "%{stderr}%{http_code} %{size_download}\n", f"https://127.0.0.1:{server.port}/one"
        )
        (found,) = bench.flows("server", server, 1)
        assert (found.flow.method, found.flow.path, found.flow.status) == ("GET", "/one", 200)
        assert found.flow.response_bytes == len(answered)
        assert found.library is not None
        assert Path(found.library.path).name == name
        program = "gnutls-serv" if server is bench.gnutls else "selfserv"
        http_table.passed(found.library.path, "server", program, found.flow.protocol)


def test_the_client_of_nss(bench: Bench) -> None:
    server = bench.nginx
    (request := bench.tls.place / "request").write_text(
        f"GET /one HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
    )
    command = [find("tstclnt"), "-h", "127.0.0.1", "-p", str(server.port), "-D", "-o", "-A", str(request)]
    # It ends with an error where the server closes first.
    as_logged(
        bench, server, "HTTP/1.1", 1, "libnspr4.so", lambda: bench.tls.run(*command, check=False), "nginx", "tstclnt"
    )


def test_what_nspr_writes_without_tls_is_not_taken_for_it(bench: Bench) -> None:
    """PR_Write and PR_Read serve files and sockets in the clear, too."""
    program = """
import ctypes, sys
nspr = ctypes.CDLL(sys.argv[1])
sockets = (ctypes.c_void_p * 2)()
assert nspr.PR_NewTCPSocketPair(sockets) == 0
near, far = map(ctypes.c_void_p, sockets)
buffer = ctypes.create_string_buffer(1000)
for number in range(20):
    for sender, receiver, data in (
        (near, far, b"GET /clear HTTP/1.1\\r\\nHost: clear.test\\r\\n\\r\\n"),
        (far, near, b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n"),
    ):
        assert nspr.PR_Write(sender, data, len(data)) == len(data)
        assert nspr.PR_Read(receiver, buffer, 1000) == len(data)
for one in (near, far): assert nspr.PR_Close(one) == 0
"""
    before = bench.tap.tap.stats()
    bench.ask(program, str(bench.nspr))
    # What comes after it in the ring shows that it would be there.
    bench.curl("-o", "/dev/null", f"https://127.0.0.1:{bench.nginx.port}/after")
    assert [one.flow.path for one in bench.flows("client", bench.nginx, 1)] == ["/after"]
    assert {one.flow.authority for one in bench.tap.flows} == {f"127.0.0.1:{bench.nginx.port}"}
    after = bench.tap.tap.stats()
    assert after["undecoded"] == before["undecoded"]


def test_redis_behind_tls_is_no_http_and_counted(bench: Bench) -> None:
    before = bench.tap.tap.stats()
    command = [find("redis-cli"), "-p", str(bench.redis.port), "--tls", "--cacert", str(bench.tls.certificate)]
    assert bench.run(*command, "-r", "40", "PING").stdout.count(b"PONG") == 40
    # The client's and the server's end.
    bench.tls.wait_until(
        lambda: bench.tap.tap.stats()["undecoded"] >= before["undecoded"] + 2, what="connections that show no HTTP"
    )
    assert bench.tap.flows == []


def test_postgres_behind_tls_is_no_http_and_counted(bench: Bench, spawn: Any) -> None:
    """Its TLS begins in the middle of a connection, and what looks like a request is a value."""
    (programs_of_postgres, *_) = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    data, port = bench.tls.place / "postgres", free_port()
    # It refuses to run as root: in a user namespace it is somebody else, to whom the test's files belong.
    other = [find("unshare"), "--user", "--map-user=1000", "--map-group=1000"]
    bench.run(*other, str(programs_of_postgres / "initdb"), "-D", str(data), "-A", "trust", "-U", "ours", "--no-sync")
    settings = {
        "ssl": "on",
        "ssl_cert_file": str(bench.tls.certificate),
        "ssl_key_file": str(bench.tls.key),
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
    }
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    process = spawn(
        [*other, programs_of_postgres / "postgres", "-D", data, *words],
        env=bench.tls.environment,
        stderr=subprocess.DEVNULL,
    )
    ask = [
        *(
            str(programs_of_postgres / "psql"),
            "-X",
            "-At",
            f"host=127.0.0.1 port={port} user=ours dbname=postgres sslmode=require",
        ),
        *("-c", "select ssl from pg_stat_ssl where pid = pg_backend_pid()", "-c", "select 'GET / HTTP/1.1'"),
    ]

    def answers() -> bool:
        assert process.poll() is None
        return bench.tls.run(*ask, check=False).stdout == b"t\nGET / HTTP/1.1\n"

    before = bench.tap.tap.stats()
    bench.tls.wait_until(answers, what="postgres answers over TLS")
    bench.tls.wait_until(
        lambda: bench.tap.tap.stats()["undecoded"] >= before["undecoded"] + 2, what="connections that show no HTTP"
    )
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert bench.tap.flows == []


def test_connections_of_each_library_that_were_there_before_a_tap(bench: Bench, spawn: Any) -> None:
    """One that starts anew in the middle of them joins them, too."""
    names = {"gnutls": "libgnutls.so.30", "nss": "libnspr4.so"}
    clients = {
        kind: spawn(
            [sys.executable, "-c", programs.LIBCURL_CLIENT, library(f"libcurl-{kind}.so.4")],
            env=bench.tls.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in LIBCURLS
    }

    def ask(path: str) -> None:
        for client in clients.values():
            client.stdin.write(f"https://127.0.0.1:{bench.nginx.port}{path}\n")
            client.stdin.flush()
            assert client.stdout.readline() == "done\n"

    ask("/before")
    for number in range(2):
        with Tap(bench.tls) as tap:
            tap.wait_attached(bench.files)
            ask(f"/{number}")
            found = tap.wait_for("client", len(clients))
            assert {(one.process.pid, one.library and Path(one.library.path).name) for one in found} == {
                (client.pid, names[kind]) for kind, client in clients.items()
            }
            assert {(one.flow.path, one.flow.status, one.flow.is_complete) for one in found} == {
                (f"/{number}", 200, True)
            }
            assert {one.flow.peer and one.flow.peer.port for one in found} == {bench.nginx.port}
