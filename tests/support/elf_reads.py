"""The ELF readers asked about files that are only bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.elf import ElfFacts, read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import read_exports, symbol_offsets

__all__ = ["FLAVOURS", "bytes_read", "errno_of", "exports", "facts", "flavours", "offsets", "opened"]


@contextmanager
def opened(data: bytes, *, size: int | None = None) -> Iterator[int]:
    """A memfd with this content; a larger ``size`` leaves a hole at its end."""
    fd = os.memfd_create("made")
    try:
        os.write(fd, data)
        if size is not None:
            os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def facts(data: bytes, **options: Any) -> ElfFacts:
    with opened(data) as fd:
        found = read_facts(fd, **options)
    assert found is not None
    return found


def exports(data: bytes, *wanted: str, **options: Any) -> frozenset[str]:
    """What is exported; for wanted names both ways of asking must agree."""
    with opened(data) as fd:
        found = read_exports(fd, **options)
        if wanted:
            assert read_exports(fd, wanted, **options) == found & set(wanted)
        assert read_exports(fd, found, **options) == found
    return found


def offsets(data: bytes, name: str) -> tuple[int, ...]:
    with opened(data) as fd:
        return symbol_offsets(fd, name)


def errno_of(ask: Callable[[], object]) -> int | None:
    """That of the ElfError it ends with; None if the file is at fault, or nobody."""
    try:
        ask()
    except ElfError as error:
        return error.errno
    return None


def bytes_read() -> int:
    """By this process with read and pread so far; the kernel counts (/proc/self/io, rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


FLAVOURS = [
    (bits, order, hashes) for bits in (32, 64) for order in "<>" for hashes in (("gnu",), ("old",), ("gnu", "old"))
]
flavours = pytest.mark.parametrize(("bits", "order", "hashes"), FLAVOURS)
