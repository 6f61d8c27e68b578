"""Servers that exporters send to: an OpenTelemetry collector over HTTP and gRPC, and a page for Prometheus.

Each answers on a port of its own of the loopback address.
"""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc

__all__ = ["Collector", "free_port", "grpc_collector", "http_collector", "serve"]


@dataclass
class Collector:
    """What came, decoded. While ``refuses`` is set, every request is turned down for good."""

    url: str = ""
    metrics: list[Any] = field(default_factory=list)
    logs: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    refuses: bool = False
    #: Of bodies, as they came.
    bytes: int = 0

    def points(self, name: str) -> list[Any]:
        """The data points of the metric in the last request that has it."""
        for request in reversed(self.metrics):
            for scope in (scope for resource in request.resource_metrics for scope in resource.scope_metrics):
                for metric in scope.metrics:
                    if metric.name == name:
                        return list(getattr(metric, metric.WhichOneof("data")).data_points)
        return []

    def records(self) -> list[Any]:
        """All log records, in the order they came."""
        return [
            record
            for request in self.logs
            for resource in request.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]


@contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler], tuple[int, str, bytes]]) -> Iterator[str]:
    """An HTTP server whose answers (status, content type, body) a function gives; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, content_type, body = answer(self)
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        do_POST = do_GET  # noqa: N815 - the name that the server calls

        def log_message(self, *words: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # joined by server_close, so that none is left
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def http_collector() -> Iterator[Collector]:
    """A collector that takes OTLP over HTTP, as protocol buffers."""
    found = Collector()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, str, bytes]:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        found.headers.append({name.lower(): value for name, value in request.headers.items()})
        found.bytes += len(body)
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if found.refuses:
            return 400, "text/plain", b"refused"
        if request.path == "/v1/metrics":
            found.metrics.append(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
        elif request.path == "/v1/logs":
            found.logs.append(logs_service_pb2.ExportLogsServiceRequest.FromString(body))
        else:
            return 404, "text/plain", b"no such signal"
        return 200, "application/x-protobuf", b""

    with serve(answer) as found.url:
        yield found


@contextmanager
def grpc_collector() -> Iterator[Collector]:
    """A collector that takes OTLP over gRPC."""
    found = Collector()

    def take(requests: list[Any], request: Any, context: grpc.ServicerContext) -> None:
        found.headers.append(dict(context.invocation_metadata()))
        if found.refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused")
        requests.append(request)

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
            take(found.metrics, request, context)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    class Logs(logs_service_pb2_grpc.LogsServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
            take(found.logs, request, context)
            return logs_service_pb2.ExportLogsServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    logs_service_pb2_grpc.add_LogsServiceServicer_to_server(Logs(), server)
    found.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        server.stop(grace=None).wait()


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
