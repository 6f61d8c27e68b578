"""Thousands of processes that each load a matched library, as fast as both cores can run them.

Was every load and unload reported, was anything lost, and what did sowatch itself cost? Its CPU time is
that of the whole `sowatch watch --json` process, formatting and writing included; what the BPF
programs take is in the workload's own time, so the workload is run unwatched as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Command, Figure, build, main, make_libraries, median, spread


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, count = (1, 300) if is_quick else (5, 5000)
    storm = build("storm", directory)
    (library,) = make_libraries(directory, 1)
    linked = build("loader", directory, flags=["-DLINKED", str(library), f"-Wl,-rpath,{directory}"], output="linked")
    command = [storm, str(os.cpu_count() or 1), str(count), linked]
    alone, watched, shares, reported_counts, losses = [], [], [], [], 0
    run_storm(command)  # warms the page cache
    for _ in range(rounds):
        alone.append(cpu_of(run_storm(command)))
        with Command(directory, "watch", "--json", f"/{library.name}$") as sowatch:
            sowatch.wait_ready()
            before = sowatch.cpu_s()
            spent = run_storm(command)
            loads, unloads, lost = count_events(sowatch, count)
            shares.append(100 * (sowatch.cpu_s() - before) / cpu_of(spent))
        watched.append(cpu_of(spent))
        reported_counts.append((loads, unloads))
        losses += lost
    slowdown = [100 * (one / other - 1) for one, other in zip(watched, alone, strict=True)]
    missed = sum(2 * count - loads - unloads for loads, unloads in reported_counts)
    return [
        Figure(
            f"loads and unloads of {count} processes not reported", missed, "", f"n={rounds}", aim=0, met=missed == 0
        ),
        Figure("events lost", losses, "", f"n={rounds}", aim=0),
        Figure("CPU of sowatch to the workload's", median(shares), "%", spread(shares), aim=10),
        Figure("CPU of the workload, watched to unwatched", median(slowdown), "%", spread(slowdown)),
        Figure("CPU of the workload, unwatched", median(alone), "s", spread(alone)),
    ]


def run_storm(command: list[Any]) -> dict[str, float]:
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    spent: dict[str, float] = json.loads(result.stdout)
    return spent


def cpu_of(spent: dict[str, float]) -> float:
    return spent["user_s"] + spent["system_s"]


def count_events(sowatch: Command, count: int) -> tuple[int, int, int]:
    """Loads, unloads and losses, once all are there or none has come for two seconds."""
    loads = unloads = lost = 0
    quiet_since = time.monotonic()
    while loads + unloads < 2 * count and time.monotonic() - quiet_since < 2:
        events = sowatch.events()
        for event in events:
            loads += event["event"] == "load"
            unloads += event["event"] == "unload"
            lost += event["count"] if event["event"] == "lost" else 0
        if events:
            quiet_since = time.monotonic()
        else:
            time.sleep(0.02)
    return loads, unloads, lost


if __name__ == "__main__":
    main("storm", measure)
