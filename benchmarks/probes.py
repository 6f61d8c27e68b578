"""What each call of a traced function costs.

The cost of a call stands beside that of an empty program at the same place, and beside the one-liners of bpftrace and
bcc that ask for the same, where these are installed (apt-get install bpftrace bpfcc-tools). A round runs every variant
once, in an order that turns with each round, on one pinned process; figures are medians of what a round has added to a
call that nobody traces, the best of its batches. The second "nothing" shows how much of a difference is noise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks.common import HERE, Figure, build, main, median, pin, spread, tool

from sowatch import FileId, Library
from sowatch.engine.workers import ActiveFile
from sowatch.uprobes import Attacher, CallCounter, Probe, parse_function

MEASURED_CPU, OTHER_CPU = 1, 0
FUNCTION = "plain"
INT3 = b"\xcc"

#: By what is asked for: how bpftrace and bcc's tools are asked for it.
BPFTRACE = {
    "count": "uprobe:{0}:plain {{ @[pid] = count(); }}",
    "latency": "uprobe:{0}:plain {{ @since[tid] = nsecs; }} uretprobe:{0}:plain /@since[tid]/ "
    "{{ @[pid] = hist(nsecs - @since[tid]); delete(@since[tid]); }}",
    "string": 'uprobe:{0}:plain {{ printf("%s\\n", str(arg0)); }}',
}
BCC = {
    "count": ["funccount", "-d", "3600", "{0}:plain"],
    "latency": ["funclatency", "{0}:plain"],
    "string": ["trace", '{0}:plain "%s", arg1'],
}


class NotRunning(Exception):
    """Another tool has ended, or has not attached: it cannot be compared here."""


class Loop:
    """A running tests/programs/callloop.c on its own CPU."""

    def __init__(self, program: Path, library: Path) -> None:
        self.library = library
        self._process = subprocess.Popen(
            [tool("taskset"), "-c", str(MEASURED_CPU % (os.cpu_count() or 1)), program, library, FUNCTION],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid, self._address = (int(word) for word in self._line().split())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def ask(self, command: str) -> int:
        self.begin(command)
        return self.answer()

    def begin(self, command: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def answer(self) -> int:
        return int(self._line())

    def best_ns(self, batches: int, calls: int) -> float:
        return min(self.ask(f"run {calls}") for _ in range(batches))

    def wait_for_probe(self, is_there: bool, process: subprocess.Popen[bytes] | None = None) -> None:
        """Until the kernel has put a breakpoint at the function, or has taken it away; as long as a process runs.

        Raises:
            NotRunning: within 60 s it has not, or the process has ended.
        """
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(self._address)
                if (memory.read(1) == INT3) == is_there:
                    return
            if process is not None and process.poll() is not None:
                raise NotRunning
            time.sleep(0.01)
        raise NotRunning

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


def opened(path: Path) -> ActiveFile:
    """What a rule's activation gets for a file; closed with it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    status = os.fstat(fd)
    return ActiveFile(Library(str(path), FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)), fd)


@contextmanager
def empty(program: Path, library: Path, probes: dict[str, str]) -> Iterator[None]:
    wanted = [Probe(FUNCTION, name, is_return=name == "returned") for name in probes]
    with Attacher(program, wanted) as attacher:
        file = opened(library)
        attacher.attach(file)
        yield
        file.close()


@contextmanager
def counting(library: Path, **options: Any) -> Iterator[CallCounter]:
    """Our counter; what it records is taken as `sowatch trace` takes it, and thrown away."""
    with CallCounter([FUNCTION], **options) as counter:
        file = opened(library)
        counter.attach(file)
        is_over = threading.Event()

        def take() -> None:
            while not is_over.wait(0.05):
                counter.take_calls()

        thread = threading.Thread(target=take)
        thread.start()
        yield counter
        is_over.set()
        thread.join()
        file.close()


