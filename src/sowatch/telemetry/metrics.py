"""Counter, Gauge, Histogram and the registry that finds or makes them.

Knows no exporter.

A metric is its name and its sorted tags (``rule:tls``). Words that begin with ``_`` are options, not
tags: ``_prometheus``, ``_statsd`` and ``_otlp`` name the exporters that get it (none: all of them).
They are no part of its identity.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, TypeVar

from sowatch.model.errors import UsageError
from sowatch.model.histogram import BOUNDS_S, Distribution, Latency
from sowatch.telemetry import names

__all__ = [
    "OVERFLOW_TAG",
    "Counter",
    "Gauge",
    "Histogram",
    "Metric",
    "MetricRegistry",
    "split_tags",
]

#: The tag of the one series that takes what does not fit into a full metric.
OVERFLOW_TAG: Final = "overflow:true"

#: Longer tags are cut: rules may be named by long patterns.
_TAG_CHARS: Final = 200

M = TypeVar("M", bound="Metric")
_Tags = tuple[str, ...]


def split_tags(words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tags and options, each sorted and without repetitions."""
    tags = {_clean(word) for word in words if not word.startswith("_")}
    return tuple(sorted(tags)), tuple(sorted({word for word in words if word.startswith("_")}))


def _clean(tag: str) -> str:
    # Names of rules may hold surrogates; no exporter can send those.
    return tag.encode("utf-8", "backslashreplace").decode("utf-8")[:_TAG_CHARS]


class Metric:
    """A name with tags. Made by a `MetricRegistry` only. All methods may be called from any thread."""

    kind: ClassVar[str]
    __slots__ = ("_lock", "name", "options", "tags")

    def __init__(self, name: str, tags: tuple[str, ...], options: tuple[str, ...]) -> None:
        self.name = name
        self.tags = tags
        self.options = options
        self._lock = threading.Lock()

    @property
    def labels(self) -> dict[str, str]:
        """The tags as keys and values; a tag without a colon is a key that is ``true``."""
        return {key: value if colon else "true" for key, colon, value in (tag.partition(":") for tag in self.tags)}

    def goes_to(self, exporter: str) -> bool:
        """Whether an exporter (``prometheus``, ``statsd``, ``otlp``) gets it."""
        return not self.options or f"_{exporter}" in self.options


class Counter(Metric):
    """A number that only rises."""

    kind = "counter"
    __slots__ = ("_value",)

    def __init__(self, name: str, tags: tuple[str, ...], options: tuple[str, ...]) -> None:
        super().__init__(name, tags, options)
        self._value: int | float = 0

    def add(self, delta: float = 1) -> None:
        """Raises it; a negative ``delta`` is ignored."""
        if delta > 0:
            with self._lock:
                self._value += delta

    def get(self) -> int | float:
        """The number so far."""
        return self._value


class Gauge(Metric):
    """A number that rises and falls."""

    kind = "gauge"
    __slots__ = ("_value",)

    def __init__(self, name: str, tags: tuple[str, ...], options: tuple[str, ...]) -> None:
        super().__init__(name, tags, options)
        self._value: int | float = 0

    def set(self, value: float) -> None:
        """Replaces the number."""
        with self._lock:
            self._value = value

    def add(self, delta: float) -> None:
        """Changes the number; ``delta`` may be negative."""
        with self._lock:
            self._value += delta

    def get(self) -> int | float:
        """The number now."""
        return self._value


class Histogram(Metric):
    """Counts of values by bucket."""

    kind = "histogram"
    __slots__ = ("_recorder",)

    def __init__(
        self, name: str, tags: tuple[str, ...], options: tuple[str, ...], bounds: Sequence[float] = BOUNDS_S
    ) -> None:
        super().__init__(name, tags, options)
        self._recorder = Latency(bounds)

    def observe(self, value: float) -> None:
        """Takes one value, in the unit that the metric's name ends with."""
        self._recorder.observe(value)

    def add(self, more: Distribution) -> None:
        """Takes values that were recorded elsewhere with the same bounds."""
        self._recorder.add(more)

    def get(self) -> Distribution:
        """What was taken so far."""
        return self._recorder.read()


