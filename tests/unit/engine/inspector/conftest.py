"""An inspector, whose clock is the test's, and files for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.engine import file_inspector
from sowatch.engine.address_space import MappedFile
from support.elf_files import Made
from support.inspections import Clock, Gate, Reader, name_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(file_inspector, "time", made)
    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate(file_inspector.find_mapped)
    monkeypatch.setattr(file_inspector, "find_mapped", made)
    return made


@pytest.fixture
def reader(gate: Gate, clock: Clock, deadline: Any) -> Iterator[Reader]:
    made = Reader(gate, clock, deadline(10))
    yield made
    made.end()


@pytest.fixture
def file(tmp_path: Path, clock: Clock) -> Callable[..., MappedFile]:
    """``file(name, content)`` writes a file and gives it as a process has it mapped."""

    def make(name: str = "lib.so", content: bytes | None = None, *, inode: int | None = None) -> MappedFile:
        path = tmp_path / name
        if content is None:
            content = Made().data()
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
        clock.files.append(path)
        return name_of(path, inode)

    return make
