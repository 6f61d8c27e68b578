"""Endpoints stay few, whatever paths are asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.http.flows import ConnectionKey, Flow
from sowatch.http.summary import OTHER, Summary, reduced_path
from sowatch.model.identity import ProcessId

KEY = ConnectionKey(ProcessId(1, 2), 3)


def flow(path: str, status: int | None = 200, duration_ns: int = 1_000_000) -> Flow:
    return Flow(
        KEY, "server", "HTTP/1.1", "GET", "host", path, status, begin_ns=0, end_ns=duration_ns, is_complete=True
    )


@pytest.mark.parametrize(
    ("path", "reduced"),
    [
        ("/users/123", "/users/*"),
        ("/users/alice", "/users/alice"),
        ("/img/d41d8cd98f00b204e9800998ecf8427e.png", "/img/d41d8cd98f00b204e9800998ecf8427e.png"),
        ("/img/d41d8cd98f00b204e9800998ecf8427e", "/img/*"),
        ("/deadbeef", "/deadbeef"),
        ("/log/2026-11-28T10:00", "/log/*"),
        ("/a/b?user=7#x", "/a/b"),
        ("/", "/"),
        ("//", "//"),
        ("/1/2/3/4/5/6/7/8/9/10", "/*/*/*/*/*/*/*/*/..."),
        ("", "?"),
        ("<unknown>", "<unknown>"),
    ],
)
def test_what_names_one_of_many_is_left_out(path: str, reduced: str) -> None:
    assert reduced_path(path) == reduced


@given(st.text(max_size=300))
def test_any_path_is_reduced_to_a_short_one(path: str) -> None:
    assert len(reduced_path(path)) <= 8 * 50


def test_endpoints_are_bounded_and_every_flow_counts() -> None:
    summary = Summary(max_endpoints=10)
    for number in range(500):
        summary.add(flow(f"/name{'x' * (number % 40)}", 200 + number % 3 * 100))
    assert len(summary.endpoints) <= 10 + 3
    assert sum(one.flows for one in summary.endpoints.values()) == 500
    assert sum(one.flows for key, one in summary.endpoints.items() if key.path == OTHER) > 0


def test_percentiles_are_within_one_percent() -> None:
    summary = Summary()
    for number in range(1, 1001):
        key = summary.add(flow("/x", duration_ns=number * 1_000_000))
    endpoint = summary.endpoints[key]
    for share in (0.5, 0.95, 0.99):
        assert endpoint.percentile_s(share) == pytest.approx(share, rel=0.011)


def test_a_flow_whose_beginning_is_not_known_has_no_duration() -> None:
    summary = Summary()
    key = summary.add(Flow(KEY, "server", "HTTP/1.1", status=200))
    assert summary.endpoints[key].percentile_s(0.5) is None
    assert (key.method, key.path) == (None, "?")
