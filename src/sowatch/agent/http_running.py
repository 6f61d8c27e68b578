"""A capture of HTTP flows that the agent's own watch feeds, and where its flows go.

Changed on the main thread; flows come on the capture's.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from sowatch.agent.http_files import TlsFiles
from sowatch.agent.http_meter import HttpMeter
from sowatch.agent.settings import HttpSettings
from sowatch.explain.probing import TlsAnswer
from sowatch.http.capture import Capture, HttpFlow
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import SowatchError
from sowatch.model.events import Http, Process
from sowatch.model.identity import FileId
from sowatch.watcher.watcher import Watcher

__all__ = ["Running"]

LOG = logging.getLogger("sowatch.agent")

#: Flows that wait until the watch's thread has published those before; more are counted and not published.
_MAX_WAITING: Final = 20_000


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
            headers=settings.headers,
        )
        self.has_failed = False
        #: Flows that were counted and not published.
        self.unpublished = 0
        self.files = TlsFiles(
            watcher,
            proc,
            self.capture,
            pattern=settings.libraries,
            selects=self.selects,
            on_turn=meter.forget_idle,
        )
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._waiting: list[Http] = []
        self._published: Future[None] | None = None

    def begin(self) -> None:
        """Attaches what is mapped, and what will be."""
        self.files.begin()

    def take_over(self, settings: HttpSettings) -> None:
        """Goes on by other settings, with every connection that it knows; see `is_live_change`."""
        self._set(settings)
        self.files.select_anew()

    def close(self) -> None:
        """Hands out what is under way, and detaches everything. Safe to call again."""
        self.files.close()
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
        return {name: getattr(stats, name) for name in names} | {"failed": stats.failed + len(self.files.not_attached)}

    def why(self, process: Process, files: Collection[FileId]) -> TlsAnswer:
        """What became of a process's flows, or why it has none.

        Args:
            process: that has TLS libraries.
            files: its TLS libraries.
        """
        if self.capture.is_filtered and not self.selects(process):
            return TlsAnswer("not_selected")
        for file, _, reason in self.files.not_attached:
            if file in files:
                return TlsAnswer("refused", reason)
        is_user = self.files.has(process.id, files)
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
        event = found.event(self._offset_ns, keeps_query=settings.keep_query, has_headers=bool(settings.headers))
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
