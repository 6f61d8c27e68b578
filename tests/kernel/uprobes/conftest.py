"""Libraries to probe, each a copy of the test's own, and processes that call them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch import FileId, Library
from sowatch.engine.workers import ActiveFile
from support.callers import Caller
from support.programs import build, compile_bpf


@pytest.fixture(scope="session")
def probed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-shared", "-fPIC", "-O1", "-g0", "-Wl,--build-id"]
    return build("probed", tmp_path_factory.mktemp("probed"), flags=flags, output="libprobed.so")


@pytest.fixture
def probed(probed_template: Path, scratch: Path) -> Callable[..., Path]:
    """``probed(name)`` is a copy of tests/programs/probed.c as a library, with an inode of its own."""

    def make(name: str = "libprobed.so") -> Path:
        made = scratch / name
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(probed_template, made)
        return made

    return make


@pytest.fixture
def caller(spawn: Any, programs: Any) -> Callable[..., Caller]:
    """``caller(library)`` is a process that has the library open."""
    return lambda library=None, **options: Caller(spawn, programs["caller"], library, **options)


@pytest.fixture(scope="session")
def user_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user brings: tests/programs/user_probes.bpf.c."""
    return compile_bpf("user_probes", tmp_path_factory.mktemp("bpf"))


@pytest.fixture
def active() -> Iterator[Callable[..., ActiveFile]]:
    """``active(path)`` is what a rule's activation gets for a file."""
    fds = []

    def make(path: Path, generation: int = 0) -> ActiveFile:
        fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        status = os.fstat(fds[-1])
        file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino, generation)
        return ActiveFile(Library(str(path), file_id), fds[-1])

    yield make
    for fd in fds:
        os.close(fd)
