"""Opening files whose names somebody else controls, and whether stat(2) shows the inode that the kernel maps.

What is opened by a name may be another file by the time it is opened again by that name. So a file is found once, by a
descriptor that opens nothing (O_PATH); its type is read through that, and that very file is then opened.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from sowatch.linux.descriptors import close_fd

if TYPE_CHECKING:
    # Imported where it is used: `--help` loads this module, and is to answer at once.
    import ctypes

__all__ = ["file_system_of", "open_below", "open_regular", "reopen", "shows_real_inode"]

#: The same number on every architecture but alpha (include/uapi/asm-generic/unistd.h); Linux 5.6.
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_IN_ROOT: Final = 0x10
#: struct open_how, 24 bytes: flags, mode, resolve (include/uapi/linux/openat2.h).
_OPEN_HOW: Final = struct.Struct("=QQQ")

#: fstatfs f_type of file systems where stat may show another device or inode than the mapped inode
#: has (include/uapi/linux/magic.h): overlayfs, btrfs, bcachefs, FUSE.
_MASKED_FILE_SYSTEMS: Final = frozenset({0x794C7630, 0x9123683E, 0xCA451A4E, 0x65735546})


def open_below(root_fd: int, path: str, flags: int, *, follows_links: bool = True) -> int:
    """Open ``path`` as a process with that root would, without ever leaving the root.

    Absolute links and ``..`` stay below ``root_fd``; links of ``/proc`` are refused, and without
    ``follows_links`` all: a path from the kernel has none. Never waits for the other end of a FIFO.
    Needs Linux 5.6.

    Returns:
        A file descriptor that the caller closes.

    Raises:
        OSError: as open(2) and openat2(2); ``ENOSYS`` on kernels without the call, ``EPERM`` or
            ``ENOSYS`` below a seccomp filter that does not know it.
    """
    from ctypes import get_errno

    flags |= os.O_CLOEXEC
    if not flags & os.O_PATH:
        flags |= os.O_NOCTTY | os.O_NONBLOCK
    refused = _RESOLVE_NO_MAGICLINKS if follows_links else _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_IN_ROOT | refused)
    for _ in range(8):
        fd = _libc().syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), how, len(how))
        if fd >= 0:
            return int(fd)
        # EAGAIN: something was renamed while the kernel made sure that we stay inside.
        if get_errno() not in (errno.EINTR, errno.EAGAIN):
            break
    raise OSError(get_errno(), os.strerror(get_errno()), path)


def reopen(place: int, flags: int) -> int:
    """Opens the very file that an O_PATH descriptor is of; never waits for the other end of a FIFO.

    A caller that must not open a device or a FIFO at all reads ``os.fstat(place)`` before.

    Returns:
        A file descriptor that the caller closes.

    Raises:
        OSError: as open(2).
    """
    return os.open(f"/proc/self/fd/{place}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, follows_link: bool = True) -> int:
    """Opens a regular file by its name; nothing else that has the name is opened, now or by the time it is read.

    Args:
        path: the name.
        flags: of open(2); the file has to be there.
        follows_link: whether the name may be that of a symbolic link.

    Returns:
        A file descriptor that the caller closes.

    Raises:
        OSError: as open(2); ``EISDIR`` for a directory, ``EINVAL`` for what is no regular file.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follows_link else os.O_NOFOLLOW))
    try:
        mode = os.fstat(place).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        return reopen(place, flags)
    finally:
        close_fd(place)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
    return libc


def file_system_of(fd: int) -> int | None:
    """The type of the file system of a descriptor (fstatfs f_type, include/uapi/linux/magic.h), None if unknown."""
    from ctypes import create_string_buffer

    buffer = create_string_buffer(512)
    if _libc().fstatfs(fd, buffer) != 0:
        return None
    # f_type comes first: a long, but an int on s390 and on 32-bit machines. The other half is 0 or another field.
    low, high = struct.unpack_from("=II", buffer.raw)
    return int(low if sys.byteorder == "little" or not high else high)


def shows_real_inode(fd: int) -> bool:
    """Whether stat(2) shows the device and inode that the kernel knows the file by."""
    from ctypes import create_string_buffer

    buffer = create_string_buffer(512)
    if _libc().fstatfs(fd, buffer) != 0:
        return False
    # f_type comes first: a long, but an int on s390 and on 32-bit machines. Read both halves.
    first = struct.unpack_from("=Q", buffer.raw)[0]
    return not _MASKED_FILE_SYSTEMS & {first & 0xFFFFFFFF, first >> 32}
