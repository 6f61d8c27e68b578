"""What system calls cost while sowatch watches by trampolines, beside what they cost with tracepoints.

Needs a kernel that allows both; ``scripts/matrix start 6.12`` gives a shell in one. A round runs every
variant once, in an order that turns with each round; figures are medians of the differences inside a
round, and ratios are taken inside a round too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.common import Command, Figure, build, main, make_libraries, median, pin, spread
from benchmarks.hooks import MODES, OTHER_CPU, loop

HOOKS = ("syscall", "trampoline")
WHAT = {
    "exec": "executable mmap+munmap",
    "file": "other mmap+munmap, of a file",
    "anon": "anonymous mmap+munmap",
    "getppid": "getppid",
}


@contextmanager
def watching(directory: Path, hooks: str) -> Iterator[None]:
    """Sowatch, with a rule that no file matches."""
    with Command(directory, "watch", "--json", "--strategy", "core", "--hooks", hooks, "^/no/such/library$") as command:
        ready = command.wait_ready()
        assert ready["hooks"] == hooks, ready
        yield


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, batches, pairs = (2, 5, 200) if is_quick else (12, 10, 500)
    pin(OTHER_CPU)
    (library,) = make_libraries(directory, 1)
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "nothing": nullcontext,
        "nothing again": nullcontext,
        "syscall": lambda: watching(directory, "syscall"),
        "trampoline": lambda: watching(directory, "trampoline"),
    }
    taken: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in variants for mode in MODES}
    names = list(variants)
    program = build("loadloop", directory)
    for turn in range(rounds):
        with loop(program, library) as run:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with variants[name]():
                    for mode in MODES:
                        count = pairs * (20 if mode == "getppid" else 1)
                        taken[name, mode].append(run(mode, batches, count))
        print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return figures(taken)


def figures(taken: dict[tuple[str, str], list[float]]) -> list[Figure]:
    rows = []
    for mode, what in WHAT.items():
        alone = taken["nothing", mode]
        rows.append(Figure(f"{what}, nothing attached", median(alone), "ns", spread(alone)))
        for name, label in (
            ("nothing again", "noise: nothing against nothing"),
            *((one, f"with hooks {one}") for one in HOOKS),
        ):
            ratios = [one / other for one, other in zip(taken[name, mode], alone, strict=True)]
            rows.append(Figure(f"... {label}", median(ratios), "x", spread(ratios)))
    return rows


if __name__ == "__main__":
    main("trampolines", measure)
