"""HTTPS clients and servers of the test's own, on copies of TLS libraries in the test's own directory."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from sowatch.http.taps import HttpFlow, HttpTap

__all__ = ["WAYS_TO_PEERS", "Server", "Tap", "Tls", "find"]

#: The first way is the kernel's from 6.3 on, by a tracepoint; the second serves older ones, and works on all.
WAYS_TO_PEERS = ["descriptors"]
if " __traceiter_sock_send_length" in Path("/proc/kallsyms").read_text(encoding="ascii"):
    WAYS_TO_PEERS.append("sockets")

#: By family the sonames whose copies a process loads by LD_LIBRARY_PATH.
FAMILIES = {"openssl": ("libssl.so.3", "libcrypto.so.3"), "gnutls": ("libgnutls.so.30",)}

LIBRARIES = sum(len(sonames) for sonames in FAMILIES.values())

PYTHON_SERVER = """
import http.server, ssl, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        body = b"x" * int(self.path.rpartition("size=")[2] or 10) if "size=" in self.path else b"0123456789"
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer
    def log_message(self, form, *args):
        sys.stdout.write(f"{self.command} {self.path} {args[1] if len(args) > 1 else 0}\\n")
        sys.stdout.flush()
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[2:4])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""

#: Ends the program of a server whose connections `serve(reader, writer)` takes.
SERVE_BY_ASYNCIO = """
async def main():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[2:4])
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]), ssl=context) as server:
        await server.serve_forever()
asyncio.run(main())
"""

ASYNCIO_SERVER = """
import asyncio, ssl, sys
async def serve(reader, writer):
    try:
        while head := await reader.readuntil(b"\\r\\n\\r\\n"):
            line = head.partition(b"\\r\\n")[0].decode()
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 10\\r\\n\\r\\n0123456789")
            await writer.drain()
            print(" ".join(line.split()[:2]), 200, flush=True)
    except asyncio.IncompleteReadError:
        writer.close()
"""
ASYNCIO_SERVER += SERVE_BY_ASYNCIO

KEEP_ALIVE_CLIENT = """
import http.client, ssl, sys
client = http.client.HTTPSConnection("127.0.0.1", int(sys.argv[1]), context=ssl.create_default_context())
for line in sys.stdin:
    client.request("GET", line.strip()); client.getresponse().read(); print("done", flush=True)
"""

NGINX = """
daemon off; master_process {master}; {workers} error_log {place}/error.log info; pid {place}/nginx.pid;
events {{ worker_connections 256; }}
http {{
  log_format short '$request_method $request_uri $status $content_length $body_bytes_sent';
  access_log {place}/access.log short; keepalive_requests 1000000000;
  client_body_temp_path {place}/b; proxy_temp_path {place}/p; fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u;
  scgi_temp_path {place}/s;
  server {{
    listen 127.0.0.1:{port} ssl http2;
    ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3; ssl_early_data {early_data};
    root {place}/files;
    location /missing {{ return 404; }}
    location / {{ return 200 "0123456789"; }}
    location /big {{ try_files /big =404; }}
  }}
}}
"""


APACHE = """
ServerRoot {place}
PidFile {place}/apache.pid
Listen 127.0.0.1:{port}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule ssl_module {modules}/mod_ssl.so
LoadModule http2_module {modules}/mod_http2.so
Mutex file:{place} default
ErrorLog {place}/apache-error.log
LogFormat "%m %U%q %>s" short
CustomLog {place}/apache.log short
ServerName localhost
User daemon
Group daemon
DocumentRoot {place}/files
Protocols h2 http/1.1
SSLEngine on
SSLCertificateFile {certificate}
SSLCertificateKeyFile {key}
StartServers 1
ServerLimit 1
"""

NODE_SERVER = """
const https = require("https"), fs = require("fs"), [, port, cert, key] = process.argv;
https.createServer({cert: fs.readFileSync(cert), key: fs.readFileSync(key)}, (request, response) => {
  response.setHeader("Content-Length", 10);
  response.end("0123456789");
  console.log(`${request.method} ${request.url} 200`);
}).listen(Number(port), "127.0.0.1");
"""

