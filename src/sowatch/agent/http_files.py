"""Which TLS libraries are mapped, and has a capture attached to them: what `[http]` makes of the agent's watch.

Files are read by a thread that may hang with their file system; then the others go on without it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from sowatch.agent.settings import HTTP_PREFIX
from sowatch.engine.workers import ActiveFile, open_active
from sowatch.http.capture import Capture
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import read_exports
from sowatch.linux.proc import ProcFs
from sowatch.linux.timeout_worker import CallTimeout, TimeoutWorker
from sowatch.linux.tls_libraries import FAMILIES
from sowatch.model.errors import EnvironmentFault, SowatchError
from sowatch.model.events import Event, Load, Process, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.watcher.subscription import Subscription
from sowatch.watcher.watcher import Watcher

__all__ = ["TlsFiles"]

LOG = logging.getLogger("sowatch.agent")

#: What is known of so many files: whether they are TLS libraries, and why they could not be attached.
_MAX_FILES: Final = 16_384
#: What could not be attached for now is tried again this often.
_TURN_S: Final = 1.0
#: How long a file may take to be read and attached, until it counts as one whose file system hangs.
_ANSWER_S: Final = 5.0
#: How long the end waits for the file that is being read.
_END_S: Final = 1.0
_NAMES: Final = frozenset(name for family in FAMILIES.values() for name in family)
_HANGS: Final = "its file system does not answer"


class _Hung(NamedTuple):
    """A file whose file system does not answer, by its path, and who has it mapped by now."""

    path: str
    users: dict[ProcessId, Load]


class _Found(NamedTuple):
    """What came of a file. ``is_tls`` is None where that was not asked; ``reason``: why it is not attached."""

    is_tls: bool | None
    is_attached: bool
    reason: str | None = None
    is_permanent: bool = False


class TlsFiles:
    """Has a capture attached to each TLS library that a process of a watch maps, from `begin` on.

    Args:
        watcher: the agent's.
        proc: the host's.
        capture: started by its owner, who closes it after this.
        pattern: that paths of libraries have to match; None: all of them.
        selects: whether calls of a process count, where calls are filtered.
        on_turn: called about once a second, on the thread that follows the watch.
    """

    def __init__(
        self,
        watcher: Watcher,
        proc: ProcFs,
        capture: Capture,
        *,
        pattern: str | None,
        selects: Callable[[Process], bool],
        on_turn: Callable[[float], None],
    ) -> None:
        self._watcher = watcher
        self._proc = proc
        self._capture = capture
        self._pattern = None if pattern is None else re.compile(pattern)
        self._selects = selects
        self._on_turn = on_turn
        #: By file who has it mapped; with the lock, as others read it.
        self._users: dict[FileId, dict[ProcessId, Load]] = {}
        self._lock = threading.Lock()
        #: By (file, change time) whether it is a TLS library; by file its path and why it cannot be attached.
        self._is_tls: OrderedDict[tuple[FileId, int], bool] = OrderedDict()
        self._refused: OrderedDict[FileId, tuple[str, str]] = OrderedDict()
        self._to_retry: dict[FileId, Load] = {}
        #: What is asked of a file system that does not answer, and what came of it once it did.
        self._hung: dict[FileId, _Hung] = {}
        self._late: deque[tuple[Load, _Found]] = deque()
        self._worker = TimeoutWorker("sowatch-http-file")
        self._subscription: Subscription | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Attaches what is mapped, and what will be."""
        self._subscription = self._watcher.subscribe(events=("load", "unload"), control=False)
        self._thread = threading.Thread(target=self._follow, name="sowatch-http-files", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Follows no longer; waits for a file that is being read, but not for long. Safe to call again."""
        if self._subscription is not None:
            self._subscription.close()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(_END_S)
        if not thread.is_alive():
            self._worker.close()

    def select_anew(self) -> None:
        """Asks of each process that is known whether its calls count; any thread."""
        with self._lock:
            loads = [load for users in self._users.values() for load in users.values()]
        for load in loads:
            self._note_user(load)

    # ---- what is there, any thread -----------------------------------------------------------------

    @property
    def not_attached(self) -> list[tuple[FileId, str, str]]:
        """The TLS libraries that could not be attached, with the path and the reason of each."""
        refused = [(file, path, reason) for file, (path, reason) in self._refused.copy().items()]
        return refused + [(file, one.path, _HANGS) for file, one in self._hung.copy().items()]

    def has(self, process: ProcessId, files: Collection[FileId]) -> bool:
        """Whether the capture is attached to one of these files because of this process, as ``/proc`` knows it."""
        with self._lock:
            return any(process.same_tick(user) for file in files for user in self._users.get(file, ()))

    # ---- on the thread that follows the watch --------------------------------------------------------

    def _follow(self) -> None:
        subscription = self._subscription
        assert subscription is not None
        for one in self._watcher.snapshot(with_ranges=False):
            self._take(Load(one.rule, one.library, one.process, "snapshot", None, one.time_ns, one.ranges))
        turn_s = time.monotonic() + _TURN_S
        while not subscription.has_ended:
            event = subscription.get(_TURN_S)
            if event is not None:
                self._take(event)
            while self._late:
                self._take_late(*self._late.popleft())
            if (now_s := time.monotonic()) >= turn_s:
                turn_s = now_s + _TURN_S
                for load in list(self._to_retry.values()):
                    self._take(load)
                self._on_turn(now_s)

    def _take(self, event: Event) -> None:
        try:
            if isinstance(event, Load):
                self._load(event)
            elif isinstance(event, Unload):
                self._unload(event)
        except Exception:
            LOG.exception("a file was not examined for HTTP flows")

    def _load(self, load: Load) -> None:
        file = load.library.id
        if file in self._hung:
            self._hung[file].users[load.process.id] = load
        elif file in self._users:
            self._add_users(file, [load])
        elif file not in self._refused and self._may_be_tls(load):
            found = self._examine(load)
            if found is not None and self._settle(load, found):
                self._add_users(file, [load])

    def _unload(self, event: Unload) -> None:
        file, process = event.library.id, event.process.id
        if file in self._hung:
            self._hung[file].users.pop(process, None)
            return
        if (waits := self._to_retry.get(file)) is not None and waits.process.id == process:
            del self._to_retry[file]
        with self._lock:
            users = self._users.get(file)
            if users is None or users.pop(process, None) is None:
                return
            if not users:
                del self._users[file]
        self._capture.note(event)
        if not users:
            self._capture.attacher.detach(ActiveFile(event.library, -1))

    def _take_late(self, load: Load, found: _Found) -> None:
        """A file system has answered after all."""
        users = self._hung.pop(load.library.id).users
        if self._settle(load, found):
            if users:
                self._add_users(load.library.id, users.values())
            else:
                self._capture.attacher.detach(ActiveFile(load.library, -1))

    def _add_users(self, file: FileId, loads: Collection[Load]) -> None:
        with self._lock:
            self._users.setdefault(file, {}).update((load.process.id, load) for load in loads)
        for load in loads:
            self._note_user(load)

    def _note_user(self, load: Load) -> None:
        if not self._capture.is_filtered or self._selects(load.process):
            self._capture.note(load)
        else:
            self._capture.select(load.process, is_wanted=False)

    def _may_be_tls(self, load: Load) -> bool:
        """Whether a file is worth being opened: by its kind and path, and by what is known of it."""
        library = load.library
        if library.kind not in ("library", "executable") or (self._pattern and not self._pattern.search(library.path)):
            return False
        return self._is_tls.get((library.id, library.changed_ns), True)

    def _examine(self, load: Load) -> _Found | None:
        """What came of a file that is attached if it is a TLS library; None: its file system does not answer."""
        late: list[_Found] = []
        # The rules of [http] have asked for the exports already; another rule that wants the file may not have.
        is_known = load.rule.startswith(HTTP_PREFIX) or (load.library.id, load.library.changed_ns) in self._is_tls

        def call() -> _Found:
            late.append(self._attach(load, is_known=is_known))
            return late[0]

        try:
            return self._worker.run(
                call, _ANSWER_S, on_return=lambda: self._late.append((load, late[0] if late else _Found(None, False)))
            )
        except CallTimeout as error:
            if error.is_refused:
                return _Found(None, is_attached=False, reason=_HANGS)
            LOG.warning("%s is not tapped: %s", load.library.path, _HANGS)
            self._hung[load.library.id] = _Hung(load.library.path, {load.process.id: load})
            return None

    def _settle(self, load: Load, found: _Found) -> bool:
        """Keeps what came of a file; whether it is attached."""
        library = load.library
        waited = self._to_retry.pop(library.id, None) is not None
        if found.is_tls is not None:
            self._is_tls[library.id, library.changed_ns] = found.is_tls
            if len(self._is_tls) > _MAX_FILES:
                self._is_tls.popitem(last=False)
        if found.reason is None:
            return found.is_attached
        if found.is_permanent:
            LOG.warning("%s cannot be tapped: %s", library.path, found.reason)
            self._refused[library.id] = (library.path, found.reason)
            if len(self._refused) > _MAX_FILES:
                self._refused.popitem(last=False)
        else:
            if not waited:
                LOG.warning("%s is not tapped yet: %s", library.path, found.reason)
            self._to_retry[library.id] = load
        return False

    # ---- on a thread that may hang -------------------------------------------------------------------

    def _attach(self, load: Load, *, is_known: bool) -> _Found:
        file = open_active(self._proc, load.process.pid, load.library, load.ranges)
        if file is None:
            return _Found(None, is_attached=False)  # its process has ended, or changed what it has mapped
        try:
            is_tls = None if is_known else _is_tls(file)
            if not (is_known or is_tls):
                return _Found(is_tls, is_attached=False)
            self._capture.attacher.attach(file)
        except EnvironmentFault as error:
            return _Found(None, is_attached=False, reason=str(error))
        except SowatchError as error:
            return _Found(None, is_attached=False, reason=str(error), is_permanent=True)
        finally:
            file.close()
        return _Found(is_tls, is_attached=True)


def _is_tls(file: ActiveFile) -> bool | None:
    """Whether it exports functions of a family; None: that cannot be read."""
    try:
        exports = read_exports(file.fileno(), _NAMES)
    except (ElfError, OSError):
        return None
    return any(exports.issuperset(family) for family in FAMILIES.values())
