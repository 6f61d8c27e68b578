"""`give_back`: returns what the C library's allocator keeps of memory that is free."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


@functools.cache
def _trim() -> Callable[[int], object] | None:
    libc = ctypes.CDLL(None)
    return getattr(libc, "malloc_trim", None)  # musl has none, and keeps less


def give_back() -> None:
    """Takes some milliseconds; for after a peak, which may have left 20 MB behind (glibc: malloc_trim)."""
    trim = _trim()
    if trim is not None:
        trim(0)
