"""Commands as a person sees them, on terminals of 80 and 200 columns, and how Ctrl-C ends them there."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from support.programs import Mapper
from support.screen import Terminal

SOWATCH = Path(sysconfig.get_path("scripts")) / "sowatch"


@pytest.mark.parametrize("columns", [80, 200])
def test_watch_shows_each_change_once_and_ctrl_c_ends_it_with_stopped(
    mapper: Mapper, make_library: Any, tmp_path: Path, deadline: Any, columns: int
) -> None:
    words = [SOWATCH, "watch", re.escape(str(tmp_path))]
    with Terminal(words, columns=columns, rows=40, timeout_s=deadline(60)) as terminal:
        terminal.wait_for(lambda lines: any("ready: " in line for line in lines), "ready")
        mapper.map(make_library("libseen.so"))
        mapper.exit()
        terminal.wait_for(lambda lines: any(" - exit " in line for line in lines), "the unload")
        terminal.press("\x03")
        assert terminal.wait_for_end() == 0
        shown = terminal.lines()
    text = "".join(line.ljust(columns) for line in shown)
    assert re.findall(r"\d ([-+*o]) (\w+) ", text) == [("+", "mmap"), ("-", "exit")]
    assert re.search(r"stopped: 1 load, 1 unload, \d+ lost", text)
    assert "Traceback" not in text


@pytest.mark.parametrize(("columns", "most"), [(80, 80), (200, 120)])
def test_doctor_is_wrapped_at_the_width_of_the_terminal(deadline: Any, columns: int, most: int) -> None:
    with Terminal([SOWATCH, "doctor"], columns=columns, rows=200, timeout_s=deadline(60)) as terminal:
        assert terminal.wait_for_end() in (0, 1, 3)
        shown = [line for line in terminal.lines() if line]
    assert max(map(len, shown)) <= most
    assert [line for line in shown if not line.startswith(" ")] == [
        "this machine",
        "this user",
        "watching uses no uprobes: watch, run, list, top, audit, explain, serve",
        "probing uses uprobes: trace, http, rules of serve that count or attach",
        "BPF objects of this installation, SHA-256",
    ]


def test_doctor_in_a_pipe_has_80_columns() -> None:
    done = subprocess.run([SOWATCH, "doctor"], stdout=subprocess.PIPE, text=True, check=False)
    assert max(map(len, done.stdout.splitlines())) <= 80
