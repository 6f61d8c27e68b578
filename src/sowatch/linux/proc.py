"""What ``/proc`` says of processes, as the records of `sowatch.linux.proc_parse`. Never raises for a vanished process.

`ProcFs` reads below one proc root. A process that ended, or may not be read, is an answer (`Miss`), not an error:
what else goes wrong (no file descriptors left, say) is a `ProcReadError`.

While the thread-group leader is dead and other threads live, ``/proc/PID/maps`` is empty and ``exe``,
``root`` and the v1 cgroups are gone. `ProcFs` then reads them through a live thread.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Literal, NamedTuple, TypeVar

from sowatch.linux import auxv
from sowatch.linux.cgroups import choose_cgroup, parse_cgroups
from sowatch.linux.descriptors import close_fd, is_lack_of_resources
from sowatch.linux.mapped_rows import is_program_of, leaves_open, resolve_rows
from sowatch.linux.pods import pod_in
from sowatch.linux.proc_parse import (
    DELETED,
    EXECUTABLE_ROW,
    ROW,
    Link,
    MapRow,
    Stat,
    Status,
    parse_stat,
    parse_status,
    rows_of,
    seen_path,
)
from sowatch.model.errors import ProcRootError, SowatchError
from sowatch.model.events import Pod, Process

__all__ = ["MapsState", "Miss", "ProcFs", "ProcReadError"]

_T = TypeVar("_T")


class Miss(Enum):
    """Why a reader has no answer. Every member is false, so ``if not proc.stat(pid)`` works."""

    #: The process (or thread) ended, never was, or is hidden by the mount option ``hidepid``.
    GONE = "gone"
    #: It is there, and this user may not read it.
    DENIED = "denied"
    #: It is there and has no such thing: a kernel thread or a zombie, or a path longer than the
    #: kernel can give (`exe`: 4,095 bytes).
    ABSENT = "absent"
    #: It is there, and the kernel does not answer: somebody holds a lock of its address space.
    HUNG = "hung"

    def __bool__(self) -> Literal[False]:
        return False


class MapsState(NamedTuple):
    """Shows that a maps file has not changed: its inode in ``/proc``, which no later process gets, and a digest."""

    inode: int
    digest: bytes


class ProcReadError(SowatchError):
    """Something below the proc root could not be read, and not because of the process."""

    def __init__(self, path: str, errno: int) -> None:
        self.path = path
        self.errno = errno
        super().__init__(
            f"cannot read {path}: {os.strerror(errno)}. "
            "Check the limits of this process (`ulimit -n`, memory) and try again."
        )


_READ_BYTES: Final = 1 << 16
#: Maps are parsed in pieces of about this size: a process may have a million mappings with long paths.
_BATCH_BYTES: Final = 1 << 18


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _miss(error: OSError, path: str) -> Miss:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return Miss.GONE
    if error.errno in (errno.EACCES, errno.EPERM):
        return Miss.DENIED
    raise ProcReadError(path, error.errno or errno.EIO) from error


def _read_small(path: str) -> bytes | Miss:
    """A file that the kernel gives in one piece, which stat and status are."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _READ_BYTES)
        finally:
            close_fd(fd)
    except OSError as error:
        return _miss(error, path)


def _read(path: str, size: int = -1) -> bytes | Miss:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(size)
    except OSError as error:
        return _miss(error, path)


def _numbers(path: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(path) if name.isdecimal())


def _read_rows(
    path: str,
    pattern: re.Pattern[bytes],
    known: MapsState | None = None,
    digest: Callable[[bytes], bytes] | None = None,
    on_progress: Callable[[], None] | None = None,
) -> tuple[list[MapRow] | Miss | None, MapsState | None]:
    """The rows of one maps file that match, ``ABSENT`` if it is empty, None if it is as it was; and how it is now.

    Without a function for the digest it has no state, nor has one that is larger than `_BATCH_BYTES`.
    """
    rows: list[MapRow] = []
    pieces, size, is_first = [b"\n"], 0, True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while True:
                piece = os.read(fd, _READ_BYTES)
                pieces.append(piece)
                size += len(piece)
                if on_progress is not None:
                    on_progress()
                if piece and size < _BATCH_BYTES:
                    continue
                data = b"".join(pieces)
                if is_first and not piece:
                    if not size:
                        return Miss.ABSENT, None
                    state = None if digest is None else MapsState(os.fstat(fd).st_ino, digest(data))
                    return (None if state is not None and state == known else rows_of(pattern, data)), state
                cut = data.rfind(b"\n")
                rows += rows_of(pattern, data[: cut + 1])
                if not piece:
                    return rows, None
                pieces, size, is_first = [data[cut:]], 0, False
        finally:
            close_fd(fd)
    except OSError as error:
        return _miss(error, path), None


