"""`Packages`: which package a mapped file is of, in which version, as it was when that was mapped. Read-only.

What an upgrade has put in the place of a file must not lend it its version. So a database counts only where the very
inode that is mapped has the content that the database has; else what the file says of itself counts; and what was found
is kept, for the time when the file has been replaced.
docs/decisions/0072-package-identity.md has the rules.

Files and databases are those of containers: see `package_databases`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Final, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

from cachetools import LRUCache

from sowatch.inventory.language_packages import jar_package, npm_package, wheel_of, wheels_listed
from sowatch.inventory.look_budget import BudgetError, LookBudget, spend, within
from sowatch.inventory.package_databases import (
    DPKG_LISTS,
    DatabaseIndex,
    Listed,
    PackageRecord,
    apk_listed,
    apk_records,
    apk_state,
    dpkg_digest,
    dpkg_listed,
    dpkg_records,
    dpkg_state,
    file_state,
)
from sowatch.inventory.package_identity import (
    IdentifiedBy,
    PackageIdentity,
    Release,
    by_note,
    by_record,
    is_borrowed,
    plain,
    release_of,
)
from sowatch.inventory.roots import RootKey, Roots, own_root_key
from sowatch.inventory.rpm_database import rpm_listed
from sowatch.linux.content_hash import htlhash
from sowatch.linux.descriptors import close_fd, is_exhausted
from sowatch.linux.disk_calls import LOOK_TIMEOUT_S, DiskCalls, HangingCalls
from sowatch.linux.elf import ElfFacts, read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.heap import give_back
from sowatch.linux.mapped_file import open_mapped
from sowatch.linux.memory_files import is_memory
from sowatch.linux.openat import open_below
from sowatch.linux.package_note import PackageNote, read_package_note
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId

__all__ = ["HasFile", "IdentifiedBy", "PackageIdentity", "Packages"]

LOG = logging.getLogger("sowatch")
T = TypeVar("T")

#: Files of which the identity is kept, the ones asked for last: two hundred containers with five hundred each.
MAX_KEPT: Final = 100_000
#: Of those files the ones that are open at one time.
MAX_OPEN: Final = 256
#: Of all databases together, in files on their lists.
MAX_INDEXED: Final = 4_000_000
#: What is unknown is looked up again after this time: a package may just be on its way.
ASK_AGAIN_S: Final = 300.0
#: Larger files are not compared with their hash.
MAX_CONTENT: Final = 512 << 20
_CHUNK: Final = 1 << 20
_TIMEOUT_S: Final = 60.0


class HasFile(Protocol):
    """Who has what mapped: a `Mapped`, or an event of a load."""

    @property
    def process(self) -> Process:
        """Who has it mapped."""

    @property
    def library(self) -> Library:
        """What is mapped."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Where; empty: that is looked up."""


_FileKey: TypeAlias = tuple[RootKey, FileId, str, str | None, int]


class _Answer(NamedTuple):
    """``is_settled`` is false where a package manager was at work, or the process had gone: ask again."""

    identity: PackageIdentity | None
    is_settled: bool = True


