"""`Attacher`: a BPF object's programs on the functions of each file that a rule activates.

One attachment per real file, however many containers or rules share it: the kernel covers every process that maps the
inode, now or later. The file is resolved and attached through the descriptor that the activation brings, never
through a name.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from types import TracebackType
from typing import Final, Literal, Self

from sowatch.bpf.binding import Variable
from sowatch.bpf.probe_object import (
    ProbeObject,
    Ring,
    Table,
    has_attach_cookie,
    has_uprobe_multi,
)
from sowatch.engine.workers import ActiveFile
from sowatch.linux.capabilities import missing_capabilities
from sowatch.linux.descriptors import close_fd
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import BpfError, EnvironmentFault, NotPermitted, ProgramRefused, SowatchError
from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule
from sowatch.uprobes.attached import File, Linker, close_files
from sowatch.uprobes.known_files import find_known, open_known
from sowatch.uprobes.places import Plan, Returns, plan_of, safe_returns
from sowatch.uprobes.probes import Probe, probes_of
from sowatch.uprobes.records import AttachedFile, AttacherStats, Failure, Site
from sowatch.uprobes.self_test import SelfTest

__all__ = ["Attacher"]

LOG = logging.getLogger("sowatch.uprobes")

#: So many refused files are remembered with their reasons.
_MAX_REFUSED: Final = 1024
#: Device, inode and subvolume.
_Inode = tuple[int, int, int, int]


class Attacher:
    """Attaches the programs of an object to every file that it is given; a context manager.

    Args:
        program: path of a ``.bpf.o``; loaded by `start`, or by entering the context.
        probes: see `sowatch.uprobes.probes.probes_of`.
        linger_s: how long a file stays attached after its last user, so that the next short process is covered from
            its first call. Meanwhile the link holds the inode, and where it is a uprobe.multi link the mount, too.
        prearm: files that are attached before anybody loads them, and stay so: patterns of paths (looked through again
            with each verification), or libraries as the inventory has seen them. See `prearm`.
        verify_s: how often each link is compared with what the kernel has, and the self-test is run.
        prepare: called with the object before it is loaded, to set constants, and with the cookie of the one site that
            it is for (0: all).
        after_load: called with each object that was loaded, before it is attached.
        links: ``auto`` takes uprobe.multi where the kernel has it (6.6), else a perf event for each function.
        returns: how returns are seen. ``probe``: by the kernel's return probes. ``instructions``: by probes on the
            return instructions, where a function has no other way out. ``auto``: by return probes, but not where these
            can end a process that is below a seccomp filter (x86-64, 6.11 until the kernel lets them through).
        is_split: where the kernel has no cookies, load the object once for each site.
        pairs_returns: entry and return of one function have one cookie, that of the entry.

    `attach` and `detach` are for `Rule`: ``Rule("libssl", on_activate=a.attach, on_deactivate=a.detach)``; `rule` does
    that. They may be called by any thread; work on one file is done by one thread at a time.

    >>> attacher = Attacher("probes.bpf.o", {"SSL_write": "on_write"})  # doctest: +SKIP
    >>> with attacher, Watcher(attacher.rule("libssl")) as watcher:  # doctest: +SKIP
    ...     watcher.wait()
    """

    def __init__(
        self,
        program: str | os.PathLike[str],
        probes: Mapping[str, str] | Iterable[Probe] | None = None,
        *,
        linger_s: float = 0.0,
        prearm: Iterable[str | Library] = (),
        verify_s: float = 10.0,
        prepare: Callable[[ProbeObject, int], None] | None = None,
        after_load: Callable[[ProbeObject], None] | None = None,
        links: Literal["auto", "multi", "perf_event"] = "auto",
        returns: Literal["auto", "probe", "instructions"] = "auto",
        is_split: bool = False,
        pairs_returns: bool = False,
    ) -> None:
        self._source = program
        self._wanted = probes if probes is None or isinstance(probes, Mapping) else tuple(probes)
        self._linger_s = linger_s
        self._to_arm = list(prearm)
        self._verify_s = verify_s
        self._prepare = prepare
        self._after_load = after_load
        self._links = links
        self._asked_returns = returns
        #: How returns are seen; decided by `start`.
        self.returns: Returns = "probe"
        self._is_split = is_split
        self._pairs_returns = pairs_returns
        self._object: ProbeObject | None = None
        self._linker: Linker | None = None
        self._self_test: SelfTest | None = None
        self._probes: tuple[Probe, ...] = ()
        self._cookies = count(1)
        self._proc = ProcFs("/proc")
        #: By inode and generation, 0 for the first of an inode; see `_known`.
        self._files: dict[tuple[int, int, int, int, int], File] = {}
        self._refused: OrderedDict[FileId, tuple[Library, str]] = OrderedDict()
        self._sites: dict[int, Site] = {}
        self._lock = threading.RLock()
        #: Work on one file is done by one thread at a time; files share these by hash.
        self._stripes = [threading.Lock() for _ in range(64)]
        self._counts: Counter[str] = Counter()
        self._rings: list[Ring] = []
        self._due = threading.Condition(self._lock)
        self._is_stopping = False
        self._keeper: threading.Thread | None = None

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """Loads the object, and attaches it to what is to be armed. Safe to call again.

        Raises:
            NotPermitted: this process lacks a capability.
            BpfError: it does not load; the message ends with the verifier's last lines, ``log`` has all of them.
            UsageError: a probe names a program that is not there.
        """
        if self._object is not None:
            return self
        is_multi = bool(has_uprobe_multi()) if self._links == "auto" else self._links == "multi"
        self.returns = safe_returns() if self._asked_returns == "auto" else self._asked_returns
        try:
            self._object = self._load(0, is_multi=is_multi)
        except BpfError as error:
            raise _not_permitted(error) or ProgramRefused(os.fspath(self._source), error) from error
        self._linker = Linker(
            self._object,
            is_multi=is_multi,
            has_cookies=has_attach_cookie() is not False,
            load_for=(lambda cookie: self._load(cookie, is_multi=is_multi)) if self._is_split else None,
        )
        self._self_test = SelfTest(is_multi=is_multi)
        self._self_test.run()
        self._is_stopping = False
        try:
            self._arm_all()
        except BaseException:
            self.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="sowatch-uprobes", daemon=True)
        self._keeper.start()
        return self

    def _load(self, cookie: int, *, is_multi: bool) -> ProbeObject:
        """The object in the kernel, for all sites (0) or for one."""
        loaded = ProbeObject(self._source)
        try:
            self._probes = probes_of(loaded.programs(), self._wanted, self._source)
            wanted = {probe.program for probe in self._probes}
            for program in loaded.programs():
                if program.name in wanted:
                    loaded.use_uprobe(program.name, multi=is_multi)
                elif "probe" in program.section:
                    loaded.skip(program.name)
            if self._prepare is not None:
                self._prepare(loaded, cookie)
            loaded.load()
            if self._after_load is not None:
                self._after_load(loaded)
        except BaseException:
            loaded.close()
            raise
        return loaded

    def close(self) -> None:
        """Detaches everything and frees the object. Safe to call again."""
        with self._due:
            self._is_stopping = True
            self._due.notify_all()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join()
            self._keeper = None
        with self._lock:
            files = list(self._files.values())
            self._files.clear()
            self._sites.clear()
            rings, self._rings = self._rings, []
            loaded, self._object = self._object, None
            self_test, self._self_test = self._self_test, None
            self._linker = None
        close_files(files)
        for ring in rings:
            ring.close()
        if self_test is not None:
            self_test.close()
        if loaded is not None:
            loaded.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- what a rule calls -----------------------------------------------------------------------

    def rule(self, pattern: str, *, name: str = "uprobes", exports: Iterable[str] = ()) -> Rule:
        """A rule whose activation attaches, and whose deactivation detaches."""
        return Rule(pattern, name=name, exports=tuple(exports), on_activate=self.attach, on_deactivate=self.detach)

    def attach(self, file: ActiveFile) -> None:
        """Attaches to a file, or adds a user to one that is attached already.

        What the surroundings refuse (no descriptors, no memory) is tried again, later each time, while the file is
        used; meanwhile its state is ``retrying``.

        Raises:
            SowatchError: the file can never be probed: not ELF, another architecture, a required function is missing.
            EnvironmentFault: there is no descriptor left to keep the file open; nothing is left attached.
        """
        library = file.library
        with self._one_at_a_time(library.id):
            with self._lock:
                known = self._known(library.id)
                if known is not None:
                    if not known.users and known.library.id != library.id:
                        # Who armed it knew neither its generation nor the path by which processes see it.
                        known.become(library)
                        self._sites.update((site.cookie, site) for site in reversed(known.sites))
                    known.users += 1
                    known.lingers_until = None
                    return
            self._attach_new(library, file.fileno(), users=1)

    def detach(self, file: ActiveFile) -> None:
        """Takes one user from a file; without users it is detached at once, or after ``linger_s``."""
        file_id = file.library.id
        with self._one_at_a_time(file_id):
            with self._due:
                found = self._known(file_id)
                if found is None or not found.users:
                    return
                found.users -= 1
                if found.is_held:
                    return
                if self._linger_s > 0:
                    found.lingers_until = time.monotonic() + self._linger_s
                    self._due.notify_all()
                    return
                self._remove(found)
            found.close()

    def prearm(self, *what: str | Library) -> list[SowatchError]:
        """Attaches to files before anybody loads them, and keeps them attached until `close`.

        So the very first call of the first process counts. A file that is deleted is detached with its last user.

        Args:
            what: patterns of absolute paths (``/usr/lib/*/libssl.so.3``, with ``**`` for any depth), which are looked
                through again with each verification; or libraries with a ``host_path``, as `sowatch.inventory` has
                them.

        Returns:
            Why files that are there could not be attached.

        Raises:
            UsageError: a pattern that is no absolute path, or finds more than 4,096 files.
        """
        self._loaded()
        problems = [problem for one in what for problem in self._arm(one)]
        with self._lock:
            self._to_arm += [one for one in what if isinstance(one, str) and one not in self._to_arm]
        return problems

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def sites(self) -> dict[int, Site]:
        """Every probed function by its cookie; a copy."""
        with self._lock:
            return dict(self._sites)

    @property
    def failures(self) -> list[Failure]:
        """What could not be attached to the files that are attached now."""
        found = [
            Failure(file.library, one.symbol, one.reason or "", is_permanent=one.state == "failed")
            for file in self.files()
            for one in file.attachments
            if one.reason is not None
        ]
        return list(dict.fromkeys(found))

    @property
    def stats(self) -> AttacherStats:
        """How it is now."""
        with self._lock:
            files = [file.view() for file in list(self._files.values())]
            states = Counter(one.state for file in files for one in file.attachments)
            return AttacherStats(
                files=len(files),
                expected=states["attached"] + states["retrying"],
                attached=states["attached"],
                failed=states["failed"],
                repaired=self._counts["repaired"],
                retries=self._counts["retries"],
                refused=len(self._refused),
                armed=sum(file.is_armed for file in files),
                lingering=sum(file.is_lingering for file in files),
                self_test_error=None if self._self_test is None else self._self_test.error,
            )

    def files(self) -> list[AttachedFile]:
        """Every file that is attached or was refused, with each of its probes, as it is now."""
        with self._lock:
            files = [file.view() for file in list(self._files.values())]
            return files + [
                AttachedFile(library, "failed", reason, 0, is_lingering=False, is_armed=False, attachments=())
                for library, reason in self._refused.values()
            ]

    def map(self, name: str) -> Table:
        """A map of the object: iterate over it, look up, update; valid until `close`."""
        return self._loaded().table(name)

    def variable(self, section: str, name: str) -> Variable:
        """A global variable of the object; see `sowatch.bpf.binding.BpfObject.variable`."""
        return self._loaded().variable(section, name)

    def objects(self) -> list[ProbeObject]:
        """The object, and those of single sites where programs have no cookies."""
        with self._lock:
            own = [group.own_object for file in list(self._files.values()) for group in file.groups]
        return [self._loaded(), *(one for one in own if one is not None)]

    def ring(self, name: str) -> Ring:
        """A ring buffer of the object; closed with the attacher."""
        ring = self._loaded().ring(name)
        with self._lock:
            self._rings.append(ring)
        return ring

    # ---- truth -----------------------------------------------------------------------------------

    def verify(self) -> int:
        """Compares each link with what the kernel has, and attaches anew what is gone or elsewhere; runs the self-test.

        Returns:
            How many links were not as they should be.
        """
        repaired = 0
        with self._lock:
            files = list(self._files.values())
        for file in files:
            with self._one_at_a_time(file.library.id):
                if self._known(file.library.id) is not file:
                    continue
                lost = [group for group in file.groups if group.link is not None and not group.is_in_place(file.fd)]
                for group in lost:
                    assert group.link is not None
                    group.link.close()
                    group.link = None
                if lost and self._linker is not None:
                    repaired += len(lost)
                    LOG.warning("%d links on %s were not in place and are made anew", len(lost), file.library.path)
                    self._linker.link(file)
                    file.plan_retry(time.monotonic())
        test = self._self_test
        if test is not None:
            before = test.repaired
            test.run()
            repaired += test.repaired - before
        with self._lock:
            self._counts["repaired"] += repaired
        return repaired

    # ---- inside ------------------------------------------------------------------------------------

    def _loaded(self) -> ProbeObject:
        if self._object is None:
            raise SowatchError("the attacher is not started. Use it as a context manager, or call start().")
        return self._object

    def _one_at_a_time(self, file_id: FileId) -> threading.Lock:
        return self._stripes[hash(_inode(file_id)) % len(self._stripes)]

    def _known(self, file_id: FileId) -> File | None:
        """What is attached to a file already; with the lock held.

        The generation may be unknown (0) to who found the file by its path. While a file is held open here, its inode
        number is that of no other; but some FUSE servers give one to several files.
        """
        found = self._files.get((*_inode(file_id), file_id.generation))
        if found is not None:
            return found
        found = self._files.get((*_inode(file_id), 0))
        if found is None or found.library.id.generation in (0, file_id.generation) or not file_id.generation:
            return found
        return None

    def _put(self, file: File) -> None:
        file_id = file.library.id
        key = (*_inode(file_id), 0)
        self._files[(*_inode(file_id), file_id.generation) if key in self._files else key] = file
        self._refused.pop(file_id, None)
        # The entry of a function goes before its returns, which may have the same cookie.
        self._sites.update((site.cookie, site) for site in reversed(file.sites))

    def _remove(self, file: File) -> None:
        for key in [key for key, one in self._files.items() if one is file and key[:4] == _inode(file.library.id)]:
            del self._files[key]
        for site in file.sites:
            self._sites.pop(site.cookie, None)

    def _attach_new(self, library: Library, fd: int, *, users: int = 0, is_armed: bool = False) -> None:
        """Attaches to a file that is not known yet; with its stripe held."""
        loaded = self._loaded()
        try:
            file = self._new_file(library, fd, users=users, is_armed=is_armed)
        except EnvironmentFault:
            raise
        except SowatchError as error:
            if self._object is not loaded:
                raise _closed(library) from error
            self._refuse(library, str(error))
            raise
        with self._due:
            if self._object is loaded:
                file.plan_retry(time.monotonic())
                self._put(file)
                self._due.notify_all()
                return
        file.close()
        raise _closed(library)

    def _new_file(self, library: Library, fd: int, *, users: int, is_armed: bool) -> File:
        linker = self._linker
        if linker is None:
            raise _closed(library)
        sites, missing = self._plan(fd, library)
        try:
            own_fd = os.dup(fd)
        except OSError as error:
            raise EnvironmentFault(f"cannot keep {library.path} open: {error.strerror}. Raise `ulimit -n`.") from error
        file = File(library, own_fd, users, is_armed, groups=linker.groups(sites), missing=missing)
        refused = linker.link(file)
        if refused is not None:
            file.close()
            raise SowatchError(f"cannot attach to {library.path}: {refused}") from refused
        return file

    def _plan(self, fd: int, library: Library) -> Plan:
        return plan_of(fd, library, self._probes, self._cookies, self.returns, pairs_returns=self._pairs_returns)

    def _refuse(self, library: Library, reason: str) -> None:
        with self._lock:
            self._refused[library.id] = (library, reason)
            self._refused.move_to_end(library.id)
            if len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)

    def _arm_all(self) -> None:
        with self._lock:
            wanted = list(self._to_arm)
        for one in wanted:
            for problem in self._arm(one):
                LOG.warning("cannot be attached before it is loaded: %s", problem)
        with self._lock:
            # What the inventory has seen is searched for once; what a pattern finds may come later.
            self._to_arm = [one for one in self._to_arm if isinstance(one, str)]
            gone = [file for file in self._files.values() if file.is_armed and file.is_deleted]
        for file in gone:
            with self._one_at_a_time(file.library.id):
                with self._lock:
                    file.is_armed = False
                    if file.is_held or self._known(file.library.id) is not file:
                        continue
                    self._remove(file)
                file.close()

    def _arm(self, what: str | Library) -> list[SowatchError]:
        problems = []
        for one in [what] if isinstance(what, Library) else find_known(what):
            try:
                library, fd = open_known(one, self._proc)
            except SowatchError as error:
                problems.append(error)
                continue
            try:
                self._arm_file(library, fd)
            except SowatchError as error:
                problems.append(error)
            finally:
                close_fd(fd)
        return problems

    def _arm_file(self, library: Library, fd: int) -> None:
        with self._one_at_a_time(library.id):
            with self._lock:
                known = self._known(library.id)
                if known is not None:
                    known.is_armed = True
                    return
                if library.id in self._refused:
                    return
            self._attach_new(library, fd, is_armed=True)

    def _keep(self) -> None:
        """The housekeeping thread: ends what has lingered, retries, verifies."""
        verify_at = time.monotonic() + self._verify_s
        while True:
            with self._due:
                while not self._is_stopping:
                    files = self._files.values()
                    times = [at for one in files for at in (one.lingers_until, one.retry_at) if at is not None]
                    wait_s = min([verify_at, *times]) - time.monotonic()
                    if wait_s <= 0:
                        break
                    self._due.wait(wait_s)
                if self._is_stopping:
                    return
                now = time.monotonic()
                due = list(self._files.values())
            self._end_lingering([one for one in due if one.lingers_until is not None and one.lingers_until <= now])
            for file in due:
                if file.retry_at is not None and file.retry_at <= now:
                    self._retry(file)
            if now >= verify_at:
                try:
                    self.verify()
                    self._arm_all()
                except SowatchError as error:
                    LOG.warning("%s", error)
                verify_at = time.monotonic() + self._verify_s

    def _end_lingering(self, files: list[File]) -> None:
        """Detaches what nobody has used meanwhile; all of it at once, as each waits for the kernel."""
        ended = []
        for file in files:
            with self._one_at_a_time(file.library.id), self._lock:
                if not file.is_held and self._known(file.library.id) is file:
                    self._remove(file)
                    ended.append(file)
                file.lingers_until = None
        close_files(ended)

    def _retry(self, file: File) -> None:
        with self._one_at_a_time(file.library.id):
            linker = self._linker
            if linker is None or self._known(file.library.id) is not file:
                return
            error = linker.link(file)
            with self._lock:
                self._counts["retries"] += 1
                file.plan_retry(time.monotonic())
                if error is None:
                    return
                self._remove(file)
            file.close()
        self._refuse(file.library, f"cannot attach to {file.library.path}: {error}")


def _inode(file_id: FileId) -> _Inode:
    return file_id.major, file_id.minor, file_id.inode, file_id.subvolume


def _not_permitted(error: BpfError) -> NotPermitted | None:
    """A refusal for want of a capability, if one is missing."""
    missing = missing_capabilities() if error.errno in (errno.EPERM, errno.EACCES) else ()
    if not missing:
        return None
    return NotPermitted("cannot load the probes", f"missing {' and '.join(missing)}", "Run it as root, or with sudo.")


def _closed(library: Library) -> EnvironmentFault:
    return EnvironmentFault(f"the attacher was closed before {library.path} was attached. Nothing to do.")
