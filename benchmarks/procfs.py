"""What strategy ``procfs`` costs: polls of 200 and of 2,000 processes, beside reading all their maps.

Idle: nobody in the crowd ran since the last poll, so their CPU clocks are all that is asked for.
All read: the same poll with every process's mappings read, which is what polling costs without the
clocks, and what a host on which every process runs all the time costs with them. `cat` of all maps
stands beside both, in turn with them. Of a whole `sowatch watch --strategy procfs` the CPU time over
some seconds is taken.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from benchmarks.common import Command, Figure, crowd, main, make_libraries, median, spread, tool

from sowatch.linux.cpu_clock import CpuClocks
from sowatch.model.config import Config
from sowatch.sources.polling import ProcfsSource


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, watched_s = (3, 1.0) if is_quick else (25, 10.0)
    libraries = make_libraries(directory, 3)
    figures = []
    for count in (200, 2000):
        with crowd(directory, count, libraries):
            figures += looks(count, rounds)
            figures.append(whole(count, watched_s, directory))
    return figures


def looks(count: int, rounds: int) -> list[Figure]:
    """CPU of single looks, in turn with cat."""
    taken: dict[str, list[float]] = {"cat": [], "idle": [], "all read": []}
    source = ProcfsSource(Config())
    clocks = source._clocks  # noqa: SLF001
    try:
        scans, _ = source.scan_all()
        if len(scans) < count:
            raise RuntimeError(f"{len(scans)} processes were read, not {count}")
        look(source)
        for _ in range(rounds):
            taken["cat"].append(cat_maps())
            taken["idle"].append(look(source))
            source._clocks = NoClocks()  # noqa: SLF001
            taken["all read"].append(look(source))
            source._clocks = clocks  # noqa: SLF001
            look(source)  # takes the clocks down again
    finally:
        source.close()
    ratios = {name: [one / cat for one, cat in zip(taken[name], taken["cat"], strict=True)] for name in taken}
    aims = {"idle": 0.1, "all read": 1.5}  # of all CPU time, in user space and in the kernel
    return [
        Figure(f"cat of the maps of {count} processes", median(taken["cat"]), "ms", spread(taken["cat"])),
        *(
            Figure(
                f"a poll of {count} processes to cat, {name} ({median(taken[name]):.3g} ms)",
                median(ratios[name]),
                "x",
                spread(ratios[name]),
                aim=aims[name],
            )
            for name in ("idle", "all read")
        ),
    ]


class NoClocks(CpuClocks):
    """As below a proc file system of another pid namespace."""

    def __init__(self) -> None:
        self._is_ours = False


def look(source: ProcfsSource) -> float:
    """Milliseconds of CPU that one poll takes, with what its helper thread takes."""
    source.polls.ask()
    begun = time.process_time()
    source.drain()
    return (time.process_time() - begun) * 1000


def cat_maps() -> float:
    """Milliseconds of CPU that `cat /proc/[0-9]*/maps > /dev/null` takes."""
    paths = [f"{entry}/maps" for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    # A process that ends meanwhile makes cat complain and go on.
    done = subprocess.Popen([tool("cat"), *paths], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(done.pid, 0)
    done.returncode = 0
    return (used.ru_utime + used.ru_stime) * 1000


def whole(count: int, seconds: float, directory: Path) -> Figure:
    """CPU of the whole command while nothing of the crowd runs, in percent of one CPU."""
    with Command(directory, "watch", "--json", "--strategy", "procfs") as command:
        command.wait_ready()
        time.sleep(1)  # the writing of the snapshot is no part of it
        begun, before = time.monotonic(), command.cpu_s()
        time.sleep(seconds)
        used = (command.cpu_s() - before) / (time.monotonic() - begun)
    return Figure(f"sowatch watch --strategy procfs, {count} idle processes, CPU", 100 * used, "%", aim=2.0)


if __name__ == "__main__":
    main("procfs", measure)
