"""Opens mapped files safely and reads what they say of themselves, off the draining thread.

Files are under the control of whoever made the container: they are opened through the kernel's own link to the
mapping, or below the process's own root, never by following a link out of it; without blocking on a FIFO; and only
regular files are read.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from cachetools import LRUCache

from sowatch.engine.address_space import Change, Name
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import ExportSearch, search_exports
from sowatch.linux.openat import open_below, reopen, shows_real_inode
from sowatch.linux.proc import ProcFs
from sowatch.model.identity import FileId

__all__ = ["FileFacts", "Inspection", "Inspector", "open_mapped"]

#: A look that takes longer hangs: what else it hangs for is not tried until it has returned.
STUCK_S: Final = 0.5
#: When all threads have looked for so long, those behind them get further ones: so many at a time, and in all.
BUSY_S: Final = 0.1
MORE_THREADS: Final = 8
MAX_THREADS: Final = 64
#: Files that were given up and are looked at again when what hung has returned.
MAX_GIVEN_UP: Final = 5_000
#: What dynamic loaders are called: ld-linux-x86-64.so.2, ld-musl-x86_64.so.1, ld64.so.2, ld.so.1, libc.musl-...
LOADER_NAME: Final = re.compile(r"/(ld(64)?(-[^/]*)?\.so[^/]*|libc\.musl-[^/]*|ld-[0-9.]+\.so)$")
#: Mappings within a range that has no link of its own: so many are tried.
MAX_LINKS: Final = 8
#: Files whose facts are kept; a few hundred bytes each.
MAX_FACTS: Final = 5_000


#: A file as it was at one time: its ctime in ns says which.
Version = tuple[FileId, int]


class FileFacts(NamedTuple):
    """What a file says of itself. ``is_elf`` is None if it could not be read; ``exports`` if not asked for.

    ``is_partial``: something was given up, because the file contradicts itself or passes a limit of work.
    """

    is_elf: bool | None = None
    build_id: str | None = None
    soname: str | None = None
    exports: frozenset[str] | None = None
    is_partial: bool = False
    #: What the kernel can start a process with it as; see `sowatch.linux.elf.ElfFacts`.
    image_kinds: frozenset[str] = frozenset()

    def kind(self, claimed: str, path: str, *, is_anonymous: bool) -> str:
        """What the file at ``path`` is to a process that claims it to be ``claimed``.

        Executable and interpreter are claims: a process can write its auxiliary vector and its exe link
        (prctl(PR_SET_MM)), and map anything over what exec has mapped. So the file has to be one that the kernel can
        start a process with. If it could not be read, an interpreter has to be called like one.
        """
        if claimed in ("executable", "interpreter"):
            if self.is_elf is None:
                is_library = claimed == "interpreter" and not LOADER_NAME.search(path)
            else:
                is_library = self.is_elf and claimed not in self.image_kinds
            return "library" if is_library else claimed
        if claimed == "library" and (self.is_elf is False or (is_anonymous and not self.is_elf)):
            return "other"
        return claimed


class Inspection:
    """A look at one file that was asked for. ``facts`` is None until it is done."""

    __slots__ = ("asked_s", "facts")

    def __init__(self, asked_s: float) -> None:
        self.asked_s = asked_s
        self.facts: FileFacts | None = None


class _Order(NamedTuple):
    inspection: Inspection
    version: Version
    pid: int
    path: str
    is_own_view: bool
    is_deleted: bool
    ranges: tuple[tuple[int, int], ...]
    #: The process does not answer: only our own view is left.
    skips_process: bool = False


class _Look:
    """What a thread does: since when, for whom, and whether it waits for the process or for the file."""

    __slots__ = ("device", "is_at_file", "order", "pid", "since_s")

    def __init__(self, order: _Order) -> None:
        self.since_s = time.monotonic()
        self.order: _Order | None = order
        self.pid = order.pid
        self.device = order.version[0][:2]
        self.is_at_file = False

    def holds_up(self, pid: int, device: tuple[int, int], now_s: float) -> bool:
        """Whether this look hangs, and one at a file on that device, mapped by that process, would too."""
        return now_s - self.since_s > STUCK_S and (device == self.device if self.is_at_file else pid == self.pid)


class Inspector:
    """One thread that opens and reads files on demand, and remembers what it found by FileId.

    Args:
        proc: the host's.
        exports: symbols that some rule asks for; read only if there are any.
        on_done: called on the inspector's thread after each look.

    All methods may be called from any thread.
    """

    def __init__(self, *, proc: ProcFs, exports: frozenset[str], on_done: Callable[[], None]) -> None:
        self._proc = proc
        self._exports = exports
        self._on_done = on_done
        self._known: LRUCache[Version, FileFacts] = LRUCache(MAX_FACTS)
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._under_way: dict[Version, Inspection] = {}
        self._looking: dict[threading.Thread, _Look] = {}
        #: Files that were not looked at, as that would hang: on which device, for which process.
        self._given_up: dict[FileId, tuple[int, tuple[int, int]]] = {}
        self._recovered: set[FileId] = set()
        self._threads: list[threading.Thread] = []
        self._add_thread()

    def _add_thread(self) -> None:
        # A daemon: a read that hangs in a dead network file system must not keep the process.
        thread = threading.Thread(target=self._work, name="sowatch-inspector", daemon=True)
        self._threads.append(thread)
        thread.start()

    def relieve(self, now_s: float) -> None:
        """Further threads for what waits behind looks that take long; to be called some ten times a second."""
        with self._lock:
            busy = sum(now_s - look.since_s > BUSY_S for look in self._looking.values())
            waiting = len(self._under_way) - len(self._looking)
            missing = min(waiting, MORE_THREADS, MAX_THREADS - len(self._threads))
            if busy == len(self._threads):
                for _ in range(missing):
                    self._add_thread()
            for look in self._looking.values():
                # Others may wait for the same file, and we may have it in our own view.
                order = look.order
                if order and order.is_own_view and not look.is_at_file and now_s - look.since_s > BUSY_S:
                    look.order = None
                    self._orders.put(order._replace(skips_process=True))

    def take_recovered(self) -> set[FileId]:
        """Files that could not be looked at because something hung, and can now."""
        if not self._recovered:
            return set()
        with self._lock:
            taken, self._recovered = self._recovered, set()
        return taken

    def known(self, name: Name) -> FileFacts | None:
        """The facts, if the file was read before and has not changed since."""
        with self._lock:
            return self._known.get((name.file_id, name.changed_ns))

    def inspect(self, change: Change, *, is_own_view: bool, now_s: float) -> Inspection:
        """Asks for a look at the file of a change; one look serves all who wait for that file."""
        name = change.name
        with self._lock:
            version = name.file_id, name.changed_ns
            inspection = self._under_way.get(version)
            if inspection is None:
                inspection = self._under_way[version] = Inspection(now_s)
                self._orders.put(
                    _Order(
                        inspection,
                        version,
                        change.process.pid,
                        name.path,
                        is_own_view,
                        name.is_deleted,
                        change.ranges,
                    )
                )
            return inspection

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the thread, if it can within the time. Safe to call again."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._orders.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        me = threading.current_thread()
        while (order := self._orders.get()) is not None:
            look = _Look(order)
            with self._lock:
                # One thread for each thing that hangs is enough.
                others = self._looking.values()
                is_hopeless = any(one.holds_up(look.pid, look.device, look.since_s) for one in others)
                if order.skips_process:
                    look.order, look.pid, is_hopeless = None, 0, False
                self._looking[me] = look
            facts = FileFacts() if is_hopeless else self._look(order, look)
            with self._lock:
                del self._looking[me]
                if facts.is_elf is not None:
                    self._known[order.version] = facts
                order.inspection.facts = order.inspection.facts or facts
                self._under_way.pop(order.version, None)
                has_hung = time.monotonic() - look.since_s > STUCK_S
                if is_hopeless and len(self._given_up) < MAX_GIVEN_UP:
                    self._given_up[order.version[0]] = look.pid, look.device
                elif has_hung:
                    self._recover(order.version[0], look)
                is_spare = has_hung and len(self._threads) > 1
                if is_spare:
                    self._threads.remove(me)  # another one has taken its place
            self._on_done()
            if is_spare:
                return

    def _recover(self, file: FileId, look: _Look) -> None:
        """What hung has returned: all that was given up for its sake, and its own file, which nobody waits for."""
        found = [one for one, (pid, device) in self._given_up.items() if pid == look.pid or device == look.device]
        for one in found:
            del self._given_up[one]
        self._recovered.update(found, (file,))

    def _look(self, order: _Order, look: _Look) -> FileFacts:
        def on_file() -> None:
            look.is_at_file = True

        fd = open_mapped(
            self._proc,
            order.pid,
            order.version[0],
            order.path,
            () if order.skips_process else order.ranges,
            is_own_view=order.is_own_view,
            is_deleted=order.is_deleted,
            on_file=on_file,
            skips_process=order.skips_process,
        )
        if fd is None:
            return FileFacts()
        try:
            facts = read_facts(fd)
            if facts is None:
                return FileFacts(is_elf=False)
            search = self._search_exports(fd) if facts.is_elf else None
            return FileFacts(
                facts.is_elf,
                facts.build_id,
                facts.soname,
                None if search is None else search.found,
                facts.is_partial or (search is not None and search.gave_up is not None),
                image_kinds=facts.image_kinds,
            )
        except (ElfError, OSError):
            return FileFacts()  # it could not be read, and may be tried again
        finally:
            os.close(fd)

    def _search_exports(self, fd: int) -> ExportSearch | None:
        if not self._exports:
            return None
        try:
            return search_exports(fd, self._exports)
        except ElfError:
            return None  # the kernel could not read it, and may do so yet


def open_mapped(
    proc: ProcFs,
    pid: int,
    file_id: FileId,
    path: str,
    ranges: tuple[tuple[int, int], ...],
    *,
    is_own_view: bool,
    is_deleted: bool,
    on_file: Callable[[], None] = lambda: None,
    skips_process: bool = False,
) -> int | None:
    """A descriptor of the very file that a process has mapped, or None if it cannot be had any more.

    Tried in order: the kernel's link to the mapping, the path below the process's root, the path
    in our own view if it is the same. Nothing is opened before it is known to be that file: the
    process may have mapped another one in its place, or put a link, a FIFO or a device there.
    ``on_file`` is called before a file system is asked, and no more the process.
    """
    roots = _roots(None if skips_process else proc, pid, is_own_view=is_own_view)
    for found, is_link in _candidates(proc, pid, path, ranges, () if is_deleted else roots, on_file):
        on_file()
        try:
            if _is_it(found, file_id, is_link=is_link):
                return reopen(found, os.O_RDONLY)
        except OSError:
            continue
        finally:
            os.close(found)
    return None


def _is_it(fd: int, file_id: FileId, *, is_link: bool) -> bool:
    """Whether a descriptor (O_PATH will do) is of that file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return False
    if shows_real_inode(fd):
        return (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) == file_id[:3]
    # On overlayfs and btrfs stat invents the device, on an overlay over several file systems the inode too.
    return is_link or status.st_ino == file_id.inode


