"""The simulator of benchmarks/fleet.py: every answer of a store is what the hosts really had mapped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: It computes for half a minute, on a machine of its own.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[3]


def test_every_answer_is_what_the_hosts_really_had_mapped() -> None:
    # In a process of its own: chdb starts threads, and opens files, that stay.
    command = [sys.executable, "-m", "benchmarks.fleet", "check", "120", "1", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differences"] == 0
    assert found["compared"].keys() == {
        "coverage",
        "state",
        "who",
        "remediated",
        "versions",
        "stale",
        "history",
    }
    assert found["compared"]["who"] > 4000
    assert found["records"] > 30_000


def test_an_answer_that_is_wrong_is_found(tmp_path: Path) -> None:
    # The same with a store that believes what is out of force.
    code = (
        "import runpy, sys, sowatch.fleet.schema as schema\n"
        "right = schema.schema_sql()\n"
        "wrong = right.replace('WHERE reported.version >= coverage.in_force_from', 'WHERE 1')\n"
        "assert wrong != right\n"
        "schema.schema_sql = lambda: wrong\n"
        "sys.argv = ['fleet', 'check', '36', '1', '1']\n"
        "runpy.run_module('benchmarks.fleet', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["differences"] > 0
    assert "lost_earlier" in done.stderr  # its unmapped record never came
