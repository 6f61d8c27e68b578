"""What the agent takes of a node's memory and CPU, as the kernel charges it to a pod: with the maps of its programs.

``python -m benchmarks.pod [--quick]``: `sowatch serve` with the chart's defaults (every shared library of every
process) in a memory cgroup with the chart's limit; first with 500 processes of ten libraries each beside it, then
while the mixed workload of `benchmarks.soak` runs, too. The limit holds the process, its page cache and what the kernel
keeps for it: maps, descriptors, page tables. Root only, and a hierarchy of version 1 or 2 with the memory controller;
so it is not among what ``benchmarks/run`` runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.common import TICKS_PER_S, Figure, crowd, main
from benchmarks.soak import work

from support import workload
from support.agent import UnixConnection, ask
from support.programs import make_libraries

LIMIT_MB = 512
MIB = 1 << 20


class Group:
    """A memory cgroup of its own."""

    def __init__(self) -> None:
        roots = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
        root = next(one for one in roots if (one / "memory.limit_in_bytes").exists() or "memory" in controllers(one))
        self.at = root / f"sowatch-pod-{os.getpid()}"
        self.at.mkdir()
        self.is_v1 = (self.at / "memory.limit_in_bytes").exists()
        name = "memory.limit_in_bytes" if self.is_v1 else "memory.max"
        (self.at / name).write_text(str(LIMIT_MB * MIB), encoding="ascii")

    def add(self, pid: int) -> None:
        (self.at / "cgroup.procs").write_text(str(pid), encoding="ascii")

    @property
    def peak_mb(self) -> float:
        name = "memory.max_usage_in_bytes" if self.is_v1 else "memory.peak"
        return int((self.at / name).read_text(encoding="ascii")) / MIB

    @property
    def now_mb(self) -> float:
        name = "memory.usage_in_bytes" if self.is_v1 else "memory.current"
        return int((self.at / name).read_text(encoding="ascii")) / MIB


def controllers(root: Path) -> list[str]:
    path = root / "cgroup.subtree_control"
    return path.read_text(encoding="ascii").split() if path.exists() else []


class Served:
    """The agent, begun inside the cgroup."""

    def __init__(self, directory: Path, group: Group) -> None:
        self.socket = directory / "s.sock"
        held = f"import os; os.read(0, 1); os.execv({sys.executable!r}, {self._words()!r})"
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=log, stderr=log)
        group.add(self.process.pid)
        assert self.process.stdin is not None
        self.process.stdin.write(b".")
        self.process.stdin.close()
        while not self.is_ready():
            assert self.process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)

    def _words(self) -> list[str]:
        return [sys.executable, "-m", "sowatch", "serve", "--socket", os.fspath(self.socket)]

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, str]:
        answer = ask(UnixConnection(self.socket, 60), "GET", path, None, {})
        return answer.status, answer.text

    def metric(self, name: str) -> float:
        (found,) = re.findall(rf"^{name} (\S+)", self.get("/metrics")[1], re.MULTILINE)
        return float(found)

    def cpu_s(self) -> float:
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICKS_PER_S

    def resident_mb(self) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        (found,) = re.findall(r"^VmRSS:\s*(\d+)", text, re.MULTILINE)
        return int(found) / 1024


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    seconds = 5.0 if is_quick else 120.0
    workload.prepare(directory)
    libraries = make_libraries(directory, 10, prefix="crowd")
    group = Group()
    try:
        with crowd(directory, 50 if is_quick else 500, libraries):
            served = Served(directory, group)
            try:
                return figures(served, group, directory, seconds)
            finally:
                served.process.terminate()
                served.process.wait()
    finally:
        group.at.rmdir()


def figures(served: Served, group: Group, directory: Path, seconds: float) -> list[Figure]:
    found = [
        Figure("maps of the BPF programs", served.metric("sowatch_bpf_map_bytes") / MIB, "MiB"),
        Figure("mappings known at the start", served.metric("sowatch_watcher_mappings"), ""),
    ]
    before_s, begun_s = served.cpu_s(), time.monotonic()
    time.sleep(seconds / 4)
    idle = (served.cpu_s() - before_s) / (time.monotonic() - begun_s)
    found += [
        Figure("resident, without changes", served.resident_mb(), "MiB"),
        Figure("charged to the cgroup, without changes", group.now_mb, "MiB"),
        Figure("CPU without changes of ours", 1000 * idle, "m"),
    ]
    is_over = threading.Event()
    runs: list[int] = []
    worker = threading.Thread(target=work, args=(directory, is_over, runs))
    before_s, begun_s, events = served.cpu_s(), time.monotonic(), served.metric("sowatch_watcher_events_total")
    worker.start()
    time.sleep(seconds)
    is_over.set()
    worker.join()
    busy_s, spent_s = served.cpu_s() - before_s, time.monotonic() - begun_s
    events = served.metric("sowatch_watcher_events_total") - events
    return [
        *found,
        Figure("events of the workload", events, ""),
        Figure("CPU in the workload", 1000 * busy_s / spent_s, "m"),
        Figure("CPU time for 1,000 events", 1000 * 1000 * busy_s / max(events, 1), "ms"),
        Figure("resident, after the workload", served.resident_mb(), "MiB"),
        Figure("charged to the cgroup at the most", group.peak_mb, "MiB", aim=LIMIT_MB),
    ]


if __name__ == "__main__":
    main("pod", measure)
