"""docs/pythons.md: the table, with what a run without faults adds to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct

from roots.table import LEFT_OUT, ROOTS, SMOKE, UNIT

__all__ = ["NONE_MADE", "Run", "read", "render"]

_HEAD: Final = """\
# Pythons

<!-- Written by `scripts/test-wheel --write` from a run; the table behind it is tools/roots/table.py. -->
"""
_TRIED: Final = """\
In each system that has a release in this table, the wheel was installed by `pip install`, from files, into a root that
has Python and neither compiler nor libbpf; `sowatch watch` ran there, and then the tests against what was installed,
each file of which was compared with the wheel. {rest}
"""
_ELSEWHERE: Final = """\
Python 3.11 also runs the whole suite in each run of `.ci/run`, against the checkout. How to run one: `CONTRIBUTING.md`.
"""
#: The page says this as long as it has no run.
NONE_MADE: Final = "No run was made for this page yet, so it says nothing of any system."
#: Of systems that may be absent.
_ABSENT: Final = "Where it says `{word}`, nothing was tried."
_TESTS: Final = """\
The unit tests are {unit}; `scripts/test-wheel --full` runs all of them. The others are {smoke}, for each strategy that
needs no compiler.
"""
_NOT_RUN: Final = "not run"


class Run(Struct, frozen=True):
    """What one root gave: the release of its Python, its C library, and how many tests passed in it."""

    root: str
    python: str
    glibc: str
    unit: int
    kernel: int


def render(runs: Iterable[Run]) -> str:
    """The page for one run. Of roots that did not take part it says nothing but that."""
    by_name = {run.root: run for run in runs}
    rows = []
    for root in ROOTS:
        run = by_name.get(root.name)
        kernel = "" if run is None else str(run.kernel) if run.kernel else "none: no kernel of that machine here"
        ran = (run.python, run.glibc, str(run.unit), kernel) if run else (_NOT_RUN, "", "", "")
        rows.append([root.python, root.system, *ran])
    unit = ", ".join(f"`{name}`" for name in UNIT if name.startswith("tests/"))
    smoke = ", ".join(f"`{name}`" for name in SMOKE if name.startswith("tests/"))
    left_out = "".join(f"- `{name}`: {why}\n" for name, why in LEFT_OUT.items())
    rest = _ABSENT.format(word=_NOT_RUN) if len(by_name) < len(ROOTS) else ""
    tried = _TRIED.format(rest=rest).replace(" \n", "\n") if by_name else f"{NONE_MADE}\n"
    return (
        "\n".join(
            [
                _HEAD,
                tried,
                _ELSEWHERE,
                _table(["Python", "system", "release", "glibc", "unit tests passed", "others passed"], rows),
                _TESTS.format(unit=unit, smoke=smoke),
                "## Left out\n",
                "Tests that need a compiler or the sources, which a root has not:\n",
                left_out,
            ]
        ).rstrip("\n")
        + "\n"
    )


def read(page: str) -> list[Run]:
    """The runs that a page was rendered from."""
    found = []
    for root in ROOTS:
        match = re.search(
            rf"^\| {re.escape(root.python)} +\| {re.escape(root.system)} +\| ([\d.]\S*) +\| (\S+) +\| (\d+) +\| (\d*)",
            page,
            flags=re.MULTILINE,
        )
        if match:
            found.append(Run(root.name, match[1], match[2], int(match[3]), int(match[4] or 0)))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )
