"""The very file that a process has mapped: opened, checked, and under which path it can be opened from here.

Nothing is opened before it is known to be that file: the process may have mapped another one in its place, another may
have its name by now, or the name may be that of a link, a FIFO or a device.

On overlayfs the kernel's link to a mapping leads to the file that the overlay shows now. After a copy-up that is the
upper one, while the process still runs the lower one. The change time distinguishes them: both are never the same. The
lower file is then searched for in the layers, by its own inode.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple, TypeAlias

from sowatch.linux.descriptors import close_fd
from sowatch.linux.mapped_rows import subvolume_of
from sowatch.linux.openat import file_system_of, open_below, reopen, shows_real_inode
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.identity import FileId

__all__ = [
    "NOT_REGULAR",
    "Found",
    "OnTry",
    "Place",
    "build_id_of_copied_up",
    "file_version",
    "find_in_layers",
    "find_mapped",
    "is_on_overlay",
    "mapped_build_id",
    "open_layer",
    "open_mapped",
    "shows_a_lower_file",
]

#: How the file is opened from here: by its path in our view, below the root of its process, by the kernel's link.
Place = Literal["own", "root", "link"]

#: include/uapi/linux/magic.h
OVERLAYFS_MAGIC: Final = 0x794C7630
#: PROCMAP_QUERY (include/uapi/linux/fs.h, Linux 6.11): _IOWR('f', 17, struct procmap_query), 104 bytes.
_PROCMAP_QUERY: Final = 0xC0686611
_QUERY: Final = struct.Struct("=9Q4I2Q")
_BUILD_ID_BYTES: Final = 20
_BUILD_ID_SIZE_FIELD: Final = 12
#: A file may have thousands of ranges; the link of each leads to the same file.
MAX_LINKS: Final = 16
#: Docker's limit is 127 lower layers; each costs two system calls.
MAX_LAYERS: Final = 256


#: What a device or a FIFO is that was mapped, or has taken the place.
NOT_REGULAR: Final = "not a regular file"
#: Takes the place that was tried (None: a layer of an overlay), its path, and why the file was not found there.
OnTry: TypeAlias = Callable[[Place | None, str, OSError | Miss | str | None], None]


class Found(NamedTuple):
    """A descriptor that opens nothing yet (O_PATH), and where that file is; None: no path leads to it from here."""

    fd: int
    place: Place | None
    #: The kernel's link, if that is how it was found.
    link: str | None = None


def open_mapped(
    proc: ProcFs,
    pid: int,
    file_id: FileId,
    path: str,
    ranges: tuple[tuple[int, int], ...],
    *,
    is_own_view: bool,
    is_deleted: bool,
    changed_ns: int = 0,
    on_file: Callable[[], None] = lambda: None,
    skips_process: bool = False,
) -> int | None:
    """A descriptor of the very file that a process has mapped, or None if it cannot be had any more.

    Args: as of `find_mapped`.
    """
    found = find_mapped(
        proc,
        pid,
        file_id,
        path,
        ranges,
        is_own_view=is_own_view,
        is_deleted=is_deleted,
        changed_ns=changed_ns,
        on_file=on_file,
        skips_process=skips_process,
    )
    if found is None:
        return None
    try:
        return reopen(found.fd, os.O_RDONLY)
    except OSError:
        return None
    finally:
        close_fd(found.fd)


def find_mapped(
    proc: ProcFs,
    pid: int,
    file_id: FileId,
    path: str,
    ranges: tuple[tuple[int, int], ...],
    *,
    is_own_view: bool,
    is_deleted: bool,
    changed_ns: int = 0,
    on_file: Callable[[], None] = lambda: None,
    skips_process: bool = False,
    on_try: OnTry = lambda _place, _path, _why: None,
) -> Found | None:
    """The very file that a process has mapped, or None if it cannot be had any more.

    Tried in order: the kernel's link to the mapping, the path in our own view if it is the same, the path below the
    process's root, the layers of an overlay.

    Args:
        proc: the host's.
        pid: of the process.
        file_id: of the mapped file.
        path: as the process sees it.
        ranges: where it is mapped.
        is_own_view: whether the process sees the same files as we do.
        is_deleted: whether it has no name any more.
        changed_ns: the change time of the mapped inode, 0 if nobody knows it.
        on_file: called before a file system is asked, and no more the process.
        skips_process: the process does not answer.
        on_try: called after each way that was tried until the file was found.
    """
    link, link_path = (None, None) if skips_process else _open_link(proc, pid, ranges, on_file, on_try)
    mapped = None
    if link is not None and link_path is not None:
        why_not = _why_not_it(link, file_id, changed_ns, is_link=True)
        on_try("link", link_path, why_not)
        mapped = None if why_not else _status_of(link)
    try:
        place: Place | None = "link" if mapped is not None else None
        if is_deleted and mapped is None:
            on_try("root", f"{proc.root}/{pid}/root{path}", "its name is gone")
        roots = _roots(None if skips_process else proc, pid, path, on_try, is_own_view=is_own_view)
        for where, root in () if is_deleted else roots:
            shown = path if where == "own" else root + path
            try:
                fd = _open_path(root, path, on_file)
            except OSError as error:
                if mapped is None:
                    on_try(where, shown, error)
                continue
            if mapped is None:
                why_not = _why_not_it(fd, file_id, changed_ns, is_link=False)
                on_try(where, shown, why_not)
                if why_not is None:
                    return Found(fd, where)
            status = _status_of(fd)
            is_same = mapped is not None and status is not None and os.path.samestat(status, mapped)
            close_fd(fd)
            if is_same:
                place = where
                break
        if link is not None and mapped is not None:
            found, link = Found(link, place, link_path), None
            return found
        if link is not None and changed_ns and _may_be_on_overlay(link):
            in_layer = find_in_layers(proc, pid, file_id, path)
            on_try(None, path, None if in_layer else "no layer that can be reached from here has it")
            return in_layer
        return None
    finally:
        if link is not None:
            close_fd(link)


def is_on_overlay(fd: int) -> bool:
    """Whether a file is shown by overlayfs, and may be another one than what is mapped under it."""
    return file_system_of(fd) == OVERLAYFS_MAGIC


def _may_be_on_overlay(fd: int) -> bool:
    try:
        return is_on_overlay(fd)
    except OSError:
        return False


def _status_of(fd: int) -> os.stat_result | None:
    """None where the file system refuses: a FUSE server may answer with any error, or be gone (ECONNABORTED)."""
    try:
        return os.fstat(fd)
    except OSError:
        return None


def _why_not_it(fd: int, file_id: FileId, changed_ns: int, *, is_link: bool) -> OSError | str | None:
    """Why a descriptor (O_PATH will do) is not of that file, or cannot be compared; None if it is."""
    try:
        return _difference(fd, file_id, changed_ns, is_link=is_link)
    except OSError as error:
        return error


def _difference(fd: int, file_id: FileId, changed_ns: int, *, is_link: bool) -> str | None:
    status = os.fstat(fd)
    other = "another file is mapped there by now" if is_link else "another file has that name now"
    is_real = shows_real_inode(fd)
    is_same = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) == file_id[:3]
    if not stat.S_ISREG(status.st_mode):
        return NOT_REGULAR if is_same or is_link else other
    if is_real:
        return None if is_same else other
    # On overlayfs and btrfs stat invents the device, on an overlay over several file systems the inode too.
    if changed_ns and status.st_ctime_ns != changed_ns and is_on_overlay(fd):
        return "the overlay shows a copy of it, or another file"
    if file_id.subvolume and subvolume_of(fd) not in (0, file_id.subvolume):
        return other
    return None if is_link or status.st_ino == file_id.inode else other


def _open_link(
    proc: ProcFs, pid: int, ranges: tuple[tuple[int, int], ...], on_file: Callable[[], None], on_try: OnTry
) -> tuple[int | None, str | None]:
    """The kernel's link to the mapping; the user who controls the process cannot make it lead elsewhere."""
    links = proc.map_files_dir(pid)
    if isinstance(links, Miss):
        on_try("link", f"{proc.root}/{pid}/map_files", links)
        return None, None
    path, why = links, "nothing is mapped any more"  # type: str, OSError | str
    for start, end in _with_parts(proc, pid, ranges) if ranges else ():
        path = f"{links}/{start:x}-{end:x}"
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            why = error
            continue
        on_file()
        return fd, path
    on_try("link", path, why)
    return None, None


