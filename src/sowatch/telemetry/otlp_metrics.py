"""The metrics for an OpenTelemetry collector, over HTTP or gRPC. Needs the extra ``sowatch[otlp]``.

The SDK's instruments would count a second time what is counted already, so its data model is filled from the registry
and given to its exporters, which know the protocols, the environment variables (``OTEL_EXPORTER_OTLP_*``) and TLS.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from sowatch.model.errors import SowatchError
from sowatch.telemetry.metrics import Counter, Gauge, Histogram, Metric, MetricRegistry
from sowatch.telemetry.names import CATALOGUE
from sowatch.telemetry.otlp import Otlp, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import export

__all__ = ["OtlpMetricsExporter"]

#: Attributes that the semantic conventions define as numbers.
_NUMBERS: Final = frozenset({"http.response.status_code", "server.port"})


class OtlpMetricsExporter:
    """Sends every metric, counters and histograms as totals since the start. Used by one thread (`Pusher`).

    Args:
        registry: whose metrics.
        endpoint: of the collector, ``http://HOST:4318`` or ``https://...`` (gRPC: usually port 4317);
            None: what OTEL_EXPORTER_OTLP_ENDPOINT says, else this host.
        protocol: ``http`` or ``grpc``.
        headers: sent with each request, for an authorization.
        timeout_s: for one delivery, with the tries that the SDK makes.
        resource: facts about this agent; ``service.name`` is ``sowatch`` unless it says otherwise.

    Raises:
        UsageError: the OpenTelemetry SDK is not installed.
        ConfigError: an unknown protocol, or an endpoint that is no URL.
    """

    name = "otlp"

    def __init__(
        self,
        registry: MetricRegistry,
        endpoint: str | None = None,
        *,
        protocol: Protocol = "http",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        resource: Mapping[str, str] | None = None,
    ) -> None:
        self._registry = registry
        self._otlp = Otlp(endpoint, protocol, headers, timeout_s, resource)
        self._exporter: Any = self._otlp.metric_exporter()
        self._timeout_ms = timeout_s * 1000
        self._start_ns = time.time_ns()

    def push(self) -> None:
        """Sends the metrics as they are now.

        Raises:
            SowatchError: the collector did not take them.
        """
        from opentelemetry.sdk.metrics.export import MetricExportResult

        refusal = SowatchError(
            f"the collector at {self._otlp.where} did not take the metrics. "
            "See whether it listens there; the log of opentelemetry has its answer."
        )
        try:
            result = self._exporter.export(self._data(), timeout_millis=self._timeout_ms)
        except Exception as error:
            # Version 1.39 let through what its HTTP client raised.
            raise refusal from error
        if result is not MetricExportResult.SUCCESS:
            raise refusal

    def close(self) -> None:
        """Closes the connection. Safe to call again."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.shutdown()

    def _data(self) -> export.MetricsData:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics

        wanted = [metric for metric in self._registry.collect() if metric.goes_to("otlp")]
        now_ns = time.time_ns()
        families = [self._family(list(series), now_ns) for _, series in groupby(wanted, key=lambda one: one.name)]
        scope = ScopeMetrics(self._otlp.scope, families, "")
        return MetricsData([ResourceMetrics(self._otlp.resource, [scope], "")])

    def _family(self, series: list[Metric], now_ns: int) -> export.Metric:
        from opentelemetry.sdk.metrics import export

        total = export.AggregationTemporality.CUMULATIVE
        numbers = [
            export.NumberDataPoint(_attributes(metric), self._start_ns, now_ns, metric.get())
            for metric in series
            if isinstance(metric, Counter | Gauge)
        ]
        data: export.Sum | export.Gauge | export.Histogram
        if isinstance(series[0], Counter):
            data = export.Sum(numbers, total, is_monotonic=True)
        elif isinstance(series[0], Gauge):
            data = export.Gauge(numbers)
        else:
            data = export.Histogram([self._buckets(one, now_ns) for one in series if isinstance(one, Histogram)], total)
        name = series[0].name
        known = CATALOGUE.get(name)
        shown = known.convention if known and known.convention else f"sowatch.{name}"
        return export.Metric(shown, known.help if known else "", "s" if "seconds" in name else "1", data)

    def _buckets(self, metric: Histogram, now_ns: int) -> export.HistogramDataPoint:
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        found = metric.get()
        # The smallest and the largest value are optional in the protocol, though not in the SDK's type.
        return HistogramDataPoint(
            attributes=_attributes(metric),
            start_time_unix_nano=self._start_ns,
            time_unix_nano=now_ns,
            count=found.count,
            sum=found.total,
            bucket_counts=found.counts,
            explicit_bounds=found.bounds,
            min=None,  # type: ignore[arg-type]
            max=None,  # type: ignore[arg-type]
        )


def _attributes(metric: Metric) -> dict[str, str | int]:
    return {
        key: int(value) if key in _NUMBERS and value.isascii() and value.isdigit() else value
        for key, value in metric.labels.items()
    }
