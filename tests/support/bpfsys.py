"""bpf(2) without any library: what the kernel offers, and which programs, maps and links exist.

Used to prove that a kernel test may be skipped and that none leaves anything behind, so it shares
no code with sowatch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from pathlib import Path

#: __NR_bpf, by `uname -m` (asm/unistd.h).
_NR_BPF = {"x86_64": 321, "aarch64": 280}

# enum bpf_cmd of linux/bpf.h
_MAP_CREATE = 0
_OBJ_PIN = 6
_OBJ_GET = 7
_GET_NEXT_ID = {"prog": 11, "map": 12, "link": 31}

_MAP_TYPE_ARRAY = 2


class _MapCreate(ctypes.Structure):
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
    )


class _NextId(ctypes.Structure):
    _fields_ = (("start_id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


class _Pinned(ctypes.Structure):
    _fields_ = (("path", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


def _bpf(command: int, attribute: ctypes.Structure) -> int:
    number = _NR_BPF.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of bpf(2) on {platform.machine()} is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.syscall(
        ctypes.c_long(number), ctypes.c_int(command), ctypes.byref(attribute), ctypes.c_uint(ctypes.sizeof(attribute))
    )
    if got < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(got)


def why_no_bpf() -> OSError | None:
    """The error of creating an array map, the least that bpf(2) can do; None if it worked."""
    try:
        os.close(create_map())
    except OSError as error:
        return error
    return None


def kernel_offers_bpf() -> bool:
    """Whether bpf(2) exists here at all, for whomever: only ENOSYS says that it does not."""
    error = why_no_bpf()
    return error is None or error.errno != errno.ENOSYS


def all_ids() -> set[tuple[str, int]]:
    """Every program, map and link of this host as (kind, id); empty for who may not ask."""
    found: set[tuple[str, int]] = set()
    for kind, command in _GET_NEXT_ID.items():
        attribute = _NextId()
        while True:
            try:
                _bpf(command, attribute)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EPERM, errno.EINVAL, errno.ENOSYS):
                    break
                raise
            found.add((kind, attribute.next_id))
            attribute.start_id = attribute.next_id
    return found


def held_ids(pid: int | str) -> set[tuple[str, int]]:
    """The programs, maps and links that fds of one process hold; empty if it is gone."""
    found: set[tuple[str, int]] = set()
    try:
        entries = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return found
    for entry in entries:
        try:
            # A link is "anon_inode:[bpf_link]" from 6.11 on, "anon_inode:bpf_link" before.
            if os.readlink(f"/proc/{pid}/fd/{entry}").startswith(("anon_inode:bpf", "anon_inode:[bpf")):
                found |= _ids_of(f"/proc/{pid}/fdinfo/{entry}")
        except OSError:
            continue
    return found


def _ids_of(fdinfo: str) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for line in Path(fdinfo).read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("prog_id", "map_id", "link_id") and value.strip().isdigit():
            found.add((name.removesuffix("_id"), int(value)))
    return found


def create_map() -> int:
    """An fd of a new array map of one entry."""
    return _bpf(_MAP_CREATE, _MapCreate(_MAP_TYPE_ARRAY, 4, 8, 1))


def pin(fd: int, path: str) -> None:
    """Gives the object of ``fd`` a name on a bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, _Pinned(ctypes.addressof(name), fd, 0))


def pinned_ids(path: str) -> set[tuple[str, int]]:
    """The program, map or link that is pinned at ``path``; empty if none is."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    try:
        fd = _bpf(_OBJ_GET, _Pinned(ctypes.addressof(name), 0, 0))
    except OSError:
        return set()
    try:
        return _ids_of(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)


def mounted_bpffs() -> list[str]:
    """Where this process sees a bpffs."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.split()[4] for line in lines if line.partition(" - ")[2].startswith("bpf ")]
