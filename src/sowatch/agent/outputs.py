"""Sinks and exporters by configuration, replaced one by one when it changes.

Used by the main thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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


class _Runs(Protocol):
    """A `SinkRunner` or a `Pusher`."""

    def start(self) -> None: ...
    def close(self) -> None: ...


class _Closes(Protocol):
    """A sink or an exporter."""

    def close(self) -> None: ...


class _Output:
    """One that runs or is going to, with what ends the following of its figures."""

    def __init__(self, runner: _Runs, device: _Closes, unfollow: Callable[[], None]) -> None:
        self.runner = runner
        self._device = device
        self._unfollow = unfollow

    def close(self) -> None:
        self.runner.close()
        self._unfollow()

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
            for one in gone:
                self._running.pop(one).close()
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

    def close(self) -> None:
        """Delivers what waits, for a few seconds at most, and ends all. Safe to call again."""
        for output in self._running.values():
            output.close()
        self._running.clear()

    def _make(self, one: SinkSettings | ExporterSettings) -> _Output:
        if isinstance(one, SinkSettings):
            sink = _sink(one, self._origin)
            runner = SinkRunner(sink, self._watcher.subscribe(events=one.events, limit=one.queue_events))
            return _Output(runner, sink, self._sampler.follow_sink(runner))
        exporter = self._exporter(one)
        pusher = Pusher(exporter, interval_s=one.interval_s)
        return _Output(pusher, exporter, self._sampler.follow_exporter(pusher))

    def _exporter(self, one: ExporterSettings) -> StatsdExporter | OtlpMetricsExporter:
        if one.type == "statsd":
            return StatsdExporter(self._metrics, one.address, tags=one.tags)
        return OtlpMetricsExporter(self._metrics, one.endpoint, protocol=one.protocol, resource=_resource(self._origin))


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
