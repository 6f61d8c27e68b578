"""How long an honest load waits, until its callback, beside processes that flood.

The floods: 1 and 4 processes that map and unmap one matched file without a pause, three threads that fork without
one, a process with 10,000 different files and two threads that map and unmap, and one that forks children with 3,000
ranges of a file each while nobody reads the events. Of the first, the watching process is stopped for 10 s once as
well. Then forks, children that share the address space, and two threads beside 2,000 mappings, while everything of
the host is watched: each child then has loads of its own. ``--beside DIRECTORY`` measures another checkout, with its
own ``.venv``, by turns with this one. Neither has the machine for itself: the floods take every CPU, and the load
average stands in the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

HERE: Final = Path(__file__).resolve().parent
LIMIT_S: Final = 40.0
STOPPED_S: Final = 10.0
#: So long a flood has lasted when the first honest load is made.
BEGUN_S: Final = 3.0
#: Between two honest loads.
PAUSE_S: Final = 0.2
#: The way of the hostile process, by case, while everything is watched.
WITH_ALL_WATCHED: Final = {f"{way}, all watched": way for way in ("forks", "shares", "flood")}
#: Case, and the most that p99 may be, in seconds.
AIMS: Final[dict[str, float]] = {
    "1 flooder": 0.5,
    "4 flooders": 1.0,
    "forks": 1.0,
    "10,000 files": 1.0,
    "stopped 10 s": 2.0,
    **dict.fromkeys(WITH_ALL_WATCHED, 1.0),
}

CASES: Final = (*AIMS, "3,000 x forks")
QUICK_CASES: Final = ("1 flooder", "forks")


def measure(is_quick: bool, directory: Path, cases: Sequence[str], rounds: int, others: Sequence[Path]) -> list[Any]:
    from benchmarks.common import Figure, quantile

    versions = {"": Path(sys.executable)} | {f", {one.name}": one / ".venv/bin/python" for one in others}
    waits: dict[tuple[str, str], list[float]] = defaultdict(list)
    ends: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for number in range(1 if is_quick else rounds):
        for case in cases:
            for version, python in versions.items():
                found, end = one_round(case, directory, python, 2 if is_quick else 10)
                waits[case, version] += found
                ends[case, version].append(end)
                longest = f"{quantile(found, 0.5):.3g} s, longest {max(found):.3g} s" if found else ""
                print(f"round {number}, {case}{version}: {longest} {end}", flush=True)
    figures = []
    for case, version in sorted(ends):
        got, case_ends = waits[case, version], ends[case, version]
        what = f"{case}{version}"
        if got:
            aim = AIMS.get(case)
            figures.append(Figure(f"{what}: honest load to callback, p50", quantile(got, 0.5), "s", f"n={len(got)}"))
            figures.append(Figure("... p99", quantile(got, 0.99), "s", f"longest {max(got):.3g} s", aim=aim))
        lost = sum(one["lost"] for one in case_ends)
        figures.append(Figure(f"{what}: lost", lost, "", f"{case_ends[-1]['losses']}"))
        repaired = sum(one["repaired"] for one in case_ends)
        figures.append(Figure("... watches that had repaired all", repaired, f"/{len(case_ends)}"))
        figures.append(Figure("... resident, at most", max(one["rss_mb"] for one in case_ends), "MB"))
        figures.append(Figure("... load average", os.getloadavg()[0], ""))
    return figures


def one_round(case: str, directory: Path, python: Path, loads: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds that each honest load waited, and what the watch says of itself 2 s after the flood."""
    from benchmarks.common import Mapper, build, make_libraries

    program, template = build("mapper", directory), make_libraries(directory, 1)[0]
    waits: list[float] = []
    what = "everything" if case in WITH_ALL_WATCHED else "directory"
    with Watching(python, directory, what) as watching, Mapper(program, directory) as honest:
        with contextlib.ExitStack() as stack:
            flood(case, stack, directory, template)
            time.sleep(BEGUN_S)
            if case == "stopped 10 s":
                os.kill(watching.process.pid, signal.SIGSTOP)
                time.sleep(STOPPED_S)
                os.kill(watching.process.pid, signal.SIGCONT)
            for number in range(0 if case == "3,000 x forks" else loads):
                library = Path(shutil.copyfile(template, directory / f"libhonest{time.monotonic_ns()}-{number}.so"))
                asked = time.monotonic()
                honest.map(library)
                waits.append(watching.wait_for(honest.pid, library.stat().st_ino, asked))
                time.sleep(PAUSE_S)
            if case == "3,000 x forks":
                time.sleep(10)
        time.sleep(2)
    return waits, watching.end


