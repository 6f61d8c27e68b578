"""What a guest said, against the table: a list of faults, empty if all is as it must be. Imports ``kernels``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from matrix.kernels import CELLS, CHOICES, FEATURES, KNOWN_FAULTS, Cell

__all__ = ["Verdict", "faults_of_facts", "judge", "judge_unfinished", "step_of"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``passed``: tests that ran and passed. ``faults``: one line or more for each thing that is wrong.

    ``is_done``: it ran to its end.
    """

    release: str
    passed: int
    faults: tuple[str, ...]
    is_done: bool = True


def judge(kernel: str, out: Path, cells: Sequence[Cell] = CELLS) -> Verdict:
    """Reads what `inside` left in its directory; ``cells``: those that had to be tried."""
    try:
        facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Verdict("", 0, (f"it told nothing of itself ({error}); see {out / 'console.log'}",))
    passed = 0
    faults = list(faults_of_facts(kernel, facts, cells))
    for status in sorted(out.glob("*.rc")):
        report = status.with_suffix(".xml")
        rc = int(status.read_text(encoding="ascii"))
        if not report.exists():
            faults.append(f"pytest ended with {rc} and without a report; see {out / 'console.log'}")
            continue
        good, bad = _tests(report, _known_on(kernel))
        passed += good
        faults += bad
        # 1: some failed, which those that are known do.
        if rc not in (0, 1):
            faults.append(f"pytest ended with {rc}; see {out / 'console.log'}")
    return Verdict(facts["release"], passed, tuple(faults))


def judge_unfinished(kernel: str, out: Path, cells: Sequence[Cell] = CELLS) -> Verdict:
    """The same for a guest that was ended before it was done: what it has found wrong until then is wrong."""
    found = Verdict("", 0, ())
    if (out / "facts.json").exists():
        found = judge(kernel, out, cells)
    passed, faults = found.passed, list(found.faults)
    known = _known_on(kernel)
    for progress in sorted(out.glob("*.progress")):
        if progress.with_suffix(".rc").exists():
            continue  # its report was read
        for line in _lines(progress):
            if "test" not in line or line["test"] in known:
                continue
            if line["outcome"] == "passed":
                passed += 1
            else:
                faults.append(f"{line['test']} {line['outcome']}: {line['why']}")
    return Verdict(found.release, passed, tuple(faults), is_done=False)


def step_of(out: Path) -> str:
    """What a guest began last, for people."""
    written = sorted(out.glob("*.progress"), key=lambda path: path.stat().st_mtime_ns)
    begun = [line["begun"] for path in written for line in _lines(path) if "begun" in line]
    return begun[-1] if begun else "its start"


def _lines(progress: Path) -> list[dict[str, str]]:
    """What was written whole: the guest may have been ended in the middle of a line."""
    text = progress.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _known_on(kernel: str) -> frozenset[str]:
    return frozenset(fault.test for fault in KNOWN_FAULTS if kernel in fault.kernels)


def faults_of_facts(kernel: str, facts: Mapping[str, Any], cells: Sequence[Cell] = CELLS) -> Iterator[str]:
    """Where ``facts`` (see `inside`) and the table differ."""
    found: Mapping[str, str] = facts["features"]
    for name in FEATURES.keys() - found.keys():
        yield f"{name}: in the table, but nobody looked"
    for name, answer in found.items():
        if name not in FEATURES:
            yield f"{name}: {answer}, and not in the table of features"
            continue
        must = "yes" if kernel in FEATURES[name] else "no"
        if answer != must:
            why = facts["refusals"].get(name, "")
            yield f"{name}: {answer}, and must be {must}" + (f"\n{why}" if why else "")
    chosen = facts["choice"]
    if (chosen["strategy"], chosen["hooks"]) != CHOICES[kernel]:
        yield f"without options it chooses {chosen['strategy']}, {chosen['hooks']}, and must choose {CHOICES[kernel]}"
    for cell in cells:
        if cell.name in facts["cells"]:
            yield from _faults_of_cell(kernel, cell, facts["cells"][cell.name])
        else:
            yield f"{cell.name}: in the table, but nobody tried"


def _faults_of_cell(kernel: str, cell: Cell, decision: Mapping[str, Any]) -> Iterator[str]:
    words = "; ".join(f"{one['strategy']}: {one['error'] or 'works'}" for one in decision["attempts"])
    used = (decision["strategy"], decision["hooks"])
    if kernel in cell.works_on:
        if used != (cell.strategy, cell.hooks):
            yield f"{cell.name}: must be used, but it is {used[0]}, {used[1]} ({words})"
    elif kernel not in cell.refused_on:
        yield f"{cell.name}: the table says neither that it works nor why not ({words})"
    elif used == (cell.strategy, cell.hooks):
        yield f"{cell.name}: works, where the table says that it is refused"
    elif cell.refused_on[kernel] not in words:
        yield f"{cell.name}: refused with {words!r}, where the table says {cell.refused_on[kernel]!r}"


def _tests(report: Path, known: frozenset[str]) -> tuple[int, list[str]]:
    """How many tests of a JUnit file passed, and what the others say; ``known``: those that must fail."""
    passed, bad = 0, []
    # Written by our own pytest, in a guest that we started.
    for case in ET.parse(report).iter("testcase"):  # noqa: S314
        troubles = [child for child in case if child.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname')}::{case.get('name')}"
        if name in known:
            if not troubles:
                bad.append(f"{name} passes, where the table says that it fails: take it out of KNOWN_FAULTS")
        elif not troubles:
            passed += 1
        else:
            bad += [f"{name} {trouble.tag}: {trouble.get('message')}" for trouble in troubles]
    return passed, bad
