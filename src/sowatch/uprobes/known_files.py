"""Files that are to be probed before anybody loads them: by patterns of paths, or as the inventory has seen them."""

from __future__ import annotations

import glob
import itertools
import os
from typing import Final, NamedTuple

from sowatch.linux.descriptors import close_fd
from sowatch.linux.mapped_file import is_on_overlay, open_layer
from sowatch.linux.openat import open_regular, shows_real_inode
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import Library
from sowatch.model.identity import FileId

__all__ = ["KnownFile", "find_known", "open_known"]

#: A pattern that finds more files than this is a mistake: each of them is held open.
MAX_FILES: Final = 4096


class KnownFile(NamedTuple):
    """An open file, and what stat says of it; the caller closes ``fd``."""

    library: Library
    fd: int


def find_known(pattern: str) -> list[str]:
    """The paths that a pattern finds now, in order.

    Raises:
        UsageError: it is no absolute path, or finds too many files.
    """
    if not pattern.startswith("/"):
        raise UsageError(f"prearm: {pattern!r} is no absolute path. Write /usr/lib/*/libssl.so.3.")
    found = list(itertools.islice(glob.iglob(pattern, recursive=True), MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise UsageError(f"prearm: {pattern!r} finds more than {MAX_FILES} files. Give a narrower pattern.")
    return sorted(found)


def open_known(what: str | Library, proc: ProcFs) -> KnownFile:
    """Opens a file by its path, or one that the inventory has seen.

    On overlayfs the file of the layer below is opened, which is what every container that shares the layer maps.

    Raises:
        SowatchError: it cannot be opened, is another file by now, or its inode cannot be determined.
    """
    path = what if isinstance(what, str) else what.host_path
    if path is None:
        assert isinstance(what, Library)
        raise SowatchError(f"no path leads to {what.path} from here. Give the path of the file on the host.")
    try:
        fd = open_regular(path)
    except OSError as error:
        raise SowatchError(f"cannot open {path}: {error.strerror}. Give the path of a library.") from error
    try:
        if is_on_overlay(fd):
            layer = open_layer(proc, os.getpid(), os.path.realpath(path), os.fstat(fd))
            close_fd(fd)
            fd = -1 if layer is None else layer
        library = _checked(what, path, fd)
    except BaseException as error:
        close_fd(fd)
        if isinstance(error, OSError):
            reason = f"the file system of {path} does not say which file it is: {error.strerror}"
            raise SowatchError(f"{reason}. It is attached when a process maps it.") from error
        raise
    return KnownFile(library, fd)


def _checked(what: str | Library, path: str, fd: int) -> Library:
    if fd < 0:
        raise SowatchError(f"no layer of the overlay below {path} can be reached. Give the path in its layer.")
    if not shows_real_inode(fd):
        raise SowatchError(
            f"the file system of {path} does not show the inode that the kernel maps (btrfs). "
            "It is attached when a process maps it."
        )
    status = os.fstat(fd)
    found = FileId(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    if isinstance(what, str):
        return Library(path, found, host_path=path)
    if what.id[:3] != found[:3]:
        raise SowatchError(f"{path} is another file by now. Take a new inventory.")
    return what
