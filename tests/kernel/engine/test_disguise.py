"""What a process can write about itself decides nothing: it hides no library, under any strategy, from map or audit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.config import Config
from support.forced import FORCED
from support.kernel import TAG, Ledger
from support.programs import Mapper

NOBODY = 65534
ROLES = ("interpreter", "over", "executable")
STRATEGIES = [FORCED["strategy"]] if FORCED else ["core", "prebuilt", "procfs"]
#: The library that ``library()`` makes in this run of the tests.
NEW = rf"/libnew{TAG}\.so$"


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.fixture
def disguise(programs: Any, spawn: Any, scratch: Path) -> Callable[[str, Path], subprocess.Popen[bytes]]:
    """``disguise(role, library)`` is a process of nobody's that has mapped the library and says something else."""
    program = shutil.copy(programs.variant("disguise", "-Wl,-z,now"), scratch)  # where nobody may go

    def start(role: str, library: Path) -> subprocess.Popen[bytes]:
        library.chmod(0o755)
        process: subprocess.Popen[bytes] = spawn(
            [program, role, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            user=NOBODY,
            group=NOBODY,
        )
        assert process.stdout
        assert process.stdout.readline() == b"ok\n"
        return process

    return start


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_that_disguise_themselves_hide_no_library(
    open_ledger: Callable[..., Ledger],
    start: Callable[..., Mapper],
    disguise: Callable[[str, Path], subprocess.Popen[bytes]],
    library: Callable[..., Path],
    strategy: str,
) -> None:
    new, rule = library(), Rule(NEW, name="library")
    pids = [disguise(role, new).pid for role in ROLES]
    ledger = open_ledger(rule, config=Config(**{"strategy": strategy, **FORCED, "poll_interval_s": 0.05}))
    pids += [disguise(role, new).pid for role in ROLES]
    for pid in pids:
        assert ledger.wait_load(pid, inode(new)).library.kind == "library"
    # All are read again, twice.
    ledger.watcher.set_rules(rule, Rule("/libmarker", name="marker"))
    ledger.watcher.set_rules(rule)
    assert ledger.watcher.audit().differences == ()
    honest = start()
    honest.map(new)
    ledger.wait_load(honest.pid, inode(new))
    assert {pid: ledger.story(pid, inode(new)) for pid in pids if len(ledger.story(pid, inode(new))) != 1} == {}
    assert {one.process.pid for one in ledger.watcher.snapshot() if one.library.kind == "library"} == {
        *pids,
        honest.pid,
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_honest_processes_have_their_program_and_their_interpreter_as_such(
    open_ledger: Callable[..., Ledger], start: Callable[..., Mapper], strategy: str
) -> None:
    before = start()
    rules = [Rule(None, name=kind, kind=kind) for kind in ("library", "executable", "interpreter")]
    config = Config(**{"strategy": strategy, **FORCED, "poll_interval_s": 0.05})
    ledger = open_ledger(*rules, config=config)
    for mapper in (before, start()):
        ledger.wait_equal(mapper.pid)
        found = {Path(event.library.path).name.split(".")[0]: event.rule for event in ledger.of(mapper.pid, "load")}
        loader = next(name for name in found if name.startswith("ld-"))
        assert found == {"mapper": "executable", loader: "interpreter", "libc": "library"}