NODE_CLIENT = """
const https = require("https"), fs = require("fs"), [, ca, ...urls] = process.argv;
const agent = new https.Agent({keepAlive: true, maxSockets: 1, ca: fs.readFileSync(ca)});
function next() {
  const url = urls.shift();
  if (!url) return agent.destroy();
  https.get(url, {agent}, (response) => { response.resume(); response.on("end", next); });
}
next();
"""


def find(program: str) -> str:
    """Where a program is; administrators' programs are not on everybody's PATH."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found is not None, f"{program} is not installed; scripts/setup --for test installs it"
    return found


def library(soname: str) -> Path:
    """The system's library of this name, to be copied."""
    for directory in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"):
        if (path := Path(directory, soname)).exists():
            return path.resolve()
    raise AssertionError(f"{soname} is not installed")


class Server:
    """A server that runs, and the log of what it answered."""

    def __init__(self, process: Any, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    def answered(self) -> list[tuple[str, str, int]]:
        """Method, target and status of each request, from the server's own log."""
        return [row[:3] for row in self.rows()]

    def rows(self) -> list[tuple[str, str, int, int, int]]:
        """The same with the sizes of both bodies, where the server logs them."""
        form = re.compile(r"(\S+) (\S+) (\d+)(?: (\d+|-) (\d+))?")
        found = (form.fullmatch(line) for line in self.log.read_text().splitlines())
        return [
            (row[1], row[2], int(row[3]), int((row[4] or "0").replace("-", "0")), int(row[5] or 0))
            for row in found
            if row
        ]


class Tls:
    """A directory with certificates and copies of libraries, and what is started with them.

    Args:
        place: an empty directory of the test.
        spawn: the fixture that ends what it started.
        wait_until: the fixture.
    """

    def __init__(self, place: Path, spawn: Any, wait_until: Any) -> None:
        self.place = place
        self.spawn = spawn
        self.wait_until = wait_until
        self.libraries = place / "lib"
        self.libraries.mkdir()
        for sonames in FAMILIES.values():
            for soname in sonames:
                shutil.copyfile(library(soname), self.libraries / soname)
        self.certificate, self.key = place / "cert.pem", place / "key.pem"
        subprocess.run(
            [
                *(
                    find("openssl"),
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=localhost",
                ),
                *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
                *("-keyout", str(self.key), "-out", str(self.certificate)),
            ],
            check=True,
            capture_output=True,
        )
        self.environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.libraries),
            "SSL_CERT_FILE": str(self.certificate),
        }

    def add(self, path: Path) -> Path:
        """Copies another library to the others."""
        return Path(shutil.copyfile(path, self.libraries / path.name))

    def hold(self, *more: Path) -> int:
        """Keeps every library mapped, and more of them, so that it is attached before a short process has it.

        Gives the pid of who does, and never calls them.
        """
        program = "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path)\nprint(flush=True)\nsys.stdin.read()"
        paths = [*(str(self.libraries / sonames[0]) for sonames in FAMILIES.values()), *map(str, more)]
        process = self.spawn(
            [sys.executable, "-c", program, *paths], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        return int(process.pid)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Runs a client to its end."""
        return subprocess.run(command, env=self.environment, check=check, capture_output=True, timeout=60)

    def serve(self, command: Sequence[str], port: int, log: Path, **options: Any) -> Server:
        """Starts a server, and waits until it listens."""
        process = self.spawn(command, env=self.environment, **options)

        def listens() -> bool:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        self.wait_until(listens, what=f"{command[0]} listening")
        return Server(process, port, log)

    def keep_alive(self, server: Server) -> tuple[Any, Callable[[str], None]]:
        """A client that keeps one connection to a server, and what makes it ask for a path; it ends with its input."""
        client = self.spawn(
            [sys.executable, "-c", KEEP_ALIVE_CLIENT, str(server.port)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def ask(path: str) -> None:
            client.stdin.write(path + "\n")
            client.stdin.flush()
            assert client.stdout.readline() == "done\n"

        return client, ask

    def python(self, program: str = PYTHON_SERVER, *words: str) -> Server:
        """A server of the standard library, HTTP/1.1, or another one; it gets the words behind its key."""
        port = free_port()
        log = self.place / f"python-{port}.log"
        with log.open("wb") as output:
            return self.serve(
                [sys.executable, "-c", program, str(port), str(self.certificate), str(self.key), *words],
                port,
                log,
                stdout=output,
                stderr=subprocess.DEVNULL,
            )

    def nginx(self, *, workers: int = 1, early_data: bool = False) -> Server:
        """Nginx with HTTP/1.1 and HTTP/2."""
        port = free_port()
        config = self.place / "nginx.conf"
        config.write_text(
            NGINX.format(
                master="on" if workers > 1 else "off",
                early_data="on" if early_data else "off",
                workers=f"worker_processes {workers}; user root;",
                place=self.place,
                port=port,
                certificate=self.certificate,
                key=self.key,
            )
        )
        (self.place / "files").mkdir(exist_ok=True)
        (self.place / "files" / "big").write_bytes(b"b" * 3_000_000)
        return self.serve(
            [find("nginx"), "-c", str(config), "-p", str(self.place)],
            port,
            self.place / "access.log",
            stderr=subprocess.DEVNULL,
        )

    def apache(self) -> Server:
        """Apache with HTTP/1.1 and HTTP/2."""
        port = free_port()
        config = self.place / "apache.conf"
        modules = "/usr/lib/apache2/modules"
        (self.place / "files").mkdir(exist_ok=True)
        for name in ("one", "two", "four"):
            (self.place / "files" / name).write_text("0123456789")
        config.write_text(
            APACHE.format(place=self.place, port=port, modules=modules, certificate=self.certificate, key=self.key)
        )
        command = [find("apache2"), "-X", "-f", str(config)]
        return self.serve(command, port, self.place / "apache.log", stderr=subprocess.DEVNULL)

    def node_binary(self) -> Path:
        """A copy of node, which has OpenSSL within and exports it."""
        copy = self.libraries / "node"
        if not copy.exists():
            shutil.copyfile(os.path.realpath(find("node")), copy)
            copy.chmod(0o755)
        return copy

    def hold_node(self) -> int:
        """Keeps node running, so that it is attached before a short one runs; gives how many files that makes."""
        self.spawn([str(self.node_binary()), "-e", "setInterval(() => 0, 1000)"], env=self.environment)
        linked = subprocess.run(["ldd", self.node_binary()], capture_output=True, text=True, check=True).stdout
        # Distributions link theirs with the system's library; others have one within.
        return LIBRARIES + ("libssl" not in linked)

    def node(self) -> Server:
        """An HTTP/1.1 server in node."""
        port, log = free_port(), self.place / "node.log"
        command = [str(self.node_binary()), "-e", NODE_SERVER, str(port), str(self.certificate), str(self.key)]
        with log.open("wb") as output:
            return self.serve(command, port, log, stdout=output)


class Tap:
    """An `HttpTap` on the copies only, and the flows that it reported; a context manager."""

    def __init__(self, tls: Tls, place: Path | None = None, **options: Any) -> None:
        self.tls = tls
        self.flows: list[HttpFlow] = []
        pattern = f"^{re.escape(str(place or tls.libraries))}/"
        self.tap = HttpTap(self._take, pattern=pattern, keeps_query=True, **options)
        #: A path whose flow holds up the thread of the tap, when that is the case, and until when.
        self.held_by: str | None = None
        self.is_held, self.goes_on = threading.Event(), threading.Event()

    def _take(self, found: HttpFlow) -> None:
        self.flows.append(found)
        if found.flow.path is not None and found.flow.path == self.held_by:
            self.is_held.set()
            self.goes_on.wait(60)

    def __enter__(self) -> Self:
        self.tap.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.tap.close()

    def wait_attached(self, files: int = LIBRARIES) -> None:
        """Waits until so many libraries are attached, with every probe that is expected there."""

        def is_attached() -> bool:
            stats = self.tap.attached
            return stats.files >= files and stats.attached == stats.expected

        self.tls.wait_until(is_attached, what=f"{files} libraries attached")

    def of(self, side: str, port: int | None = None) -> list[HttpFlow]:
        """The flows of one side, and of one server."""
        found = [one for one in self.flows if one.flow.side == side]
        if port is None:
            return found
        return [one for one in found if port in (one.flow.local_port, one.flow.peer and one.flow.peer.port)]

    def wait_for(self, side: str, number: int) -> list[HttpFlow]:
        """Waits until so many flows of one side are there."""
        self.tls.wait_until(lambda: len(self.of(side)) >= number, what=f"{number} flows of the {side}")
        return self.of(side)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
