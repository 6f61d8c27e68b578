"""How long it takes to read what 3,000 processes have mapped, beside `cat` of their maps files.

Unknown: the first scan, in which the kernel asks about every file it shows. Known: the next
one, when every file has its verdict, once with everything matched and once with nothing. The whole
start-up snapshot of a Watcher (scanning, matching, reporting) stands beside them. All in turn, round
after round, with the same processes.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.common import Figure, crowd, main, make_libraries, median, spread, tool

from sowatch import Config, Rule, Watcher
from sowatch.sources.core import BpfSource


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, processes, libraries = (2, 200, 3) if is_quick else (15, 3000, 3)
    taken: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    with crowd(directory, processes, make_libraries(directory, libraries)):
        for _ in range(rounds):
            beside = cat_maps()
            taken.setdefault("cat", []).append(beside)
            spent = {
                **read_twice(is_wanted=False, least=processes),
                **read_twice(is_wanted=True, least=processes),
                "start, nothing matched": watcher_snapshot("^/no/such/library$", least=processes),
                "start, all matched": watcher_snapshot(None, least=processes),
            }
            for name, seconds in spent.items():
                taken.setdefault(name, []).append(seconds * 1000)
                ratios.setdefault(name, []).append(seconds * 1000 / beside)
    return [
        Figure(f"cat of the maps of {processes} processes", median(taken["cat"]), "ms", spread(taken["cat"])),
        ratio("known and ignored", ratios, taken, 0.25),
        ratio("known and matched", ratios, taken, 0.4),
        ratio("unknown", ratios, taken, 0.5),
        ratio("start, nothing matched", ratios, taken, 0.6),
        ratio("start, all matched", ratios, taken, None),
    ]


def ratio(name: str, ratios: dict[str, list[float]], taken: dict[str, list[float]], aim: float | None) -> Figure:
    what = f"snapshot to cat, {name} ({median(taken[name]):.3g} ms)"
    return Figure(what, median(ratios[name]), "x", spread(ratios[name]), aim=aim)


def cat_maps() -> float:
    """Milliseconds that `cat /proc/[0-9]*/maps > /dev/null` takes, without the shell's start."""
    paths = [f"{entry}/maps" for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    start = time.monotonic()
    # A process that ends meanwhile makes cat complain and go on.
    subprocess.run([tool("cat"), *paths], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return (time.monotonic() - start) * 1000


def read_twice(*, is_wanted: bool, least: int) -> dict[str, float]:
    """Seconds of the first scan by a fresh source, and of one after all files had an answer."""
    source = BpfSource(Config())
    try:
        start = time.monotonic()
        scans, _ = source.scan_all()
        unknown = time.monotonic() - start
        if len(scans) < least:
            raise RuntimeError(f"{len(scans)} processes were read, not {least}")
        places = {record.key: record.place for scan in scans for record in scan.maps}
        source.answer(places, is_wanted=is_wanted)
        start = time.monotonic()
        source.scan_all()
        known = time.monotonic() - start
    finally:
        source.close()
    return {"unknown": unknown, f"known and {'matched' if is_wanted else 'ignored'}": known}


def watcher_snapshot(pattern: str | None, *, least: int) -> float:
    """Seconds of a Watcher's start-up snapshot, by its own word."""
    watcher = Watcher(Rule(pattern))
    ready = watcher.start()
    watcher.stop()
    if ready.processes < least:
        raise RuntimeError(f"{ready.processes} processes were seen, not {least}")
    return ready.seconds


if __name__ == "__main__":
    main("snapshot", measure)
