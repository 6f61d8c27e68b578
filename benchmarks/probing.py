"""How fast functions are attached and detached, and what `sowatch trace` takes while they are called all the time.

As many calls a second are asked for as the last figures say; where the breakpoint itself takes longer, as on many
virtual machines, fewer are made, and the figures are of those.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.common import TICKS_PER_S, Figure, build, main, median, pin, quantile, spread, tool
from benchmarks.probes import FUNCTION, OTHER_CPU, Loop, compile_empty, opened

from sowatch import FileId, LibraryEvent, Rule, Watcher
from sowatch.engine.workers import ActiveFile
from sowatch.uprobes import Attacher, CallCounter, Probe

SYMBOLS = 200
RATE, PACED_S = 100_000, 5


def attaching(is_quick: bool, directory: Path, empty_object: Path) -> list[Figure]:
    """A library of many functions, by kind of link."""
    source, library = directory / "many.c", directory / "libmany.so"
    source.write_text("".join(f"int many_{number}(int a) {{ return a + {number}; }}\n" for number in range(SYMBOLS)))
    subprocess.run([tool("cc"), "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    times: dict[str, list[float]] = {}
    for _ in range(1 if is_quick else 3):
        for links in ("multi", "perf_event"):
            with Attacher(empty_object, [Probe("many_*", "entered")], links=links) as attacher:
                file = opened(library)
                since = time.monotonic()
                attacher.attach(file)
                times.setdefault(f"attach, {links}", []).append((time.monotonic() - since) / SYMBOLS * 1e6)
                since = time.monotonic()
                attacher.detach(file)
                times.setdefault(f"detach, {links}", []).append((time.monotonic() - since) / SYMBOLS * 1e6)
                file.close()
    figures = [
        Figure(f"{name}, each of {SYMBOLS} functions", median(us), "µs", spread(us)) for name, us in times.items()
    ]
    for what in ("attach", "detach"):
        multi, single = times[f"{what}, multi"], times[f"{what}, perf_event"]
        ratios = [one / other for one, other in zip(multi, single, strict=True)]
        figures.append(Figure(f"{what}: multi to perf_event", median(ratios), "x", spread(ratios)))
    return figures


def loading(is_quick: bool, directory: Path) -> list[Figure]:
    """From the kernel's mmap of a file to its probes."""
    number = 20 if is_quick else 300
    flags = ["-shared", "-fPIC", "-O1"]
    template = build("probed", directory, flags=flags, output="libprobed.so")
    (directory / "copies").mkdir()
    copies = [Path(shutil.copyfile(template, directory / "copies" / f"libcopy{one}.so")) for one in range(number)]
    done: dict[FileId, int] = {}
    delays: list[float] = []
    counter = CallCounter([FUNCTION], linger_s=3600.0)

    def attach(file: ActiveFile) -> None:
        counter.attach(file)
        done[file.library.id] = time.monotonic_ns()

    def note(event: LibraryEvent) -> None:
        assert event.t_ns is not None
        delays.append((done[event.library.id] - event.t_ns) / 1e6)

    rule = Rule(f"^{directory}/copies/", on_activate=attach, on_load=note)
    with counter, Watcher(rule), ExitStack() as stack:
        caller = subprocess.Popen(
            [build("caller", directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(caller.wait)
        assert caller.stdin
        stack.callback(caller.stdin.close)
        for path in copies:
            caller.stdin.write(f"open {path}\n")
            caller.stdin.flush()
            time.sleep(0.02)
        until = time.monotonic() + 60
        while len(delays) < number and time.monotonic() < until:
            time.sleep(0.05)
    what = f"load to attached, entry and return, {number} files one after the other"
    return [
        Figure(f"{what}, p50", median(delays), "ms", spread(delays)),
        Figure("... p99", quantile(delays, 0.99), "ms"),
        Figure("... files that were not attached", number - len(delays), "", aim=0),
    ]


def busy(is_quick: bool, directory: Path, loop: Loop) -> list[Figure]:
    """The whole command while a function is called RATE times a second."""
    duration_s = 1 if is_quick else PACED_S
    figures: list[Figure] = []
    for what, function in [("counted and timed", "plain"), ("shown one by one with a string", "plain(str:64)")]:
        output = directory / f"traced-{len(figures)}"
        with output.open("wb") as file:
            command = [sys.executable, "-m", "sowatch", "trace", f"{loop.library}:{function}"]
            process = subprocess.Popen(command, stdout=file)
            loop.wait_for_probe(is_there=True)
            time.sleep(1.0)
            before = cpu_s(process.pid)
            number = RATE * duration_s
            since = time.monotonic()
            loop.ask(f"pace {number} {RATE}")
            took_s = time.monotonic() - since
            cpu = (cpu_s(process.pid) - before) / took_s
            process.terminate()
            process.wait()
        lines = output.read_text(encoding="utf-8").splitlines()
        shown = sum(line.count("GET /index") for line in lines)
        (counted,) = [int(line.split()[0]) for line in lines if str(loop.pid) in line and f"  {FUNCTION}  " in line]
        reported = re.search(r"(\d+) of them not shown one by one", output.read_text(encoding="utf-8"))
        said = int(reported[1]) if reported else 0
        figures += [
            Figure(f"{number / took_s:.0f} calls a second {what}: CPU of sowatch", cpu * 100, "%"),
            Figure("... calls that are in no count", number - counted, "", aim=0),
        ]
        if "(" in function:
            figures += [
                Figure("... not shown one by one", (number - shown) / number * 100, "%"),
                Figure("... of them not reported as lost", number - shown - said, "", aim=0),
            ]
        loop.wait_for_probe(is_there=False)
    return figures


def cpu_s(pid: int) -> float:
    """Of a process and of the one that does its work: the command waits for that."""
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    spent = 0.0
    for one in (pid, *workers):
        after_comm = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        spent += (int(after_comm[11]) + int(after_comm[12])) / TICKS_PER_S
    return spent


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    pin(OTHER_CPU)
    flags = ["-shared", "-fPIC", "-O1", "-fno-omit-frame-pointer"]
    library = build("probed", directory, flags=flags, output="libcalled.so")
    with Loop(build("callloop", directory), library) as loop:
        figures = busy(is_quick, directory, loop)
    return figures + attaching(is_quick, directory, compile_empty(directory)) + loading(is_quick, directory)


if __name__ == "__main__":
    main("probing", measure)
