"""The section [http] of the agent: off, or a capture that goes on or is replaced when the configuration changes.

Changed on the main thread. What decodes is an extra, and imported only where it is switched on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from sowatch.agent.settings import HTTP_PREFIX, HttpSettings
from sowatch.explain import ProcessReport
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import ConfigError, SowatchError
from sowatch.model.rules import Rule
from sowatch.telemetry import MetricRegistry, Sampler
from sowatch.uprobes.features import why_not_attach
from sowatch.watcher.watcher import Watcher

if TYPE_CHECKING:
    from sowatch.agent.http_meter import HttpMeter
    from sowatch.agent.http_running import Running

__all__ = ["HttpChange", "HttpFlows", "is_live_change", "with_tls_libraries"]


def with_tls_libraries(rules: list[Rule], settings: HttpSettings) -> list[Rule]:
    """The rules with those that [http] adds after all others: for TLS libraries that no other rule wants."""
    if not settings.enabled:
        return rules
    from sowatch.http.capture import family_rules

    return [*(rules or [Rule()]), *family_rules(settings.libraries, prefix=HTTP_PREFIX)]


def is_live_change(old: HttpSettings, new: HttpSettings) -> bool:
    """Whether a capture can go on by other settings and loses nothing.

    What the programs have as constants, and which files they are on, needs a new one.
    """
    keys = ("enabled", "libraries", "headers", "capture_bytes", "linger_s")
    return all(getattr(old, key) == getattr(new, key) for key in keys) and old.is_filtered == new.is_filtered


class HttpChange:
    """Settings on their way to be in force: `start`, then `apply`, or `discard`."""

    def __init__(self, flows: HttpFlows, settings: HttpSettings) -> None:
        self._flows = flows
        self._settings = settings
        self._new: Running | None = None

    def start(self) -> None:
        """Loads programs if there has to be a new capture.

        Raises:
            ConfigError: they cannot be used; nothing has changed then.
        """
        running = self._flows.running
        if not self._settings.enabled or (running and is_live_change(running.settings, self._settings)):
            return
        if (reason := why_not_attach()) is not None:
            raise ConfigError("http.enabled", f"TLS libraries cannot be tapped: {reason}")
        self._new = self._flows.make(self._settings)
        try:
            self._new.capture.start()
        except SowatchError as error:
            self.discard()
            raise ConfigError("http.enabled", f"the programs for TLS libraries cannot be used: {error}") from error

    def apply(self) -> None:
        """Once the watcher has the rules: ends the capture that is gone, and begins the new one."""
        self._flows.take_over(self._settings, self._new)
        self._new = None

    def discard(self) -> None:
        """What is new is not wanted after all. Safe to call again."""
        if self._new is not None:
            self._new.close()
            self._new = None


class HttpFlows:
    """The section [http] of the agent.

    Args:
        watcher: the agent's.
        metrics: gets the figures.
        sampler: follows what the capture counts.
        proc: the host's.
    """

    def __init__(self, watcher: Watcher, metrics: MetricRegistry, sampler: Sampler, proc: ProcFs) -> None:
        self._watcher = watcher
        self._sampler = sampler
        self._proc = proc
        self.running: Running | None = None
        self._metrics = metrics
        self._meter: HttpMeter | None = None
        self._unfollow: list[Callable[[], None]] = []

    def prepare(self, settings: HttpSettings) -> HttpChange:
        """The change to other settings; nothing is loaded yet."""
        return HttpChange(self, settings)

    def make(self, settings: HttpSettings) -> Running:
        """A capture that is not loaded yet."""
        from sowatch.agent.http_meter import HttpMeter
        from sowatch.agent.http_running import Running

        if self._meter is None:
            self._meter = HttpMeter(self._metrics, settings.max_endpoints)
        return Running(settings, self._meter, self._watcher, self._proc)

    def take_over(self, settings: HttpSettings, new: Running | None) -> None:
        """See `HttpChange.apply`."""
        running = self.running
        if self._meter is not None:
            self._meter.change_bound(settings.max_endpoints)
        if new is None and settings.enabled:
            assert running is not None
            running.take_over(settings)
            return
        # Not side by side: the calls of a moment would count twice.
        self._end(keeps_meter=new is not None)
        if new is None:
            return
        self.running = new
        new.begin()
        self._unfollow = [
            self._sampler.follow_http(new.figures),
            self._sampler.follow_attachments("http", new.attachments),
        ]

    def close(self) -> None:
        """Detaches everything. Safe to call again."""
        self._end(keeps_meter=False)

    def explained(self, report: ProcessReport) -> ProcessReport:
        """The report with what became of the process's flows, where its files say that it can have some."""
        http, running = report.http, self.running
        if http is None:
            return report if running is None else _explained_published(report, running)
        if http.state != "tappable":
            return report
        if running is None:
            return replace(report, http=replace(http, state="off"))
        files = {one.library.id for one in report.mappings if one.library.path in http.files}
        return replace(report, http=replace(running.why(report.process, files), files=http.files))

    def summary(self) -> dict[str, Any] | None:
        """How it is, for ``/readyz``; None: it is off."""
        running = self.running
        if running is None:
            return None
        return {**_state(running), **running.figures()}

    def endpoints(self, with_flows: bool) -> dict[str, Any] | None:
        """What ``/http`` answers; None: it is off."""
        running, meter = self.running, self._meter
        if running is None or meter is None:
            return None
        return {**meter.endpoints(with_flows=with_flows), **_state(running), "stats": running.figures()}

    def _end(self, *, keeps_meter: bool) -> None:
        running, self.running = self.running, None
        if running is not None:
            running.close()
        for unfollow in self._unfollow:
            unfollow()  # asks it once more
        self._unfollow = []
        if self._meter is not None and not keeps_meter:
            self._meter.close()
            self._meter = None


def _explained_published(report: ProcessReport, running: Running) -> ProcessReport:
    """The same where nothing was read for the asker: by what the capture is attached to, or could not be."""
    known = {one.library.id for one in running.capture.attacher.files()}
    known |= {file for file, _, _ in running.files.not_attached}
    files = {one.library.id: one.library.path for one in report.mappings if one.library.id in known}
    if not files:
        return report
    return replace(report, http=replace(running.why(report.process, files), files=tuple(files.values())))


def _state(running: Running) -> dict[str, Any]:
    """Whether the capture goes on, and what it is attached to."""
    return {
        "running": not running.has_failed,
        "files": running.capture.attacher.stats.files,
        "sees_sockets": running.capture.sees_sockets,
        "not_tapped": [{"path": path, "reason": reason} for _, path, reason in running.files.not_attached],
    }
