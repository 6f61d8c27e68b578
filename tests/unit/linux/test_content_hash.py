"""Names for the content of files without a build id."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sowatch.linux.content_hash import htlhash


def hashed(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return htlhash(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 100_000])
def test_hash_is_of_head_tail_and_length(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)

    whole = content[:4096] + content[-4096:] + size.to_bytes(8, "big")
    assert hashed(tmp_path / "file") == "htlhash:" + hashlib.sha256(whole).hexdigest()[:32]


def test_empty_file_has_the_hash_that_everybody_computes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    # printf '\0\0\0\0\0\0\0\0' | sha256sum | head -c 32
    assert hashed(tmp_path / "file") == "htlhash:af5570f5a1810b7af78caf4bc70a660f"


def test_file_position_stays_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        os.lseek(fd, 7, os.SEEK_SET)
        htlhash(fd)

        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    finally:
        os.close(fd)
