"""Fixtures of the hostile tests: what hangs, and an agent beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, short_directory
from support.hangs import Hang


@pytest.fixture
def hang(programs: Any, scratch: Path, deadline: Any, closing: contextlib.ExitStack) -> Callable[..., Hang]:
    """``hang(way, library, count)`` is a running Hang; it ends before everything that was opened earlier."""
    program = programs.variant("hang", "-pthread")

    def start(way: str, library: Path, count: int = 1) -> Hang:
        return closing.enter_context(Hang(program, way, scratch / "m", library, count, timeout_s=deadline(10)))

    return start


@pytest.fixture
def agent(spawn: Any, wait_until: Any, deadline: Any) -> Iterator[Callable[..., Agent]]:
    """``agent(config)`` is a started agent."""
    with contextlib.ExitStack() as stack:

        def start(config: str) -> Agent:
            place = stack.enter_context(short_directory())
            return Agent(spawn, wait_until, place, config, timeout_s=deadline(15)).start()

        yield start
