"""`.ci/run`: what comes of the wheel's stage neither hides the stages after it nor is hidden by them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: What it starts. Here each only writes down that it was started.
STEPS = ("setup", "lint", "test", "test-fresh", "test-wheel", "matrix")


def run_with(directory: Path, wheel_ends_with: int) -> tuple[int, str, list[str]]:
    """Its exit code, what it printed, and what it started, in a checkout whose `scripts/test-wheel` ends so."""
    (directory / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/run", directory / ".ci/run")
    for name in (*(f"scripts/{step}" for step in STEPS), "benchmarks/run"):
        code = wheel_ends_with if name.endswith("test-wheel") else 0
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {name} >>started\nexit {code}\n", encoding="utf-8")
        path.chmod(0o755)
    done = subprocess.run([directory / ".ci/run"], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, (directory / "started").read_text(encoding="utf-8").split()


@pytest.mark.parametrize(
    ("ends_with", "gives", "words"),
    [
        pytest.param(0, 0, "", id="passed"),
        pytest.param(1, 1, "the wheel: failed", id="failed"),
        pytest.param(2, 1, "the wheel: failed", id="wrong usage"),
        pytest.param(124, 0, "the wheel: not finished in time", id="time was up"),
        pytest.param(75, 0, "the wheel: not tried", id="no mirror was reached"),
        pytest.param(137, 1, "the wheel: failed", id="killed before the time was up"),
    ],
)
def test_guests_and_benchmarks_run_whatever_comes_of_the_wheel(tmp_path, ends_with, gives, words) -> None:
    code, said, started = run_with(tmp_path, ends_with)
    assert code == gives
    assert [*started[-3:]] == ["scripts/test-wheel", "scripts/matrix", "benchmarks/run"]
    assert words in said
    assert ("the wheel: " in said) == bool(words)
