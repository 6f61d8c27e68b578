"""HTTP flows on this very kernel: one request over TLS, seen on both sides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support.tls import Tap, Tls

CLIENT = """
import ssl, sys, urllib.request
urllib.request.urlopen(sys.argv[1], context=ssl.create_default_context(cafile=sys.argv[2])).read()
"""


def test_a_request_over_tls_is_seen_on_both_sides(tmp_path: Path, spawn: Any, wait_until: Any) -> None:
    tls = Tls(tmp_path, spawn, wait_until)
    tls.hold()
    with Tap(tls) as tap:
        server = tls.python()
        tap.wait_attached()
        url = f"https://127.0.0.1:{server.port}/seen?size=100000"
        tls.run(sys.executable, "-c", CLIENT, url, str(tls.certificate))
        for side in ("client", "server"):
            (found,) = tap.wait_for(side, 1)
            flow = found.flow
            assert (flow.method, flow.path, flow.status) == ("GET", "/seen?size=100000", 200)
            assert (flow.response_bytes, flow.is_complete) == (100_000, True)
            port = flow.local_port if side == "server" else flow.peer and flow.peer.port
            assert port == server.port
        assert tap.tap.stats()["lost"] == 0
