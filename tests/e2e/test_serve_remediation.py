"""An upgrade and the end of the last process that ran on with the old file: as a command and Prometheus show it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.agent import NewAgent
from support.programs import Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")


def test_how_long_a_replaced_file_went_on_running_is_shown(
    new_agent: NewAgent, programs: Any, make_library: Callable[..., Path], tmp_path: Path
) -> None:
    library = make_library("libremedied.so")
    agent = new_agent("stale_interval_s = 1\n[[rules]]\npattern = 'libremedied'\n").start()

    def rows() -> list[list[str]]:
        command = [sys.executable, "-m", "sowatch", "debug", "remediation", "--socket", agent.socket]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.split() for line in done.stdout.splitlines()[1:]]

    def metric(name: str) -> float:
        lines = agent.get("/metrics").text.splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"sowatch_stale_{name} ")), -1.0)

    with Mapper(programs["mapper"], tmp_path) as running:
        running.map(library)
        agent.wait_until(lambda: "libremedied" in agent.get("/inventory").text, 60, "the load")
        make_library("libremedied.so.new").rename(library)
        replaced_s = library.stat().st_ctime
        agent.wait_until(rows, 60, "the stale file")
        (row,) = rows()
        assert row[1:6] == ["replaced", "1", "of", "1", "goes"]
        assert row[-1] == str(library)
        agent.wait_until(lambda: metric("oldest_timestamp_seconds") > 0, 60, "the metric")
        assert metric("oldest_timestamp_seconds") == pytest.approx(replaced_s, abs=0.01)
    agent.wait_until(lambda: metric("remediation_seconds_count") == 1, 60, "the end of the last process")
    (row,) = rows()
    assert (row[1:3], row[4]) == (["replaced", "1"], "s")
    assert metric("oldest_timestamp_seconds") == 0
    found = agent.get("/page/stale").json["remediations"]
    assert [(one["path"], one["processes"], one["left"], one["since_known"]) for one in found] == [
        (str(library), 1, 0, True)
    ]
    assert metric("remediation_seconds_sum") == pytest.approx(found[0]["seconds"], abs=0.01)
    assert agent.stop() == 0
