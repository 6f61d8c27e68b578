"""The ELF auxiliary vector of a process, ``/proc/PID/auxv``: bytes in, numbers out. Reads nothing itself."""

from __future__ import annotations

import struct
import sys
from typing import Final

__all__ = ["interpreter_base", "is_32bit"]

_AT_BASE: Final = 7  # include/uapi/linux/auxvec.h: where exec put the interpreter


def is_32bit(data: bytes) -> bool | None:
    """Whether a vector is of a 32-bit process, ``None`` if it is empty.

    Read as pairs of 64-bit words a 32-bit vector has "types" above 2**32, because its AT_PAGESZ,
    which is never 0, fills the upper half of one.
    """
    if not data:
        return None
    return any(int.from_bytes(data[at : at + 8], sys.byteorder) >> 32 for at in range(0, len(data) - 7, 16))


def interpreter_base(data: bytes) -> int:
    """The address at which exec mapped the interpreter (the dynamic linker); 0 if there is none."""
    pair = struct.Struct("=II" if is_32bit(data) else "=QQ")
    pairs = pair.iter_unpack(data[: len(data) // pair.size * pair.size])
    return next((value for key, value in pairs if key == _AT_BASE), 0)
