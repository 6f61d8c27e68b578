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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Final, Literal, Self

from sowatch.bpf.binding import BpfMap, Variable
from sowatch.bpf.probe_object import Link, ProbeObject, Ring, has_attach_cookie, has_uprobe_multi
from sowatch.engine.workers import ActiveFile
from sowatch.linux.symbols import Symbol, SymbolError, is_go, native_machine_error, resolve
from sowatch.model.errors import BpfError, EnvironmentFault, SowatchError
from sowatch.model.events import Library
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule
from sowatch.uprobes.probes import Probe, probes_of
from sowatch.uprobes.records import AttachedFile, AttacherStats, Attachment, Failure, Site, State

__all__ = ["Attacher"]

LOG = logging.getLogger("sowatch.uprobes")

#: Links that are closed at once: each waits for the kernel, some milliseconds up to a tenth of a second.
_CLOSERS: Final = 8
#: A failure of the surroundings is tried again after this, then after twice that, up to the second.
_FIRST_RETRY_S: Final = 1.0
_SLOWEST_RETRY_S: Final = 60.0
#: So many refused files are remembered with their reasons.
_MAX_REFUSED: Final = 1024
#: Failures that say nothing of the file (see attr `Failure.is_permanent`).
_TRANSIENT: Final = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}
)


@dataclass(slots=True)
class _Group:
    """What one link attaches: one program on some sites of one file. ``link`` is None until that has worked.

    ``own_object`` is there where programs cannot tell sites apart: the object loaded once more, for this site alone.
    ``reason`` says why there is no link.
    """

    program: str
    is_return: bool
    sites: list[Site]
    link: Link | None = None
    own_object: ProbeObject | None = None
    reason: str | None = None


@dataclass(slots=True)
class _File:
    """One real file: who uses it, and its links. ``fd`` is our own descriptor of it."""

    library: Library
    fd: int
    users: int = 0
    lingers_until: float | None = None
    groups: list[_Group] = field(default_factory=list)
    missing: list[Attachment] = field(default_factory=list)
    retry_at: float | None = None
    retry_wait_s: float = _FIRST_RETRY_S


