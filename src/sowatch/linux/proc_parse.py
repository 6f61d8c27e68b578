"""The texts of ``/proc``: pure functions, bytes in, frozen records out. Nothing here opens anything."""

from __future__ import annotations

import os
import re
from typing import AnyStr, Final, NamedTuple

from sowatch.model.identity import TICK_NS

__all__ = [
    "DELETED",
    "EXECUTABLE_ROW",
    "ROW",
    "Link",
    "MapRow",
    "Stat",
    "Status",
    "as_maps_shows",
    "executable_maps",
    "parse_maps",
    "parse_stat",
    "parse_status",
    "rows_of",
    "seen_path",
]


class MapRow(NamedTuple):
    r"""One row of ``/proc/PID/maps``.

    ``major``, ``minor`` and ``inode`` are what the row says: on overlayfs (kernel 6.8 and newer)
    the overlay's own, so they are no `FileId`. An anonymous mapping has 0 in all three.

    ``path`` has the kernel's mark for a name that is gone taken off and put into ``is_deleted``.
    Like every path in maps it is seen from *our* root; see `seen_path`. Two things cannot be
    determined from the text, because the kernel (``show_map_vma``, ``seq_path(m, path, "\n")``,
    ``path_with_deleted``) escapes nothing but the newline. `ProcFs.resolve` finds out:

    * ``\012`` is a newline, or a backslash and three digits in a name. It is read as a newline.
    * `` (deleted)`` at the end is the mark, or the end of a name. It is read as the mark
      (of a file "x (deleted)" that was deleted the last one is).

    Anywhere else in the name neither is special, and spaces never are: the path goes to the end of
    the line. No name starts with a space (paths start with ``/``, the kernel's own names with
    ``[`` or ``anon_inode:`` and the like), so the padding before it can be taken off safely.
    """

    start: int
    end: int
    perms: str
    offset_bytes: int
    major: int
    minor: int
    inode: int
    path: bytes
    is_deleted: bool
    #: On btrfs, once `ProcFs.resolve` has asked; 0 elsewhere.
    subvolume: int = 0

    @property
    def shown_path(self) -> bytes:
        """The path with the mark, as the links in ``map_files`` show it."""
        return self.path + DELETED if self.is_deleted else self.path

    @property
    def raw(self) -> bytes:
        """The text in maps, the same however it is read."""
        return as_maps_shows(self.shown_path)


class Link(NamedTuple):
    """Where a link such as ``/proc/PID/exe`` points; ``is_deleted`` as in `MapRow`."""

    path: str
    is_deleted: bool

    @property
    def raw(self) -> bytes:
        """The text that maps has for the same file."""
        return as_maps_shows(os.fsencode(self.path) + DELETED * self.is_deleted)


class Stat(NamedTuple):
    """What is used of ``/proc/PID/stat``. ``comm`` is raw; ``start_ticks`` are 1/100 s since boot.

    ``image`` is where the last exec put code and stack: inherited by fork and, as addresses are random, different
    after every exec. Empty where it may not be seen, within exec, and of kernel threads.
    """

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgrp: int
    session: int
    flags: int
    threads: int
    start_ticks: int
    image: tuple[bytes, ...] = ()

    @property
    def start_ns(self) -> int:
        """Start in ns since boot, rounded down to the tick."""
        return self.start_ticks * TICK_NS

    @property
    def is_kernel_thread(self) -> bool:
        """Whether it has no program at all."""
        return bool(self.flags & _PF_KTHREAD)

    @property
    def has_executed(self) -> bool:
        """Whether it has executed a program since it was forked; the process itself cannot change the flag."""
        return not self.flags & _PF_FORKNOEXEC

    @property
    def is_dead(self) -> bool:
        """Whether this task ended or is ending; with ``threads`` above 1 only the leader is.

        The flag comes before the address space is given up (exit_signals, exit_mm), the state after.
        """
        return self.state in ("Z", "X", "x") or bool(self.flags & _PF_EXITING)


class Status(NamedTuple):
    """What is used of ``/proc/PID/status``.

    ``uid`` is the real one, in our user namespace. ``ns_pid`` is the process id in the innermost
    pid namespace of the process (``None`` before kernel 4.1, which does not show it).
    """

    tgid: int
    ppid: int
    uid: int
    ns_pid: int | None
    threads: int


