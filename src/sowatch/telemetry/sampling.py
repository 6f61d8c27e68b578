"""From the figures that the core keeps to metrics, when somebody asks.

The core pays nothing for being watched: its plain fields are read here, at a scrape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from sowatch.engine.activation import RegistryStats
from sowatch.model.events import Ready
from sowatch.model.histogram import Distribution, RuleTimings
from sowatch.model.process_events import ProcessMonitorStats
from sowatch.model.stats import Stats
from sowatch.telemetry import names
from sowatch.telemetry.metrics import Gauge, MetricRegistry
from sowatch.telemetry.pusher import Pusher
from sowatch.telemetry.sinks import SinkRunner

__all__ = ["Sampler", "WatcherFigures"]

_COUNTERS: Final = {
    "records": names.HITS,
    "loads": names.MATCHES,
    "unloads": names.UNLOADS,
    "events": names.EVENTS,
    "repairs": names.REPAIRS,
    "rereads": names.REREADS,
    "unresolved": names.UNRESOLVED,
    "partial": names.PARTIAL,
    "callback_errors": names.CALLBACK_ERRORS,
    "audits": names.AUDITS,
    "pod_lookups": names.POD_LOOKUPS,
    "pod_lookup_failures": names.POD_LOOKUP_FAILURES,
}
_ATTACHMENTS: Final = {**names.ATTACHMENTS, "lost": names.CALLS_LOST, "untimed": names.CALLS_UNTIMED}
_GAUGES: Final = {
    "processes": names.PROCESSES,
    "libraries": names.LIBRARIES,
    "mappings": names.MAPPINGS,
    "audit_differences": names.AUDIT_DIFFERENCES,
}


class HasRegistryStats(Protocol):
    """A `FileRegistry`."""

    @property
    def stats(self) -> RegistryStats:
        """Its figures."""


class HasMonitorStats(Protocol):
    """A `ProcessMonitor`."""

    @property
    def stats(self) -> ProcessMonitorStats:
        """Its figures."""


class WatcherFigures(Protocol):
    """What a `Watcher` reports of itself."""

    @property
    def stats(self) -> Stats:
        """Its figures."""

    @property
    def ready(self) -> Ready | None:
        """What its ``ready`` event reported."""

    @property
    def is_repaired(self) -> bool:
        """Whether every loss was made good."""

    @property
    def timings(self) -> Mapping[str, RuleTimings]:
        """How long callbacks took, by rule."""

    @property
    def registry(self) -> HasRegistryStats:
        """Its file registry."""


class _Source:
    """One thing that is followed: its totals rise from nothing, whatever the metrics had before."""

    def __init__(self, registry: MetricRegistry) -> None:
        self._registry = registry
        # By what was asked for: series that overflow are one metric.
        self._seen: dict[tuple[str, ...], Any] = {}
        self._owned: set[Gauge] = set()

    def counter(self, definition: names.Definition, total: float, *tags: str) -> None:
        """Brings a counter up to date; a total that fell has begun anew."""
        key = (definition.name, *tags)
        before = self._seen.get(key, 0)
        self._seen[key] = total
        self._registry.counter(definition.name, *tags).add(total - before if total >= before else total)

    def gauge(self, definition: names.Definition, value: float, *tags: str) -> None:
        """Sets a gauge, which goes when the source goes."""
        gauge = self._registry.gauge(definition.name, *tags)
        self._owned.add(gauge)
        gauge.set(value)

    def histogram(self, definition: names.Definition, now: Distribution, *tags: str) -> None:
        """Adds what is new in a distribution."""
        key = (definition.name, *tags)
        before = self._seen.get(key)
        self._seen[key] = now
        self._registry.histogram(definition.name, *tags).add(now if before is None else now - before)

    def end(self) -> None:
        for gauge in self._owned:
            self._registry.forget(gauge)


class Sampler:
    """Keeps the metrics of a registry in step with what it follows.

    Each ``follow_`` method returns a function that takes the last figures and ends that;
    the gauges of what was followed go then, its counters stay. A new watcher after a changed
    configuration adds to the counters of the one before it. All methods may be called from any thread.

    Args:
        registry: where the metrics live.
        version: of the program, for ``build.info``.
    """

    def __init__(self, registry: MetricRegistry, *, version: str | None = None) -> None:
        self._registry = registry
        if version is not None:
            registry.gauge(names.BUILD.name, f"version:{version}").set(1)

    def follow_watcher(self, watcher: WatcherFigures) -> Callable[[], None]:
        """Follows a watcher and its file registry."""
        return self._follow(lambda source: _sample_watcher(source, watcher))

    def follow_process_monitor(self, monitor: HasMonitorStats) -> Callable[[], None]:
        """Follows a process monitor."""
        return self._follow(lambda source: _sample_fields(source, monitor.stats, names.PROCESS_MONITOR))

    def follow_sink(self, runner: SinkRunner) -> Callable[[], None]:
        """Follows a sink."""
        return self._follow(lambda source: _sample_sink(source, runner))

    def follow_exporter(self, pusher: Pusher) -> Callable[[], None]:
        """Follows an exporter that pushes."""
        return self._follow(lambda source: _sample_exporter(source, pusher))

    def follow_attachments(self, rule: str, read: Callable[[], Mapping[str, float]]) -> Callable[[], None]:
        """Follows what a rule attaches: figures by the keys of `names.ATTACHMENTS`, and ``lost`` and ``untimed``."""
        return self._follow(lambda source: _sample_attachments(source, rule, read()))

    def follow_http(self, read: Callable[[], Mapping[str, int]]) -> Callable[[], None]:
        """Follows flows out of TLS libraries: figures by the keys of `names.HTTP` and `names.HTTP_LOST_PLACES`."""
        return self._follow(lambda source: _sample_http(source, read()))

    def follow_fleet(self, read: Callable[[], Mapping[str, int]]) -> Callable[[], None]:
        """Follows what is sent to the receiver of a fleet: figures by the keys of `names.FLEET`."""
        return self._follow(lambda source: _sample_fleet(source, read()))

    def _follow(self, sample: Callable[[_Source], None]) -> Callable[[], None]:
        source = _Source(self._registry)
        remove = self._registry.add_source(lambda: sample(source))
        once = threading.Lock()

        def end() -> None:
            if once.acquire(blocking=False):
                remove()
                sample(source)
                source.end()

        return end


def _sample_watcher(source: _Source, watcher: WatcherFigures) -> None:
    stats = watcher.stats
    for field, definition in _COUNTERS.items():
        source.counter(definition, getattr(stats, field))
    for field, definition in _GAUGES.items():
        source.gauge(definition, getattr(stats, field))
    for where, count in stats.losses._asdict().items():
        source.counter(names.LOST, count, f"where:{where}")
    source.counter(names.LOST, stats.lost_queue, "where:queue")
    source.gauge(names.IS_REPAIRED, int(watcher.is_repaired))
    source.gauge(names.UNREAD, stats.unread)
    ready = watcher.ready
    if ready is not None:
        tags = (f"strategy:{ready.strategy}", f"hooks:{ready.hooks or 'none'}", f"guarantee:{ready.guarantee}")
        source.gauge(names.STRATEGY, 1, *tags)
    for rule, timings in watcher.timings.items():
        if "on_activate" in timings.callbacks:
            source.histogram(names.ATTACH_SECONDS, timings.attach.read(), f"rule:{rule}")
        for definition, latencies in (
            (names.CALLBACK_SECONDS, timings.callbacks),
            (names.LOAD_TO_CALLBACK_SECONDS, timings.delays),
        ):
            for callback, latency in latencies.items():
                source.histogram(definition, latency.read(), f"rule:{rule}", f"callback:{callback}")
    _sample_fields(source, watcher.registry.stats, names.FILE_REGISTRY)


def _sample_fields(
    source: _Source, stats: RegistryStats | ProcessMonitorStats, definitions: Mapping[str, names.Definition]
) -> None:
    for name in stats.__struct_fields__:
        definition = definitions[name]
        value = getattr(stats, name)
        if definition.kind == "gauge":
            source.gauge(definition, value)
        else:
            source.counter(definition, value)


def _sample_sink(source: _Source, runner: SinkRunner) -> None:
    stats = runner.stats
    tag = f"sink:{runner.name}"
    source.counter(names.SINK_EVENTS, stats.events, tag)
    source.counter(names.SINK_LOST, stats.lost, tag)
    source.counter(names.SINK_ERRORS, stats.errors, tag)
    source.gauge(names.SINK_WAITING, stats.waiting, tag)
    source.gauge(names.SINK_UP, int(stats.is_up), tag)


def _sample_exporter(source: _Source, pusher: Pusher) -> None:
    source.counter(names.EXPORTER_PUSHES, pusher.pushes, f"exporter:{pusher.name}")
    source.counter(names.EXPORTER_ERRORS, pusher.errors, f"exporter:{pusher.name}")


def _sample_http(source: _Source, figures: Mapping[str, int]) -> None:
    for field, definition in names.HTTP.items():
        source.counter(definition, figures[field])
    for field, where in names.HTTP_LOST_PLACES.items():
        source.counter(names.HTTP_LOST, figures[field], f"where:{where}")


def _sample_fleet(source: _Source, figures: Mapping[str, int]) -> None:
    for field, definition in names.FLEET.items():
        (source.gauge if definition.kind == "gauge" else source.counter)(definition, figures[field])


def _sample_attachments(source: _Source, rule: str, figures: Mapping[str, float]) -> None:
    for field, value in figures.items():
        definition = _ATTACHMENTS[field]
        (source.gauge if definition.kind == "gauge" else source.counter)(definition, value, f"rule:{rule}")
