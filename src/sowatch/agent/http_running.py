"""A capture of HTTP flows that the agent's own watch feeds, and where its flows go.

Changed on the main thread. Files are attached on a thread that follows the watch; flows come on the capture's.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Self

from sowatch.agent.http_meter import HttpMeter
from sowatch.agent.settings import HTTP_PREFIX, HttpSettings
from sowatch.engine.subscription import Subscription
from sowatch.engine.workers import ActiveFile
from sowatch.explain.probing import TlsAnswer
from sowatch.http.capture import Capture, HttpFlow
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import read_exports
from sowatch.linux.mapped_file import open_mapped
from sowatch.linux.proc import ProcFs
from sowatch.linux.tls_libraries import FAMILIES
from sowatch.model.errors import EnvironmentFault, SowatchError
from sowatch.model.events import Event, Http, Load, Process, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.watcher.watcher import Watcher

__all__ = ["Running"]

LOG = logging.getLogger("sowatch.agent")

#: Flows that wait until the watch's thread has published those before; more are counted and not published.
_MAX_WAITING: Final = 20_000
#: What is known of so many files: whether they are TLS libraries, and why they could not be attached.
_MAX_FILES: Final = 16_384
#: What could not be attached for now is tried again this often, and idle series are looked for.
_TURN_S: Final = 1.0


class Running:
    """A capture that the agent's watch feeds, from `begin` on.

    Args:
        settings: enabled; see `take_over`.
        meter: counts flows.
        watcher: the agent's.
        proc: the host's.
    """

    def __init__(self, settings: HttpSettings, meter: HttpMeter, watcher: Watcher, proc: ProcFs) -> None:
        self._watcher = watcher
        self._proc = proc
        self._meter = meter
        self._set(settings)
        self.capture = Capture(
            self._take_flow,
            on_failure=lambda: setattr(self, "has_failed", True),
            on_drained=self._publish,
            is_filtered=settings.is_filtered,
            capture_bytes=settings.capture_bytes,
            linger_s=settings.linger_s,
            keeps_query=True,  # by the settings of the moment, see `_take_flow`
        )
        self.has_failed = False
        #: Flows that were counted and not published.
        self.unpublished = 0
        #: By file its users; by (file, change time) whether it is a TLS library; by file why it cannot be attached.
        self._users: dict[FileId, dict[ProcessId, Load]] = {}
        self._is_tls: OrderedDict[tuple[FileId, int], bool] = OrderedDict()
        self.refused: OrderedDict[FileId, tuple[str, str]] = OrderedDict()
        self._to_retry: dict[FileId, Load] = {}
        self._lock = threading.Lock()
        self._subscription: Subscription | None = None
        self._thread: threading.Thread | None = None
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._waiting: list[Http] = []
        self._published: Future[None] | None = None

    def begin(self) -> None:
        """Attaches what is mapped, and what will be."""
        self._subscription = self._watcher.subscribe(events=("load", "unload"), control=False)
        self._thread = threading.Thread(target=self._follow, name="sowatch-http-files", daemon=True)
        self._thread.start()

    def take_over(self, settings: HttpSettings) -> None:
        """Goes on by other settings, with every connection that it knows; see `is_live_change`."""
        with self._lock:
            self._set(settings)
            for users in self._users.values():
                for load in users.values():
                    self._note_user(load)

    def close(self) -> None:
        """Hands out what is under way, and detaches everything. Safe to call again."""
        if self._subscription is not None:
            self._subscription.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.capture.close()
        if self._published is not None:
            with suppress(SowatchError, TimeoutError):
                self._published.result(1.0)

    def figures(self) -> dict[str, int]:
        """What `Sampler.follow_http` wants."""
        stats = self.capture.stats()
        return stats | {"truncated": stats["gaps"], "unpublished": self.unpublished}

    def attachments(self) -> dict[str, float]:
        """What `Sampler.follow_attachments` wants."""
        stats = self.capture.attacher.stats
        names = ("expected", "attached", "failed", "repaired", "retries")
        return {name: getattr(stats, name) for name in names} | {"failed": stats.failed + len(self.refused)}

    def why(self, process: Process, files: Collection[FileId]) -> TlsAnswer:
        """What became of a process's flows, or why it has none.

        Args:
            process: that has TLS libraries.
            files: its TLS libraries.
        """
        if self.capture.is_filtered and not self.selects(process):
            return TlsAnswer("not_selected")
        for file in files:
            if file in self.refused:
                return TlsAnswer("refused", self.refused[file][1])
        with self._lock:
            is_user = any(process.id.same_tick(user) for file in files for user in self._users.get(file, ()))
        activity = self.capture.activity(process.id)
        if not is_user or activity is None:
            return TlsAnswer("not_attached")
        probed = [one for one in self.capture.attacher.files() if one.library.id in files]
        for one in probed:
            if one.state != "attached":
                return TlsAnswer("refused", one.reason or "it is tried again")
        if activity.flows:
            return TlsAnswer("flows", calls=activity.calls, flows=activity.flows)
        return TlsAnswer("no_http" if activity.calls else "no_call", calls=activity.calls)

    def selects(self, process: Process) -> bool:
        """Whether flows of a process count."""
        if self._containers and not (process.container or "").startswith(self._containers):
            return False
        if self._process is None:
            return True
        return any(one and self._process.search(one) for one in (process.comm, process.exe))

    # ---- flows, on the capture's thread --------------------------------------------------------

    def _set(self, settings: HttpSettings) -> None:
        self.settings = settings
        self._containers = settings.containers
        self._process = None if settings.process is None else re.compile(settings.process)
        self._path = None if settings.path is None else re.compile(settings.path)

    def _take_flow(self, found: HttpFlow) -> None:
        settings, flow = self.settings, found.flow
        if settings.side not in (None, flow.side):
            return
        if self._path is not None and not (flow.path and self._path.search(flow.path)):
            return
        event = found.event(self._offset_ns, keeps_query=settings.keep_query)
        self._meter.add(found, event)
        if not settings.events:
            return
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append(event)
        else:
            self.unpublished += 1

    def _publish(self) -> None:
        """Not before the ones before are: so a watch that is busy gets no more work than it can do."""
        if not self._waiting or (self._published is not None and not self._published.done()):
            return
        events, self._waiting = self._waiting, []
        try:
            self._published = self._watcher.publish(events)
        except SowatchError:  # it has ended
            self.unpublished += len(events)

    # ---- files, on the thread that follows the watch ---------------------------------------------

    def _follow(self) -> None:
        subscription = self._subscription
        assert subscription is not None
        for one in self._watcher.snapshot(with_ranges=False):
            self._take(Load(one.rule, one.library, one.process, "snapshot", None, one.time_ns, one.ranges))
        retry_s = time.monotonic() + _TURN_S
        while not subscription.has_ended:
            event = subscription.get(_TURN_S)
            if event is not None:
                self._take(event)
            if (now_s := time.monotonic()) >= retry_s:
                retry_s = now_s + _TURN_S
                for load in list(self._to_retry.values()):
                    self._take(load)
                self._meter.forget_idle(now_s)

    def _take(self, event: Event) -> None:
        try:
            with self._lock:
                if isinstance(event, Load):
                    self._load(event)
                elif isinstance(event, Unload):
                    self._unload(event)
        except Exception:
            LOG.exception("a file was not examined for HTTP flows")

    def _load(self, load: Load) -> None:
        file = load.library.id
        users = self._users.get(file)
        if users is None:
            if file in self.refused or not self._is_wanted(load) or not self._attach(load):
                return
            users = self._users[file] = {}
        users[load.process.id] = load
        self._note_user(load)

    def _unload(self, event: Unload) -> None:
        file = event.library.id
        if (waits := self._to_retry.get(file)) is not None and waits.process.id == event.process.id:
            del self._to_retry[file]
        users = self._users.get(file)
        if users is None or users.pop(event.process.id, None) is None:
            return
        self.capture.note(event)
        if not users:
            del self._users[file]
            self.capture.attacher.detach(ActiveFile(event.library, -1))

    def _note_user(self, load: Load) -> None:
        if not self.capture.is_filtered or self.selects(load.process):
            self.capture.note(load)
        else:
            self.capture.select(load.process, is_wanted=False)

    def _is_wanted(self, load: Load) -> bool:
        """Whether a file is a TLS library that is to be tapped; the rules of [http] have asked for its exports already.

        Files that another rule wants are opened once, as that one may not have asked for them.
        """
        library = load.library
        pattern = self.settings.libraries
        if library.kind not in ("library", "executable") or (pattern and not re.search(pattern, library.path)):
            return False
        if load.rule.startswith(HTTP_PREFIX):
            return True
        key = (library.id, library.changed_ns)
        known = self._is_tls.get(key)
        if known is not None:
            return known
        opened = self._open(load)
        if opened is None:
            return False
        with opened:
            try:
                exports = read_exports(opened.fileno(), {one for family in FAMILIES.values() for one in family})
            except (ElfError, OSError):
                return False
        self._is_tls[key] = any(exports.issuperset(family) for family in FAMILIES.values())
        if len(self._is_tls) > _MAX_FILES:
            self._is_tls.popitem(last=False)
        return self._is_tls[key]

    def _open(self, load: Load) -> _Opened | None:
        library = load.library
        fd = open_mapped(
            self._proc,
            load.process.pid,
            library.id,
            library.path,
            load.ranges,
            is_own_view=library.host_path == library.path,
            is_deleted=library.deleted,
            changed_ns=library.changed_ns,
        )
        return None if fd is None else _Opened(library, fd)

    def _attach(self, load: Load) -> bool:
        file = load.library.id
        self._to_retry.pop(file, None)
        opened = self._open(load)
        if opened is None:
            return False  # its process has ended, or changed what it has mapped
        with opened:
            try:
                self.capture.attacher.attach(opened)
            except EnvironmentFault as error:
                LOG.warning("%s is not tapped yet: %s", load.library.path, error)
                self._to_retry[file] = load
                return False
            except SowatchError as error:
                LOG.warning("%s cannot be tapped: %s", load.library.path, error)
                self.refused[file] = (load.library.path, str(error))
                if len(self.refused) > _MAX_FILES:
                    self.refused.popitem(last=False)
                return False
        return True


class _Opened(ActiveFile):
    """A file that is closed at the end of a ``with``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
