"""`Bench`: TLS libraries of every kind, a tap on them, and servers that use them; for the tests of flows."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from sowatch.http.taps import HttpFlow
from support import https_programs as programs
from support.tls import LIBRARIES, Server, Tap, Tls, find, free_port, library

__all__ = ["PYTHON_SERVERS", "Bench"]

PYTHON_SERVERS = (
    programs.AIOHTTP_SERVER,
    programs.HYPERCORN_SERVER,
    programs.UVICORN_SERVER,
    programs.GRPC_SERVER,
    programs.WEBSOCKET_SERVER,
    programs.CONNECT_PROXY,
)


class Bench:
    """Libraries, the tap on them, and servers that are started once they are asked for; of the whole module."""

    def __init__(self, tls: Tls) -> None:
        self.tls = tls
        self.nss = tls.add(library("libnss3.so"))
        self.nspr = tls.add(library("libnspr4.so"))
        self.boring = tls.add(library("android/libssl.so.0"))
        tls.add(library("android/libcrypto.so.0"))
        (self.wheel, crypto) = sorted(map(tls.add, _wheel("psycopg2-binary", r"lib(?:ssl|crypto)-.*")), reverse=True)
        assert self.wheel.name.startswith("libssl-"), crypto
        self.files = LIBRARIES + 6
        tls.hold(self.nss, self.nspr, self.boring, self.wheel)
        # All of them now: what a test starts has to end with it.
        self.nginx, self.gnutls, self.nss_server = tls.nginx(early_data=True), self._gnutls(), self._nss()
        self.nghttpx, self.redis = self._nghttpx(), self._redis()
        self.python = {program: tls.python(program) for program in PYTHON_SERVERS}
        self.tap = Tap(tls)

    def _nghttpx(self) -> Server:
        """A proxy between TLS and TLS."""
        port, log = free_port(), self.tls.place / "nghttpx.log"
        command = [
            *(find("nghttpx"), "--conf=/dev/null", f"-f127.0.0.1,{port}", f"-b127.0.0.1,{self.nginx.port};;tls"),
            *("--insecure", "--host-rewrite", "--workers=1", "--single-process", f"--accesslog-file={log}"),
            *("--accesslog-format=$method $path $status - $body_bytes_sent", "--errorlog-file=/dev/null"),
            *(str(self.tls.key), str(self.tls.certificate)),
        ]
        return self.tls.serve(command, port, log, stderr=subprocess.DEVNULL)

    def _gnutls(self) -> Server:
        """Has no log."""
        port = free_port()
        command = [
            *(find("gnutls-serv"), "--http", "--quiet", f"--port={port}", "--disable-client-cert", "--earlydata"),
            *("--maxearlydata=16384", f"--x509keyfile={self.tls.key}", f"--x509certfile={self.tls.certificate}"),
        ]
        output = subprocess.DEVNULL
        return self.tls.serve(command, port, Path("/dev/null"), stdin=subprocess.PIPE, stdout=output, stderr=output)

    def _redis(self) -> Server:
        port = free_port()
        command = [
            *(find("redis-server"), "--port", "0", "--bind", "127.0.0.1", "--tls-port", str(port), "--save", ""),
            *("--tls-cert-file", str(self.tls.certificate), "--tls-key-file", str(self.tls.key)),
            *("--tls-auth-clients", "no", "--dir", str(self.tls.place)),
        ]
        return self.tls.serve(command, port, Path("/dev/null"), stdout=subprocess.DEVNULL)

    def _nss(self) -> Server:
        """NSS's own, without a log."""
        port, database = free_port(), self.tls.place / "nss"
        database.mkdir()
        bundle = self.tls.place / "key.p12"
        for command in (
            [find("certutil"), "-N", "-d", f"sql:{database}", "--empty-password"],
            [
                *(find("openssl"), "pkcs12", "-export", "-out", str(bundle), "-name", "ours", "-passout", "pass:"),
                *("-in", str(self.tls.certificate), "-inkey", str(self.tls.key)),
            ],
            [find("pk12util"), "-i", str(bundle), "-d", f"sql:{database}", "-W", ""],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        command = [find("selfserv"), "-d", f"sql:{database}", "-n", "ours", "-p", str(port), "-w", "", "-V", "tls1.2:"]
        output = subprocess.DEVNULL
        return self.tls.serve(command, port, Path("/dev/null"), stdout=output, stderr=output)

    def run(self, *command: str) -> subprocess.CompletedProcess[bytes]:
        return self.tls.run(*command)

    def ask(self, program: str, *words: str) -> None:
        """Runs a client in Python."""
        self.run(sys.executable, "-c", program, *words)

    def curl(self, *words: str) -> bytes:
        command = [find("curl"), "-sS", "--cacert", str(self.tls.certificate), *words]
        return bytes(self.run(*command).stdout)

    def flows(self, side: str, server: Server, number: int) -> list[HttpFlow]:
        """Waits for so many flows that this server is asked for; every one is right about both ends."""

        def found() -> list[HttpFlow]:
            name = f"127.0.0.1:{server.port}"
            return [one for one in self.tap.of(side) if one.flow.authority == name]

        self.tls.wait_until(lambda: len(found()) >= number, what=f"{number} flows of the {side}")
        for one in found():
            assert one.flow.is_complete, one
            assert one.flow.peer is not None
            assert (one.flow.peer.port if side == "client" else one.flow.local_port) == server.port
            assert one.flow.peer.address == "127.0.0.1"
            if side == "server":
                assert one.process.pid == server.process.pid
        return found()


def _wheel(name: str, pattern: str) -> list[Path]:
    """Files of an installed wheel."""
    return [Path(str(one.locate())) for one in metadata.files(name) or () if re.fullmatch(pattern, one.name)]
