"""Opens mapped files safely and reads what they say of themselves, off the draining thread.

Files are under the control of containers: they are opened through the kernel's own link to the
mapping, or below the process's own root, never by following a link out of it; without blocking on a FIFO; and only
regular files are read.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Final, NamedTuple

from cachetools import LRUCache

from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.fair_queue import FairQueue
from sowatch.linux.descriptors import close_fd, is_lack_of_resources
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import ExportSearch, search_exports
from sowatch.linux.mapped_file import Place, build_id_of_copied_up, find_mapped, mapped_build_id, open_mapped
from sowatch.linux.openat import reopen
from sowatch.linux.proc import ProcFs, ProcReadError
from sowatch.model.identity import FileId
from sowatch.model.literals import Kind

__all__ = ["FileFacts", "Inspection", "Inspector", "host_path", "open_mapped"]

#: A read that takes longer hangs: what else it hangs for is not tried until it has returned.
STUCK_S: Final = 0.5
#: When all threads have been busy for so long, those behind them get further ones: so many at a time, and in all.
BUSY_S: Final = 0.02
MORE_THREADS: Final = 8
MAX_THREADS: Final = 64
#: Files that were given up and are read again when what hung has returned.
MAX_GIVEN_UP: Final = 5_000
#: What dynamic loaders are called: ld-linux-x86-64.so.2, ld-musl-x86_64.so.1, ld64.so.2, ld.so.1, libc.musl-...
LOADER_NAME: Final = re.compile(r"/(ld(64)?(-[^/]*)?\.so[^/]*|libc\.musl-[^/]*|ld-[0-9.]+\.so)$")
#: Files whose facts are kept; a few hundred bytes each.
MAX_FACTS: Final = 5_000
#: Names whose facts are found without their version being made and looked up.
MAX_AT_HAND: Final = 500

#: What changed so recently may change again within the granularity of the kernel's clock for files (a tick, 10 ms at
#: the most), and keep its change time. Linux 6.13 has finer ones for files that were read.
RACY_NS: Final = 20_000_000
#: A file that is not whole, or is no ELF file, and changed so recently is read again: it may be being written.
UNFINISHED_S: Final = 60.0
#: So long after its last change a file that looks whole is whole.
WRITTEN_S: Final = 2.0
FIRST_RECHECK_S: Final = 0.25
MAX_UNFINISHED: Final = 1_000


class Version(NamedTuple):
    """A file under one name, as it was when it was mapped: its change time in ns, 0 if nobody knows that."""

    file_id: FileId
    changed_ns: int
    view: Hashable
    path: str
    is_deleted: bool


#: A file as it was when it was read: change time and size.
Content = tuple[FileId, int, int]


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
    #: Which path was found to lead to it from here.
    place: Place | None = None
    #: The kernel's link that led to it.
    link: str | None = None

    def kind(self, claimed: Kind, path: str, *, is_anonymous: bool) -> Kind:
        """What the file at ``path`` is to a process that states that it is its ``claimed``.

        Executable and interpreter are statements of the process: a process can write its auxiliary vector and its exe
        link (prctl(PR_SET_MM)), and map anything over what exec has mapped. So the file has to be one that the kernel
        can start a process with. If it could not be read, an interpreter has to be called like one.
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
    """A read of one file that was asked for, by one process or by several. ``facts`` is None until it is done."""

    __slots__ = ("asked_s", "asker", "facts", "has_begun")

    def __init__(self, asked_s: float, facts: FileFacts | None = None, asker: int | None = None) -> None:
        self.asked_s = asked_s
        self.facts = facts
        #: The process in whose queue it waits; None: it waits in those of two.
        self.asker = asker
        self.has_begun = False


class _Request(NamedTuple):
    inspection: Inspection
    version: Version
    pid: int
    is_own_view: bool
    ranges: tuple[tuple[int, int], ...]
    #: The process does not answer: only our own view is left.
    skips_process: bool = False


class _Look:
    """What a thread does: since when, for whom, and whether it waits for the process or for the file."""

    __slots__ = ("device", "is_at_file", "pid", "request", "since_s")

    def __init__(self, request: _Request) -> None:
        self.since_s = time.monotonic()
        self.request: _Request | None = request
        self.pid = request.pid
        self.device = request.version.file_id[:2]
        self.is_at_file = False

    def holds_up(self, pid: int, device: tuple[int, int], now_s: float) -> bool:
        """Whether this read hangs, and one of a file on that device, mapped by that process, would too."""
        return now_s - self.since_s > STUCK_S and (device == self.device if self.is_at_file else pid == self.pid)


