"""Files whose names somebody else controls: what is opened is what was looked at."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sowatch.agent.reload import _digest
from sowatch.agent.settings import load_settings
from sowatch.linux.openat import open_regular, reopen
from sowatch.model.errors import ConfigError


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_fifo(path: Path) -> None:
    make_fifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


def make_directory(path: Path) -> None:
    path.mkdir()


ODD = pytest.mark.parametrize("make", [make_fifo, make_link_to_fifo, make_directory])


@ODD
def test_only_a_regular_file_is_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "odd")
    with pytest.raises(OSError, match=r"it is not a regular file|Is a directory"):
        open_regular(tmp_path / "odd")


def test_a_link_is_followed_unless_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    fd = open_regular(tmp_path / "link")
    assert os.read(fd, 10) == b"text"
    os.close(fd)
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(tmp_path / "link", follows_link=False)


def test_the_file_that_was_found_is_opened_whatever_has_its_name_by_then(tmp_path: Path) -> None:
    name = tmp_path / "name"
    name.write_bytes(b"first")
    place = os.open(name, os.O_PATH)
    name.unlink()
    os.mkfifo(name)
    fd = reopen(place, os.O_RDONLY)
    assert os.read(fd, 10) == b"first"
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(fd)
    os.close(place)


@ODD
def test_a_configuration_that_is_no_file_is_refused_and_does_not_hang(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"cannot read .*Give a regular file"):
        load_settings(str(tmp_path / "odd"))
    assert _digest(str(tmp_path / "odd")) in ("it is not a regular file", "Is a directory")
