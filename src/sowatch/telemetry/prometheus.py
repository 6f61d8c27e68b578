"""The metrics as Prometheus text and OpenMetrics. Needs the extra ``sowatch[agent]`` (prometheus_client)."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from sowatch.model.errors import UsageError
from sowatch.model.histogram import Distribution
from sowatch.telemetry.metrics import Counter, Gauge, Histogram, Metric, MetricRegistry
from sowatch.telemetry.names import CATALOGUE, prometheus_name

if TYPE_CHECKING:
    import prometheus_client

__all__ = ["PrometheusExporter"]


class PrometheusExporter:
    """What ``/metrics`` answers with.

    Args:
        registry: whose metrics.
        max_age_s: an answer may be this old. A page that everybody scrapes at once is then made once;
            with 0 every answer is made anew.

    Raises:
        UsageError: prometheus_client is not installed.
    """

    def __init__(self, registry: MetricRegistry, *, max_age_s: float = 0.0) -> None:
        try:
            from prometheus_client.exposition import choose_encoder
        except ImportError as error:
            raise UsageError(
                "prometheus_client is not installed, and /metrics needs it. Install it: pip install 'sowatch[agent]'."
            ) from error
        self._choose_encoder = choose_encoder
        self._registry = registry
        self._max_age_s = max_age_s
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, bytes]] = {}

    def render(self, accept_header: str | None = None) -> tuple[str, bytes]:
        """The content type and the body for an ``Accept`` header: OpenMetrics if asked for, else text.

        May be called from any thread. Takes about a millisecond for a hundred series.
        """
        encode, content_type = self._choose_encoder(accept_header or "")
        with self._lock:
            now_s = self._registry.clock()
            made_s, body = self._kept.get(content_type, (float("-inf"), b""))
            if now_s - made_s >= self._max_age_s:
                body = encode(self)
                self._kept = {kind: one for kind, one in self._kept.items() if now_s - one[0] < self._max_age_s}
                self._kept[content_type] = (now_s, body)
        return content_type, body

    def collect(self) -> Iterable[prometheus_client.Metric]:
        """The families, as prometheus_client's registries ask for them."""
        wanted = [metric for metric in self._registry.collect() if metric.goes_to("prometheus")]
        for _, series in groupby(wanted, key=lambda metric: metric.name):
            yield _family(list(series))


def _family(series: list[Metric]) -> prometheus_client.Metric:
    from prometheus_client import Metric as Family

    first = series[0]
    known = CATALOGUE.get(first.name)
    # OpenMetrics names a family of counters without the ending of its samples.
    name = prometheus_name(first.name, first.kind).removesuffix("_total" if first.kind == "counter" else "")
    family = Family(name, known.help if known else f"{first.name}, made by its user.", first.kind)
    seen = set()
    for metric in series:
        labels = {re.sub(r"[^a-zA-Z0-9_]", "_", key): value for key, value in metric.labels.items()}
        # Tags that differ only in what a label may not hold; twice the same would break the whole scrape.
        key = tuple(sorted(labels.items()))
        if key not in seen:
            seen.add(key)
            _add_samples(family, metric, name, labels)
    return family


def _add_samples(family: Any, metric: Metric, name: str, labels: dict[str, str]) -> None:
    if isinstance(metric, Counter):
        family.add_sample(f"{name}_total", labels, metric.get())
    elif isinstance(metric, Gauge):
        family.add_sample(name, labels, metric.get())
    elif isinstance(metric, Histogram):
        found: Distribution = metric.get()
        bounds = [*map(repr, found.bounds), "+Inf"]
        for bound, count in zip(bounds, accumulate(found.counts), strict=True):
            family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
        family.add_sample(f"{name}_count", labels, found.count)
        family.add_sample(f"{name}_sum", labels, found.total)
