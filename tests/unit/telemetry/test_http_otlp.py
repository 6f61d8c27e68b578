"""HTTP flows as a real collector gets them: names and attributes of OpenTelemetry's semantic conventions."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from sowatch.agent.http_meter import HttpMeter
from sowatch.http.capture import HttpFlow
from sowatch.http.flows import ConnectionKey, Flow
from sowatch.model.events import Pod
from sowatch.model.identity import ProcessId
from sowatch.telemetry import MetricRegistry, OtlpLogSink, OtlpMetricsExporter
from support.receivers import http_collector
from support.scripted import HTTP, PROCESS


def values(attributes: Any) -> dict[str, str | int]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def logged(**more: Any) -> Any:
    with http_collector() as collector:
        sink = OtlpLogSink(collector.url)
        assert sink.write([replace(HTTP, **more)]) == 1
        sink.close()
    (record,) = collector.records()
    return record


FULL = {
    "side": "server",
    "protocol": "HTTP/2",
    "method": "POST",
    "authority": "[::1]:8443",
    "path": "/a/b?x=1&y=?",
    "status": 201,
    "grpc_status": 5,
    "request_bytes": 3,
    "response_bytes": 4,
    "peer": ("192.0.2.1", 5),
}


def test_a_flow_is_a_log_record_with_the_attributes_of_the_conventions() -> None:
    record = logged(**FULL)
    assert (record.event_name, record.severity_text) == ("sowatch.http", "INFO")
    assert record.time_unix_nano == HTTP.time_ns
    found = values(record.attributes)
    assert {name: value for name, value in found.items() if not name.startswith(("process.", "container."))} == {
        "sowatch.http.side": "server",
        "http.request.method": "POST",
        "http.response.status_code": 201,
        "url.scheme": "https",
        "url.path": "/a/b",
        "url.query": "x=1&y=?",
        "server.address": "::1",
        "server.port": 8443,
        "sowatch.http.authority": "[::1]:8443",
        "network.protocol.version": "2",
        "network.peer.address": "192.0.2.1",
        "network.peer.port": 5,
        "http.request.body.size": 3,
        "http.response.body.size": 4,
        "rpc.grpc.status_code": 5,
    }
    assert found["process.pid"] == HTTP.process.pid


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"method": "BREW"}, {"http.request.method": "_OTHER", "http.request.method_original": "BREW"}),
        ({"method": "get"}, {"http.request.method": "_OTHER", "http.request.method_original": "get"}),
        ({"method": "GET"}, {"http.request.method": "GET", "http.request.method_original": None}),
        ({"method": "<unknown>"}, {"http.request.method": None, "http.request.method_original": None}),
        ({"authority": "<unknown>"}, {"server.address": None, "sowatch.http.authority": None}),
        ({"path": "<unknown>"}, {"url.path": None, "url.query": None}),
        ({"path": "/a?"}, {"url.path": "/a", "url.query": ""}),
        ({"path": None, "peer": None}, {"url.path": None, "network.peer.address": None, "network.peer.port": None}),
        ({"path": "/\x1b\udcff"}, {"url.path": "/\\x1b\\xff"}),
        ({"status": None, "grpc_status": None}, {"http.response.status_code": None, "rpc.grpc.status_code": None}),
    ],
)
def test_what_is_unknown_or_made_up_is_no_attribute_of_a_log(
    more: dict[str, Any], expected: dict[str, str | None]
) -> None:
    found = values(logged(**FULL | more).attributes)
    assert {name: found.get(name) for name in expected} == expected


def test_the_durations_of_flows_are_metrics_by_their_names_in_the_conventions() -> None:
    registry = MetricRegistry()
    meter = HttpMeter(registry, 10)
    for side, status in (("server", 200), ("client", 503)):
        flow = Flow(
            ConnectionKey(ProcessId(7, 1), 1),
            side,  # type: ignore[arg-type]
            "HTTP/1.1",
            "GET",
            "shop.example:8443",
            "/users/7",
            status,
            begin_ns=10**9,
            end_ns=10**9 + 20_000_000,
        )
        found = HttpFlow(flow, PROCESS, None)
        meter.add(found, found.event(0))
    with http_collector() as collector:
        exporter = OtlpMetricsExporter(registry, collector.url)
        exporter.push()
        exporter.close()
    for side, status in (("server", 200), ("client", 503)):
        (point,) = collector.points(f"http.{side}.request.duration")
        attributes = values(point.attributes)
        attributes.pop("container.id", None)
        assert attributes == {
            "http.request.method": "GET",
            "http.response.status_code": status,
            "http.route": "/users/*",
            "server.address": "shop.example",
            "server.port": 8443,
            "url.scheme": "https",
            "network.protocol.version": "1.1",
            **({"error.type": "503"} if status == 503 else {}),
        }
        assert list(point.explicit_bounds) == [
            0.005,
            0.01,
            0.025,
            0.05,
            0.075,
            0.1,
            0.25,
            0.5,
            0.75,
            1,
            2.5,
            5,
            7.5,
            10,
        ]
        assert (point.count, round(point.sum, 6), point.bucket_counts[2]) == (1, 0.02, 1)
        (unit,) = {
            metric.unit
            for request in collector.metrics
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == f"http.{side}.request.duration"
        }
        assert unit == "s"


def test_headers_that_were_named_are_attributes_of_a_log() -> None:
    record = logged(
        request_headers={"x-request-id": "r-1", "accept": "<unknown>"}, response_headers={"server": "a\x1b"}
    )
    found = {one.key: one.value.array_value for one in record.attributes if ".header." in one.key}
    assert {key: [one.string_value for one in value.values] for key, value in found.items()} == {
        "http.request.header.x-request-id": ["r-1"],
        "http.response.header.server": ["a\\x1b"],
    }


def test_a_process_in_a_pod_has_the_attributes_of_kubernetes_that_are_known() -> None:
    def of(pod: Pod | None) -> dict[str, Any]:
        found = values(logged(process=replace(HTTP.process, pod=pod)).attributes)
        return {name: value for name, value in found.items() if name.startswith("k8s.")}

    assert of(Pod("0f0e", "web-0", "shop", "nginx")) == {
        "k8s.pod.uid": "0f0e",
        "k8s.pod.name": "web-0",
        "k8s.namespace.name": "shop",
        "k8s.container.name": "nginx",
    }
    assert of(Pod("0f0e")) == {"k8s.pod.uid": "0f0e"}
    assert of(None) == {}