class Attacher:
    """Attaches the programs of an object to every file that it is given; a context manager.

    Args:
        program: path of a ``.bpf.o``; loaded by `start`, or by entering the context.
        probes: see `sowatch.uprobes.probes.probes_of`.
        linger_s: how long a file stays attached after its last user, so that the next short process is covered from
            its first call. Meanwhile the link holds the inode, and where it is a uprobe.multi link the mount, too.
        verify_s: how often each link is compared with what the kernel has.
        prepare: called with the object before it is loaded, to set constants, and with the cookie of the one site that
            it is for (0: all).
        links: ``auto`` takes uprobe.multi where the kernel has it, else a perf event for each function.
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
        verify_s: float = 10.0,
        prepare: Callable[[ProbeObject, int], None] | None = None,
        links: Literal["auto", "multi", "perf_event"] = "auto",
        is_split: bool = False,
        pairs_returns: bool = False,
    ) -> None:
        self._source = program
        self._wanted = probes if probes is None or isinstance(probes, Mapping) else tuple(probes)
        self._linger_s = linger_s
        self._verify_s = verify_s
        self._prepare = prepare
        self._links = links
        self._is_split = is_split
        self._has_cookies = True
        self._pairs_returns = pairs_returns
        self._object: ProbeObject | None = None
        self._probes: tuple[Probe, ...] = ()
        self._is_multi = False
        self._cookies = count(1)
        self._files: dict[FileId, _File] = {}
        self._refused: OrderedDict[FileId, tuple[Library, str]] = OrderedDict()
        self._sites: dict[int, Site] = {}
        self._lock = threading.RLock()
        #: Work on one file is done by one thread at a time; files share these by hash.
        self._stripes = [threading.Lock() for _ in range(64)]
        self._counts: Counter[str] = Counter()
        self._rings: list[Ring] = []
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """Loads the object. Safe to call again.

        Raises:
            BpfError: it does not load; ``log`` has the verifier's words.
            UsageError: a probe names a program that is not there.
        """
        if self._object is not None:
            return self
        self._is_multi = bool(has_uprobe_multi()) if self._links == "auto" else self._links == "multi"
        self._has_cookies = has_attach_cookie() is not False
        self._object = self._load(0)
        self._stop.clear()
        self._keeper = threading.Thread(target=self._keep, name="sowatch-uprobes", daemon=True)
        self._keeper.start()
        return self

    def _load(self, cookie: int) -> ProbeObject:
        """The object in the kernel, for all sites (0) or for one."""
        loaded = ProbeObject(self._source)
        try:
            self._probes = probes_of(loaded.programs(), self._wanted, self._source)
            wanted = {probe.program for probe in self._probes}
            for program in loaded.programs():
                if program.name in wanted:
                    loaded.use_uprobe(program.name, multi=self._is_multi)
                elif "probe" in program.section:
                    loaded.skip(program.name)
            if self._prepare is not None:
                self._prepare(loaded, cookie)
            loaded.load()
        except BaseException:
            loaded.close()
            raise
        return loaded

    def close(self) -> None:
        """Detaches everything and frees the object. Safe to call again."""
        self._stop.set()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join()
            self._keeper = None
        with self._lock:
            files, self._files = list(self._files.values()), {}
            self._sites.clear()
            rings, self._rings = self._rings, []
            loaded, self._object = self._object, None
        _close_links([group.link for file in files for group in file.groups if group.link is not None])
        for file in files:
            os.close(file.fd)
            _close_objects(file)
        for ring in rings:
            ring.close()
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

        Raises:
            SowatchError: the file can never be probed: not ELF, another architecture, a required function is missing.
            EnvironmentFault: it could not be done now; nothing is left attached.
        """
        try:
            self._attach(file)
        except EnvironmentFault:
            raise
        except SowatchError as error:
            with self._lock:
                self._refused[file.library.id] = (file.library, str(error))
                self._refused.move_to_end(file.library.id)
                if len(self._refused) > _MAX_REFUSED:
                    self._refused.popitem(last=False)
            raise

    def _attach(self, file: ActiveFile) -> None:
        loaded = self._loaded()
        library = file.library
        with self._one_at_a_time(library.id):
            with self._lock:
                known = self._files.get(library.id)
                if known is not None:
                    known.users += 1
                    known.lingers_until = None
                    return
            sites, missing = self._resolve(file.fileno(), library)
            try:
                own_fd = os.dup(file.fileno())
            except OSError as error:
                raise EnvironmentFault(
                    f"cannot keep {library.path} open: {error.strerror}. Raise `ulimit -n`."
                ) from error
            made = _File(library, own_fd, users=1, groups=self._groups(sites), missing=missing)
            failure = self._link(loaded, made)
            if failure is not None and failure.errno not in _TRANSIENT:
                self._undo(made)
                raise SowatchError(f"cannot attach to {library.path}: {failure}") from failure
            if failure is not None:
                made.retry_at = time.monotonic() + made.retry_wait_s
            with self._lock:
                self._refused.pop(library.id, None)
                self._files[library.id] = made
                for group in made.groups:
                    for site in group.sites:
                        self._sites.setdefault(site.cookie, site)

    def detach(self, file: ActiveFile) -> None:
        """Takes one user from a file; without users it is detached at once, or after ``linger_s``."""
        self._release(file.library.id)

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def sites(self) -> dict[int, Site]:
        """Every probed function by its cookie; a copy."""
        with self._lock:
            return dict(self._sites)

    @property
    def failures(self) -> list[Failure]:
        """What could not be attached to the files that are attached now."""
        with self._lock:
            found = [
                Failure(file.library, one.symbol, one.reason or "", is_permanent=True)
                for file in self._files.values()
                for one in file.missing
            ]
        return list(dict.fromkeys(found))

    @property
    def stats(self) -> AttacherStats:
        """How it is now."""
        with self._lock:
            groups = [group for file in self._files.values() for group in file.groups]
            return AttacherStats(
                files=len(self._files),
                expected=sum(len(group.sites) for group in groups),
                attached=sum(len(group.sites) for group in groups if group.link is not None),
                failed=sum(len(file.missing) for file in self._files.values()),
                repaired=self._counts["repaired"],
                retries=self._counts["retries"],
                refused=len(self._refused),
            )

    def files(self) -> list[AttachedFile]:
        """Every file that is attached or was refused, with each of its probes, as it is now."""
        with self._lock:
            files = [_view(file) for file in self._files.values()]
            return files + [
                AttachedFile(library, "failed", reason, 0, is_lingering=False, is_armed=False, attachments=())
                for library, reason in self._refused.values()
            ]

    def map(self, name: str) -> BpfMap:
        """A map of the object; valid until `close`."""
        return self._loaded().map(name)

    def variable(self, section: str, name: str) -> Variable:
        """A global variable of the object; see `sowatch.bpf.binding.BpfObject.variable`."""
        return self._loaded().variable(section, name)

    def objects(self) -> list[ProbeObject]:
        """The object, and those of single sites where programs have no cookies."""
        with self._lock:
            own = [group.own_object for file in self._files.values() for group in file.groups]
        return [self._loaded(), *(one for one in own if one is not None)]

    def ring(self, name: str) -> Ring:
        """A ring buffer of the object; closed with the attacher."""
        ring = self._loaded().ring(name)
        with self._lock:
            self._rings.append(ring)
        return ring

    def verify(self) -> int:
        """Compares each link with what the kernel has, and attaches anew what is gone; gives how many that were."""
        repaired = 0
        with self._lock:
            files = list(self._files.values())
        for file in files:
            with self._one_at_a_time(file.library.id):
                for group in file.groups:
                    if group.link is not None and not group.link.is_attached:
                        group.link.close()
                        group.link = None
                        repaired += 1
                if repaired and self._object is not None:
                    self._link(self._object, file)
        self._counts["repaired"] += repaired
        return repaired

    # ---- inside ------------------------------------------------------------------------------------

    def _loaded(self) -> ProbeObject:
        if self._object is None:
            raise SowatchError("the attacher is not started. Use it as a context manager, or call start().")
        return self._object

    def _one_at_a_time(self, file_id: FileId) -> threading.Lock:
        return self._stripes[hash(file_id) % len(self._stripes)]

    def _resolve(self, fd: int, library: Library) -> tuple[list[Site], list[Attachment]]:
        """The functions of a file for each probe; raises if one that is required is not there."""
        if wrong := native_machine_error(fd):
            raise SowatchError(
                f"cannot probe {library.path}: {wrong}. Only files of this machine's kind can be probed."
            )
        sites: list[Site] = []
        missing: list[Attachment] = []
        for probe in self._probes:
            try:
                found = _resolve_probe(fd, probe)
            except SymbolError as error:
                if not probe.is_optional:
                    raise SowatchError(f"cannot probe {library.path}: {error}") from error
                near = f" (near: {', '.join(error.near)})" if error.near else ""
                missing.append(Attachment(probe.symbol, probe.program, probe.is_return, "failed", error.reason + near))
                continue
            sites += [self._site(library, one, probe, sites) for one in found]
        if not sites:
            reasons = "; ".join(f"{one.symbol}: {one.reason}" for one in missing)
            raise SowatchError(f"nothing to probe: {reasons}. `sowatch trace --list` shows what it has.")
        return sites, missing

    def _site(self, library: Library, symbol: Symbol, probe: Probe, before: list[Site]) -> Site:
        entry = next((one for one in before if one.offset == symbol.offset and not one.is_return), None)
        is_pair = self._pairs_returns and probe.is_return and entry is not None
        cookie = entry.cookie if is_pair and entry is not None else next(self._cookies)
        return Site(cookie, library, symbol.name, symbol.offset, probe.program, probe.is_return)

    def _groups(self, sites: list[Site]) -> list[_Group]:
        if not self._is_multi:
            return [_Group(site.program, site.is_return, [site]) for site in sites]
        groups: dict[tuple[str, bool], _Group] = {}
        for site in sites:
            key = site.program, site.is_return
            group = groups.setdefault(key, _Group(*key, []))
            # One consumer for an (inode, offset): two names of one function are one site.
            if all(site.offset != other.offset for other in group.sites):
                group.sites.append(site)
        return list(groups.values())

    def _link(self, loaded: ProbeObject, file: _File) -> BpfError | None:
        """Attaches what is not attached yet; gives the first error, with the rest attached."""
        path = f"/proc/self/fd/{file.fd}"
        first = None
        # Returns first: else a call between the two has an entry whose return nobody sees.
        for group in sorted(file.groups, key=lambda one: not one.is_return):
            if group.link is not None:
                continue
            try:
                if self._is_multi:
                    offsets = [site.offset for site in group.sites]
                    cookies = [site.cookie for site in group.sites]
                    group.link = loaded.link_multi(group.program, path, offsets, cookies, is_return=group.is_return)
                else:
                    (site,) = group.sites
                    group.link = self._object_for(loaded, file, group).link_one(
                        group.program,
                        path,
                        site.offset,
                        site.cookie if self._has_cookies else None,
                        is_return=group.is_return,
                    )
            except BpfError as error:
                group.reason = str(error)
                first = first or error
            else:
                group.reason = None
        return first

    def _object_for(self, loaded: ProbeObject, file: _File, group: _Group) -> ProbeObject:
        """What is attached for a site: an object of its own, for entry and return, where programs have no cookies."""
        if self._has_cookies or not self._is_split:
            return loaded
        cookie = group.sites[0].cookie
        for other in file.groups:
            if other.own_object is not None and other.sites[0].cookie == cookie:
                return other.own_object
        group.own_object = self._load(cookie)
        return group.own_object

    def _undo(self, file: _File) -> None:
        _close_links([group.link for group in file.groups if group.link is not None])
        os.close(file.fd)
        _close_objects(file)

    def _release(self, file_id: FileId) -> None:
        with self._one_at_a_time(file_id):
            with self._lock:
                file = self._files.get(file_id)
                if file is None:
                    return
                file.users -= 1
                if file.users > 0:
                    return
                if self._linger_s > 0:
                    file.lingers_until = time.monotonic() + self._linger_s
                    return
            self._drop(file)

    def _drop(self, file: _File) -> None:
        with self._lock:
            self._files.pop(file.library.id, None)
            for group in file.groups:
                for site in group.sites:
                    self._sites.pop(site.cookie, None)
        self._undo(file)

    def _keep(self) -> None:
        """The housekeeping thread: ends what has lingered, retries, verifies."""
        verify_at = time.monotonic() + self._verify_s
        while not self._stop.wait(min(0.2, self._verify_s)):
            now = time.monotonic()
            with self._lock:
                files = list(self._files.values())
            for file in files:
                if file.lingers_until is not None and file.lingers_until <= now:
                    with self._one_at_a_time(file.library.id):
                        if file.users == 0 and self._files.get(file.library.id) is file:
                            self._drop(file)
                elif file.retry_at is not None and file.retry_at <= now:
                    self._retry(file)
            if now >= verify_at:
                self.verify()
                verify_at = now + self._verify_s

    def _retry(self, file: _File) -> None:
        with self._one_at_a_time(file.library.id):
            loaded = self._object
            if loaded is None or self._files.get(file.library.id) is not file:
                return
            self._counts["retries"] += 1
            if self._link(loaded, file) is None:
                file.retry_at = None
                return
            file.retry_wait_s = min(_SLOWEST_RETRY_S, 2 * file.retry_wait_s)
            file.retry_at = time.monotonic() + file.retry_wait_s


