"""Roots with package databases, and processes in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory.packages import Packages
from support.package_roots import DEBIAN, Jailed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root directory of a Debian 12, with nothing in it."""
    made = tmp_path / "root"
    (made / "etc").mkdir(parents=True)
    (made / "etc/os-release").write_text(DEBIAN)
    return made


@pytest.fixture
def jailed(spawn: Any, root: Path) -> Callable[[], Jailed]:
    """Starts a process in it."""
    return lambda: Jailed(spawn, root)


@pytest.fixture
def found() -> Iterator[Packages]:
    """What finds packages; closed after the test."""
    with Packages() as made:
        yield made
