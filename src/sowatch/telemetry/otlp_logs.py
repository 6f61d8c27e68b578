"""Events as logs for an OpenTelemetry collector, over HTTP or gRPC. Needs the extra ``sowatch[otlp]``.

The SDK's batching is not used: it drops without reporting how much. A `SinkRunner` batches, waits and counts; the SDK's
exporter sends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sowatch.model.errors import SinkError
from sowatch.model.escape import visible
from sowatch.model.events import Event, Http, LibraryEvent, Pod, Process, Renewed, Stale
from sowatch.model.lines import to_json
from sowatch.model.plural import counted
from sowatch.telemetry.http_names import host_and_port, known, method_name
from sowatch.telemetry.otlp import Otlp, Protocol

__all__ = ["OtlpLogSink"]


class OtlpLogSink:
    """A `Sink`. One log record for each event: its line of schema 1 as the body, the main facts as attributes.

    The event's name is ``sowatch.load`` and so on; ``lost`` is a warning, all else information. Unlike
    metrics, logs do have the pid and the path.

    Args:
        endpoint, protocol, headers, timeout_s, resource: as of `OtlpMetricsExporter`.
        name: what metrics and messages call it.

    Raises:
        UsageError: the OpenTelemetry SDK is not installed.
        ConfigError: an unknown protocol, or an endpoint that is no URL.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        protocol: Protocol = "http",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        resource: Mapping[str, str] | None = None,
        name: str = "otlp",
    ) -> None:
        self.name = name
        self._otlp = Otlp(endpoint, protocol, headers, timeout_s, resource)
        self._exporter: Any = self._otlp.log_exporter()
        self._seq = 0

    def write(self, events: Sequence[Event]) -> int:
        """Sends all events as one request; waits ``timeout_s`` at most.

        Raises:
            SinkError: the collector did not take them; none counts as delivered.
        """
        from opentelemetry.sdk._logs.export import LogRecordExportResult

        records = [self._record(event, self._seq + place) for place, event in enumerate(events)]
        refusal = SinkError(
            f"the collector at {self._otlp.where} did not take {counted(len(events), 'event')}; "
            "see whether it listens there"
        )
        try:
            result = self._exporter.export(records)
        except Exception as error:
            # Version 1.39 let through what its HTTP client raised.
            raise refusal from error
        if result is not LogRecordExportResult.SUCCESS:
            raise refusal
        self._seq += len(events)
        return len(events)

    def reopen(self) -> None:
        """Does nothing: there is no file."""

    def interrupt(self) -> None:
        """Closes the connection and ends the waiting between tries; one request goes on until it times out."""
        self.close()

    def close(self) -> None:
        """Closes the connection. Safe to call again."""
        exporter, self._exporter = self._exporter, _Closed()
        exporter.shutdown()

    def _record(self, event: Event, seq: int) -> Any:
        from opentelemetry._logs import LogRecord, SeverityNumber
        from opentelemetry.sdk._logs import ReadableLogRecord

        is_loss = event.event == "lost"
        record = LogRecord(
            timestamp=event.time_ns,
            observed_timestamp=time.time_ns(),
            severity_number=SeverityNumber.WARN if is_loss else SeverityNumber.INFO,
            severity_text="WARN" if is_loss else "INFO",
            body=to_json(event, seq),
            attributes=_attributes(event),
            event_name=f"sowatch.{event.event}",
        )
        return ReadableLogRecord(record, self._otlp.resource, self._otlp.scope)


class _Closed:
    """In the place of an exporter that was shut down."""

    def export(self, _records: Sequence[Any]) -> None:
        return None

    def shutdown(self) -> None:
        return None


def _attributes(event: Event) -> Mapping[str, str | int | list[str]]:
    """The facts one would search for; what is not known is left out. OpenTelemetry's names where it has some."""
    if isinstance(event, Http):
        return {**_known(_http_facts(event) | _process_facts(event.process)), **_header_facts(event)}
    if not isinstance(event, LibraryEvent | Stale | Renewed):
        return {}
    library, process = event.library, event.process
    facts: dict[str, str | int | None] = {
        "sowatch.rule": event.rule,
        "sowatch.cause": None if isinstance(event, Stale) else event.cause,
        "sowatch.staleness": event.staleness if isinstance(event, Stale) else None,
        "file.path": library.path,
        "sowatch.library.kind": library.kind,
        "sowatch.library.build_id": library.build_id,
        "sowatch.library.soname": library.soname,
    }
    if process is not None:
        facts |= _process_facts(process)
    return _known(facts)


def _process_facts(process: Process) -> dict[str, str | int | None]:
    pod = process.pod or Pod("")
    return {
        "process.pid": process.pid,
        "process.command": process.comm,
        "process.executable.path": process.exe,
        "container.id": process.container,
        "k8s.pod.uid": pod.uid or None,
        "k8s.pod.name": pod.name,
        "k8s.namespace.name": pod.namespace,
        "k8s.container.name": pod.container,
    }


def _http_facts(event: Http) -> dict[str, str | int | None]:
    """By the semantic conventions for HTTP spans, where they have a name."""
    host, port = host_and_port(event.authority)
    path, mark, query = (known(event.path) or "").partition("?")
    method = method_name(event.method)
    return {
        "sowatch.http.side": event.side,
        "http.request.method": method,
        "http.request.method_original": event.method if method == "_OTHER" else None,
        "http.response.status_code": event.status,
        "url.scheme": "https",
        "url.path": path or None,
        "url.query": query if mark else None,
        "server.address": host,
        "server.port": port,
        "sowatch.http.authority": known(event.authority),
        "network.protocol.version": event.protocol.removeprefix("HTTP/"),
        "network.peer.address": event.peer and event.peer[0],
        "network.peer.port": event.peer and event.peer[1],
        "http.request.body.size": event.request_bytes,
        "http.response.body.size": event.response_bytes,
        "rpc.grpc.status_code": event.grpc_status,
    }


def _header_facts(event: Http) -> dict[str, list[str]]:
    """Header fields that were named: lists by the conventions, of one string for all lines of a field."""
    sides = (("request", event.request_headers), ("response", event.response_headers))
    return {
        f"http.{side}.header.{name}": [visible(value)]
        for side, fields in sides
        for name, value in (fields or {}).items()
        if known(value) is not None
    }


def _known(facts: dict[str, str | int | None]) -> dict[str, str | int]:
    # Protocol buffers hold nothing that is not UTF-8, and logs are to have no control characters.
    return {
        key: visible(value) if isinstance(value, str) else value for key, value in facts.items() if value is not None
    }