def flood(case: str, stack: contextlib.ExitStack, directory: Path, template: Path) -> None:
    """Begins a flood that lasts as long as the stack."""
    from benchmarks.common import Mapper, build

    target = directory / "libflood.so"
    shutil.copyfile(template, target)
    count = {"1 flooder": 1, "4 flooders": 4, "stopped 10 s": 1}.get(case, 0)
    for _ in range(count):
        flooder = stack.enter_context(Mapper(build("mapper", directory), directory))
        flooder.send("loop", target, 1_000_000_000)
        stack.callback(os.kill, flooder.pid, signal.SIGKILL)  # it does not listen any more
    if count:
        return
    own = directory / f"own-{time.monotonic_ns()}"
    own.mkdir()
    command: list[str | Path]
    if case == "forks" or case in WITH_ALL_WATCHED:
        directory.chmod(0o755)
        command = [build("hostile", directory, flags=["-pthread"]), WITH_ALL_WATCHED.get(case, case), target]
    elif case == "10,000 files":
        other = own / "libother.so"
        command = [build("ranges", directory, flags=["-pthread"]), "churnfiles", own, "10000", other]
    else:
        command = [build("ranges", directory, flags=["-pthread"]), "fork", own / "librange.so", "3000", "3000"]
    running = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdout.readline()
    stack.callback(running.kill if case != "3,000 x forks" else running.stdin.close)


class Watching:
    """``watch`` in a process of its own, by the Python of some checkout.

    Attributes:
        end: what it said of itself last; to be read after the block.
    """

    def __init__(self, python: Path, directory: Path, what: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--watch", directory, what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.end: dict[str, Any] = {}
        self._reported: dict[tuple[int, int], tuple[float | None, float]] = {}
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        with self._news:
            self._news.wait_for(lambda: (0, 0) in self._reported or self.end, 120)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self._reader.join()

    def wait_for(self, pid: int, inode: int, since: float) -> float:
        """Seconds until the load of this file was reported, from the mmap, or from that time if it was not seen."""
        with self._news:
            self._news.wait_for(lambda: (pid, inode) in self._reported, LIMIT_S)
            begun, reported = self._reported.get((pid, inode), (None, since + LIMIT_S))
            return reported - (begun or since)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = json.loads(line)
            with self._news:
                if isinstance(found, dict):
                    self.end = found
                else:
                    pid, inode, *times = found
                    self._reported[pid, inode] = tuple(times)
                self._news.notify_all()


def watch(directory: str, what: str) -> None:
    """Reports honest loads as lines of JSON until the input ends, then what became of the watch.

    Args:
        directory: where the honest libraries are.
        what: ``directory``: nothing else is watched, nor read; ``everything``: all of the host is, and read.
    """
    from sowatch import Load, Rule, Watcher
    from sowatch.model.literals import KINDS

    def note(event: Load) -> None:
        reported = time.monotonic()
        begun = event.t_ns / 1e9 if event.cause == "mmap" and event.t_ns else None
        print(json.dumps([event.process.pid, event.library.id.inode, begun, reported]), flush=True)

    is_all = what == "everything"
    rest = Rule(None, name="all", kind=KINDS) if is_all else Rule(f"{directory}/", name="all")
    with Watcher(Rule(f"{directory}/libhonest", name="honest", on_load=note), rest) as watcher:
        subscription = watcher.subscribe()
        if is_all:
            threading.Thread(target=lambda: all(True for _ in subscription), daemon=True).start()
        print(json.dumps([0, 0, None, time.monotonic()]), flush=True)
        sys.stdin.read()
        stats = watcher.stats
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        losses = {name: count for name, count in stats.losses._asdict().items() if count}
        found = {"lost": stats.lost_kernel, "losses": losses, "repaired": watcher.is_repaired, "rss_mb": peak}
        found |= {"repairs": stats.repairs, "rereads": stats.rereads, "records": stats.records}
        print(json.dumps(found | {"cpu_s": round(time.process_time(), 2)}), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        watch(*sys.argv[2:4])
        return
    from benchmarks import common

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--beside", action="append", type=Path, default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", choices=CASES)
    options, sys.argv[1:] = parser.parse_known_args()

    def run(is_quick: bool, directory: Path) -> list[Any]:
        cases = options.case or (QUICK_CASES if is_quick else CASES)
        return measure(is_quick, directory, cases, options.rounds, options.beside)

    common.main("flood", run)


if __name__ == "__main__":
    main()