DELETED: Final = b" (deleted)"
_PF_EXITING: Final = 0x00000004  # include/linux/sched.h, like the next ones
_PF_FORKNOEXEC: Final = 0x00000040
_PF_KTHREAD: Final = 0x00200000
_PERMS: Final = {f"{r}{w}{x}{s}".encode(): f"{r}{w}{x}{s}" for r in "r-" for w in "w-" for x in "x-" for s in "ps"}
# Rows are matched from the newline before them: sre finds a literal first byte with memchr, which makes
# passing over the rows without x three times as fast as with ^. A row without its own newline is cut off,
# so the look-ahead leaves it out. Possessive, so that no input makes it backtrack.
_RANGE: Final = rb"\n([0-9a-f]++)-([0-9a-f]++) "
_FILE: Final = rb"([0-9a-f]++):([0-9a-f]++) ([0-9]++) *+([^\n]*+)(?=\n)"
ROW: Final = re.compile(_RANGE + rb"([r-][w-][x-][ps]) ([0-9a-f]++) " + _FILE)
EXECUTABLE_ROW: Final = re.compile(_RANGE + rb"([r-][w-]x[ps]) ([0-9a-f]++) (?!00:00 0 )" + _FILE)
_STATUS_LINE: Final = re.compile(rb"\n(Tgid|PPid|Uid|NStgid|Threads):[ \t]*+([^\n]*+)")


def parse_maps(data: bytes) -> list[MapRow]:
    r"""Every complete row of a maps file, in its order.

    >>> parse_maps(b"7f00-8f00 r-xp 00001000 fe:01 42" + b" " * 40 + b"/lib/a b.so (deleted)\n")[0].path
    b'/lib/a b.so'
    """
    return rows_of(ROW, b"\n" + data)


def executable_maps(data: bytes) -> list[MapRow]:
    """The rows of a maps file that map a file executable: about 0.3 µs for each row passed over.

    A row is of a file if it has an inode or a device: a FUSE file system may give inode 0.
    """
    return rows_of(EXECUTABLE_ROW, b"\n" + data)


def rows_of(pattern: re.Pattern[bytes], data: bytes) -> list[MapRow]:
    """The rows that match `ROW` or `EXECUTABLE_ROW`; ``data`` has a newline before each."""
    return [
        MapRow(
            int(start, 16), int(end, 16), _PERMS[perms], int(offset, 16), int(major, 16), int(minor, 16), int(inode),
            *_unmarked(path.replace(b"\\012", b"\n")),
        )
        for start, end, perms, offset, major, minor, inode, path in pattern.findall(data)
    ]  # fmt: skip


def _unmarked(path: bytes) -> tuple[bytes, bool]:
    return (path[: -len(DELETED)], True) if path.endswith(DELETED) else (path, False)


def as_maps_shows(path: bytes) -> bytes:
    """A path as maps has it."""
    return path.replace(b"\n", b"\\012")


def parse_stat(data: bytes) -> Stat | None:
    """The record of a stat file, ``None`` if it is not one.

    The comm may hold anything, ``) R 1`` and newlines included, so it ends at the *last* ``)``.
    """
    head, _, tail = data.rpartition(b")")
    pid, _, comm = head.partition(b" (")
    fields = tail.split(None, 26)  # what follows is not used
    try:
        ppid, pgrp, session, flags, threads, start_ticks = (int(fields[at]) for at in (1, 2, 3, 6, 17, 19))
        # 0: no program; 1: we may not know where (do_task_stat without ptrace access).
        image = () if fields[23:24] in ([], [b"0"], [b"1"]) else tuple(fields[23:26])
        return Stat(int(pid), comm, fields[0].decode("ascii"), ppid, pgrp, session, flags, threads, start_ticks, image)
    except (IndexError, ValueError):
        return None


def parse_status(data: bytes) -> Status | None:
    """The record of a status file, ``None`` if it is not one. Its Name line is escaped by the kernel."""
    lines = {key: value.split() for key, value in _STATUS_LINE.findall(data)}
    try:
        tgid, ppid, uid, threads = (int(lines[key][0]) for key in (b"Tgid", b"PPid", b"Uid", b"Threads"))
        ns_pid = int(lines[b"NStgid"][-1]) if b"NStgid" in lines else None
    except (IndexError, KeyError, ValueError):
        return None
    return Status(tgid, ppid, uid, ns_pid, threads)


def seen_path(path: AnyStr, root: AnyStr) -> AnyStr:
    """A path as a process with the root directory ``root`` sees it; both as ``/proc`` shows them to us.

    In a mount tree of its own (most containers) its root is ``/`` and the path right already; in a
    plain chroot it is not. A file outside the root keeps its path.

    >>> seen_path("/srv/jail/lib/libz.so.1", "/srv/jail")
    '/lib/libz.so.1'
    """
    if len(root) > 1 and path.startswith(root) and path[len(root) : len(root) + 1] in ("/", b"/"):
        return path[len(root) :]
    return path