def _resolve_probe(fd: int, probe: Probe) -> list[Symbol]:
    if probe.is_return and is_go(fd):
        raise SymbolError(probe.symbol, "a return probe breaks programs written in Go")
    return resolve(fd, probe.symbol)


def _view(file: _File) -> AttachedFile:
    attachments: list[Attachment] = []
    for group in file.groups:
        state: State = "retrying" if group.link is None else "attached"
        link_id = None if group.link is None else group.link.id
        attachments += [
            Attachment(
                site.symbol, site.program, site.is_return, state, group.reason, site.offset, site.cookie, link_id
            )
            for site in group.sites
        ]
    attachments += file.missing
    waiting = [one.reason for one in attachments if one.state == "retrying"]
    return AttachedFile(
        file.library,
        "retrying" if waiting else "attached",
        waiting[0] if waiting else None,
        file.users,
        is_lingering=file.users == 0 and file.lingers_until is not None,
        is_armed=False,
        attachments=tuple(attachments),
    )


def _close_objects(file: _File) -> None:
    for group in file.groups:
        if group.own_object is not None:
            group.own_object.close()


def _close_links(links: list[Link]) -> None:
    """Closes them, some at once: the kernel makes each wait."""
    if len(links) < 3:
        for link in links:
            link.close()
        return
    with ThreadPoolExecutor(_CLOSERS, thread_name_prefix="sowatch-detach") as pool:
        list(pool.map(Link.close, links))