class ProcFs:
    """Readers below one proc root. Holds no file descriptor and no state; any thread may use it.

    Pids are those of the pid namespace that the proc file system was mounted in. Readers give
    their record or a `Miss`.

    Args:
        root: where a proc file system is mounted.

    Raises:
        ProcRootError: nothing is mounted there, or something else.

    >>> import os
    >>> ProcFs().stat(os.getpid()).pid == os.getpid()
    True
    """

    __slots__ = ("root",)

    def __init__(self, root: str | os.PathLike[str] = "/proc") -> None:
        self.root = os.path.abspath(root)
        self._check(os.fspath(root))

    def pids(self) -> list[int]:
        """Every process there is, ascending. Threads are not in it.

        Raises:
            ProcRootError: the root is no proc file system any more.
            ProcReadError: descriptors or memory are lacking.
        """
        try:
            found = _numbers(self.root)
        except OSError as error:
            if is_lack_of_resources(error):
                raise ProcReadError(self.root, error.errno or errno.EIO) from error
            raise ProcRootError(self.root, os.strerror(error.errno or errno.EIO)) from error
        if not found:  # an unmounted proc is an empty directory: that is no news of everybody's death
            raise ProcRootError(self.root, "it shows no process")
        return found

    def threads(self, pid: int) -> list[int] | Miss:
        """The ids of the threads of a process, ascending; a dead leader is listed while others live."""
        path = f"{self.root}/{pid}/task"
        try:
            return _numbers(path)
        except OSError as error:
            return _miss(error, path)

    def maps(self, pid: int) -> list[MapRow] | Miss:
        """Every mapping of a process; none for a kernel thread or a zombie.

        Not atomic: the kernel hands it out a page at a time, and rows of mappings that were made or
        dropped between two pages may be missing or stale.
        """
        return self._maps(pid, ROW)

    def executable_maps(self, pid: int) -> list[MapRow] | Miss:
        """The mappings of a process that map a file executable; see `maps` and the function of that name."""
        return self._maps(pid, EXECUTABLE_ROW)

    def _maps(self, pid: int, pattern: re.Pattern[bytes]) -> list[MapRow] | Miss:
        def ask(base: str) -> list[MapRow] | Miss:
            rows, _ = _read_rows(f"{base}/maps", pattern)
            assert rows is not None  # without a known state nothing is as it was
            return rows

        found = self._first(pid, ask)
        return [] if found is Miss.ABSENT else found

    def new_executable_maps(
        self, pid: int, known: MapsState | None, digest: Callable[[bytes], bytes], on_progress: Callable[[], None]
    ) -> tuple[list[MapRow] | Miss | None, MapsState | None]:
        """`executable_maps`, or None if the maps are what they were in a ``known`` state; and their state.

        Args:
            pid: of the process.
            known: what an earlier call gave.
            digest: no two texts have the same.
            on_progress: called after each piece that was read.
        """
        state: MapsState | None = None

        def ask(base: str) -> list[MapRow] | Miss | None:
            nonlocal state
            rows, state = _read_rows(f"{base}/maps", EXECUTABLE_ROW, known, digest, on_progress)
            return rows

        found = self._first(pid, ask)
        return [] if found is Miss.ABSENT else found, state

    def resolve(self, pid: int, rows: Sequence[MapRow]) -> list[MapRow]:
        """Rows of a process with what their text leaves open; see `sowatch.linux.mapped_rows`.

        Needs the right to see the files of the process, may wait for a file system that hangs, and follows no link.
        Where the answer cannot be had a row stays as it is.
        """
        found = list(rows)
        if any(leaves_open(row) for row in rows) and (root := self.root_dir(pid)):
            self._resolve(root.removesuffix("/root"), found)
        return found

    def _resolve(self, base: str, rows: list[MapRow]) -> None:
        resolve_rows(base, rows)

    def live_thread(self, pid: int) -> int | Miss:
        """A thread of the process that still has its address space: the leader if it can be.

        ``ABSENT`` for a kernel thread or a zombie.
        """

        def ask(base: str) -> int | Miss:
            data = _read(f"{base}/maps", 1)
            return data if isinstance(data, Miss) else int(base.rpartition("/")[2]) if data else Miss.ABSENT

        return self._first(pid, ask)

    def map_files_dir(self, pid: int) -> str | Miss:
        """The directory with a link for each mapped file, named by its range in hexadecimal.

        It is that of a live thread: ``/proc/TID`` exists for every one, though it is not listed. Its
        links can be opened with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE in the initial user namespace
        only, even those of one's own process.
        """
        tid = self.live_thread(pid)
        return tid if isinstance(tid, Miss) else f"{self.root}/{tid}/map_files"

    def root_dir(self, pid: int) -> str | Miss:
        """A path that leads to the root directory of the process, through a live thread."""
        tid = self.live_thread(pid)
        return tid if isinstance(tid, Miss) else f"{self.root}/{tid}/root"

    def mapped_pages(self, pid: int) -> int | Miss:
        """How many pages of address space it has mapped (total_vm); 0 without any. Takes no lock of it."""
        data = _read(f"{self.root}/{pid}/statm")
        return data if isinstance(data, Miss) else int(data.split()[0] or 0)

    def stat(self, pid: int) -> Stat | Miss:
        """State, parent, start time and comm. Works for every user on every process."""
        data = _read_small(f"{self.root}/{pid}/stat")
        return data if isinstance(data, Miss) else parse_stat(data) or Miss.GONE

    def is_image_hidden(self, pid: int) -> bool:
        """Whether it has a program, and we may not know where: `Stat.image` is empty then, too."""
        data = _read(f"{self.root}/{pid}/stat")
        return not isinstance(data, Miss) and data.rpartition(b")")[2].split()[23:24] == [b"1"]

    def status(self, pid: int) -> Status | Miss:
        """Owner and pid in its own namespace. Works for every user on every process."""
        data = _read(f"{self.root}/{pid}/status")
        return data if isinstance(data, Miss) else parse_status(data) or Miss.GONE

    def cgroup(self, pid: int) -> str | Miss:
        """The path of its cgroup, chosen as `choose_cgroup` says; ``ABSENT`` without cgroups."""
        at_root: str | None = None

        def ask(base: str) -> str | Miss:
            nonlocal at_root
            data = _read(f"{base}/cgroup")
            if isinstance(data, Miss):
                return data
            paths = parse_cgroups(data)
            if not paths:
                return Miss.ABSENT
            chosen = choose_cgroup(paths)
            if chosen != "/" and paths[1:] != ("/",):
                return chosen
            at_root = at_root or chosen
            return Miss.ABSENT  # v1 shows a dead leader in the root (proc_cgroup_show)

        found = self._first(pid, ask)
        return at_root if at_root is not None and found is Miss.ABSENT else found

    def exe(self, pid: int) -> Link | Miss:
        """The main executable, seen from our root; ``ABSENT`` for a kernel thread or a zombie."""
        path = self._link(pid, "exe")
        if isinstance(path, Miss):
            return path
        mark = _text(DELETED)
        if not path.endswith(mark):
            return Link(path, False)
        root = self.root_dir(pid)
        if root and self._is_program_of(root.removesuffix("/root"), path):
            return Link(path, False)
        return Link(path.removesuffix(mark), True)

    def _is_program_of(self, base: str, path: str) -> bool:
        return is_program_of(base, path)

    def is_32bit(self, pid: int) -> bool | Miss:
        """Whether its program is a 32-bit one, by the auxiliary vector; opens no file of it."""
        data = self._auxv(pid)
        return data if isinstance(data, Miss) else bool(auxv.is_32bit(data))

    def interpreter_base(self, pid: int) -> int:
        """The address at which exec mapped the interpreter; 0 if there is none, or it cannot be read."""
        data = self._auxv(pid)
        return 0 if isinstance(data, Miss) else auxv.interpreter_base(data)

    def _auxv(self, pid: int) -> bytes | Miss:
        def ask(base: str) -> bytes | Miss:
            data = _read(f"{base}/auxv")
            return Miss.ABSENT if data == b"" else data

        return self._first(pid, ask)

    def process(self, pid: int, *, container_of: Callable[[str], str | None] | None = None) -> Process | None:
        """The whole record of a process; what may not be read or is not there is ``None`` in it.

        Args:
            pid: of the process; that of a thread gives ``None``.
            container_of: takes the path of a cgroup and gives the id of the container, if it is one.

        Returns:
            ``None`` if there is no such process. If it ends while it is read, what its stat had:
            never a mixture with another process that got the pid.
        """
        first = self.stat(pid)
        if isinstance(first, Miss):
            return None
        status, exe, root, cgroup = self.status(pid), self.exe(pid), self._link(pid, "root"), self.cgroup(pid)
        last = self.stat(pid)
        known = Process(pid=pid, start_ns=first.start_ns, ppid=first.ppid, comm=_text(first.comm))
        if isinstance(last, Miss) or last.start_ticks != first.start_ticks:
            return known
        if not isinstance(status, Miss) and status.tgid != pid:
            return None
        place = None if container_of is None or isinstance(cgroup, Miss) else pod_in(cgroup)
        return Process(
            pid=pid,
            start_ns=known.start_ns,
            ns_pid=None if isinstance(status, Miss) else status.ns_pid,
            ppid=known.ppid,
            comm=known.comm,
            exe=None if isinstance(exe, Miss) else seen_path(exe.path, "/" if isinstance(root, Miss) else root),
            uid=None if isinstance(status, Miss) else status.uid,
            container=None if container_of is None or isinstance(cgroup, Miss) else container_of(cgroup),
            cgroup=None if isinstance(cgroup, Miss) else cgroup,
            pod=None if place is None else Pod(place.uid),
        )

    def boot_id(self) -> str | None:
        """The random id of this boot of the kernel; ``None`` where proc shows processes only."""
        data = _read(f"{self.root}/sys/kernel/random/boot_id")
        return None if isinstance(data, Miss) else data.decode("ascii", "replace").strip()

    def _link(self, pid: int, name: str) -> str | Miss:
        def ask(base: str) -> str | Miss:
            try:
                return os.readlink(f"{base}/{name}")
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:  # do_proc_readlink has one page for it
                    return Miss.ABSENT
                return _miss(error, f"{base}/{name}")

        return self._first(pid, ask)

    def _first(self, pid: int, ask: Callable[[str], _T | Miss]) -> _T | Miss:
        """The answer of the process's directory or, if the leader is dead, of the first live thread's."""
        answer = ask(f"{self.root}/{pid}")
        if not isinstance(answer, Miss):
            return answer
        # Read again: ENOENT and ESRCH also mean a kernel thread and a zombie, and the files
        # of a task without memory belong to root, so that its owner is refused (task_dump_owner).
        leader = self.stat(pid)
        if isinstance(leader, Miss):
            return leader
        if leader.is_kernel_thread or (answer is Miss.DENIED and not leader.is_dead):
            return answer if answer is Miss.DENIED else Miss.ABSENT
        tids = self.threads(pid) if leader.is_dead else []
        answers = {Miss.ABSENT}
        for tid in tids if isinstance(tids, list) else ():
            answer = Miss.ABSENT if tid == pid else ask(f"{self.root}/{pid}/task/{tid}")
            if not isinstance(answer, Miss):
                return answer
            answers.add(answer)
        # A thread that executes another program takes the place of the leader, perhaps meanwhile.
        answer = ask(f"{self.root}/{pid}")
        return answer if not isinstance(answer, Miss) else Miss.DENIED if Miss.DENIED in answers else Miss.ABSENT

    def _check(self, given: str) -> None:
        try:
            info = os.stat(self.root)
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else str(error)
            raise ProcRootError(given, reason) from error
        if not stat.S_ISDIR(info.st_mode):
            raise ProcRootError(given, "it is not a directory")
        kind = _filesystem(info.st_dev)
        if kind not in (None, "proc"):
            raise ProcRootError(given, f"it is on {kind}")
        if not os.path.islink(f"{self.root}/self"):
            raise ProcRootError(given, "it has no link named self")
        # GONE: it ended since it was listed. DENIED: hidepid=1, which only a proc file system has.
        for pid in self.pids():
            data = _read(f"{self.root}/{pid}/stat")
            if isinstance(data, bytes) and ((found := parse_stat(data)) is None or found.pid != pid):
                raise ProcRootError(given, f"{pid}/stat is not the stat of process {pid}")
            if data is not Miss.GONE:
                return


def _filesystem(device: int) -> str | None:
    """The type of the file system on a device, ``None`` where our mount table does not have it (btrfs)."""
    table = _read("/proc/self/mountinfo")
    if isinstance(table, Miss):
        return None
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    for line in table.split(b"\n"):
        mount, _, rest = line.partition(b" - ")
        if mount.split(b" ")[2:3] == [wanted]:
            return _text(rest.partition(b" ")[0])
    return None
