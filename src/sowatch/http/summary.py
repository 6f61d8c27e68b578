"""Endpoints: flows by method, path and status class, with rates and latencies. Bounded, whatever paths come.

A path is reduced: parts that are numbers, UUIDs, hashes or dates become ``*``, and the query goes. The latencies of an
endpoint are kept in a DDSketch, whose percentiles are within 1 %.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

from ddsketch import DDSketch

from sowatch.http.flows import Flow, Side

__all__ = ["MAX_ENDPOINTS", "OTHER", "Endpoint", "EndpointKey", "Summary", "is_error", "reduced_path"]

#: Endpoints that are kept; the flows of further ones are counted under `OTHER`.
MAX_ENDPOINTS: Final = 1000
OTHER: Final = "other"
#: Parts of a path that name one of many things.
_VARIABLE: Final = re.compile(
    r"\d+"
    r"|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
    r"|(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{8,}"
    r"|\d{4}-\d\d-\d\d.*"
    r"|(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{20,}={0,2}"
)
_MAX_PARTS: Final = 8
_MAX_PART: Final = 48


@lru_cache(maxsize=4096)
def reduced_path(target: str | None) -> str:
    """The endpoint that a path belongs to.

    >>> reduced_path("/users/123/orders/7f3c9a2e-1111-4222-8333-944445555666?page=2")
    '/users/*/orders/*'
    >>> reduced_path("/v1/items"), reduced_path(None), reduced_path("*")
    ('/v1/items', '?', '*')
    """
    if target is None:
        return "?"
    path = target.partition("?")[0].partition("#")[0]
    if not path.startswith("/"):
        return path[:_MAX_PART] or "?"
    parts = path.split("/")[1:]
    shown = ["*" if _VARIABLE.fullmatch(part) or len(part) > _MAX_PART else part for part in parts[:_MAX_PARTS]]
    return "/" + "/".join(shown + (["..."] if len(parts) > _MAX_PARTS else []))


class EndpointKey(NamedTuple):
    """What flows are counted by. ``status_class`` is the first digit of the status, None if there was none."""

    side: Side
    authority: str | None
    method: str | None
    path: str
    status_class: int | None


@dataclass(slots=True)
class Endpoint:
    """The figures of one endpoint; durations in seconds. ``errors``: see `is_error`."""

    flows: int = 0
    incomplete: int = 0
    errors: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    durations: DDSketch = field(default_factory=DDSketch)

    def percentile_s(self, share: float) -> float | None:
        """The duration that the given share (0 to 1) of the flows do not exceed; None if none is known."""
        value: float | None = self.durations.get_quantile_value(share) if self.durations.count else None
        return value


def is_error(side: Side, status: int | None) -> bool:
    """Whether a status is an error: 5xx, and on the client's side 4xx; a server's 4xx is the fault of its client."""
    return status is not None and status >= (400 if side == "client" else 500)


class Summary:
    """Counts flows by endpoint. One thread at a time may use it.

    Args:
        max_endpoints: are kept, by order of appearance; the rest is counted under `OTHER`. May be changed.
        by_status: each status class is an endpoint of its own.
    """

    def __init__(self, max_endpoints: int = MAX_ENDPOINTS, *, by_status: bool = True) -> None:
        self.max_endpoints = max_endpoints
        self._by_status = by_status
        self.endpoints: dict[EndpointKey, Endpoint] = {}

    def add(self, flow: Flow) -> EndpointKey:
        """Counts one flow; gives the endpoint that it was counted under."""
        status_class = flow.status // 100 if self._by_status and flow.status is not None else None
        key = EndpointKey(flow.side, flow.authority, flow.method, reduced_path(flow.path), status_class)
        endpoint = self.endpoints.get(key)
        if endpoint is None:
            if len(self.endpoints) >= self.max_endpoints:
                key = EndpointKey(flow.side, None, None, OTHER, status_class)
                # At most two sides by ten classes come on top of the bound.
                endpoint = self.endpoints.setdefault(key, Endpoint())
            else:
                endpoint = self.endpoints[key] = Endpoint()
        endpoint.flows += 1
        endpoint.incomplete += not flow.is_complete
        endpoint.errors += is_error(flow.side, flow.status)
        endpoint.request_bytes += flow.request_bytes
        endpoint.response_bytes += flow.response_bytes
        if flow.duration_ns is not None:
            endpoint.durations.add(flow.duration_ns / 1e9)
        return key
