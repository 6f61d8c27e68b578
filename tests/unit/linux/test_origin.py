"""Which host this is, as the files of machine-id(5) say."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from packaging.version import Version

import sowatch
from sowatch.linux.origin import host_id, origin_of
from sowatch.linux.proc import ProcFs

ID = "0123456789abcdef0123456789abcdef"


def proc_with(directory: Path, place: str, text: str) -> ProcFs:
    """A proc file system whose process 1 has such a file in its root."""
    for part in ("self", "1/ns", f"1/root/{os.path.dirname(place)}"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    (directory / "1" / "root" / place).write_text(text)
    proc = ProcFs()
    proc.root = str(directory)
    return proc


@pytest.mark.parametrize("place", ["etc/machine-id", "var/lib/dbus/machine-id"])
def test_the_id_is_read_in_the_root_of_the_first_process(tmp_path: Path, place: str) -> None:
    assert host_id(proc_with(tmp_path, place, f"{ID}\n")) == ID


@pytest.mark.parametrize("text", ["", "uninitialized\n", ID.upper(), ID + "0"])
def test_what_is_no_id_is_not_taken_for_one_nor_for_that_of_another_root(tmp_path: Path, text: str) -> None:
    assert host_id(proc_with(tmp_path, "etc/machine-id", text)) is None


def test_the_origin_is_this_host_this_boot_and_this_package() -> None:
    found = origin_of(ProcFs())

    assert found.host == socket.gethostname()
    assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # In a checkout the metadata is of the last setup, and an sdist that was made since writes the file anew.
    assert found.version == sowatch.__version__
    assert Version(found.version) >= Version("0.1.dev0")
