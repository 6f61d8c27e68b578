"""What `sowatch http` costs an nginx, and how much of what passes it sees.

wrk asks one nginx over HTTPS, with and without sowatch beside it, in turns: kept-alive connections, and one connection
for each request. Only nginx's copy of libssl is probed. Requests that were answered are counted by wrk.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import TICKS_PER_S, Figure, main, median, spread, tool  # isort: skip - it makes the next found
from support.tls import Server, Tls

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def wait_until(predicate: Callable[[], Any], *, what: str = "") -> None:
    end = time.monotonic() + 30
    while not predicate():
        if time.monotonic() > end:
            raise SystemExit(f"{what or predicate} did not happen within 30 s")
        time.sleep(0.05)


def load(server: Server, seconds: float, *, is_closing: bool) -> tuple[int, float, float]:
    """Requests that were answered, their rate, and the 99th percentile of their latency in ms."""
    command = [tool("wrk"), "-t1", "-c16", f"-d{seconds:g}s", "--latency", f"https://127.0.0.1:{server.port}/x"]
    if is_closing:
        command[1:1] = ["-H", "Connection: close"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    requests, rate = re.search(r"(\d+) requests in", text), re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found is not None
    assert requests is not None
    assert rate is not None
    return int(requests[1]), float(rate[1]), float(found[1]) * _UNITS[found[2]]


class Watched:
    """A running ``sowatch http --summary --json``."""

    def __init__(self, tls: Tls) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sowatch",
                "http",
                "--summary",
                "--json",
                "--top",
                "5",
                f"^{re.escape(str(tls.libraries))}/",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def end(self) -> tuple[int, dict[str, int]]:
        """The flows of the server, and the counters."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=120)
        lines = [json.loads(line) for line in output.splitlines()]
        return sum(line["flows"] for line in lines if line["event"] == "http_endpoint"), lines[-1]


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    tool("wrk")
    seconds, rounds = (1.0, 1) if is_quick else (5.0, 5)
    figures = []
    with nginx(directory) as (tls, server):
        load(server, 1, is_closing=False)
        for what, is_closing in (("kept alive", False), ("a connection each", True)):
            plain, watched, p99, seen, cpu, unlost = [], [], [], [], [], []
            for _ in range(rounds):
                _, rate, plain_p99 = load(server, seconds, is_closing=is_closing)
                beside = Watched(tls)
                time.sleep(3)  # the probes are there
                before = beside.cpu_s()
                answered, slowed, slow_p99 = load(server, seconds, is_closing=is_closing)
                time.sleep(1)  # what is in the ring is decoded
                cpu.append((beside.cpu_s() - before) / (answered / 1000))
                flows, stats = beside.end()
                plain.append(rate)
                watched.append(slowed / rate)
                p99.append(slow_p99 / plain_p99)
                seen.append(flows / answered)
                unlost.append((flows + stats["lost"] / 2) / answered)
            figures += [
                Figure(f"{what}: requests/s without", median(plain), "/s", spread(plain)),
                Figure(
                    f"{what}: throughput with, to without",
                    median(watched),
                    "x",
                    spread(watched),
                    0.8,
                    median(watched) >= 0.8,
                ),
                Figure(f"{what}: p99 with, to without", median(p99), "x", spread(p99)),
                Figure(f"{what}: requests seen", median(seen), "x", spread(seen)),
                Figure(f"{what}: seen, and half the calls lost", median(unlost), "x", spread(unlost)),
                Figure(f"{what}: CPU of sowatch for 1,000 requests", median(cpu), "s", spread(cpu)),
            ]
    return figures


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[tuple[Tls, Server]]:
    processes: list[subprocess.Popen[bytes]] = []

    def spawn(command: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    try:
        tls = Tls(directory, spawn, wait_until)
        server = tls.nginx()
        yield tls, server
    finally:
        for process in processes:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main("flows", measure)
