"""docs/kernels.md: the table, with what a run without faults adds to it. May import ``kernels``.

Marks come from the table, because a run in which a guest differed from it writes no page.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from matrix.kernels import CELLS, CHOICES, FEATURES, KERNELS, KNOWN_FAULTS, Cell, Kernel, KnownFault

__all__ = ["Run", "is_news", "read", "render"]

_HEAD = """\
# Kernels

<!-- Written by `scripts/matrix --write` from a run; the table behind it is tools/matrix/kernels.py. -->

Each of these kernels ran as a guest (QEMU, emulated, x86-64) with as many tests as the table says, and showed
exactly what this page says of it: a guest that shows more or less fails the run. A question mark: it did not take
part in this run, so the table is silent on it. How to run one: `CONTRIBUTING.md`.

Where a strategy works it was forced, with its hooks, and reported every scenario of
`tests/kernel/sources/test_conformance.py` and what `sowatch watch` must report of `tests/e2e/test_commands.py`;
`runtime` compiled its programs in the guest.
"""
_FEATURES = """\
Found by loading or attaching something that needs them, never by the version. A `.bpf.o` is an object of the BPF
programs, which has to load as a whole.
"""


_NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Run:
    """What one guest gave: its kernel's release and how many tests passed in it."""

    kernel: str
    release: str
    passed: int


def render(runs: Iterable[Run]) -> str:
    """The page for one run. Of kernels that did not take part it says nothing but that."""
    by_name = {run.kernel: run for run in runs}
    names = [kernel.name for kernel in KERNELS]
    ran = []
    for kernel in KERNELS:
        run = by_name.get(kernel.name)
        ran.append([kernel.name, kernel.suite, *((run.release, str(run.passed)) if run else (_NOT_RUN, ""))])
    chosen = ["without options", *(_choice(*CHOICES[name]) if name in by_name else "?" for name in names)]
    cells = [[cell.name, *(_mark(by_name, name, "works", cell.works_on) for name in names)] for cell in CELLS]
    features = [[feature, *(_mark(by_name, name, "yes", has) for name in names)] for feature, has in FEATURES.items()]
    parts = [
        _HEAD,
        _table(["kernel", "Debian suite", "release", "tests passed"], ran),
        "## Strategies and hook sets\n",
        _table(["strategy", *names], [*cells, chosen]),
        *_reasons(),
        *_faults(),
        "## Features\n",
        _FEATURES,
        _table(["feature", *names], features),
    ]
    return "\n".join(parts)


def read(page: str) -> list[Run]:
    """The runs that a page was rendered from."""
    suites = "|".join(kernel.suite for kernel in KERNELS)
    found = re.findall(rf"^\| (\S+) +\| (?:{suites}) +\| (\S+) +\| (\d+) +\|$", page, flags=re.MULTILINE)
    return [Run(kernel, release, int(passed)) for kernel, release, passed in found]


def is_news(kernel: Kernel, release: str, page: str) -> bool:
    """Whether a kernel that moves on by itself has done so since the page was written: then it may differ."""
    return kernel.may_be_absent and bool(release) and release not in {run.release for run in read(page)}


def _mark(runs: Container[str], kernel: str, word: str, kernels: Container[str]) -> str:
    if kernel not in runs:
        return "?"
    return word if kernel in kernels else "no"


def _choice(strategy: str | None, hooks: str | None) -> str:
    return ", ".join(word for word in (strategy, hooks) if word) or "nothing"


def _reasons() -> list[str]:
    lines = [line for cell in CELLS for line in _reasons_of(cell)]
    return ["Where it says no, what is refused:\n", "\n".join(lines) + "\n"] if lines else []


def _reasons_of(cell: Cell) -> list[str]:
    return [f"- {cell.name}, {kernel}: {words}" for kernel, words in cell.refused_on.items()]


def _faults() -> list[str]:
    lines = [_fault(fault) for fault in KNOWN_FAULTS]
    return ["## Known faults\n", "Tests that fail, and why:\n", "\n".join(lines) + "\n"] if lines else []


def _fault(fault: KnownFault) -> str:
    where = ", ".join(kernel.name for kernel in KERNELS if kernel.name in fault.kernels)
    return f"- {where}: {fault.why} (`{fault.test.partition('::')[2]}`)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
