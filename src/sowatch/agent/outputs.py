"""Sinks and exporters by configuration, replaced one by one when it changes.

Used by the main thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from sowatch.agent.settings import ExporterSettings, Settings, SinkSettings
from sowatch.model.events import Origin
from sowatch.telemetry import (
    FileSink,
    MetricRegistry,
    OtlpLogSink,
    OtlpMetricsExporter,
    Pusher,
    Sampler,
    Sink,
    SinkRunner,
    StatsdExporter,
    StdoutSink,
)
from sowatch.watcher.watcher import Watcher

__all__ = ["Outputs"]

LOG = logging.getLogger("sowatch.agent")

#: An output that takes what waits gets this long at the end; one that takes nothing, so long, and one that took nothing
#: before, so long: the end of an agent whose collector is dead is not to take two seconds.
_DELIVER_S: Final = 2.0
_STALL_S: Final = 0.7
_DOWN_S: Final = 0.3
#: All of them are ended at the same time; what hangs then is left behind.
_GRACE_S: Final = 0.5


class _Closes(Protocol):
    """A sink or an exporter."""

    def close(self) -> None: ...


class _Output:
    """One that runs or is going to, with what ends the following of its figures."""

    def __init__(self, kind: str, runner: SinkRunner | Pusher, device: _Closes, unfollow: Callable[[], None]) -> None:
        self._type = kind
        self.runner = runner
        self._device = device
        self._unfollow = unfollow

    def close(self) -> None:
        if isinstance(self.runner, SinkRunner):
            self.runner.close(_DELIVER_S, stall_s=_STALL_S if self.runner.stats.is_up else _DOWN_S)
        else:
            self.runner.close(_STALL_S if self.runner.last_error is None else _DOWN_S)
        self._unfollow()

    def facts(self) -> dict[str, Any]:
        """For ``/readyz``."""
        runner = self.runner
        if isinstance(runner, SinkRunner):
            stats = runner.stats
            up: dict[str, Any] = {"up": stats.is_up, "error": stats.last_error}
            figures = {"events": stats.events, "lost": stats.lost, "waiting": stats.waiting, "errors": stats.errors}
            return {"name": runner.name, "kind": "sink", "type": self._type, **up, **figures}
        up = {"up": runner.last_error is None, "error": runner.last_error}
        figures = {"pushes": runner.pushes, "errors": runner.errors}
        return {"name": runner.name, "kind": "exporter", "type": self._type, **up, **figures}

    def discard(self) -> None:
        """It was never started, so nobody else closes what it writes to."""
        self.close()
        self._device.close()


class Outputs:
    """All sinks and exporters of the agent.

    Args:
        watcher: whose events go to the sinks; before its start for those that shall have the snapshot.
        metrics: what the exporters send.
        sampler: follows both.
        origin: where the agent runs.
    """

    def __init__(self, watcher: Watcher, metrics: MetricRegistry, sampler: Sampler, origin: Origin) -> None:
        self._origin = origin
        self._watcher = watcher
        self._metrics = metrics
        self._sampler = sampler
        self._running: dict[SinkSettings | ExporterSettings, _Output] = {}

    def prepare(self, settings: Settings) -> Callable[[], None]:
        """Opens what is new in a configuration; calling the result starts it and ends what is gone.

        Raises:
            SowatchError: one cannot be opened; nothing has changed then.
        """
        wanted: list[SinkSettings | ExporterSettings] = [*settings.sinks, *settings.exporters]
        gone = [one for one in self._running if one not in wanted]
        made: dict[SinkSettings | ExporterSettings, _Output] = {}
        try:
            for one in wanted:
                if one not in self._running and one not in made:
                    made[one] = self._make(one)
        except BaseException:
            for output in made.values():
                output.discard()
            raise

        def apply() -> None:
            _close([self._running.pop(one) for one in gone])
            for one, output in made.items():
                output.runner.start()
                self._running[one] = output

        return apply

    def reopen(self) -> None:
        """Has file sinks open their files anew, after a rotation."""
        for output in self._running.values():
            if isinstance(output.runner, SinkRunner):
                output.runner.reopen()

    def problems(self) -> list[str]:
        """What is down, and why, for people."""
        found = []
        for output in self._running.values():
            runner = output.runner
            if isinstance(runner, SinkRunner) and not runner.stats.is_up:
                found.append(f"sink {runner.name}: {runner.stats.last_error}")
            elif isinstance(runner, Pusher) and runner.last_error is not None:
                found.append(f"exporter {runner.name}: {runner.last_error}")
        return found

    def state(self) -> list[dict[str, Any]]:
        """Each output with its figures, and whether it is up; any thread."""
        return [output.facts() for output in list(self._running.values())]

    def close(self) -> None:
        """Delivers what waits and ends all, within two seconds, whatever hangs. Safe to call again."""
        _close(self._running.values())
        self._running.clear()

    def _make(self, one: SinkSettings | ExporterSettings) -> _Output:
        if isinstance(one, SinkSettings):
            sink = _sink(one, self._origin)
            runner = SinkRunner(sink, self._watcher.subscribe(events=one.events, limit=one.queue_events))
            return _Output(one.type, runner, sink, self._sampler.follow_sink(runner))
        exporter = self._exporter(one)
        pusher = Pusher(exporter, interval_s=one.interval_s)
        return _Output(one.type, pusher, exporter, self._sampler.follow_exporter(pusher))

    def _exporter(self, one: ExporterSettings) -> StatsdExporter | OtlpMetricsExporter:
        if one.type == "statsd":
            return StatsdExporter(self._metrics, one.address, tags=one.tags)
        return OtlpMetricsExporter(self._metrics, one.endpoint, protocol=one.protocol, resource=_resource(self._origin))


def _close(outputs: Iterable[_Output]) -> None:
    """All at the same time: one whose server does not answer takes nothing of the time of the others.

    Each on a thread of its own, which is left behind if it hangs: what a library does to close a connection may wait.
    """
    end_s = time.monotonic() + _DELIVER_S + _GRACE_S
    threads = [threading.Thread(target=output.close, name="sowatch-output-end", daemon=True) for output in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    if left := sum(thread.is_alive() for thread in threads):
        LOG.warning("%d outputs did not end in time and were left behind", left)


def _resource(origin: Origin) -> dict[str, str]:
    """By the OpenTelemetry conventions for resources."""
    found = {"host.name": origin.host, "host.id": origin.host_id, "service.version": origin.version}
    return {name: value for name, value in found.items() if value is not None}


def _sink(one: SinkSettings, origin: Origin) -> Sink:
    if one.type == "file":
        assert one.path is not None
        return FileSink(one.path, max_bytes=one.max_bytes, max_files=one.max_files, name=one.title, origin=origin)
    if one.type == "otlp":
        return OtlpLogSink(one.endpoint, protocol=one.protocol, name=one.title, resource=_resource(origin))
    return StdoutSink(name=one.title)
