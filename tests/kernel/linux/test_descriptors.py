"""Giving a descriptor back of which the file system does not want to hear."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.descriptors import close_fd
from support.silent_fs import NAME, SilentFileSystem


def test_a_file_system_that_has_ended_refuses_the_close_and_the_descriptor_is_free(
    make_library: Any, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so")) as silent:
        fd = os.open(f"/proc/{silent.pid}/root{tmp_path}/mnt/{NAME}", os.O_RDONLY)
        other = os.dup(fd)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(other)
    close_fd(fd)
    open_fds = os.listdir("/proc/self/fd")
    assert str(fd) not in open_fds
    close_fd(-1)
