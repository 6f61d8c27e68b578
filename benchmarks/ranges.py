"""How long an honest load waits beside a process with very many ranges, and how long ``sowatch list`` takes.

``python -m benchmarks.ranges [CASE ...] [--quick]``, a case being KIND:COUNT, by default those of `CASES`. The
hostile process is ``tests/programs/ranges.c`` and runs as nobody. Not among what ``benchmarks/run`` runs: it
keeps a CPU busy for minutes where the answer is bad.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Mapper, build, machine, make_libraries

from sowatch import Load, Rule, Watcher
from sowatch.model.literals import KINDS, StrategySetting

#: split: ranges of one file; weave: of two files by turns; files: files of one range; churn, churnfiles: two threads
#: that map and unmap beside these; fork: children of split.
CASES = (
    "split:8000",
    "split:30000",
    "weave:15000",
    "churn:3000",
    "churn:10000",
    "files:10000",
    "churnfiles:3000",
    "fork:3000",
)
CHILDREN = 300
#: No load waits longer: it counts as this.
LIMIT_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ranges", description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--loads", type=int, default=5, help="honest loads a case")
    parser.add_argument("--quick", action="store_true", help="one small case of two loads: shows that it works")
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args()
    cases, loads = (("split:300",), 2) if options.quick else (options.cases, options.loads)
    with tempfile.TemporaryDirectory(prefix="sowatch-ranges-", dir="/var/tmp") as directory:
        Path(directory).chmod(0o777)
        for case in cases:
            kind, _, count = case.partition(":")
            one_case(Path(directory), kind, int(count), loads, options.strategy)
    print(machine())


def one_case(directory: Path, kind: str, count: int, loads: int, strategy: StrategySetting) -> None:
    """Prints the figures of one case."""
    from sowatch import Config

    program, template = build("mapper", directory), make_libraries(directory, 1)[0]
    reported: dict[tuple[int, int], float] = {}
    news = threading.Event()

    def note(event: Load) -> None:
        reported[event.process.pid, event.library.id.inode] = time.monotonic()
        news.set()

    rules = [Rule(f"{directory}/libhonest", name="honest", on_load=note), Rule(f"{directory}/", name="all", kind=KINDS)]
    watcher = Watcher(*rules, config=Config(strategy=strategy))
    waits = []
    with watcher, Mapper(program, directory) as honest:
        begun_cpu = time.process_time()
        begun = time.monotonic()
        with hostile(directory, kind, count) as pid:
            seconds = time.monotonic() - begun
            for number in range(loads):
                library = Path(shutil.copyfile(template, directory / f"libhonest{kind}{count}-{number}.so"))
                key = (honest.pid, library.stat().st_ino)
                asked = time.monotonic()
                honest.map(library)
                while key not in reported and time.monotonic() - asked < LIMIT_S:
                    news.wait(0.01)
                    news.clear()
                waits.append(reported.get(key, asked + LIMIT_S) - asked)
                time.sleep(0.2)
            asked = time.monotonic()
            report = watcher.audit()
            audited = time.monotonic() - asked
            wrong = sum(one.pid == pid for one in report.differences)
            asked = time.monotonic()
            watcher.explain(pid)
            explained = time.monotonic() - asked
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            cpu = time.process_time() - begun_cpu
            asked = time.monotonic()
            command: list[str | Path] = [Path(sys.executable).parent / "sowatch", "list", "--json", "--pid", str(pid)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(command, stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=False)
            listed = time.monotonic() - asked
    print(
        f"{kind}:{count}: made in {seconds:.2f} s; honest load p50 {statistics.median(waits):.3g} s, "
        f"max {max(waits):.3g} s; CPU {cpu:.2f} s; list {listed:.3g} s; "
        f"audit {audited:.3g} s, {wrong} differences; explain {explained:.3g} s; RSS at most {memory} MB",
        flush=True,
    )


@contextlib.contextmanager
def hostile(directory: Path, kind: str, count: int) -> Iterator[int]:
    """The process, as nobody, once it has all its ranges; gives its pid."""
    program = build("ranges", directory, flags=["-pthread"])
    own = directory / f"own-{kind}-{count}"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    other = [str(own / "libother.so")]
    more = {"churn": other, "churnfiles": other, "weave": other, "fork": [str(CHILDREN)]}.get(kind, [])
    where = own if kind.endswith("files") else own / "librange.so"
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    command: list[str | Path] = [*drop, program, kind, where, str(count), *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == f"ready {count}\n"
        try:
            yield running.pid
        finally:
            assert running.stdin is not None
            running.stdin.close()
            if kind.startswith("churn"):
                running.kill()


if __name__ == "__main__":
    main()
