"""What an executable mmap+munmap pair, other mmaps and getppid cost while sowatch watches.

Beside each stands what empty programs on the same hooks cost. A round runs every variant once, in
an order that turns with each round; figures are medians of the differences inside a round. The
second "nothing" and the second "empty" variant show how much of a difference is noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.common import HERE, Command, Figure, build, main, make_libraries, median, pin, quantile, spread, tool

MODES = ("exec", "file", "anon", "getppid")
PAIR = ("sys_enter_mmap", "sys_exit_mmap")
HOOKS = (*PAIR, "sys_enter_munmap", "sys_exit_munmap")
MEASURED_CPU, OTHER_CPU = 1, 0


def compile_empty(directory: Path) -> tuple[Path, Path]:
    """The program that attaches, and the object that does nothing."""
    cc, clang = tool("cc"), tool("clang")
    attach, empty = directory / "attach", directory / "empty.bpf.o"
    multiarch = subprocess.run([cc, "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    target = ["-target", "bpf", f"-I/usr/include/{multiarch}"]
    subprocess.run([cc, "-O2", HERE / "attach.c", "-o", attach, "-lbpf"], check=True)
    subprocess.run([clang, "-O2", "-g", *target, "-c", HERE / "empty.bpf.c", "-o", empty], check=True)
    return attach, empty


@contextmanager
def attached(attach: Path, empty: Path, hooks: tuple[str, ...]) -> Iterator[None]:
    """Empty programs on the hooks."""
    with subprocess.Popen([attach, empty, *hooks], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdin
        assert running.stdout
        if running.stdout.readline() != b"ready\n":
            raise RuntimeError("the empty programs did not attach")
        yield
        running.stdin.close()


@contextmanager
def watching(directory: Path) -> Iterator[None]:
    """Sowatch, with a rule that no file matches."""
    with Command(directory, "watch", "--json", "^/no/such/library$") as command:
        command.wait_ready()
        yield


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, batches, pairs = (2, 5, 500) if is_quick else (25, 30, 500)
    pin(OTHER_CPU)
    attach, empty = compile_empty(directory)
    (library,) = make_libraries(directory, 1)
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "nothing": nullcontext,
        "nothing again": nullcontext,
        "empty pair": lambda: attached(attach, empty, PAIR),
        "empty": lambda: attached(attach, empty, HOOKS),
        "empty again": lambda: attached(attach, empty, HOOKS),
        "sowatch": lambda: watching(directory),
    }
    taken: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in variants for mode in MODES}
    names = list(variants)
    undisturbed = tries = 0
    while undisturbed < rounds and tries < 3 * rounds:
        turn = tries % len(names)
        tries += 1
        fresh: dict[tuple[str, str], float] = {}
        was_single_user = is_quick or becomes_single_user()
        with loop(build("loadloop", directory), library) as run:
            for name in names[turn:] + names[:turn]:
                with variants[name]():
                    for mode in MODES:
                        fresh[name, mode] = run(mode, batches, pairs * (20 if mode == "getppid" else 1))
        # With --quick the figures mean little anyway.
        if was_single_user and (is_quick or is_single_user()):
            undisturbed += 1
            for key, value in fresh.items():
                taken[key].append(value)
        print(f"\rround {undisturbed} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    if undisturbed < rounds:
        raise SystemExit("other BPF programs are on tracepoints; they would be measured too. End them first.")
    return figures(taken)


def is_single_user() -> bool:
    """Whether no tracepoint program is loaded: with one, "nothing attached" would not be true."""
    listed = subprocess.run([tool("bpftool"), "--json", "prog", "show"], capture_output=True, check=True).stdout
    return all(program["type"] != "tracepoint" for program in json.loads(listed))


def becomes_single_user() -> bool:
    """Whether the tracepoints are free, or are within half a minute."""
    deadline = time.monotonic() + 30
    while not is_single_user():
        if time.monotonic() > deadline:
            raise SystemExit("other BPF programs are on tracepoints; they would be measured too. End them first.")
        time.sleep(0.5)
    return True


@contextmanager
def loop(program: Path, library: Path) -> Iterator[Callable[[str, int, int], float]]:
    """A pinned process that measures: (mode, batches, pairs) to ns for each pair or call."""
    command: list[str | Path] = [program, library, str(MEASURED_CPU)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        scan, writing = running.stdout, running.stdin
        assert scan
        assert writing

        def run(mode: str, batches: int, pairs: int) -> float:
            writing.write(f"{mode} {batches} {pairs}\n".encode())
            writing.flush()
            # The best batch is the one that the rest of the machine disturbed least.
            return float(json.loads(scan.readline())["min_ns"])

        yield run
        writing.close()


def figures(taken: dict[tuple[str, str], list[float]]) -> list[Figure]:
    def added(name: str, mode: str, beside: str = "nothing") -> list[float]:
        return [one - other for one, other in zip(taken[name, mode], taken[beside, mode], strict=True)]

    rows = []
    alone = taken["nothing", "exec"]
    rows.append(Figure("executable mmap+munmap, nothing attached", median(alone), "ns", spread(alone)))
    noise = added("nothing again", "exec")
    rows.append(Figure("... noise: nothing against nothing", median(noise), "ns", spread(noise)))
    noise = added("empty again", "exec", "empty")
    rows.append(Figure("... noise: empty against empty", median(noise), "ns", spread(noise)))
    for name, what in (("empty pair", "two empty programs on mmap"), ("empty", "four empty programs on mmap, munmap")):
        cost = added(name, "exec")
        rows.append(Figure(f"... added by {what}", median(cost), "ns", spread(cost)))
    cost = added("sowatch", "exec")
    rows.append(Figure("... added by sowatch", median(cost), "ns", spread(cost)))
    for name, aim in (("empty pair", None), ("empty", 1.0)):
        ratios = [one / max(other, 1.0) for one, other in zip(cost, added(name, "exec"), strict=True)]
        what = "two" if name == "empty pair" else "four"
        rows.append(Figure(f"... sowatch to {what} empty programs", median(ratios), "x", spread(ratios), aim=aim))
    for mode, what in (
        ("file", "other mmap+munmap, of a file"),
        ("anon", "anonymous mmap+munmap"),
        ("getppid", "getppid"),
    ):
        alone, empty, cost = taken["nothing", mode], added("empty", mode), added("sowatch", mode)
        noise = added("empty again", mode, "empty")
        more = added("sowatch", mode, "empty")
        rows.append(Figure(f"{what}, nothing attached", median(alone), "ns", spread(alone)))
        rows.append(Figure("... added by four empty programs", median(empty), "ns", spread(empty)))
        rows.append(Figure("... noise: empty against empty", median(noise), "ns", spread(noise)))
        rows.append(Figure("... added by sowatch", median(cost), "ns", spread(cost)))
        # No more than the empty programs, as far as two runs of those agree with each other.
        is_met = median(more) <= max(0.0, quantile(noise, 0.75))
        rows.append(Figure("... sowatch against empty", median(more), "ns", spread(more), aim=0, met=is_met))
    return rows


if __name__ == "__main__":
    main("hooks", measure)
