"""When a file was made and written to, as statx(2) shows it: `file_times`."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import lru_cache
from typing import Any, Final, NamedTuple

__all__ = ["FileTimes", "file_times"]

#: include/uapi/linux/stat.h and fcntl.h
_STATX_BTIME: Final = 0x800
_AT_EMPTY_PATH: Final = 0x1000
#: struct statx, 256 bytes: stx_mask at 0, stx_btime at 80, each time 16 bytes (s64 seconds, u32 nanoseconds, padding).
_SIZE_BYTES: Final = 256
_MASK: Final = struct.Struct("=I")
_TIME: Final = struct.Struct("=qI4x")
_BTIME_AT: Final = 80


class FileTimes(NamedTuple):
    """By the wall clock, in ns since the epoch.

    ``born_ns``: when the inode was made, None where its file system does not keep that. ``written_ns``: when its
    content was written last, or what utimensat(2) has set.
    """

    born_ns: int | None
    written_ns: int


def file_times(fd: int) -> FileTimes:
    """Of a descriptor, which may be one that opens nothing (O_PATH).

    Raises:
        OSError: as fstat(2).
    """
    status = os.fstat(fd)
    buffer = ctypes.create_string_buffer(_SIZE_BYTES)
    statx = _statx()
    born_ns = None
    if statx is not None and statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) == 0:
        (mask,) = _MASK.unpack_from(buffer)
        if mask & _STATX_BTIME:
            seconds, rest = _TIME.unpack_from(buffer, _BTIME_AT)
            born_ns = seconds * 10**9 + rest
    return FileTimes(born_ns, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _statx() -> Any:
    """The function of libc (glibc 2.28, musl 1.2.4); None where it has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    return function