class Packages:
    """Finds the packages of mapped files, and remembers them beyond the file. A context manager. Any thread.

    One call is answered at a time. What does not answer in time is unknown. A database is read again only where it has
    changed.

    Args:
        proc: the host's. Default: ``/proc``.
        hanging: what does not answer, shared with other readers of the disk.
        clock: seconds that only rise.

    Raises:
        ProcRootError: ``/proc`` is not mounted.
    """

    def __init__(
        self,
        proc: ProcFs | None = None,
        hanging: HangingCalls | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc or ProcFs()
        self._calls = DiskCalls("sowatch-packages", hanging)
        self._clock = clock
        self._kept: LRUCache[_FileKey, PackageIdentity] = LRUCache(MAX_KEPT)
        #: One object for equal ones: each container has the same packages.
        self._identities: LRUCache[PackageIdentity, PackageIdentity] = LRUCache(MAX_KEPT)
        #: When what was not found is looked up again.
        self._unknown: LRUCache[_FileKey, float] = LRUCache(MAX_KEPT)
        self._hashes: LRUCache[tuple[FileId, str, int], str] = LRUCache(MAX_KEPT)
        self._indexes: LRUCache[object, DatabaseIndex] = LRUCache(MAX_INDEXED, getsizeof=len)
        # A thread that was given up may still use them.
        self._indexes_lock = threading.Lock()
        self._own_root = own_root_key()
        self._asking = threading.Lock()
        #: What went wrong with files of others, each kind once.
        self._reported = set[str]()
        #: A database was read, which is large.
        self._has_read = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread that reads, unless it hangs. Safe to call again."""
        self._calls.close()

    def identify(self, wanted: Iterable[HasFile]) -> list[PackageIdentity | None]:
        """The package of each file, in the same order; None if it is unknown, which may change.

        Asked soon after the load it is known for as long as the file is mapped, whatever replaces it. Many at once cost
        less than one by one: a database is searched once for all that are new. Takes 10 us for what is known.
        """
        with self._asking:
            found = self._identify(list(wanted))
            if self._has_read:
                self._has_read = False
                give_back()
            return found

    def content_name(self, one: HasFile) -> str | None:
        """The build id of a mapped file; a hash of its content if it has none; None if it cannot be read any more.

        See `sowatch.linux.content_hash.htlhash`. A hash is kept as identities are.
        """
        library = one.library
        if library.build_id:
            return library.build_id
        if is_memory(library.id) or not library.path.startswith("/"):
            return None
        key = (library.id, library.path, library.changed_ns)
        with self._asking:
            found = self._hashes.get(key)
            if found is None:
                found = self._run(partial(self._hash, one), None, place=("hash", library.id[:2], library.path))
                if found is not None:
                    self._hashes[key] = found
        return found

    def _run(
        self, call: Callable[[], T], otherwise: T, timeout_s: float | None = None, *, place: tuple[object, ...]
    ) -> T:
        """As `DiskCalls.run`; ``otherwise``, too, where it fails: no file ends the search for others."""
        try:
            return self._calls.run(call, otherwise, timeout_s, place=place)
        except Exception as error:  # noqa: BLE001 - whatever the files of a container make a library raise
            self._failed(error)
            return otherwise

    def _failed(self, error: Exception) -> _Answer:
        kind = type(error).__name__
        if kind not in self._reported:
            self._reported.add(kind)
            LOG.warning("a file could not be looked up, its package is unknown: %s: %s", kind, error)
        return _Answer(None, is_settled=not (isinstance(error, OSError) and is_exhausted(error)))

    def _hash(self, one: HasFile) -> str | None:
        fd = self._open(one, is_own_view=False)
        if fd is None:
            return None
        try:
            return htlhash(fd)
        except OSError:
            return None
        finally:
            close_fd(fd)

    def _identify(self, asked: Sequence[HasFile]) -> list[PackageIdentity | None]:
        roots = Roots(self._proc)
        found: list[PackageIdentity | None] = [None] * len(asked)
        new: dict[RootKey, dict[_FileKey, list[int]]] = {}
        now_s = self._clock()
        keys: dict[int, RootKey | None] = {}
        for index, one in enumerate(asked):
            pid, library = one.process.pid, one.library
            if is_memory(library.id) or not library.path.startswith("/"):
                continue
            if pid not in keys:
                keys[pid] = self._run(partial(roots.key, pid), None, place=("root", pid))
            if (root := keys[pid]) is None:
                continue
            key = (root, library.id, library.path, library.build_id, library.changed_ns)
            kept = self._kept.get(key)
            if kept is not None:
                found[index] = kept
            elif self._unknown.get(key, 0.0) <= now_s:
                new.setdefault(root, {}).setdefault(key, []).append(index)
        for root, files in new.items():
            new_keys = list(files)
            # What was found by the end of one part is kept, whatever the next one takes.
            for start in range(0, len(new_keys), MAX_OPEN):
                part = {key: files[key] for key in new_keys[start : start + MAX_OPEN]}
                holders = {key: [asked[place] for place in at[:_MOST_HOLDERS]] for key, at in part.items()}
                for key, answer in self._answers(roots, root, holders).items():
                    identity = self._keep(key, answer, now_s)
                    for index in part[key]:
                        found[index] = identity
        return found

    def _keep(self, key: _FileKey, answer: _Answer, now_s: float) -> PackageIdentity | None:
        if answer.identity is None:
            if answer.is_settled:
                self._unknown[key] = now_s + ASK_AGAIN_S
            return None
        kept = self._kept[key] = self._identities.setdefault(answer.identity, answer.identity)
        return kept

    def _answers(
        self, roots: Roots, root: RootKey, files: Mapping[_FileKey, Sequence[HasFile]]
    ) -> dict[_FileKey, _Answer]:
        """Of files below one root that nothing is known of yet, with who has them mapped."""
        answers: dict[_FileKey, _Answer] = {}
        looks: list[_Look] = []
        for key, holders in files.items():
            opened = self._opened(root, key, holders)
            if isinstance(opened, _Look):
                looks.append(opened)
            else:
                answers[key] = opened
        return answers | self._looked(roots, root, looks) if looks else answers

    def _opened(self, root: RootKey, key: _FileKey, holders: Sequence[HasFile]) -> _Look | _Answer:
        """The very file, if one of those that have it mapped still shows it, within a deadline of its own."""
        unknown: _Look | _Answer = _Answer(None, is_settled=False)
        for one in holders:
            library = one.library
            place = ("file", library.id[:2], os.path.dirname(library.path))
            read = partial(self._read_file, key, one, is_own_view=root == self._own_root)
            found = self._run(read, unknown, place=place)
            if isinstance(found, _Look) or found.is_settled:
                return found
        return unknown

    def _looked(self, roots: Roots, root: RootKey, looks: Sequence[_Look]) -> dict[_FileKey, _Answer]:
        # A database on a file system that hangs keeps nobody else from being answered.
        timeout_s = LOOK_TIMEOUT_S if self._calls.hanging else _TIMEOUT_S
        nothing = dict.fromkeys((look.key for look in looks), _Answer(None, is_settled=False))
        look_up = partial(self._look, roots, root, looks)
        return nothing | self._run(look_up, nothing, timeout_s, place=("packages", root))

    # ---- on the thread that reads --------------------------------------------------------------

    def _read_file(self, key: _FileKey, one: HasFile, *, is_own_view: bool) -> _Look | _Answer:
        fd = self._open(one, is_own_view=is_own_view)
        if fd is None:
            return _Answer(None, is_settled=False)
        look = _Look(key, one.process.pid, one.library, fd)
        try:
            facts = read_facts(fd)
            if _was_overwritten(look, facts):
                return _Answer(None)
            look.soname = None if facts is None else facts.soname
            look.note = read_package_note(fd)
        except ElfError:
            return _Answer(None)
        return look

    def _look(self, roots: Roots, root: RootKey, looks: Sequence[_Look]) -> dict[_FileKey, _Answer]:
        for pid in dict.fromkeys(look.pid for look in looks):
            with ExitStack() as stack:
                try:
                    root_fd = stack.enter_context(roots.open(pid))
                except OSError:  # this one ended just now; another has the same root
                    continue
                try:
                    with within(LookBudget(_TIMEOUT_S)):
                        return self._identified(root, root_fd, looks)
                except Exception as error:  # noqa: BLE001 - as in `_run`
                    return dict.fromkeys((look.key for look in looks), self._failed(error))
        return {}

    def _open(self, one: HasFile, *, is_own_view: bool) -> int | None:
        pid, library = one.process.pid, one.library
        return open_mapped(
            self._proc,
            pid,
            library.id,
            library.path,
            one.ranges or self._ranges(pid, library),
            is_own_view=is_own_view,
            is_deleted=library.deleted,
            changed_ns=library.changed_ns,
        )

    def _ranges(self, pid: int, library: Library) -> tuple[tuple[int, int], ...]:
        rows = self._proc.executable_maps(pid)
        if isinstance(rows, Miss):
            return ()
        return tuple((row.start, row.end) for row in rows if row.inode == library.id.inode)

    def _identified(self, root: RootKey, root_fd: int, looks: Sequence[_Look]) -> dict[_FileKey, _Answer]:
        release = release_of(root_fd)
        # A database that proves the very file says more than a note, which may be one that was linked in.
        found = self._by_databases(root, root_fd, looks, release)
        left: list[_Look] = []
        for look in looks:
            answer = found.get(look.key)
            if answer is not None and answer.identity is not None:
                continue
            if look.note is not None and not is_borrowed(look.note, look.soname):
                found[look.key] = _Answer(by_note(look.note, release))
            else:
                left.append(look)
        return found | self._by_languages(root_fd, [look for look in left if look.key not in found])

    def _by_languages(self, root_fd: int, looks: Sequence[_Look]) -> dict[_FileKey, _Answer]:
        found: dict[_FileKey, _Answer] = {}
        try:
            wheels = wheels_listed(root_fd, [look.library.path for look in looks])
        except Exception as error:  # noqa: BLE001 - as in `_run`
            return dict.fromkeys((look.key for look in looks), self._failed(error))
        for look in looks:
            try:
                found[look.key] = _Answer(self._by_language(root_fd, look, wheels.get(look.library.path)))
            except Exception as error:  # noqa: BLE001 - as in `_run`
                found[look.key] = self._failed(error)
        return found

    def _by_databases(
        self, root: RootKey, root_fd: int, looks: Sequence[_Look], release: Release
    ) -> dict[_FileKey, _Answer]:
        """What a package manager has on its lists, and so is none of a language; its package, if that is certain."""
        found: dict[_FileKey, _Answer] = {}
        for manager in _MANAGERS:
            by_path: dict[str, list[_Look]] = {}
            for look in looks:
                if look.key not in found:
                    by_path.setdefault(look.library.path, []).append(look)
            state = manager.state(root_fd)
            if not by_path or not any(state):
                continue
            answers = self._by_manager(manager, root_fd, by_path, state, release)
            if answers and manager.state(root_fd) != state:  # it is at work: which of both was read is open
                answers = dict.fromkeys(answers, _Answer(None, is_settled=False))
            found |= answers
        # rpm is asked for each package by a process of its own; where its packages have notes, these are right.
        left = [look for look in looks if look.key not in found and _needs_rpm(look)]
        if left and root == self._own_root and _has_rpm(root_fd):
            owned, records = rpm_listed([look.library.path for look in left])
            for look in left:
                listed = owned[look.library.path]
                if listed is not None:
                    found[look.key] = _checked(root_fd, look, listed, records.get(listed.package), "rpm", release)
        return found

    def _by_manager(
        self,
        manager: _Manager,
        root_fd: int,
        by_path: Mapping[str, Sequence[_Look]],
        state: tuple[object, ...],
        release: Release,
    ) -> dict[_FileKey, _Answer]:
        place = file_state(root_fd, manager.place)
        key = (manager.name, None if place is None else place[:2])
        # Put back when it was used, as its size counts; nobody else uses it meanwhile.
        with self._indexes_lock:
            index = self._indexes.pop(key, None) or DatabaseIndex()
        found: dict[_FileKey, _Answer] = {}
        try:
            for path, listed in manager.listed(root_fd, by_path, index).items():
                if listed is None:
                    continue
                if index.records is None or index.records[0] != state:
                    index.records = state, manager.records(root_fd)
                    index.was_read = True
                record = index.records[1].get(listed.package)
                for look in by_path[path]:
                    found[look.key] = _checked(root_fd, look, listed, record, manager.name, release)
        finally:
            self._has_read |= index.was_read
            index.was_read = False
            with self._indexes_lock, suppress(ValueError):  # larger than all may be together
                self._indexes[key] = index
        return found

    def _by_language(self, root_fd: int, look: _Look, listed: Listed | None) -> PackageIdentity | None:
        """By what is beside the file, or in the archives that its process has open."""
        path = look.library.path
        spend()
        if listed is not None:
            wheel = wheel_of(root_fd, listed) if _is_that_file(root_fd, look, listed) else None
            return None if wheel is None else plain("pypi", "", *wheel)
        npm = npm_package(root_fd, path) if _is_shown(root_fd, look) else None
        if npm is not None:
            scope, _, name = npm[0].rpartition("/")
            return plain("npm", scope, name, npm[1])
        maven = jar_package(self._proc, look.pid, look.fd)
        return None if maven is None else plain("maven", *maven)


#: Of the processes that have a file so many are asked for it.
_MOST_HOLDERS: Final = 3


class _Look:
    """A mapped file that was opened, until nobody has it any more: a thread that hangs may bring it late."""

    __slots__ = ("fd", "key", "library", "note", "pid", "soname")

    def __init__(self, key: _FileKey, pid: int, library: Library, fd: int) -> None:
        self.key = key
        self.pid = pid
        self.library = library
        self.fd = fd
        self.note: PackageNote | None = None
        self.soname: str | None = None

    def __del__(self) -> None:
        close_fd(self.fd)


class _Manager(NamedTuple):
    """How the database of a package manager is read; ``place`` distinguishes it from those of other roots."""

    name: Literal["dpkg", "apk"]
    place: str
    listed: Callable[[int, Collection[str], DatabaseIndex], dict[str, Listed | None]]
    records: Callable[[int], dict[str, PackageRecord]]
    state: Callable[[int], tuple[object, ...]]


_MANAGERS: Final = (
    _Manager("dpkg", "/var/lib/dpkg", dpkg_listed, dpkg_records, dpkg_state),
    _Manager("apk", "/", apk_listed, apk_records, apk_state),
)


def _was_overwritten(look: _Look, facts: ElfFacts | None) -> bool:
    """Whether another program was written into the file since it was mapped."""
    known = look.library.build_id
    return known is not None and facts is not None and facts.build_id not in (None, known)


def _needs_rpm(look: _Look) -> bool:
    return look.note is None or look.note.type != "rpm"


def _is_shown(root_fd: int, look: _Look) -> bool:
    """Whether the path of the file leads to it."""
    try:
        fd = open_below(root_fd, look.library.path, os.O_PATH)
    except OSError as error:
        if is_exhausted(error):
            raise
        return False
    try:
        return os.path.samestat(os.fstat(fd), os.fstat(look.fd))
    except OSError:
        return False
    finally:
        close_fd(fd)


def _is_that_file(root_fd: int, look: _Look, listed: Listed) -> bool | None:
    """Whether a mapped file is the one that is on a list: None if that cannot be determined.

    The change time shows that nothing was written since the list was. In a tree that was copied it is the time of the
    copy, of whatever file. So it counts only where the package has brought no hash.
    """
    digest = listed.digest if listed.place != DPKG_LISTS else dpkg_digest(root_fd, listed)
    if digest is not None:
        return _has_digest(look.fd, *digest)
    is_older = listed.listed_ns and os.fstat(look.fd).st_ctime_ns <= listed.listed_ns
    return True if is_older and _is_shown(root_fd, look) else None


def _has_digest(fd: int, algorithm: str, expected: str) -> bool | None:
    size = os.fstat(fd).st_size
    if size > MAX_CONTENT:
        return None
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for at in range(0, size, _CHUNK):
        spend(content_bytes=_CHUNK)
        digest.update(os.pread(fd, _CHUNK, at))
    return digest.hexdigest() == expected


def _checked(
    root_fd: int,
    look: _Look,
    listed: Listed,
    record: PackageRecord | None,
    manager: Literal["dpkg", "apk", "rpm"],
    release: Release,
) -> _Answer:
    if record is None or not record.version:
        return _Answer(None, is_settled=False)  # it is being installed, or the file is of one that has gone
    try:
        is_that_file = _is_that_file(root_fd, look, listed)
    except BudgetError:
        return _Answer(None)
    except OSError as error:
        return _Answer(None, is_settled=not is_exhausted(error))
    return _Answer(by_record(record, manager, release) if is_that_file else None)


def _has_rpm(root_fd: int) -> bool:
    """Whether there is a database of rpm: none is asked for nothing."""
    return any(file_state(root_fd, path) is not None for path in ("/var/lib/rpm", "/usr/lib/sysimage/rpm"))
