"""Fixtures of the end-to-end tests: agents, each with a short directory of its own, and commanded processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, NewAgent, short_directory
from support.programs import Mapper, build


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory() as made:
        yield made


@pytest.fixture
def new_agent(spawn: Any, wait_until: Any, place: Path, deadline: Any) -> NewAgent:
    """``new_agent(config=None, options=(), ...)`` is an agent in ``place`` that is not started yet."""
    return lambda *words, **more: Agent(spawn, wait_until, place, *words, **{"timeout_s": deadline(20), **more})


@pytest.fixture
def mapper(programs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapper]:
    """A running Mapper that ends with the test."""
    with Mapper(programs["mapper"], tmp_path_factory.mktemp("m")) as running:
        yield running


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """Closes what is entered into it when the test ends, last first."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def probed_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-shared", "-fPIC", "-O1", "-g0", "-Wl,--build-id"]
    return build("probed", tmp_path_factory.mktemp("probed"), flags=flags, output="libprobed.so")


@pytest.fixture
def library(probed_template: Path, place: Path) -> Callable[[str], Path]:
    """``library(name)`` is a copy of tests/programs/probed.c as a library, with an inode of its own."""

    def make(name: str = "libprobed.so") -> Path:
        return Path(shutil.copyfile(probed_template, place / name))

    return make
