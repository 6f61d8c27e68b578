"""Metrics and sinks: what sowatch reports of itself, and where its events go besides its subscribers.

The core counts what it does in plain fields; a `Sampler` reads those when somebody asks, so that nothing here costs
the draining thread anything.

* ``metrics.py``: Counter, Gauge, Histogram, MetricRegistry.
* ``names.py``: every metric of sowatch, from which docs/metrics.md is made.
* ``sampling.py``: from the figures of watcher, registry, monitor and sinks to metrics.
* ``prometheus.py``, ``statsd.py``, ``otlp_metrics.py``: exporters; ``pusher.py`` drives the last two.
* ``sinks.py``: the `Sink` protocol, and the thread that feeds one; ``stdout_sink.py``,
  ``file_sink.py``, ``otlp_logs.py``: the sinks.

Exporters import their libraries when they are made, so the rest works without the extras.
"""

from sowatch.telemetry.file_sink import FileSink
from sowatch.telemetry.metrics import Counter, Gauge, Histogram, MetricRegistry
from sowatch.telemetry.otlp_logs import OtlpLogSink
from sowatch.telemetry.otlp_metrics import OtlpMetricsExporter
from sowatch.telemetry.prometheus import PrometheusExporter
from sowatch.telemetry.pusher import Pusher
from sowatch.telemetry.sampling import Sampler
from sowatch.telemetry.sinks import Sink, SinkRunner, SinkStats
from sowatch.telemetry.statsd import StatsdExporter
from sowatch.telemetry.stdout_sink import StdoutSink

__all__ = [
    "Counter",
    "FileSink",
    "Gauge",
    "Histogram",
    "MetricRegistry",
    "OtlpLogSink",
    "OtlpMetricsExporter",
    "PrometheusExporter",
    "Pusher",
    "Sampler",
    "Sink",
    "SinkRunner",
    "SinkStats",
    "StatsdExporter",
    "StdoutSink",
]
