"""Fixtures of the kernel tests: short scratch directories, commanded processes, taps and ledgers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.model.config import NO_GUARD, Config
from support import bpfsys
from support.kernel import TAG, Ledger, Tap
from support.programs import Mapper, compile_library
from support.stepped import Stall, Trick


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory with a short name (sockets live in it) that any user may enter."""
    # On a real file system, whatever /tmp is: tests compare what stat says.
    made = Path(tempfile.mkdtemp(prefix="sow-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    # Some tests make deeper directories than shutil.rmtree can follow.
    subprocess.run(["rm", "-rf", made], check=True)


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """Closes what is entered into it when the test ends, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once: in an emulated guest the compiler takes longer than most tests."""
    return compile_library(tmp_path_factory.mktemp("template") / "libtemplate.so")


@pytest.fixture
def library(template: Path, scratch: Path) -> Callable[..., Path]:
    """``library(name)`` is a new library of that name in ``scratch``, with an inode of its own."""

    def make(name: str | os.PathLike[str] = f"libnew{TAG}.so") -> Path:
        made = scratch / name
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, made)
        return made

    return make


@pytest.fixture
def start(programs: Any, scratch: Path, closing: contextlib.ExitStack) -> Callable[..., Mapper]:
    """``start(program=None)`` is a running Mapper that ends with the test."""

    def run(program: Path | None = None) -> Mapper:
        return closing.enter_context(Mapper(program or programs["mapper"], scratch))

    return run


@pytest.fixture
def open_tap(programs: Any, scratch: Path, deadline: Any, closing: contextlib.ExitStack) -> Callable[..., Tap]:
    """``open_tap(ring_bytes=..., ...)`` is a Tap with that configuration."""

    def open_one(**config: Any) -> Tap:
        return closing.enter_context(Tap(programs["mapper"], scratch, deadline(10), **config))

    return open_one


@pytest.fixture(scope="module")
def long_scratch() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sow-", dir="/var/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def long_tap(programs: Any, long_scratch: Path, deadline: Any) -> Iterator[Tap]:
    """Loading and unloading the programs takes longer than most tests, so those of a module share a tap."""
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    with Tap(programs["mapper"], long_scratch, deadline(10)) as tap:
        yield tap


@pytest.fixture
def tap(long_tap: Tap) -> Tap:
    """A Tap with the default configuration, no record taken yet, no verdict given, nothing special reported."""
    long_tap.reset()
    return long_tap


@pytest.fixture
def open_ledger(schema: Any, deadline: Any, closing: contextlib.ExitStack) -> Callable[..., Ledger]:
    """``open_ledger(*rules, **options)`` is a started Ledger; its watcher ends with the test."""

    def open_one(*rules: Any, **options: Any) -> Ledger:
        return closing.enter_context(Ledger(*rules, timeout_s=deadline(10), check=schema, **options))

    return open_one


@pytest.fixture(scope="module")
def long_ledger(schema: Any, deadline: Any) -> Iterator[Ledger]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    # The guard against floods is off: here it is the protocol that is tried, as fast as threads can map.
    with Ledger(timeout_s=deadline(10), check=schema, config=Config(max_records_s=NO_GUARD)) as ledger:
        yield ledger
        ledger.stop()


@pytest.fixture
def ledger(long_ledger: Ledger) -> Iterator[Ledger]:
    """A Ledger of everything, running since before the test. The whole stream is checked, not just the test's."""
    before = len(long_ledger.controls())
    yield long_ledger
    controls = long_ledger.controls()[max(1, before) :]
    assert not controls, f"events were lost, so the test shows nothing: {long_ledger.watcher.stats.losses}"


@pytest.fixture
def pin(programs: Any, spawn: Any) -> Callable[..., subprocess.Popen[bytes]]:
    """``pin(pid, address)`` holds the address space of a process, as a reader of its maps does, until it is killed."""
    program = programs.variant("pin", "-pthread")

    def hold(pid: int, address: int) -> subprocess.Popen[bytes]:
        words = [program, str(pid), f"{address:x}"]
        held: subprocess.Popen[bytes] = spawn(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert held.stdout
        assert held.stdout.readline() == b"ok\n"
        return held

    return hold


@pytest.fixture
def stall(programs: Any, closing: contextlib.ExitStack) -> Callable[..., Stall]:
    """``stall(way, first, other)`` is a running Stall."""
    program = programs.variant("stall", "-pthread")
    return lambda *words: closing.enter_context(Stall(program, *words))


@pytest.fixture
def trick(programs: Any, closing: contextlib.ExitStack) -> Callable[..., Trick]:
    """``trick(way, *files)`` is a running Trick."""
    return lambda *words: closing.enter_context(Trick(programs["tricks"], *words))
