"""Fixtures of these tests alone: a scratch directory, a ledger of what is in it, compiled programs."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import Rule
from sowatch.model.config import NO_GUARD, Config
from sowatch.model.literals import KINDS
from support import bpfsys
from support.hostile import compile_c
from support.kernel import Ledger
from support.lifecycle import (
    COMMON,
    OURS,
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=OURS, dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def long_ledger(schema: Any, deadline: Any) -> Iterator[Ledger]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    rule = Rule(f"{OURS}|^/memfd:in memory$", kind=KINDS, name="ours")
    # The guard against floods is off: a program of these tests reports more at once than may wait.
    with Ledger(rule, timeout_s=deadline(10), check=schema, config=Config(max_records_s=NO_GUARD)) as ledger:
        yield ledger
        ledger.stop()


@pytest.fixture
def run(scratch: Path, spawn: Any) -> Callable[..., subprocess.Popen[bytes]]:
    """``run(source, *words)`` compiles and starts a C program that says a line and waits on standard input."""
    made = 0

    def start_one(source: str, *words: object, flags: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        nonlocal made
        made += 1
        program = compile_c(COMMON + source, scratch / f"program{made}", *flags)
        return spawn([program, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    return start_one
