"""``/healthz`` says whether the draining thread goes round, not only whether it is there."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sowatch.agent.webapp import WebApp
from sowatch.telemetry import MetricRegistry


@pytest.mark.parametrize(("is_running", "silent_s", "status"), [(True, 1.0, 200), (True, 12.0, 503), (False, 1.0, 503)])
def test_a_thread_that_does_not_go_round_is_not_healthy(is_running: bool, silent_s: float, status: int) -> None:
    watcher: Any = SimpleNamespace(is_running=is_running, silent_s=silent_s)
    nobody: Any = None
    app = WebApp(watcher, MetricRegistry(), nobody, nobody, nobody)
    answer = asyncio.run(app._healthz(nobody))
    app.close()
    assert answer.status_code == status
