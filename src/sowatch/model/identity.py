"""Who is who: the identity of a file and of a process. Plain values, no I/O."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["TICK_NS", "FileId", "ProcessId"]

#: ``/proc/PID/stat`` field 22 counts in ticks of 1/100 s: USER_HZ is 100 on every Linux port
#: (include/uapi/asm-generic/param.h), whatever CONFIG_HZ is.
TICK_NS = 10_000_000


class FileId(NamedTuple):
    """The real inode of a mapped file, as a uprobe sees it.

    On overlayfs this is the lower or upper inode, so the same image layer mounted in ten
    containers is one FileId. ``major`` and ``minor`` name the file system's device,
    ``generation`` distinguishes a reused inode number from its former owner, and ``subvolume`` (0
    outside btrfs) separates btrfs subvolumes, which agree in everything else.
    """

    major: int
    minor: int
    inode: int
    generation: int = 0
    subvolume: int = 0

    @property
    def dev(self) -> str:
        """The device as ``major:minor``, the way ``/proc/PID/mountinfo`` writes it."""
        return f"{self.major}:{self.minor}"

    def __str__(self) -> str:
        text = f"{self.major}:{self.minor}/{self.inode}"
        if self.generation:
            text += f".{self.generation}"
        if self.subvolume:
            text += f"@{self.subvolume}"
        return text


class ProcessId(NamedTuple):
    """A process that cannot be mistaken for another one that got its pid later.

    ``pid`` is the tgid in the initial pid namespace, ``start_ns`` the group leader's start
    in ns since boot (``task_struct.start_boottime``). ``/proc`` truncates the latter to
    10 ms ticks, so ids that came from different sources are compared with `same_tick`.
    """

    pid: int
    start_ns: int

    def same_tick(self, other: ProcessId) -> bool:
        """Whether both name one process, at the precision ``/proc`` can give."""
        return self.pid == other.pid and self.start_ns // TICK_NS == other.start_ns // TICK_NS

    def __str__(self) -> str:
        return f"{self.pid}@{self.start_ns}"
