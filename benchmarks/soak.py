"""Hours in minutes: a mixed workload runs all the time, and once a minute the map is audited.

Beside it a hostile process, as nobody, does its worst, another thing every quarter of a minute; ``--honest`` leaves
it out. It ends with the workload; the last audit and the last measurement of the memory come some seconds later. How
long loads took to be reported is that of all processes but the hostile one's.

``python -m benchmarks.soak [--minutes N] [--quick] [--honest]`` watches everything, libraries and executables
of the whole host, while processes come, fork, execute, load, unload and go. It reports what the
audits found, what was lost and repaired, and how memory and descriptors grew. Not among what
``benchmarks/run`` runs: it takes the minutes it is given.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from benchmarks.common import Figure, machine, table

from sowatch import LibraryEvent, Rule, Subscription, Watcher
from sowatch.explain.audit import AuditReport
from sowatch.model.identity import FileId
from sowatch.model.literals import KINDS
from support import workload
from support.hostile_process import WAYS, HostileProcess
from support.programs import build, make_libraries

#: How long the hostile process does one thing.
TURN_S = 15.0
HOSTILE = "hostile"
WORKLOAD = Path(workload.__file__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="ten seconds: shows that it works")
    parser.add_argument("--honest", action="store_true", help="without the hostile process")
    options = parser.parse_args()
    minutes = 1 / 6 if options.quick else options.minutes
    with tempfile.TemporaryDirectory(prefix="sowatch-soak-") as directory:
        figures = soak(
            60 * minutes,
            Path(directory),
            between_audits_s=5.0 if options.quick else 60.0 if minutes >= 10 else 20.0,
            is_hostile=not options.honest,
        )
    print(table(figures))
    print(machine())


def soak(seconds: float, directory: Path, *, between_audits_s: float, is_hostile: bool) -> list[Figure]:
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
    turns: list[str] = []
    enemy = threading.Thread(target=rotate, args=(directory, is_over, turns))
    if is_hostile:
        enemy.start()
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
        is_over.set()
        worker.join()
        if is_hostile:
            enemy.join()
        last, quiet_mb = after_the_quiet(watcher)
        for one in last.differences[:5]:
            print("  ", one, flush=True)
    finally:
        is_over.set()
        stats = watcher.stats
        begun = time.monotonic()
        watcher.stop()
        stop_s = time.monotonic() - begun
    # The first audits fill caches; what counts is the growth after them.
    untracked = rss[len(rss) // 5 :] or rss
    return [
        Figure(f"audits in {seconds / 60:.3g} minutes", audits, ""),
        Figure("differences found on the way", divergences, ""),
        Figure("differences at the end", len(last.differences), "", aim=0),
        Figure("turns of the hostile process", len(turns), ""),
        Figure("workload runs of some 100 processes", len(runs), ""),
        Figure("loads and unloads that do not alternate", reader.astray, "", aim=0),
        Figure("load to event, half of them", reader.waited_s(0.5), "s"),
        Figure("load to event, p99", reader.waited_s(0.99), "s", aim=1.0 if is_hostile else None),
        Figure("load to event, p99.9", reader.waited_s(0.999), "s"),
        Figure("loads reported", stats.loads, ""),
        Figure("unloads reported", stats.unloads, ""),
        Figure("records lost in the kernel", stats.lost_kernel, ""),
        Figure("repairs", stats.repairs, ""),
        Figure("events lost in a queue", stats.lost_queue, ""),
        Figure("processes that could not be read", unreadable, ""),
        Figure("resident memory at the end", rss[-1], "MB", f"{min(untracked):.4g} to {max(untracked):.4g}"),
        Figure("resident memory after the quiet, beyond the first audit's", quiet_mb - rss[0], "MB", aim=20),
        Figure("stop", stop_s, "s", aim=5),
        Figure("descriptors, growth", fds[-1] - fds[0], ""),
    ]


class Reader(threading.Thread):
    """Reads every event; counts loads of what was loaded already, and unloads of what was not.

    Attributes:
        waits: how many loads of other processes than the hostile ones took so many hundredths of a second to be read.
    """

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(daemon=True)
        self.subscription = subscription
        self.held: set[tuple[int, int, FileId]] = set()
        self.astray = 0
        self.waits = [0] * 6_000

    def waited_s(self, share: float) -> float:
        """The time in which this share of the loads was read."""
        left = share * sum(self.waits)
        for hundredths, count in enumerate(self.waits):
            left -= count
            if left <= 0:
                return hundredths / 100
        return len(self.waits) / 100

    def run(self) -> None:
        for event in self.subscription:
            if not isinstance(event, LibraryEvent) or event.process is None or event.event not in ("load", "unload"):
                continue
            key = event.process.pid, event.process.start_ns, event.library.id
            if (event.event == "load") == (key in self.held):
                self.astray += 1
                print(f"   {event.event}, cause {event.cause}, does not alternate: {event.library.path}", flush=True)
            if event.event == "load" and event.t_ns is not None and event.process.comm != HOSTILE:
                waited = (time.monotonic_ns() - event.t_ns) // 10_000_000
                self.waits[min(waited, len(self.waits) - 1)] += 1
            (self.held.add if event.event == "load" else self.held.discard)(key)


def work(directory: Path, is_over: threading.Event, runs: list[int]) -> None:
    while not is_over.is_set():
        subprocess.run(
            ["/usr/bin/python3", str(WORKLOAD), str(len(runs) + 1), str(directory), "2"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        runs.append(1)


def rotate(directory: Path, is_over: threading.Event, turns: list[str]) -> None:
    """One hostile thing after the other."""
    program = build(HOSTILE, directory, flags=["-pthread"])
    (library,) = make_libraries(directory, 1, prefix=HOSTILE)
    os.truncate(library, 20_000 * 4096)
    for path in (directory, library):
        path.chmod(0o755)
    while not is_over.is_set():
        way = WAYS[len(turns) % len(WAYS)]
        turns.append(way)
        with HostileProcess(program, way, library):
            is_over.wait(TURN_S)


def after_the_quiet(watcher: Watcher) -> tuple[AuditReport, float]:
    """The first audit without a difference, or the last of some, and what memory is in use by then."""
    time.sleep(2.0)
    report = watcher.audit()
    for _ in range(4):
        if not report.differences:
            break
        time.sleep(2.0)
        report = watcher.audit()
    gc.collect()
    return report, resident_mb()


def resident_mb() -> float:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