def _with_parts(proc: ProcFs, pid: int, ranges: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    """The ranges, then those within: one of ours may be several mappings side by side, of which each has a link."""
    yield from ranges[:MAX_LINKS]
    rows = proc.executable_maps(pid)
    near = (row for row in rows or () if any(row.start < end and row.end > start for start, end in ranges[:2]))
    for row in itertools.islice(near, MAX_LINKS):
        yield row.start, row.end


def _roots(
    proc: ProcFs | None, pid: int, path: str, on_try: OnTry, *, is_own_view: bool
) -> Iterator[tuple[Place, str]]:
    """Where the path of the file may begin: at our root if it is the process's as well, at that one."""
    if is_own_view:
        yield "own", "/"
    if proc is not None:
        root = proc.root_dir(pid)
        if isinstance(root, Miss):
            on_try("root", f"{proc.root}/{pid}/root{path}", root)
        else:
            yield "root", root


def _open_path(root: str, path: str, on_file: Callable[[], None]) -> int:
    """A descriptor (O_PATH) of what a path leads to below a root.

    Raises:
        OSError: as open(2); `ENOENT` where the name of the kernel's own (``anon_inode:...``) is no path.
    """
    if not path.startswith("/"):
        raise FileNotFoundError(errno.ENOENT, "it has no path", path)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    on_file()
    try:
        return open_below(directory, path, os.O_PATH, follows_links=False)
    finally:
        close_fd(directory)


def find_in_layers(proc: ProcFs, pid: int, file_id: FileId, path: str) -> Found | None:
    """The file in a layer below the overlay that its path leads to, if this one shows the mapped inode itself.

    A path from a mount option is interpreted in our mount namespace and in that of the process; the check of the inode
    makes it harmless that the user who mounted the overlay chose it.
    """
    for fd in _opened_in_layers(proc, pid, path):
        if shows_real_inode(fd) and _why_not_it(fd, file_id, 0, is_link=False) is None:
            return Found(os.dup(fd), None)
    return None


def shows_a_lower_file(proc: ProcFs, pid: int, path: str, shown: os.stat_result) -> bool:
    """Whether what an overlay shows under a path lies in a lower layer: nothing has been copied up there.

    Nobody can set a change time, so two files do not share it with the size and the time of modification.

    Args:
        proc: the host's.
        pid: whose mounts are searched.
        path: as that process sees it.
        shown: the status of what the path leads to.

    Returns:
        False, too, if the layer cannot be reached from here.
    """
    return any(
        not is_on_overlay(fd) and file_version(os.fstat(fd)) == file_version(shown)
        for fd in _opened_in_layers(proc, pid, path, is_lower_only=True)
    )


def open_layer(proc: ProcFs, pid: int, path: str, shown: os.stat_result) -> int | None:
    """The file in a layer that an overlay shows under a path, to read; None if no layer that can be reached has it.

    Args:
        proc: the host's.
        pid: whose mounts are looked through.
        path: as that process sees it.
        shown: the status of what the path leads to.
    """
    for fd in _opened_in_layers(proc, pid, path):
        status = os.fstat(fd)
        if not is_on_overlay(fd) and stat.S_ISREG(status.st_mode) and file_version(status) == file_version(shown):
            return reopen(fd, os.O_RDONLY)
    return None


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    """What differs between a file and its copy, and an overlay shows of the file itself."""
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size


def _opened_in_layers(proc: ProcFs, pid: int, path: str, *, is_lower_only: bool = False) -> Iterator[int]:
    """A descriptor (O_PATH) of what each layer has under that path, closed when the next one is asked for."""
    root = proc.root_dir(pid)
    if not root:
        return
    for layer, below, is_lower in _layers(proc, pid, path):
        if is_lower_only and not is_lower:
            continue
        for at in (root, "/"):
            try:
                fd = _open_path(at, f"{layer}/{below}", lambda: None)
            except OSError:
                continue
            try:
                yield fd
            finally:
                close_fd(fd)


def _layers(proc: ProcFs, pid: int, path: str) -> Iterator[tuple[str, str, bool]]:
    """The layers of the overlays that the path may be on, the nearest mount first.

    Of each the directory, the path below it, and whether it is a lower one.
    """
    try:
        with open(f"{proc.root}/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read(1 << 22).split("\n")
    except OSError:
        return
    mounts = []
    for line in lines:
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if len(fields) < 5 or len(rest) < 3 or rest[0] != "overlay":
            continue
        point = _unescaped(fields[4])
        if path.startswith(point.rstrip("/") + "/"):
            inner = _unescaped(fields[3]).strip("/")
            below = f"{inner}/{path[len(point.rstrip('/')) :].lstrip('/')}".lstrip("/")
            mounts.append((len(point), below, rest[2]))
    count = 0
    for _, below, options in sorted(mounts, reverse=True):
        for layer, is_lower in _layers_of(options):
            count += 1
            if count > MAX_LAYERS:
                return
            if layer.startswith("/"):
                yield layer, below, is_lower


def _layers_of(options: str) -> Iterator[tuple[str, bool]]:
    """The directories of an overlay's lowerdir, lowerdir+ and upperdir options, and whether each is a lower one."""
    for option in options.split(","):
        name, _, value = option.partition("=")
        if name in ("upperdir", "lowerdir+", "datadir+"):
            yield _unescaped(value), name != "upperdir"
        elif name == "lowerdir":
            yield from ((_unescaped(one), True) for one in value.split(":") if one)


def _unescaped(text: str) -> str:
    r"""A field of mountinfo: blank, tab, newline and backslash stand there as \ooo."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def build_id_of_copied_up(
    proc: ProcFs, pid: int, ranges: tuple[tuple[int, int], ...], fd: int, shown: str | None
) -> str | None:
    """The build id of what is mapped, if the overlay shows another file by now; needed where no change time is known.

    Args:
        proc: the host's.
        pid: of the process.
        ranges: where it has the file mapped.
        fd: the file that was found.
        shown: the build id in that.

    Returns:
        None if what was found may be what is mapped.
    """
    if not shown or not is_on_overlay(fd):
        return None
    build_id = mapped_build_id(proc, pid, ranges)
    return build_id if build_id != shown else None


def mapped_build_id(proc: ProcFs, pid: int, ranges: tuple[tuple[int, int], ...]) -> str | None:
    """The build id of what is mapped there, from the pages of the mapped inode itself.

    Whatever path leads where. Needs Linux 6.11 (PROCMAP_QUERY) and the right to read maps.

    Returns:
        None if there is none, or it cannot be determined.
    """
    tid = proc.live_thread(pid) if ranges else None
    if not tid:
        return None
    buffer = ctypes.create_string_buffer(_BUILD_ID_BYTES)
    query = [_QUERY.size, 0, ranges[0][0], 0, 0, 0, 0, 0, 0, 0, 0, 0, _BUILD_ID_BYTES, 0, ctypes.addressof(buffer)]
    answer = bytearray(_QUERY.pack(*query))
    try:
        fd = os.open(f"{proc.root}/{tid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, answer)
        finally:
            close_fd(fd)
    except OSError:
        return None
    fields = _QUERY.unpack(answer)
    return buffer.raw[: fields[_BUILD_ID_SIZE_FIELD]].hex() or None
