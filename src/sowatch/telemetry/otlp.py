"""What metrics and logs for an OpenTelemetry collector have in common. Needs the extra ``sowatch[otlp]``.

The SDK's exporters bring the protocols, retries, TLS and the environment variables that operators know; they take
most of a second to import, so they are imported when used.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from sowatch.model.errors import ConfigError, UsageError

__all__ = ["Otlp", "Protocol", "check_collector"]

Protocol: TypeAlias = Literal["http", "grpc"]


class Otlp:
    """A collector, and what is known of ourselves.

    Args:
        endpoint: ``http://HOST:PORT`` or ``https://...``, with a path if the collector sits behind one;
            None: OTEL_EXPORTER_OTLP_ENDPOINT, else this host.
        protocol: ``http`` or ``grpc``.
        headers: sent with each request.
        timeout_s: for one delivery.
        resource: attributes of the resource.

    Raises:
        UsageError: the OpenTelemetry SDK is not installed.
        ConfigError: an unknown protocol, or an endpoint that is no URL.
    """

    def __init__(
        self,
        endpoint: str | None,
        protocol: Protocol,
        headers: Mapping[str, str] | None,
        timeout_s: float,
        resource: Mapping[str, str] | None,
    ) -> None:
        check_collector(endpoint, protocol)
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._endpoint = endpoint
        self._protocol = protocol
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s
        #: The collector, for messages.
        self.where = endpoint or "the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT"
        self.scope: Any = InstrumentationScope("sowatch")
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say counts more.
        found = Resource.create(dict(resource or {})).merge(OTELResourceDetector().detect())
        if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            found = found.merge(Resource({SERVICE_NAME: "sowatch"}))
        self.resource: Any = found

    def metric_exporter(self) -> Any:
        """The SDK's exporter of metrics; the caller shuts it down."""
        if self._protocol == "http":
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

            return HttpExporter(self._url("v1/metrics"), headers=self._headers, timeout=self._timeout_s)
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter(self._endpoint, headers=self._grpc_headers(), timeout=self._timeout_s)

    def log_exporter(self, *, gzip: bool = False, session: Any = None) -> Any:
        """The SDK's exporter of logs; the caller shuts it down.

        Args:
            gzip: compress what is sent, whatever the environment says.
            session: of requests, for ``http``.
        """
        if self._protocol == "http":
            from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpExporter

            return HttpExporter(
                self._url("v1/logs"),
                headers=self._headers,
                timeout=self._timeout_s,
                compression=HttpCompression.Gzip if gzip else None,
                session=session,
            )
        from grpc import Compression as GrpcCompression  # type: ignore[import-untyped,unused-ignore]
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcExporter

        return GrpcExporter(
            self._endpoint,
            headers=self._grpc_headers(),
            timeout=self._timeout_s,
            compression=GrpcCompression.Gzip if gzip else None,
        )

    def _url(self, path: str) -> str | None:
        return None if self._endpoint is None else f"{self._endpoint.rstrip('/')}/{path}"

    def _grpc_headers(self) -> tuple[tuple[str, str], ...] | None:
        # gRPC refuses names in capitals. None, not an empty tuple, leaves it to the environment.
        return tuple((name.lower(), value) for name, value in self._headers.items()) or None


def check_collector(endpoint: str | None, protocol: Protocol, signal: Literal["logs", "metrics"] | None = None) -> None:
    """Whether a collector can be written to as far as the settings and the environment say; asks nobody.

    Args:
        endpoint: as of `Otlp`.
        protocol: as of `Otlp`.
        signal: what is sent: it may have a variable of its own for the endpoint.

    Raises:
        UsageError: the OpenTelemetry SDK is not installed.
        ConfigError: an unknown protocol, or an endpoint that is no URL.
    """
    packages = ("opentelemetry.sdk", f"opentelemetry.exporter.otlp.proto.{'grpc' if protocol == 'grpc' else 'http'}")
    if not all(map(_is_installed, packages)):
        raise UsageError("the OpenTelemetry SDK is not installed. Install it: pip install 'sowatch[otlp]'.")
    if protocol not in ("http", "grpc"):
        raise ConfigError("otlp protocol", f"unknown protocol {protocol!r}. Use http or grpc.")
    if endpoint is not None:
        _check(endpoint)
        return
    own = "" if signal is None else f"_{signal.upper()}"
    for variable in dict.fromkeys((f"OTEL_EXPORTER_OTLP{own}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")):
        if text := os.environ.get(variable):
            # gRPC takes HOST:PORT, too.
            _check(text if protocol == "http" or "://" in text else f"http://{text}", variable)
            return


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _check(endpoint: str, source: str | None = None) -> None:
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError(
            "otlp endpoint", f"{endpoint!r} is no URL. Use http://HOST:4318 or https://HOST:4318.", source=source
        )
