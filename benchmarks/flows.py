"""What `sowatch http` costs an nginx, how much of what passes it sees, and that the rest is counted.

One nginx over HTTPS on loopback is asked with and without sowatch beside it, in turns: over kept-alive connections as
fast as it goes (wrk) and at 10,000 requests/s (h2load), with a connection for each request (ab), and over HTTP/2
(h2load). Only nginx's copies of the libraries are probed. What was sent is what nginx has logged. A peer that shows the
same bytes runs beside it in turns, too.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import TICKS_PER_S, Figure, main, median, quantile, spread, tool  # isort: skip - finds the next
from support.tls import Server, Tls

#: What the aim is: so many requests a second are all seen, at a cost of a fifth of the throughput at most.
RATE = 10_000
KEPT = 0.8
CLIENTS = 10
#: More than fit into the ring while nobody reads it.
FLOOD = 60_000
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
#: What a one-liner of bpftrace does that shows what passes: the first 200 bytes of each call.
PEER = """
uprobe:{lib}:SSL_read, uprobe:{lib}:SSL_write {{ @buffer[tid] = arg1; }}
uretprobe:{lib}:SSL_read, uretprobe:{lib}:SSL_write
/(int32)retval > 0/ {{ printf("%d %s\\n", pid, str(@buffer[tid], 200)); }}
"""


class Sample(NamedTuple):
    """One load: requests a second, the 99th percentile of their latency, and what nginx says and used."""

    rate: float
    p99_ms: float
    logged: int
    cpu_s: float


class Site:
    """The nginx, and the loads that it gets; each asks for a path of its own."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self._log = directory / "h2load.log"

    def url(self, path: str) -> str:
        return f"https://127.0.0.1:{self.server.port}/{path}"

    def logged(self) -> int:
        """Requests that nginx has answered; it is at rest once the figure is."""
        seen, now = -1, self.server.log.read_bytes().count(b"\n")
        while seen != now:
            time.sleep(0.1)
            seen, now = now, self.server.log.read_bytes().count(b"\n")
        return now

    def sample(self, load: Callable[[Site, float], tuple[float, float]], seconds: float) -> Sample:
        logged, cpu = self.logged(), sum(cpu_s(self.server.process.pid))
        rate, p99_ms = load(self, seconds)
        logged = self.logged() - logged
        return Sample(rate, p99_ms, logged, sum(cpu_s(self.server.process.pid)) - cpu)

    def kept_alive(self, seconds: float) -> tuple[float, float]:
        text = output("wrk", "-t1", "-c16", f"-d{seconds:g}s", "--latency", self.url("kept"))
        p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
        assert p99 is not None, text
        return number(r"Requests/sec:\s+([\d.]+)", text), float(p99[1]) * _UNITS[p99[2]]

    def at_rate(self, seconds: float) -> tuple[float, float]:
        return self._h2load("rate", seconds, "--h1", "-c", str(CLIENTS), "--rps", str(RATE // CLIENTS))

    def connections(self, seconds: float) -> tuple[float, float]:
        text = output("ab", "-q", "-c", "8", "-t", f"{max(1, seconds):.0f}", "-n", "9999999", self.url("each"))
        return number(r"Requests per second:\s+([\d.]+)", text), number(r"99%\s+(\d+)", text)

    def http2(self, seconds: float) -> tuple[float, float]:
        return self._h2load("two", seconds, "-c", "4", "-m", "10")

    def flood(self) -> None:
        """So many requests, each of which is answered."""
        output("h2load", "--h1", "-t1", "-c16", "-n", str(FLOOD), self.url("flood"))

    def _h2load(self, path: str, seconds: float, *options: str) -> tuple[float, float]:
        self._log.unlink(missing_ok=True)
        command = ["h2load", "-t1", *options, "-D", f"{seconds:g}", f"--log-file={self._log}", self.url(path)]
        text = output(*command)
        taken_us = [int(line.split()[2]) for line in self._log.read_text().splitlines()]
        return number(r"finished in [\d.]+m?s, ([\d.]+) req/s", text), quantile(taken_us, 0.99) / 1e3


LOADS: dict[str, tuple[str, Callable[[Site, float], tuple[float, float]]]] = {
    "kept alive": ("/kept", Site.kept_alive),
    f"kept alive, {RATE} a second asked for": ("/rate", Site.at_rate),
    "a connection each": ("/each", Site.connections),
    "HTTP/2": ("/two", Site.http2),
}


class Watched:
    """A running ``sowatch http --summary --json`` whose probes are attached."""

    def __init__(self, tls: Tls, site: Site) -> None:
        command = [sys.executable, "-m", "sowatch", "http", "--summary", "--json", f"^{re.escape(str(tls.libraries))}/"]
        self._errors = site.directory / "errors"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        places: list[tuple[int, ...]] = []
        # Linked one after the other: all are there once nothing has changed for a while.
        while len(places) < 4 or len(set(places[-4:])) > 1 or not all(places[-1]):
            time.sleep(0.4)
            assert self.process.poll() is None, "sowatch http ended"
            places.append(tuple(breakpoints(site.server.process.pid, name) for name in ("libssl", "libcrypto")))

    def cpu_s(self) -> tuple[float, float]:
        return cpu_s(self.process.pid)

    def rest(self) -> None:
        """Waits until what is in the ring is decoded."""
        before = -1.0
        while (now := sum(self.cpu_s())) > before + 0.02:
            before = now
            time.sleep(0.3)

    def end(self) -> tuple[dict[str, int], dict[str, int]]:
        """The flows of the server by path, and the counters."""
        self.process.send_signal(signal.SIGINT)
        text, _ = self.process.communicate(timeout=120)
        lines = [json.loads(line) for line in text.splitlines()]
        assert lines, f"sowatch http ended with {self.process.returncode}: {self._errors.read_text()}"
        flows: dict[str, int] = defaultdict(int)
        for line in lines[:-1]:
            flows[line["path"]] += line["flows"] - line["incomplete"]
        return flows, lines[-1]


def breakpoints(pid: int, name: str) -> int:
    """How many bytes of the code of a library differ in a process from those of the file: one for each probe."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, flags, offset, _, _, path = [*line.split(maxsplit=5), ""][:6]
        if "x" in flags and Path(path).name.startswith(name):
            start, end = (int(one, 16) for one in span.split("-"))
            with Path(path).open("rb") as file, Path(f"/proc/{pid}/mem").open("rb") as memory:
                file.seek(int(offset, 16))
                memory.seek(start)
                return sum(a != b for a, b in zip(file.read(end - start), memory.read(end - start), strict=False))
    return 0


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    if missing := [name for name in ("wrk", "ab", "h2load") if shutil.which(name) is None]:
        print(f"skipped: {', '.join(missing)} is missing. scripts/setup --for test installs it.", file=sys.stderr)
        return []
    seconds, rounds = (1.0, 1) if is_quick else (2.0, 5)
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in LOADS}
    peers: list[float] = []
    idle: list[float] = []
    with nginx(directory) as (tls, site):
        site.kept_alive(1)
        for one in range(rounds):
            print(f"\rround {one + 1} of {rounds}", end="", file=sys.stderr)
            plain = {name: site.sample(load, seconds) for name, (_, load) in LOADS.items()}
            beside = Watched(tls, site)
            idle_s, began = sum(beside.cpu_s()), time.monotonic()
            time.sleep(seconds)
            idle.append((sum(beside.cpu_s()) - idle_s) / (time.monotonic() - began) * 100)
            used, slowed = {}, {}
            for name, (_, load) in LOADS.items():
                before = beside.cpu_s()
                slowed[name] = site.sample(load, seconds)
                beside.rest()
                used[name] = [after - then for after, then in zip(beside.cpu_s(), before, strict=True)]
            flows, stats = beside.end()
            check(stats)
            for name, (path, _) in LOADS.items():
                note(taken[name], plain[name], slowed[name], used[name], flows[path])
            if (ratio := peer(site, tls, seconds, plain["kept alive"].rate)) is not None:
                peers.append(ratio)
        print(file=sys.stderr)
        figures = [figure for name in LOADS for figure in figures_of(name, taken[name])]
        figures.append(Figure("CPU of sowatch http while nginx is asked nothing", median(idle), "%", spread(idle)))
        if peers:
            what = "kept alive: throughput with bpftrace that prints each call, to without"
            figures.append(Figure(what, median(peers), "x", spread(peers)))
        return figures + overload(site, tls) + programs(site, tls)


def check(stats: dict[str, int]) -> None:
    """Each call that moved bytes is somewhere."""
    parts = [stats[name] for name in ("calls", "lost", "spared", "no_room")]
    assert stats["passed"] == sum(parts), f"{stats['passed']} calls passed, but {sum(parts)} are counted: {stats}"


def note(into: dict[str, list[float]], plain: Sample, slowed: Sample, used: list[float], flows: int) -> None:
    into["rate"].append(plain.rate)
    into["throughput"].append(slowed.rate / plain.rate)
    into["p99"].append(slowed.p99_ms / plain.p99_ms)
    into["seen"].append(flows / slowed.logged)
    into["nginx"].append((slowed.cpu_s / slowed.logged - plain.cpu_s / plain.logged) * 1e6)
    into["user"].append(used[0] / slowed.logged * 1e6)
    into["kernel"].append(used[1] / slowed.logged * 1e6)


def figures_of(name: str, taken: dict[str, list[float]]) -> list[Figure]:
    def figure(what: str, key: str, unit: str, least: float | None = None) -> Figure:
        value = median(taken[key])
        shown = f"{name}: {what}" + ("" if least is None else f" (aim: at least {least:g})")
        return Figure(shown, value, unit, spread(taken[key]), met=None if least is None else value >= least)

    is_aim = str(RATE) in name
    return [
        figure("requests/s without", "rate", "/s"),
        figure("throughput with, to without", "throughput", "x", KEPT),
        figure("p99 with, to without", "p99", "x"),
        figure("share of the requests seen whole", "seen", "x", 0.9999 if is_aim else None),
        figure("added to nginx, CPU a request", "nginx", "µs"),
        figure("sowatch, CPU a request, user", "user", "µs"),
        figure("... kernel", "kernel", "µs"),
    ]


def overload(site: Site, tls: Tls) -> list[Figure]:
    """While sowatch is stopped, more passes than the ring holds: what it has not seen is in a counter, exactly."""
    beside = Watched(tls, site)
    beside.process.send_signal(signal.SIGSTOP)
    before = site.logged()
    try:
        site.flood()
    finally:
        beside.process.send_signal(signal.SIGCONT)
    sent = site.logged() - before
    beside.rest()
    _, stats = beside.end()
    check(stats)
    # A request is one call that reads and one that writes.
    assert sent == FLOOD, f"{sent} of {FLOOD} requests were answered"
    assert stats["passed"] == 2 * sent, f"{stats['passed']} calls passed of {sent} requests"
    assert stats["lost"], "nothing was lost, so this was no overload"
    return [
        Figure("overload: calls that passed", stats["passed"], ""),
        Figure("... taken over", stats["calls"], ""),
        Figure("... lost, and counted", stats["lost"], ""),
        Figure("... in no counter", 2 * sent - stats["calls"] - stats["lost"], "", aim=0),
    ]


def programs(site: Site, tls: Tls) -> list[Figure]:
    """What the kernel (bpf_stats) says of each program: runs of a request, and what a run takes."""
    if shutil.which("bpftool") is None:
        return []
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    beside = Watched(tls, site)
    switch.write_text("1")
    try:
        since, logged = runs(beside.process.pid), site.logged()
        site.kept_alive(1)
        logged, after = site.logged() - logged, runs(beside.process.pid)
    finally:
        switch.write_text(before)
        beside.end()
    figures, total = [], 0.0
    for identity, (name, *now) in sorted(after.items(), key=lambda one: one[1][0]):
        time_ns, count = (new - old for new, old in zip(now, since.get(identity, ("", 0, 0))[1:], strict=True))
        if count < logged / 10:
            continue
        total += time_ns / logged
        what = f"program {name}: {count / logged:.2g} runs a request, each"
        figures.append(Figure(what, time_ns / count, "ns"))
    return [*figures, Figure("the programs themselves, a request", total, "ns")]


def runs(pid: int) -> dict[int, tuple[str, int, int]]:
    """Of each program of the tap of a process its name, the time in ns and the number of its runs, by its id."""
    listed = subprocess.run([tool("bpftool"), "--json", "prog", "show"], capture_output=True, check=True).stdout
    return {
        one["id"]: (one.get("name", ""), one.get("run_time_ns", 0), one.get("run_cnt", 0))
        for one in json.loads(listed)
        if one.get("name", "").startswith("tls_") and pid in [holder["pid"] for holder in one.get("pids", ())]
    }


def peer(site: Site, tls: Tls, seconds: float, plain_rate: float) -> float | None:
    """Throughput with bpftrace beside it, to without; sslsniff of bpfcc needs headers of the running kernel."""
    if shutil.which("bpftrace") is None:
        return None
    program = PEER.format(lib=tls.libraries / "libssl.so.3")
    shown = site.directory / "bpftrace"
    with shown.open("wb") as into:
        process = subprocess.Popen([tool("bpftrace"), "-e", program], stdout=into, stderr=subprocess.DEVNULL)
    try:
        # It does not say when it has attached: what it shows does.
        for _ in range(20):
            output("ab", "-q", "-n", "10", site.url("peer"))
            time.sleep(0.5)
            if shown.read_bytes().count(b"GET /peer") > 1:
                return site.sample(Site.kept_alive, seconds).rate / plain_rate
        return None
    finally:
        process.terminate()
        process.wait()


def cpu_s(pid: int) -> tuple[float, float]:
    """CPU seconds of a process in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / TICKS_PER_S, int(fields[12]) / TICKS_PER_S


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def wait_until(predicate: Callable[[], Any], *, what: str = "") -> None:
    end = time.monotonic() + 30
    while not predicate():
        if time.monotonic() > end:
            raise SystemExit(f"{what or predicate} did not happen within 30 s")
        time.sleep(0.05)


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[tuple[Tls, Site]]:
    processes: list[subprocess.Popen[bytes]] = []

    def spawn(command: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    try:
        tls = Tls(directory, spawn, wait_until)
        yield tls, Site(tls.nginx(), directory)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main("flows", measure)
