"""What runs in a guest, or on any machine: tries every feature and cell, then runs the tests.

    python -m matrix.inside KERNEL DIRECTORY [PYTEST-ARGUMENT...]

With arguments for pytest no cell is tried, and these are the tests.
Writes ``facts.json`` and one ``*.xml`` (JUnit) for each run of pytest into the directory, and meanwhile ``*.progress``,
so that a guest that is slow can be told from one that hangs; ends with 0 whatever the tests say, because `judge`
decides. May import ``kernels``, ``cache`` and the package.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from matrix.at_once import PROGRESS
from matrix.cache import ROOT
from matrix.kernels import CELLS, HELPERS, TESTS, Cell
from sowatch.bpf.binding import BpfObject, probe
from sowatch.model.config import Config
from sowatch.model.errors import BpfError
from sowatch.sources.select import plan

if TYPE_CHECKING:
    from sowatch.model.literals import HooksSetting, StrategySetting

__all__: list[str] = []

#: Emulated guests need about this much longer than the machines for which deadlines were chosen.
_DEADLINE_SCALE = "20"
#: For one object: half a minute on a quiet machine. What was compiled is kept for the tests.
_COMPILE_TIMEOUT_S = 400.0


def main(kernel: str, out: Path, arguments: list[str]) -> None:
    """Look, write down, test."""
    facts = _look(out, () if arguments else CELLS)
    (out / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if arguments:
        _pytest(out / "asked.xml", arguments)
        return
    working = [cell for cell in CELLS if kernel in cell.works_on]
    for number, cell in enumerate(working):
        _pytest(out / f"cell-{number}.xml", [*cell.tests], {"SOWATCH_TEST_OPTIONS": " ".join(cell.options)})
    if any(cell.strategy != "procfs" for cell in working):
        _pytest(out / "kernel.xml", [*TESTS])


def _note(out: Path, what: str) -> None:
    with (out / "facts.progress").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"begun": what}) + "\n")


def _look(out: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """What `judge` reads.

    ``features``: name to yes, no or unknown. ``choice``: the decision of `sowatch doctor`. ``cells``: name to what is
    used if the cell is forced. ``refusals``: object to the words of the verifier.
    """
    _note(out, "doctor")
    report = _doctor()
    features: dict[str, str] = {one["name"]: one["answer"] for one in report["probes"]}
    for name, (program_type, helper) in HELPERS.items():
        features[name] = {True: "yes", False: "no", None: "unknown"}[probe("helper", program_type, helper)]
    refusals: dict[str, str] = {}
    for item in sorted(files("sowatch.bpf").joinpath("programs").iterdir(), key=lambda found: found.name):
        # What doctor loads by parts is no object that has to load as a whole.
        if item.name.endswith(".bpf.o") and item.name != "probes.bpf.o":
            _note(out, item.name)
            refusal = _refusal(str(item))
            features[item.name] = "no" if refusal else "yes"
            if refusal:
                refusals[item.name] = refusal
    forced = {}
    for cell in cells:
        _note(out, cell.name)
        forced[cell.name] = _force(cell)
    return {
        "release": platform.release(),
        "features": features,
        "choice": report["decision"],
        "cells": forced,
        "refusals": refusals,
    }


def _doctor() -> Any:
    command = [sys.executable, "-m", "sowatch", "doctor", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout)


def _force(cell: Cell) -> dict[str, Any]:
    strategy, hooks = cast("StrategySetting", cell.strategy), cast("HooksSetting", cell.hooks or "auto")
    found = plan(Config(strategy=strategy, hooks=hooks, compile_timeout_s=_COMPILE_TIMEOUT_S))
    attempts = [attempt._asdict() for attempt in found.attempts]
    return {"strategy": found.strategy, "hooks": found.hooks, "attempts": attempts}


def _refusal(path: str) -> str | None:
    """The last words of libbpf and the verifier about an object; None if it loads."""
    try:
        with BpfObject(path) as programs:
            programs.load()
    except BpfError as error:
        return f"{error}\n{error.log[-4000:]}"
    return None


def _pytest(report: Path, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    given = {"SOWATCH_FORCE_KERNEL_TESTS": "1", "SOWATCH_DEADLINE_SCALE": _DEADLINE_SCALE}
    given |= {PROGRESS: str(report.with_suffix(".progress")), **(environment or {})}
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "matrix.at_once",
        "--color=no",
        "--tb=short",
        "--durations=15",
        f"--junitxml={report}",
    ]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, check=False)
    # A run that ended before it wrote its report must not look like one without failures.
    report.with_suffix(".rc").write_text(str(done.returncode), encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
