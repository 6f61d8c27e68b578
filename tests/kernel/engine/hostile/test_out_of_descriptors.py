"""Without descriptors, which somebody may use up, the watch goes on, and is right once there are some again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import out_of_descriptors
from support.forced import FORCED
from support.programs import build
from support.scenarios import OFTEN, STRATEGIES

TESTS = Path(__file__).resolve().parents[3]
#: So few records a second that what a process does beyond them has to be scanned.
LITTLE = {"max_records_s": 20}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("limits", [{}, LITTLE], ids=["by records", "by scans"])
def test_without_descriptors_the_watch_goes_on_and_is_right_when_there_are_some(
    scratch: Path, tmp_path_factory: pytest.TempPathFactory, deadline: Any, strategy: str, limits: dict[str, int]
) -> None:
    program = build("mapper", tmp_path_factory.getbasetemp())
    fields = json.dumps({"strategy": strategy, **FORCED, **OFTEN, **limits})
    command = [sys.executable, out_of_descriptors.__file__, scratch, program, fields, str(deadline(20))]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=deadline(80),
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["reason"] == "Too many open files"
    assert found["was_running"], run.stderr
    assert found["differences"] == []
