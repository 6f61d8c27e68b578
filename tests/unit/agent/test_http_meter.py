"""What the agent counts of HTTP flows: series, their bound, their names."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import resources
from typing import Any

import pytest

from sowatch.agent.http_meter import BOUNDS_S, HttpMeter
from sowatch.http.capture import HttpFlow
from sowatch.http.flow import FlowStats
from sowatch.http.flows import ConnectionKey, Flow
from sowatch.http.records import COUNTERS
from sowatch.model.events import Process
from sowatch.model.identity import ProcessId
from sowatch.telemetry import MetricRegistry, names
from sowatch.telemetry.metrics import Histogram

SERVER, CLIENT = "http.server.request.duration_seconds", "http.client.request.duration_seconds"


def add(meter: HttpMeter, **more: Any) -> None:
    fields = {
        "side": "server",
        "protocol": "HTTP/1.1",
        "method": "GET",
        "authority": "shop.example",
        "path": "/users/7?q=1",
        "status": 200,
        "begin_ns": 10**9,
        "end_ns": 10**9 + 20_000_000,
        "is_complete": True,
    } | more
    container = fields.pop("container", None)
    flow = Flow(ConnectionKey(ProcessId(7, 1), 1), **fields)
    found = HttpFlow(flow, Process(pid=7, start_ns=1, container=container), None)
    meter.add(found, found.event(0))


def series(metrics: MetricRegistry, name: str = SERVER) -> list[Histogram]:
    return [one for one in metrics.metrics() if isinstance(one, Histogram) and one.name == name]


@pytest.fixture
def metrics() -> MetricRegistry:
    return MetricRegistry()


def test_a_series_has_the_names_and_bounds_of_the_conventions(metrics: MetricRegistry) -> None:
    meter = HttpMeter(metrics, 10)
    add(meter, container="c0ffee")
    add(meter, path="/users/8", container="c0ffee", end_ns=10**9 + 30 * 10**9)
    (one,) = series(metrics)
    assert one.labels == {
        "http.request.method": "GET",
        "http.response.status_code": "200",
        "http.route": "/users/*",
        "server.address": "shop.example",
        "server.port": "443",
        "url.scheme": "https",
        "network.protocol.version": "1.1",
        "container.id": "c0ffee",
    }
    found = one.get()
    advised = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    assert tuple(found.bounds) == tuple(BOUNDS_S) == advised
    assert list(found.counts) == [0, 0, 1, *[0] * 11, 1]  # 20 ms, and 30 s beyond the last bound
    assert (found.count, found.total) == (2, pytest.approx(30.02))


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"method": "BREW"}, {"http.request.method": "_OTHER"}),
        ({"method": "<unknown>"}, {"http.request.method": None}),
        ({"method": None, "path": None, "authority": None}, {"http.request.method": None, "http.route": "?"}),
        ({"authority": "<unknown>"}, {"server.address": None, "server.port": None}),
        ({"authority": "[::1]:8443"}, {"server.address": "::1", "server.port": "8443"}),
        ({"authority": "SHOP.example:"}, {"server.address": "shop.example", "server.port": "443"}),
        ({"protocol": "HTTP/2"}, {"network.protocol.version": "2"}),
        ({"status": None}, {"http.response.status_code": None, "error.type": None}),
        ({"status": 404}, {"http.response.status_code": "404", "error.type": None}),
        ({"status": 404, "side": "client"}, {"error.type": "404"}),
        ({"status": 503}, {"error.type": "503"}),
    ],
)
def test_what_is_unknown_or_made_up_is_no_label(
    more: dict[str, Any], labels: dict[str, str | None], metrics: MetricRegistry
) -> None:
    add(HttpMeter(metrics, 10), **more)
    (one,) = series(metrics, CLIENT if more.get("side") == "client" else SERVER)
    assert {name: one.labels.get(name) for name in labels} == labels


def test_series_are_bounded_and_the_rest_is_counted_under_other_by_class_of_status(metrics: MetricRegistry) -> None:
    meter = HttpMeter(metrics, 3)
    for number in range(500):
        for status in (200, 301, 404, 500, None):
            add(meter, path=f"/p{'abcdefghij'[number % 10]}/{chr(97 + number // 10 % 26)}", status=status)
    add(meter, side="client")
    assert len(series(metrics, CLIENT)) == 1
    found = series(metrics)
    others = {one.labels.get("http.response.status_class"): one for one in found if one.labels["http.route"] == "other"}
    assert set(others) == {"2xx", "3xx", "4xx", "5xx", None}
    assert len(found) == 3 + 5
    assert sum(one.get().count for one in found) == 2500
    assert {tuple(one.labels) for one in others.values()} == {
        ("http.response.status_class", "http.route", "url.scheme"),
        ("http.route", "url.scheme"),
    }


def test_a_flow_without_a_duration_is_shown_and_in_no_histogram(metrics: MetricRegistry) -> None:
    meter = HttpMeter(metrics, 3)
    add(meter, begin_ns=None)
    assert series(metrics) == []
    shown = meter.endpoints(with_flows=True)
    assert shown["flows_seen"] == 1
    assert [one["seq"] for one in shown["flows"]] == [1]
    assert [one["endpoint"] for one in shown["flows"]] == [
        {"method": "GET", "authority": "shop.example", "path": "/users/*"}
    ]
    assert [(one["path"], one["flows"], one["p50_ms"]) for one in shown["endpoints"]] == [("/users/*", 1, None)]
    assert meter.endpoints(with_flows=False)["flows"] is None


def test_series_that_are_idle_go_and_give_room_and_all_go_at_the_end(metrics: MetricRegistry) -> None:
    meter = HttpMeter(metrics, 1)
    add(meter)
    add(meter, path="/more")
    assert {one.labels["http.route"] for one in series(metrics)} == {"/users/*", "other"}
    meter.forget_idle(0.0)
    assert len(series(metrics)) == 2
    meter.forget_idle(float("inf"))
    assert series(metrics) == []
    add(meter, path="/more")
    assert [one.labels["http.route"] for one in series(metrics)] == ["/more"]
    meter.close()
    assert series(metrics) == []


def test_every_figure_of_what_is_not_known_is_a_metric_and_on_the_page() -> None:
    known = {"calls", "passed", "spared", "flows"}
    figures = ({one.name for one in fields(FlowStats)} | set(COUNTERS) | {"unpublished"}) - known
    renamed = {"gaps": "truncated"}  # as `Running.figures` does
    wanted = {renamed.get(one, one) for one in figures}
    script = resources.files("sowatch.agent.page").joinpath("assets", "http.js").read_text(encoding="utf-8")
    assert set(re.findall(r"stats\.(\w+)", script)) == wanted
    assert (set(names.HTTP) | set(names.HTTP_LOST_PLACES)) - {"flows"} == wanted
