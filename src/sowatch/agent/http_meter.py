"""What the agent counts of HTTP flows: metrics by endpoint, the endpoints, the last flows. Bounded, whatever passes.

The labels are attributes of OpenTelemetry's semantic conventions for HTTP (v1.23, stable), as are the bounds of the
histograms. ``http.route`` is the reduced path: the route itself is only known to the program.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sowatch.http.capture import HttpFlow
from sowatch.http.flows import Flow, Side
from sowatch.http.summary import OTHER, EndpointKey, Summary, is_error, reduced_path
from sowatch.model.events import Http
from sowatch.model.lines import to_dict
from sowatch.telemetry import MetricRegistry, names
from sowatch.telemetry.http_names import host_and_port, method_name
from sowatch.telemetry.metrics import Histogram

__all__ = ["BOUNDS_S", "HttpMeter"]

#: The boundaries that the conventions advise for http.server.request.duration, in seconds.
BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_Tags = tuple[str, ...]
#: Series that nothing counted into for so long go: containers and hosts come and go.
_IDLE_S: Final = 600.0
#: Flows that are kept to be shown.
_RECENT: Final = 100
#: Endpoints that are shown, those with most flows.
_SHOWN: Final = 200


@lru_cache(maxsize=4096)
def _tags(
    side: Side,
    method: str | None,
    authority: str | None,
    path: str | None,
    status: int | None,
    protocol: str,
    container: str | None,
) -> _Tags:
    """The attributes of a series, as tags; what is not known is left out."""
    host, port = host_and_port(authority)
    found: dict[str, str | None] = {
        "http.request.method": method_name(method),
        "http.response.status_code": None if status is None else str(status),
        "http.route": reduced_path(path),
        "server.address": host,
        "server.port": None if port is None else str(port),
        "url.scheme": "https",
        "network.protocol.version": protocol.removeprefix("HTTP/"),
        "error.type": str(status) if is_error(side, status) else None,
        "container.id": container,
    }
    return tuple(f"{name}:{value}" for name, value in found.items() if value is not None)


@dataclass(slots=True)
class _Series:
    seconds: Histogram
    used_s: float


class HttpMeter:
    """Takes flows; the metrics and `/http` read. All methods may be called from any thread.

    Args:
        metrics: gets the series.
        max_endpoints: sets of attributes of a side that have a series each; the rest is counted under ``other``.
    """

    def __init__(self, metrics: MetricRegistry, max_endpoints: int) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        #: Of each side, by tags.
        self._series: dict[Side, dict[_Tags, _Series]] = {"client": {}, "server": {}}
        self._summary = Summary(max_endpoints, by_status=False)
        self._recent: deque[tuple[int, Http, EndpointKey]] = deque(maxlen=_RECENT)
        self._flows = 0
        self.max_endpoints = max_endpoints

    def add(self, found: HttpFlow, event: Http) -> None:
        """Counts a flow; ``event`` is the same as events have it."""
        flow = found.flow
        with self._lock:
            self._flows += 1
            self._recent.append((self._flows, event, self._summary.add(flow)))
            if flow.duration_ns is not None:
                series = self._series_of(flow, found.process.container)
                series.used_s = time.monotonic()
                series.seconds.observe(flow.duration_ns / 1e9)

    def change_bound(self, max_endpoints: int) -> None:
        """From now on so many; what has a series keeps it."""
        with self._lock:
            self.max_endpoints = max_endpoints
            self._summary.max_endpoints = max_endpoints

    def forget_idle(self, now_s: float) -> None:
        """Takes series away that nothing was counted into for a while; ``now_s`` is CLOCK_MONOTONIC."""
        with self._lock:
            for side in self._series.values():
                for tags, series in list(side.items()):
                    if now_s - series.used_s >= _IDLE_S:
                        del side[tags]
                        self._metrics.forget(series.seconds)

    def close(self) -> None:
        """Takes all series away."""
        self.forget_idle(float("inf"))

    def endpoints(self, *, with_flows: bool) -> dict[str, Any]:
        """The endpoints with most flows, and the last flows if single ones may be shown (else None).

        Flows are as in their events, with the number of each as ``seq``, and the `endpoint` that it was counted under;
        percentiles are those of durations.
        """
        with self._lock:
            most = sorted(self._summary.endpoints.items(), key=lambda item: -item[1].flows)[:_SHOWN]
            return {
                "flows_seen": self._flows,
                "endpoints": [
                    {
                        "side": key.side,
                        "method": key.method,
                        "authority": key.authority,
                        "path": key.path,
                        "flows": one.flows,
                        "incomplete": one.incomplete,
                        "errors": one.errors,
                        **{f"p{round(100 * share)}_ms": _ms(one.percentile_s(share)) for share in (0.5, 0.95, 0.99)},
                    }
                    for key, one in most
                ],
                "flows": [_flow(*one) for one in self._recent] if with_flows else None,
            }

    def _series_of(self, flow: Flow, container: str | None) -> _Series:
        side = self._series[flow.side]
        tags = _tags(flow.side, flow.method, flow.authority, flow.path, flow.status, flow.protocol, container)
        found = side.get(tags)
        if found is None and len(side) >= self.max_endpoints:
            # At most ten classes come on top of the bound.
            status_class = () if flow.status is None else (f"http.response.status_class:{flow.status // 100}xx",)
            tags = (f"http.route:{OTHER}", "url.scheme:https", *status_class)
            found = side.get(tags)
        if found is None:
            definition = names.HTTP_SERVER_SECONDS if flow.side == "server" else names.HTTP_CLIENT_SECONDS
            histogram = self._metrics.histogram(definition.name, *tags, bounds=BOUNDS_S)
            found = side[tags] = _Series(histogram, time.monotonic())
        return found


def _flow(number: int, event: Http, key: EndpointKey) -> dict[str, Any]:
    endpoint = {"method": key.method, "authority": key.authority, "path": key.path}
    return to_dict(event, number) | {"endpoint": endpoint}


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s * 1e3, 3)
