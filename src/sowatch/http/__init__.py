"""HTTP flows out of TLS libraries: each request that a process makes or serves, without touching the process.

* ``http1.py``, ``http2.py``: one direction of a connection, decoded. Pure.
* ``flows.py``: `FlowTable`, requests matched with their responses. Pure.
* ``capture.py``: `Capture`, probes on TLS libraries that feed a `FlowTable`.
* ``taps.py``: `HttpTap`, a capture with a watch of its own.
* ``summary.py``: endpoints, their rates and latencies.
"""

from __future__ import annotations

from sowatch.http.flows import Flow, FlowStats, FlowTable

__all__ = ["Flow", "FlowStats", "FlowTable"]
