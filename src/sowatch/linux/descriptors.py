"""Giving descriptors back, whatever the file system says of it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final

__all__ = ["close_fd", "is_exhausted", "is_lack_of_resources"]

#: Of the process, of the host, and of memory for either.
_LACKS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def close_fd(fd: int) -> None:
    """Closes a descriptor of a file of somebody else's; a negative one is none.

    The file system may refuse the flush that comes with it (a FUSE server that has ended: ENOTCONN); the
    descriptor is free all the same (close(2), "Dealing with error returns from close()").
    """
    if fd >= 0:
        with suppress(OSError):
            os.close(fd)


def is_exhausted(error: OSError) -> bool:
    """Whether an open failed because there are no more descriptors, which says nothing about the file."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def is_lack_of_resources(error: BaseException) -> bool:
    """Whether an error with an ``errno`` says that descriptors or memory are lacking: the same may work later."""
    return getattr(error, "errno", None) in _LACKS