def _roots(proc: ProcFs | None, pid: int, *, is_own_view: bool) -> Iterator[str]:
    """Where the path of the file may begin: at the root of its process, at ours if it is the same."""
    if proc is not None and (root := proc.root_dir(pid)):
        yield root
    if is_own_view:
        yield "/"


def _candidates(
    proc: ProcFs,
    pid: int,
    path: str,
    ranges: tuple[tuple[int, int], ...],
    roots: Iterable[str],
    on_file: Callable[[], None],
) -> Iterator[tuple[int, bool]]:
    """Descriptors that open nothing yet (O_PATH), and whether it is the kernel's link to the mapping."""
    links = proc.map_files_dir(pid) if ranges else None
    has_link = False
    for start, end in ranges if links else ():
        try:
            fd = os.open(f"{links}/{start:x}-{end:x}", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        has_link = True
        yield fd, True
    if links and not has_link:
        # A range of ours may be several mappings side by side, of which each has a link.
        rows = proc.executable_maps(pid)
        near = (row for row in rows or () if any(row.start < end and row.end > start for start, end in ranges[:2]))
        for row in itertools.islice(near, MAX_LINKS):
            try:
                yield os.open(f"{links}/{row.start:x}-{row.end:x}", os.O_PATH | os.O_CLOEXEC), True
            except OSError:
                continue
    for root in roots:
        try:
            directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        on_file()
        try:
            yield open_below(directory, path, os.O_PATH, follows_links=False), False
        except OSError:
            continue
        finally:
            os.close(directory)


def host_path(
    proc_root: str, pid: int, name: Name, ranges: tuple[tuple[int, int], ...], *, is_own_view: bool
) -> str | None:
    """A path that opens the same file from here, as far as can be said without looking."""
    if name.is_deleted:
        return f"{proc_root}/{pid}/map_files/{ranges[0][0]:x}-{ranges[0][1]:x}" if ranges else None
    if name.is_partial:
        return None
    return name.path if is_own_view else f"{proc_root}/{pid}/root{name.path}"