@contextmanager
def running(command: list[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another tool, with its output in a file, which is how much of it there is."""
    with (directory / "other.out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def bcc_tool(name: str) -> str | None:
    """One of bcc's tools: compiled (libbpf-tools), else in Python, which compiles its program with kernel headers."""
    return shutil.which(name) if name == "funclatency" else shutil.which(f"{name}-bpfcc")


def all_variants(library: Path, directory: Path, empty_object: Path) -> dict[str, Callable[[], Any]]:
    """What is compared, by name; other tools only where they are installed."""
    shown = parse_function("plain(str:64)")[1]
    variants: dict[str, Callable[[], Any]] = {
        "empty entry": lambda: empty(empty_object, library, {"entered": ""}),
        "empty entry and return": lambda: empty(empty_object, library, {"entered": "", "returned": ""}),
        "count, sowatch": lambda: counting(library, is_timed=False),
        "latency, sowatch": lambda: counting(library),
        "string, sowatch": lambda: counting(library, is_timed=False, call_format=shown),
    }
    missing = []
    if bpftrace := shutil.which("bpftrace"):
        for what, text in BPFTRACE.items():
            script = [bpftrace, "-q", "-e", text.format(library)]
            variants[f"{what}, bpftrace"] = partial(running, script, directory)
    else:
        missing.append("bpftrace")
    for what, (name, *words) in BCC.items():
        if found := bcc_tool(name):
            command = [found, *(word.format(library) for word in words)]
            variants[f"{what}, bcc"] = partial(running, command, directory)
        else:
            missing.append(f"bcc's {name}")
    if missing:
        print(f"not installed, so not compared: {', '.join(missing)}", file=sys.stderr)
    return variants


def costs(is_quick: bool, directory: Path, loop: Loop, empty_object: Path) -> list[Figure]:
    rounds, batches, calls = (1, 3, 2_000) if is_quick else (3, 8, 5_000)
    library = loop.library
    variants = all_variants(library, directory, empty_object)
    taken: dict[str, list[float]] = {name: [] for name in ["nothing", "nothing again", *variants]}
    names, failed = list(variants), dict[str, str]()
    for number in range(rounds):
        turn = number % len(names)
        alone = loop.best_ns(batches, 10 * calls)
        taken["nothing"].append(alone)
        for name in names[turn:] + names[:turn]:
            if name in failed:
                continue
            try:
                with variants[name]() as process:
                    loop.wait_for_probe(
                        is_there=True, process=process if isinstance(process, subprocess.Popen) else None
                    )
                    # A second probe comes a moment later.
                    loop.ask(f"run {calls}")
                    time.sleep(0.3)
                    taken[name].append(loop.best_ns(batches, calls) - alone)
            except NotRunning:
                lines = (directory / "other.out").read_text(errors="replace").splitlines()
                failed[name] = lines[-1] if lines else "it wrote nothing"
                del taken[name]
                continue
            loop.wait_for_probe(is_there=False)
            print(f"\rround {number + 1} of {rounds}: {name:30}", end="", file=sys.stderr)
        taken["nothing again"].append(loop.best_ns(batches, 10 * calls) - alone)
    print(file=sys.stderr)
    for name, reason in failed.items():
        print(f"does not run here, so not compared: {name}: {reason}", file=sys.stderr)
    return cost_figures(taken)


def program_times(is_quick: bool, directory: Path, loop: Loop, empty_object: Path) -> list[Figure]:
    """What the kernel says that the programs take, entry and return together: without the breakpoint around them."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    taken: dict[str, list[float]] = {}
    switch.write_text("1")
    try:
        for _ in range(1 if is_quick else 3):
            for name, variant in all_variants(loop.library, directory, empty_object).items():
                known = runs()
                try:
                    with variant() as process:
                        other = process if isinstance(process, subprocess.Popen) else None
                        loop.wait_for_probe(is_there=True, process=other)
                        loop.ask("run 1000")
                        time.sleep(0.3)
                        since = runs()
                        loop.ask("run 10000")
                        after = runs()
                except NotRunning:
                    continue
                spent = [
                    (time_ns - since[number][0]) / (count - since[number][1])
                    for number, (time_ns, count) in after.items()
                    if number in since and number not in known and count - since[number][1] >= 10_000
                ]
                taken.setdefault(name, []).append(sum(spent))
                loop.wait_for_probe(is_there=False)
    finally:
        switch.write_text(before)
    figures = [
        Figure(f"the programs themselves: {name}", median(values), "ns", spread(values))
        for name, values in taken.items()
    ]
    for what in BPFTRACE:
        for tool_name in ("bpftrace", "bcc"):
            if theirs := taken.get(f"{what}, {tool_name}"):
                ratios = [mine / other for mine, other in zip(taken[f"{what}, sowatch"], theirs, strict=True)]
                name = f"the programs themselves, {what}: sowatch to {tool_name}"
                figures.append(Figure(name, median(ratios), "x", spread(ratios), aim=1.0))
    return figures


def runs() -> dict[int, tuple[int, int]]:
    """Of each program on functions the time in ns and the number of its runs, by its id."""
    listed = subprocess.run([tool("bpftool"), "--json", "prog", "show"], capture_output=True, check=True).stdout
    return {
        one["id"]: (one.get("run_time_ns", 0), one.get("run_cnt", 0))
        for one in json.loads(listed)
        if one["type"] == "kprobe"
    }


def cost_figures(taken: dict[str, list[float]]) -> list[Figure]:
    figures = [
        Figure("a call, nothing attached", median(taken["nothing"]), "ns", spread(taken["nothing"])),
        Figure(
            "... noise: nothing against nothing", median(taken["nothing again"]), "ns", spread(taken["nothing again"])
        ),
    ]
    for name, values in taken.items():
        if not name.startswith("nothing"):
            figures.append(Figure(f"... added by {name}", median(values), "ns", spread(values)))
    for what in BPFTRACE:
        own = taken[f"{what}, sowatch"]
        base = taken["empty entry and return" if what == "latency" else "empty entry"]
        ratios = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
        figures.append(Figure(f"{what}: sowatch to empty", median(ratios), "x", spread(ratios)))
        for other in ("bpftrace", "bcc"):
            if theirs := taken.get(f"{what}, {other}"):
                ratios = [mine / their for mine, their in zip(own, theirs, strict=True)]
                figures.append(Figure(f"{what}: sowatch to {other}", median(ratios), "x", spread(ratios), aim=1.0))
    return figures


def compile_empty(directory: Path) -> Path:
    """The object that does nothing."""
    multiarch = subprocess.run([tool("cc"), "-print-multiarch"], capture_output=True, text=True, check=True).stdout
    target = ["-target", "bpf", f"-I/usr/include/{multiarch.strip()}"]
    made = directory / "empty_probe.bpf.o"
    subprocess.run([tool("clang"), "-O2", "-g", *target, "-c", HERE / "empty_probe.bpf.c", "-o", made], check=True)
    return made


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    pin(OTHER_CPU)
    empty_object = compile_empty(directory)
    flags = ["-shared", "-fPIC", "-O1", "-fno-omit-frame-pointer"]  # begins with a push, as most functions do
    library = build("probed", directory, flags=flags, output="libcalled.so")
    with Loop(build("callloop", directory), library) as loop:
        figures = costs(is_quick, directory, loop, empty_object)
        figures += program_times(is_quick, directory, loop, empty_object)
    return figures


if __name__ == "__main__":
    main("probes", measure)