class MetricRegistry:
    """Finds metrics by name and tags, or makes them.

    Args:
        max_series: how many sets of tags one name may have. What comes after them counts into one
            series tagged ``overflow:true``, and ``telemetry.overflow`` counts how often that was so:
            a label that takes any value cannot fill the memory of what stores the metrics.
        sample_interval_s: `collect` asks its sources at most this often, however many scrape.
        clock: seconds, monotonic.

    All methods may be called from any thread.

    >>> registry = MetricRegistry()
    >>> registry.counter("hits", "rule:tls").add(2)
    >>> registry.counter("hits", "rule:tls").get()
    2
    """

    def __init__(
        self,
        *,
        max_series: int = 200,
        sample_interval_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._max_series = max_series
        self._sample_interval_s = sample_interval_s
        self._lock = threading.Lock()
        self._by_name: dict[str, dict[tuple[str, ...], Metric]] = {}
        self._sources: tuple[Callable[[], object], ...] = ()
        # Held while the sources are asked: a second scraper waits for the figures of the first.
        self._sampling = threading.Lock()
        self._sampled_s = float("-inf")

    def counter(self, name: str, *tags_and_options: str) -> Counter:
        """The counter of that name and those tags.

        Raises:
            UsageError: the name is that of a metric of another kind.
        """
        return self._find(Counter, name, tags_and_options)

    def gauge(self, name: str, *tags_and_options: str) -> Gauge:
        """The gauge of that name and those tags. Otherwise like `counter`."""
        return self._find(Gauge, name, tags_and_options)

    def histogram(self, name: str, *tags_and_options: str, bounds: Sequence[float] = BOUNDS_S) -> Histogram:
        """The histogram of that name and those tags; ``bounds`` are for one that is made now. Like `counter`."""

        def make(name: str, tags: _Tags, options: _Tags) -> Histogram:
            return Histogram(name, tags, options, bounds)

        return self._find(Histogram, name, tags_and_options, make)

    def metrics(self) -> list[Metric]:
        """Every metric, by name and tags. Asks no source."""
        with self._lock:
            return [series[tags] for _, series in sorted(self._by_name.items()) for tags in sorted(series)]

    def forget(self, metric: Metric) -> None:
        """Takes a series away, because what it is about is gone. Using it afterwards has no effect."""
        with self._lock:
            series = self._by_name.get(metric.name, {})
            if series.get(metric.tags) is metric:
                del series[metric.tags]
                if not series:
                    del self._by_name[metric.name]

    def add_source(self, source: Callable[[], object]) -> Callable[[], None]:
        """Has ``source`` called before metrics are read; it brings some of them up to date.

        A source that raises is counted (``telemetry.sample_errors``); the metrics keep what they had.

        Returns:
            A function that ends this. When it has returned, the source is not called any more.
        """
        with self._lock:
            self._sources = (*self._sources, source)

        def remove() -> None:
            with self._sampling, self._lock:
                self._sources = tuple(one for one in self._sources if one is not source)

        return remove

    def collect(self) -> list[Metric]:
        """Every metric, brought up to date. What exporters use."""
        with self._sampling:
            now_s = self.clock()
            if now_s - self._sampled_s >= self._sample_interval_s:
                for source in self._sources:
                    try:
                        source()
                    except Exception:  # noqa: BLE001 - one broken source must not hide the other metrics
                        self.counter(names.SAMPLE_ERRORS.name).add()
                self._sampled_s = self.clock()
        return self.metrics()

    def report(self) -> list[dict[str, Any]]:
        """Every metric as a plain object for ``/debug/telemetry``: Name, Type, Tags, Opts, Value.

        ``Tags`` is there if there are any. The value of a histogram is its count and its sum.
        """
        found = []
        for metric in self.collect():
            value = _value(metric)
            one: dict[str, Any] = {"Name": metric.name, "Type": metric.kind}
            if metric.tags:
                one["Tags"] = list(metric.tags)
            one["Opts"] = list(metric.options)
            one["Value"] = {"count": value.count, "sum": value.total} if isinstance(value, Distribution) else value
            found.append(one)
        return found

    def _find(
        self, kind: type[M], name: str, words: Sequence[str], make: Callable[[str, _Tags, _Tags], M] | None = None
    ) -> M:
        tags, options = split_tags(words)
        with self._lock:
            series = self._by_name.setdefault(name, {})
            other = next(iter(series.values()), None)
            if other is not None and not isinstance(other, kind):
                raise UsageError(
                    f"metric {name!r} is a {other.kind}, not a {kind.kind}. Use another name for one of them."
                )
            found = series.get(tags)
            if found is None and tags and len(series) >= self._max_series:
                tags = (OVERFLOW_TAG,)
                found = series.get(tags)
                self._count_overflow(name)
            if found is None:
                found = series[tags] = (make or kind)(name, tags, options)
            assert isinstance(found, kind)
            return found

    def _count_overflow(self, name: str) -> None:
        # Not by `_find`: the lock is held, and this one has as many series as there are names.
        tags = (f"metric:{name}",)
        series = self._by_name.setdefault(names.OVERFLOW.name, {})
        counter = series.setdefault(tags, Counter(names.OVERFLOW.name, tags, ()))
        assert isinstance(counter, Counter)
        counter.add()


def _value(metric: Metric) -> int | float | Distribution:
    assert isinstance(metric, Counter | Gauge | Histogram)
    return metric.get()
