"""How long `sowatch list` takes, and the CPU time of it; beside it `cat` of the maps of all processes."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path

from benchmarks.common import Figure, main, median, spread
from benchmarks.start import COMMAND, compile_package


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    del directory
    compile_package()
    rounds = 2 if is_quick else 20
    listed, used, read = [], [], []
    for _ in range(rounds):
        wall_s, cpu_s = time_of(COMMAND, "list")
        listed.append(wall_s)
        used.append(cpu_s)
        read.append(time_of("sh", "-c", "cat /proc/[0-9]*/maps 2>/dev/null; true")[0])
    return [
        Figure("sowatch list, every library", median(listed), "s", spread(listed), aim=0.45),
        Figure("... its CPU time", median(used), "s", spread(used)),
        Figure("cat /proc/*/maps", median(read), "s", spread(read)),
    ]


def time_of(*command: str | Path) -> tuple[float, float]:
    """Wall and CPU seconds from the start of a command to its end."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    wall_s, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main("list", measure)
