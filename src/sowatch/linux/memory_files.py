"""Which devices belong to memory that was never a file in a directory: memfd, SysV segments, shared ``/dev/zero``.

Their names (``/memfd:NAME``, ``/SYSV00000000``) look like paths, and real directories may be called so. The device
distinguishes them: such memory lies on mounts of the kernel's own (``shm_mnt``, ``hugetlbfs_vfsmount``), where no
directory is.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Final

from sowatch.model.identity import FileId

__all__ = ["is_memory", "memory_devices"]

#: linux/memfd.h: the page size, as a power of two, stands above this bit.
_MFD_HUGE_SHIFT: Final = 26
_HUGE_PAGES: Final = "/sys/kernel/mm/hugepages"


@lru_cache(maxsize=1)
def memory_devices() -> frozenset[tuple[int, int]]:
    """``(major, minor)`` of the kernel's own mounts for memory; they stay the same until the next boot."""
    flags = [0]
    try:
        sizes = [int(name.removeprefix("hugepages-").removesuffix("kB")) for name in os.listdir(_HUGE_PAGES)]
    except (OSError, ValueError):
        sizes = []
    # One mount for each size of huge pages. Making the file takes no page of them.
    flags += [os.MFD_HUGETLB | (size_kb.bit_length() + 9) << _MFD_HUGE_SHIFT for size_kb in sizes]
    found = set()
    for flag in flags:
        try:
            fd = os.memfd_create("sowatch", os.MFD_CLOEXEC | flag)
        except OSError:  # this kernel has no hugetlbfs, or lets us have none of it
            continue
        try:
            device = os.fstat(fd).st_dev
        finally:
            os.close(fd)
        found.add((os.major(device), os.minor(device)))
    return frozenset(found)


def is_memory(file_id: FileId) -> bool:
    """Whether a mapped file is memory that no directory ever had.

    >>> from sowatch.model.identity import FileId
    >>> is_memory(FileId(254, 0, 99))
    False
    """
    return (file_id.major, file_id.minor) in memory_devices()
