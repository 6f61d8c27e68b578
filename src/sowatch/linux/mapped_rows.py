r"""What a row of ``/proc/PID/maps`` leaves open: the exact name, whether that is gone, and the subvolume on btrfs.

The kernel writes the newline as ``\012`` and no other byte in a special way, puts `` (deleted)`` behind a name that is
gone, and shows one device for all subvolumes of a btrfs, whose inode numbers are alike. The link in ``map_files``
has the name unescaped. The rest is found by a search for the file, so it may wait for a file system that hangs.

Everything here goes by a directory ``/proc/TID`` of a thread that has the address space. What cannot be found out
stays as the row has it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from sowatch.linux.descriptors import close_fd
from sowatch.linux.memory_files import memory_devices
from sowatch.linux.openat import file_system_of, open_below, reopen, shows_real_inode
from sowatch.linux.proc_parse import DELETED, MapRow, as_maps_shows, seen_path

__all__ = ["is_program_of", "leaves_open", "resolve_rows", "subvolume_of"]

#: include/uapi/linux/magic.h
_BTRFS_MAGIC: Final = 0x9123683E
_BTRFS: Final = b"btrfs"
_OVERLAYFS_MAGIC: Final = 0x794C7630
#: _IOWR(0x94, 18, struct btrfs_ioctl_ino_lookup_args), include/uapi/linux/btrfs.h: treeid, objectid, name[4080].
_INO_LOOKUP: Final = 0xD0009412
#: BTRFS_FIRST_FREE_OBJECTID, the root directory of any subvolume: nobody needs a privilege to ask for it.
_ROOT_DIRECTORY: Final = 256


#: Rows of one name that are resolved each; what the last of these was holds for more.
MAX_SAME: Final = 64


def leaves_open(row: MapRow) -> bool:
    """Whether more can be found out of a row than its text says."""
    return _leaves_name_open(row) or (row.major == 0 and not _is_memory(row))


def resolve_rows(base: str, rows: list[MapRow]) -> None:
    """Puts into each row the name, ``is_deleted`` and the subvolume that its file has; first into those on btrfs.

    Args:
        base: ``/proc/TID``.
        rows: of that process. Another thread may read the list meanwhile.
    """
    kinds = _device_kinds(base) if any(row.major == 0 for row in rows) else {}

    def kind_of(row: MapRow) -> bytes | None:
        # No device of a disk is that of a whole btrfs. One that nobody has mounted may be of a detached mount.
        return b"" if row.major or _is_memory(row) else kinds.get((row.major, row.minor))

    known: dict[MapRow, tuple[int, MapRow]] = {}
    numbers = [number for number, row in enumerate(rows) if leaves_open(row)]
    for number in sorted(numbers, key=lambda number: kind_of(rows[number]) != _BTRFS):
        row = rows[number]
        kind = kind_of(row)
        if kind not in (None, _BTRFS) and not _leaves_name_open(row):
            continue
        name = row._replace(start=0, end=0, perms="", offset_bytes=0)
        count, same = known.get(name, (0, row))
        if count < MAX_SAME:
            same = _resolve(base, row, may_be_btrfs=kind in (None, _BTRFS))
            known[name] = count + 1, same
        rows[number] = row._replace(path=same.path, is_deleted=same.is_deleted, subvolume=same.subvolume)


def _leaves_name_open(row: MapRow) -> bool:
    return row.path.startswith(b"/") and (b"\n" in row.path or (row.is_deleted and not _is_memory(row)))


def _is_memory(row: MapRow) -> bool:
    return (row.major, row.minor) in memory_devices()


def _device_kinds(base: str) -> dict[tuple[int, int], bytes]:
    """The type of the file system on each device that the process has mounted; empty if it cannot be determined.

    These are the devices that maps shows (``s_dev``); stat shows others on btrfs.
    """
    try:
        with open(f"{base}/mountinfo", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found = {}
    for line in lines:
        fields, _, rest = line.partition(b" - ")
        major, _, minor = (fields.split(b" ", 3)[2:3] or [b""])[0].partition(b":")
        if major.isdigit() and minor.isdigit():
            found[int(major), int(minor)] = rest.partition(b" ")[0]
    return found


def _resolve(base: str, row: MapRow, *, may_be_btrfs: bool) -> MapRow:
    link = f"{base}/map_files/{row.start:x}-{row.end:x}"
    if _leaves_name_open(row):
        row = _with_name(base, link, row)
    if not may_be_btrfs:
        return row
    with _mapped_file(base, link, row) as place:
        subvolume = 0 if place is None else subvolume_of(place)
    return row._replace(subvolume=subvolume)


def subvolume_of(place: int) -> int:
    """The id of the btrfs subvolume (its root's object id, as the kernel side has it) of a regular file.

    Args:
        place: a descriptor of it; O_PATH will do.

    Returns:
        0 on other file systems, and where it may not be read.
    """
    if file_system_of(place) != _BTRFS_MAGIC or not stat.S_ISREG(os.fstat(place).st_mode):
        return 0
    buffer = bytearray(4096)
    struct.pack_into("=QQ", buffer, 0, 0, _ROOT_DIRECTORY)
    try:
        fd = reopen(place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _INO_LOOKUP, buffer)
        finally:
            close_fd(fd)
    except OSError:
        return 0
    return int(struct.unpack_from("=Q", buffer)[0])


def is_program_of(base: str, path: str) -> bool:
    """Whether the program of a process lies under what its link ``exe`` shows: then the end of that is no mark."""
    try:
        about = os.stat(f"{base}/exe")
    except OSError:
        return False
    with _opened(base, os.fsencode(path)) as place:
        return place is not None and os.path.samestat(os.fstat(place), about)


def _with_name(base: str, link: str, row: MapRow) -> MapRow:
    shown = None
    with suppress(OSError):  # longer than a page, or mapped no more
        shown = os.readlink(os.fsencode(link))
    if shown is None or as_maps_shows(shown) != row.raw:
        shown = row.shown_path
        if b"\n" in shown:
            with _opened(base, row.raw) as place:
                shown = row.raw if place is not None and _is_mapped(base, place, link, row) else shown
    if not row.is_deleted:
        return row._replace(path=shown)
    with _opened(base, shown) as place:
        if place is not None and _is_mapped(base, place, link, row):
            return row._replace(path=shown, is_deleted=False)
    return row._replace(path=shown.removesuffix(DELETED))


@contextmanager
def _mapped_file(base: str, link: str, row: MapRow) -> Iterator[int | None]:
    """A descriptor (O_PATH) of the file of a row: by the kernel's link, which needs a capability, or by its name."""
    try:
        place: int | None = os.open(link, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        place = None
    if place is not None:
        try:
            yield place
        finally:
            close_fd(place)
        return
    with _opened(base, b"" if row.is_deleted else row.path) as place:
        yield place if place is not None and _is_mapped(base, place, link, row) else None


@contextmanager
def _opened(base: str, path: bytes) -> Iterator[int | None]:
    """A descriptor (O_PATH) of what a path of maps leads to, below the root of the process."""
    place = None
    if path.startswith(b"/"):
        try:
            root = os.open(f"{base}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                below = seen_path(path, os.readlink(os.fsencode(f"{base}/root")))
                place = open_below(root, os.fsdecode(below), os.O_PATH, follows_links=False)
            finally:
                close_fd(root)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
    try:
        yield place
    finally:
        if place is not None:
            close_fd(place)


def _is_mapped(base: str, place: int, link: str, row: MapRow) -> bool:
    """Whether a descriptor is of the file that the row maps."""
    found = os.fstat(place)
    if not stat.S_ISREG(found.st_mode):
        return False
    try:
        return os.path.samestat(os.stat(link), found)
    except OSError:  # without the capability
        pass
    if found.st_ino != row.inode:
        return False
    if shows_real_inode(place):
        return (os.major(found.st_dev), os.minor(found.st_dev)) == (row.major, row.minor)
    # Before 6.8 maps shows the device of a layer for a file on an overlay, which no mount of the process has.
    return file_system_of(place) == _OVERLAYFS_MAGIC or _device_of_mount(base, place) == (row.major, row.minor)


def _device_of_mount(base: str, place: int) -> tuple[int, int] | None:
    """The device of the mount that a descriptor is on, as maps shows it."""
    try:
        with open(f"/proc/self/fdinfo/{place}", "rb") as file:
            mount = next((line.split()[1] for line in file if line.startswith(b"mnt_id:")), b"")
        with open(f"{base}/mountinfo", "rb") as file:
            for line in file:
                fields = line.split(b" ", 3)
                if fields[0] == mount:
                    major, _, minor = fields[2].partition(b":")
                    return int(major), int(minor)
    except OSError:
        pass
    return None
