"""Libraries to probe, each a copy of the test's own, and processes that call them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.callers import Caller
from support.programs import build


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
