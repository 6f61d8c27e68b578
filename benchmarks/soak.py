"""Hours in minutes: a mixed workload runs all the time, and once a minute the map is audited.

``python -m benchmarks.soak [--minutes N] [--quick]`` watches everything, libraries and executables
of the whole host, while processes come, fork, execute, load, unload and go. It reports what the
audits found, what was lost and repaired, and how memory and descriptors grew. Not among what
``benchmarks/run`` runs: it takes the minutes it is given.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.common import Figure, machine, table

from sowatch import LibraryEvent, Rule, Watcher
from sowatch.engine.subscription import Subscription
from sowatch.model.identity import FileId
from sowatch.model.rules import KINDS
from support import workload

WORKLOAD = Path(workload.__file__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="ten seconds: shows that it works")
    options = parser.parse_args()
    minutes = 1 / 6 if options.quick else options.minutes
    with tempfile.TemporaryDirectory(prefix="sowatch-soak-") as directory:
        figures = soak(60 * minutes, Path(directory), between_audits_s=5.0 if options.quick else 60.0)
    print(table(figures))
    print(machine())


def soak(seconds: float, directory: Path, *, between_audits_s: float) -> list[Figure]:
    workload.prepare(directory)
    watcher = Watcher(Rule(None, kind=KINDS))
    subscription = watcher.subscribe()
    watcher.start()
    reader = Reader(subscription)
    reader.start()
    is_over = threading.Event()
    runs: list[int] = []
    worker = threading.Thread(target=work, args=(directory, is_over, runs))
    worker.start()
    rss, fds, audits, divergences, unreadable = [], [], 0, 0, 0
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            time.sleep(min(between_audits_s, max(0.0, deadline - time.monotonic())))
            report = watcher.audit()
            audits += 1
            divergences += len(report.differences)
            unreadable = max(unreadable, report.unreadable)
            rss.append(resident_mb())
            fds.append(len(os.listdir("/proc/self/fd")))
            stats = watcher.stats
            print(
                f"{audits}: {len(report.differences)} differences, {report.processes} processes, "
                f"{report.mappings} mappings, {stats.loads} loads, {stats.lost_kernel} lost, "
                f"{stats.repairs} repairs, {rss[-1]:.1f} MB, {fds[-1]} fds",
                flush=True,
            )
            for one in report.differences[:5]:
                print("  ", one, flush=True)
    finally:
        is_over.set()
        worker.join()
        stats = watcher.stats
        watcher.stop()
    # The first audits fill caches; what counts is the growth after them.
    settled = rss[len(rss) // 5 :] or rss
    return [
        Figure(f"audits in {seconds / 60:.3g} minutes", audits, ""),
        Figure("differences found", divergences, "", aim=0),
        Figure("workload runs of some 100 processes", len(runs), ""),
        Figure("loads and unloads that do not alternate", reader.astray, "", aim=0),
        Figure("loads told", stats.loads, ""),
        Figure("unloads told", stats.unloads, ""),
        Figure("facts lost in the kernel", stats.lost_kernel, ""),
        Figure("repairs", stats.repairs, ""),
        Figure("events lost in a queue", stats.lost_queue, ""),
        Figure("processes that could not be read", unreadable, ""),
        Figure("resident memory at the end", rss[-1], "MB", f"{min(settled):.4g} to {max(settled):.4g}"),
        Figure("descriptors, growth", fds[-1] - fds[0], ""),
    ]


class Reader(threading.Thread):
    """Reads every event; counts loads of what was loaded already, and unloads of what was not."""

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(daemon=True)
        self.subscription = subscription
        self.held: set[tuple[int, int, FileId]] = set()
        self.astray = 0

    def run(self) -> None:
        for event in self.subscription:
            if not isinstance(event, LibraryEvent) or event.process is None or event.event not in ("load", "unload"):
                continue
            key = event.process.pid, event.process.start_ns, event.library.id
            if (event.event == "load") == (key in self.held):
                self.astray += 1
                print(f"   {event.event}, cause {event.cause}, does not alternate: {event.library.path}", flush=True)
            (self.held.add if event.event == "load" else self.held.discard)(key)


def work(directory: Path, is_over: threading.Event, runs: list[int]) -> None:
    while not is_over.is_set():
        subprocess.run(
            ["/usr/bin/python3", str(WORKLOAD), str(len(runs) + 1), str(directory), "2"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        runs.append(1)


def resident_mb() -> float:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
