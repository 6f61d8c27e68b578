"""`htlhash`: names the content of a file that has no build id, by its head, its tail and its length."""

from __future__ import annotations

import hashlib
import os
from typing import Final

__all__ = ["htlhash"]

_PART_BYTES: Final = 4096
_HASH_BYTES: Final = 16


def htlhash(fd: int) -> str:
    """``htlhash:`` and 32 hexadecimal digits; equal for equal content, whatever the file is called.

    As OpenTelemetry defines it for ``process.executable.build_id.htlhash``: the first 16 bytes of the SHA-256 of the
    first 4096 bytes, the last 4096 bytes (a shorter file is both) and the length as 64 bits in big-endian order.

    Args:
        fd: of a regular file, open for reading; stays the caller's, and so does its file position.

    Raises:
        OSError: it cannot be read.
    """
    size = os.fstat(fd).st_size
    digest = hashlib.sha256(os.pread(fd, _PART_BYTES, 0), usedforsecurity=False)
    digest.update(os.pread(fd, min(size, _PART_BYTES), max(0, size - _PART_BYTES)))
    digest.update(size.to_bytes(8, "big"))
    return f"htlhash:{digest.digest()[:_HASH_BYTES].hex()}"
