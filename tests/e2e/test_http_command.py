"""sowatch http as it is typed: lines, the session of the page, and the summary."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.printed import printed, rest_of
from support.tls import Server, Tls, find, free_port

PATHS = ("/one", "/two?q=1", "/missing", "/four")


@pytest.fixture
def tls(tmp_path: Path, spawn: Any, wait_until: Any) -> Tls:
    made = Tls(tmp_path, spawn, wait_until)
    made.hold()
    return made


def urls(server: Server) -> list[str]:
    return [f"https://127.0.0.1:{server.port}{path}" for path in PATHS]


def curl(tls: Tls, server: Server, *options: str) -> None:
    tls.run(find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(tls.certificate), *options, *urls(server))


NAMED = ("--header", "User-Agent", "--header", "server", "--header", "x-request-id")


def test_the_command_as_it_is_typed(tls: Tls) -> None:
    server = tls.nginx()
    command = tls.spawn(
        [
            sys.executable,
            "-m",
            "sowatch",
            "http",
            "--json",
            "--pid",
            str(server.process.pid),
            *NAMED,
            f"^{tls.libraries}/",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def first() -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(command.stdout, selectors.EVENT_READ)
            while not selector.select(0.3):
                curl(tls, server, "--http1.1")
        return printed(command.stdout.readline())

    line = first()
    assert line["event"] == "http"
    assert (line["side"], line["protocol"], line["scheme"]) == ("server", "HTTP/1.1", "https")
    assert line["path"] in {path.partition("?")[0] for path in PATHS}
    assert line["process"]["pid"] == server.process.pid
    assert line["request_headers"]["user-agent"].startswith("curl/")
    assert line["response_headers"]["server"].startswith("nginx/")
    assert {*line["request_headers"], *line["response_headers"]} == {"user-agent", "server"}
    assert line["peer"]["address"] == "127.0.0.1"
    command.send_signal(signal.SIGINT)
    rest = rest_of(command, 30)
    assert (command.returncode, command.stderr.read()) == (0, "")
    lines = [printed(one) for one in rest.splitlines()]
    assert lines[-1]["event"] == "http_stats"
    assert {one["side"] for one in lines[:-1]} <= {"server"}
    assert not any("?" in one["path"] for one in lines[:-1])


def test_the_session_of_the_page_as_it_is_typed(tmp_path: Path, spawn: Any, wait_until: Any) -> None:
    """From an empty environment, in each shell of the machine; the directory and the port are the test's."""
    place, port = tmp_path / "shop", free_port()
    root = Path(__file__).resolve().parents[2]
    session = (root / "docs" / "http.md").read_text(encoding="utf-8").partition("## Try it\n")[2].partition("\n## ")[0]
    typed = [line[2:] for line in session.splitlines() if line.startswith("$ ")]
    (pattern,) = re.findall(r"sowatch http '(.*)'", typed[0])
    shown = re.findall(r"^[0-9:]+ (server|client) +\S+ +(\d+) +\S+ (\S+) +(\S+)", session, flags=re.MULTILINE)
    assert len(shown) == 8

    def moved(text: str) -> str:
        return text.replace("/tmp/shop", str(place)).replace("8443", str(port))

    shop = spawn([root / "scripts" / "shop", place, str(port)], stdout=subprocess.PIPE, text=True)
    assert "Ctrl-C ends it" in shop.stdout.readline()

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(is_open, what="the shop is open")
    watched = [sys.executable, "-m", "sowatch", "http", moved(pattern)]
    command = spawn(watched, stdout=subprocess.PIPE, bufsize=0)  # what is read is no more than is shown
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    for shell in filter(shutil.which, ("dash", "bash", "zsh")):
        lines: list[str] = []
        while len(lines) < len(shown):  # until the library is attached
            script = moved("\n".join(typed[1:]))
            done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, check=False, timeout=60)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            lines = flow_lines(command, len(shown))
        found = re.findall(
            r"^[0-9:]+ (server|client) +\S+ +(\d+) +\S+ (\S+) +(\S+)", "".join(lines), flags=re.MULTILINE
        )
        assert Counter(found) == Counter((*one[:3], moved(one[3])) for one in shown), shell
    shop.send_signal(signal.SIGTERM)
    assert shop.wait(timeout=20) == 0
    assert not place.exists()


def flow_lines(command: Any, number: int) -> list[str]:
    """Up to so many lines of a command, as long as they come."""
    found: list[str] = []
    with selectors.DefaultSelector() as selector:
        selector.register(command.stdout, selectors.EVENT_READ)
        while len(found) < number and selector.select(3):
            found.append(command.stdout.readline().decode())
    return found


def test_a_summary_for_people(tls: Tls) -> None:
    server = tls.nginx()
    command = tls.spawn(
        [
            sys.executable,
            "-m",
            "sowatch",
            "http",
            "--summary",
            "--side",
            "server",
            "--duration",
            "4",
            f"^{tls.libraries}/",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while command.poll() is None:
        curl(tls, server, "--http2")
    output, errors = command.communicate(timeout=30)
    assert command.returncode == 0, errors
    head, *rows = output.splitlines()
    assert head.split() == ["FLOWS", "STATUS", "P50", "P95", "P99", "SIDE", "METHOD", "ENDPOINT"]
    endpoints = {row.split()[-1]: row.split() for row in rows}
    # What passed of the connection that the probes came into: a response without its request, and fields by index.
    joined = {one for one in endpoints if one == "?" or one.startswith("<unknown>")}
    for one in joined:
        del endpoints[one]
    assert not joined or "joined late" in errors
    assert set(endpoints) == {f"127.0.0.1:{server.port}{path}" for path in ("/one", "/two", "/missing", "/four")}
    assert endpoints[f"127.0.0.1:{server.port}/missing"][1] == "4xx"
    assert "flows" in errors
