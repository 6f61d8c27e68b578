"""What the benchmarks share: building programs, running sowatch beside them, tables and JSON.

Each benchmark is a command, ``python -m benchmarks.NAME [--quick]`` from the checkout's root, that
prints a table and writes ``benchmarks/results/NAME.json``. A figure is a ratio or a difference
taken in one run; its spread stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sowatch.engine.file_inspector import WRITTEN_S
from support.programs import Mapper, build
from support.programs import make_libraries as make_new_libraries

__all__ = [
    "HERE",
    "Command",
    "Figure",
    "Mapper",
    "build",
    "crowd",
    "main",
    "make_libraries",
    "median",
    "pin",
    "quantile",
    "spread",
    "tool",
]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Figure:
    """One row. ``met`` is ``None`` for a figure that has no aim and stands there for comparison."""

    what: str
    value: float
    unit: str
    spread: str = ""
    aim: float | None = None
    met: bool | None = None

    def __post_init__(self) -> None:
        if self.aim is not None and self.met is None:
            self.met = self.value <= self.aim

    def cells(self) -> list[str]:
        aim = "" if self.aim is None else f"≤ {self.aim:g} {self.unit}".rstrip()
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        return [self.what, f"{short(self.value)} {self.unit}".rstrip(), self.spread, aim, verdict]


def main(
    name: str,
    measure: Callable[[bool, Path], list[Figure]],
    show: Callable[[Sequence[Figure]], str] | None = None,
) -> None:
    """Run a benchmark as a command: ``measure(is_quick, directory)`` gives the rows, ``show`` the table of them."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.{name}", description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, not how fast")
    is_quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix=f"sowatch-{name}-") as directory:
        figures = measure(is_quick, Path(directory))
    report = {"name": name, "quick": is_quick, "machine": machine(), "table": (show or table)(figures)}
    report["figures"] = [asdict(one) for one in figures]
    print(report["table"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def table(figures: Sequence[Figure]) -> str:
    """The rows as a Markdown table that can also be read as it is."""
    rows = [["figure", "value", "spread", "aim", ""], *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """The middle half of the values, and how many there are."""
    return f"{short(quantile(values, 0.25))} to {short(quantile(values, 0.75))}, n={len(values)}"


def short(value: float) -> str:
    """Three digits that count, but whole numbers whole."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def make_libraries(directory: Path, count: int) -> list[Path]:
    """Small libraries that are as old as installed ones to sowatch, which reads a file again that was just written."""
    made = make_new_libraries(directory, count)
    time.sleep(WRITTEN_S + 0.2)
    return made


def tool(name: str) -> str:
    """Where a compiler is."""
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"this benchmark needs {name}. Install it, or run scripts/setup.")
    return found


def pin(cpu: int) -> None:
    """Keep this process, and what it starts from now on, to one CPU."""
    os.sched_setaffinity(0, {cpu % (os.cpu_count() or 1)})


class Command:
    """``sowatch ARGUMENTS`` as a process of its own, its lines written to a file.

    Args:
        directory: for its output.
        arguments: after ``sowatch``.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._file = directory / f"out-{time.monotonic_ns()}"
        self._seen = 0
        self._partial = b""
        self._input = self._file.open("wb+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sowatch", *arguments], stdin=subprocess.DEVNULL, stdout=self._input
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self._input.close()

    def events(self) -> list[dict[str, Any]]:
        """The lines written since the last call."""
        with self._file.open("rb") as output:
            output.seek(self._seen)
            text = self._partial + output.read()
            self._seen = output.tell()
        *lines, self._partial = text.split(b"\n")
        return [json.loads(line) for line in lines]

    def wait_for(self, is_enough: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """Take events until ``is_enough`` of one; that one."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in self.events():
                if is_enough(event):
                    return event
            if self.process.poll() is not None:
                raise RuntimeError(f"sowatch ended with {self.process.returncode}")
            time.sleep(0.01)
        raise TimeoutError(f"sowatch did not report it within {timeout_s:g} s")

    def wait_ready(self) -> dict[str, Any]:
        """Take events until the start-up snapshot is done."""
        return self.wait_for(lambda event: event["event"] == "ready", 60)

    @property
    def worker(self) -> int:
        """The process that does the work; the one that was started may only wait for it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def cpu_s(self) -> float:
        """CPU seconds it has used so far, in user space and in the kernel."""
        after_comm = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()
        return (int(after_comm[11]) + int(after_comm[12])) / TICKS_PER_S

    def memory_mb(self) -> tuple[float, float]:
        """Resident memory now, and the most it ever was."""
        status = Path(f"/proc/{self.worker}/status").read_text().splitlines()
        found = {
            line.split(":")[0]: int(line.split()[1]) / 1024 for line in status if line.startswith(("VmRSS", "VmHWM"))
        }
        return found["VmRSS"], found["VmHWM"]


@contextmanager
def crowd(directory: Path, count: int, libraries: Sequence[Path] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """``count`` sleeping processes that have opened the libraries, for as long as the block lasts."""
    program = build("crowd", directory)
    running = subprocess.Popen([program, str(count), *libraries], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdin
    assert running.stdout
    with running.stdin, running.stdout:
        try:
            if running.stdout.readline() != b"ready\n":
                raise RuntimeError("the crowd did not come together")
            yield running
        finally:
            running.stdin.close()
            running.wait()