class Inspector:
    """One thread that opens and reads files on demand, and remembers what it found by FileId.

    Args:
        proc: the host's.
        exports: symbols that some rule asks for; read only if there are any.
        on_done: called on the inspector's thread after each read.

    All methods may be called from any thread.
    """

    def __init__(self, *, proc: ProcFs, exports: frozenset[str], on_done: Callable[[], None]) -> None:
        self._proc = proc
        self._exports = exports
        self._on_done = on_done
        self._known: LRUCache[Version, FileFacts] = LRUCache(MAX_FACTS)
        #: The same for the draining thread, by the id of the name, which stands beside it: what is mapped all the time.
        self._at_hand: dict[int, tuple[MappedFile, FileFacts]] = {}
        self._read: LRUCache[Content, FileFacts] = LRUCache(MAX_FACTS)
        #: Files that may be being written: when to read them again, and when the pause after that ends.
        self._unfinished: dict[FileId, tuple[float, float]] = {}
        self._lock = threading.Lock()
        #: By process: one that maps ten thousand files does not keep the file of another one waiting.
        self._requests = FairQueue[_Request | None]()
        self._under_way: dict[Version, Inspection] = {}
        self._looking: dict[threading.Thread, _Look] = {}
        #: Files that were not read, as that would hang: on which device, for which process.
        self._given_up: dict[FileId, tuple[int, tuple[int, int]]] = {}
        self._recovered: set[FileId] = set()
        self._finished: deque[Inspection] = deque()
        self._threads: list[threading.Thread] = []
        self._add_thread()

    def _add_thread(self) -> None:
        # A daemon: a read that hangs in a dead network file system must not keep the process.
        thread = threading.Thread(target=self._work, name="sowatch-inspector", daemon=True)
        with suppress(RuntimeError):  # no more threads: a limit of the service or of the host
            thread.start()
            self._threads.append(thread)

    def relieve(self, now_s: float) -> None:
        """Adds threads for files that wait behind long reads; to be called some fifty times a second."""
        with self._lock:
            busy = sum(now_s - look.since_s > BUSY_S for look in self._looking.values())
            waiting = len(self._under_way) - len(self._looking)
            missing = min(waiting, MORE_THREADS, MAX_THREADS - len(self._threads))
            if busy == len(self._threads):
                for _ in range(missing):
                    self._add_thread()
            for look in self._looking.values():
                # Others may wait for the same file, and we may have it in our own view.
                request = look.request
                if request and request.is_own_view and not look.is_at_file and now_s - look.since_s > BUSY_S:
                    look.request = None
                    self._requests.put(request.pid, request._replace(skips_process=True))

    def take_recovered(self) -> set[FileId]:
        """Files to be read again: what hung is over, or they may be complete by now."""
        if not self._recovered and not self._unfinished:
            return set()
        now_s = time.monotonic()
        with self._lock:
            taken, self._recovered = self._recovered, set()
            for file_id, (due_s, pause_s) in list(self._unfinished.items()):
                if now_s >= due_s:
                    self._unfinished[file_id] = now_s + 2 * pause_s, 2 * pause_s
                    taken.add(file_id)
                if pause_s > UNFINISHED_S:
                    del self._unfinished[file_id]
        return taken

    def take_finished(self) -> list[Inspection]:
        """Inspections that are over since the last call."""
        finished = self._finished
        return [finished.popleft() for _ in range(len(finished))]

    def known(self, name: MappedFile) -> FileFacts | None:
        """The facts, if the file was read before and has not changed since."""
        at_hand = self._at_hand.get(id(name))
        if at_hand is not None and at_hand[0] is name:
            return at_hand[1]
        with self._lock:
            # One that may be being written is read each time.
            facts = None if name.file_id in self._unfinished else self._known.get(_version_of(name))
            if facts is not None:
                if len(self._at_hand) >= MAX_AT_HAND:
                    self._at_hand.clear()
                self._at_hand[id(name)] = name, facts
            return facts

    def inspect(self, change: Change, *, is_own_view: bool, now_s: float) -> Inspection:
        """Asks for a read of the file of a change; one read serves all who wait for that file."""
        name = change.name
        with self._lock:
            version = _version_of(name)
            inspection, pid = self._under_way.get(version), change.process.pid
            if inspection is None:
                inspection = self._under_way[version] = Inspection(now_s, asker=pid)
            elif inspection.has_begun or inspection.asker in (pid, None):
                return inspection
            else:
                inspection.asker = None
            self._requests.put(pid, _Request(inspection, version, pid, is_own_view, change.ranges))
            return inspection

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the thread, if it can within the time. Safe to call again."""
        with self._lock:
            threads = list(self._threads)
        for _ in threads:
            self._requests.put(None, None)
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        me = threading.current_thread()
        while (request := self._requests.get()) is not None:
            look = _Look(request)
            with self._lock:
                if request.inspection.has_begun and not request.skips_process:
                    continue  # for the other process that has asked for it
                request.inspection.has_begun = True
                # One thread for each thing that hangs is enough.
                others = self._looking.values()
                is_hopeless = any(one.holds_up(look.pid, look.device, look.since_s) for one in others)
                if request.skips_process:
                    look.request, look.pid, is_hopeless = None, 0, False
                self._looking[me] = look
            facts = FileFacts() if is_hopeless else self._look(request, look)
            with self._lock:
                del self._looking[me]
                request.inspection.facts = request.inspection.facts or facts
                self._under_way.pop(request.version, None)
                self._finished.append(request.inspection)
                has_hung = time.monotonic() - look.since_s > STUCK_S
                if is_hopeless and len(self._given_up) < MAX_GIVEN_UP:
                    self._given_up[request.version.file_id] = look.pid, look.device
                elif has_hung:
                    self._recover(request.version.file_id, look)
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

    def _look(self, request: _Request, look: _Look) -> FileFacts:
        def on_file() -> None:
            look.is_at_file = True

        version = request.version
        found, fd = None, -1
        try:
            found = find_mapped(
                self._proc,
                request.pid,
                version.file_id,
                version.path,
                () if request.skips_process else request.ranges,
                is_own_view=request.is_own_view,
                is_deleted=version.is_deleted,
                changed_ns=max(0, version.changed_ns),
                on_file=on_file,
                skips_process=request.skips_process,
            )
            if found is None:
                # On an overlay nothing may lead to what is mapped any more; its pages still say what it is.
                build_id = None if request.skips_process else mapped_build_id(self._proc, request.pid, request.ranges)
                return FileFacts(is_elf=True if build_id else None, build_id=build_id, is_partial=bool(build_id))
            fd = reopen(found.fd, os.O_RDONLY)
            facts = self._facts_of(fd, version, found.place)._replace(place=found.place, link=found.link)
            if version.changed_ns <= 0 and not request.skips_process:
                build_id = build_id_of_copied_up(self._proc, request.pid, request.ranges, fd, facts.build_id)
                if build_id is not None:
                    facts = FileFacts(is_elf=True, build_id=build_id, is_partial=True)
        except (OSError, ProcReadError) as error:
            if is_lack_of_resources(error):
                with self._lock:
                    self._note_unfinished(version.file_id)  # it is read again
            return FileFacts()
        else:
            return facts
        finally:
            close_fd(fd)
            if found is not None:
                close_fd(found.fd)

    def _facts_of(self, fd: int, version: Version, place: Place | None) -> FileFacts:
        """What the file says, read once for each content of it."""
        before = os.fstat(fd)
        content = version.file_id, before.st_ctime_ns, before.st_size
        with self._lock:
            facts = self._read.get(content)
        age_ns = time.time_ns() - before.st_ctime_ns
        is_settled = True
        if facts is None:
            facts = self._parse(fd)
            after = os.fstat(fd)
            age_ns = time.time_ns() - after.st_ctime_ns
            is_settled = (after.st_ctime_ns, after.st_size) == content[1:] and age_ns > RACY_NS
        is_whole = facts.is_elf and not facts.is_partial and age_ns > WRITTEN_S * 1e9
        with self._lock:
            if is_settled and facts.is_elf is not None:
                self._read[content] = facts
            if not is_settled or (not is_whole and age_ns < UNFINISHED_S * 1e9):
                self._note_unfinished(version.file_id)
            elif is_whole:
                self._note_finished(version.file_id)
            # A link is one process's, so the next one is read.
            if content in self._read and place != "link" and before.st_ctime_ns == version.changed_ns:
                self._known[version] = facts._replace(place=place)
                self._at_hand.clear()
        return facts

    def _note_unfinished(self, file_id: FileId) -> None:
        if file_id not in self._unfinished and len(self._unfinished) < MAX_UNFINISHED:
            self._unfinished[file_id] = time.monotonic() + FIRST_RECHECK_S, FIRST_RECHECK_S
            self._at_hand.clear()

    def _note_finished(self, file_id: FileId) -> None:
        """Nobody writes to it any more: what was published of it meanwhile is checked once more, and that is all."""
        if self._unfinished.pop(file_id, None) is not None:
            self._recovered.add(file_id)

    def _parse(self, fd: int) -> FileFacts:
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

    def _search_exports(self, fd: int) -> ExportSearch | None:
        if not self._exports:
            return None
        try:
            return search_exports(fd, self._exports)
        except ElfError:
            return None  # the kernel could not read it, and may do so yet


def _version_of(name: MappedFile) -> Version:
    return Version(name.file_id, name.changed_ns, name.view, name.path, name.is_deleted)


def host_path(proc_root: str, pid: int, name: MappedFile, facts: FileFacts) -> str | None:
    """A path that opens the same file from here, as it was found when the file was opened; None if there is none."""
    if facts.place == "link":
        return facts.link
    if facts.place == "root":
        return f"{proc_root}/{pid}/root{name.path}"
    return name.path if facts.place == "own" else None
