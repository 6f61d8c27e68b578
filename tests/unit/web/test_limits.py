"""Who asks over TCP, how often they may, and what takes a while."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from sowatch.web.limits import Bucket, ClientLimits, OneAtATime, client_of


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_user_at_the_other_end_of_a_loopback_connection_is_known(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen()
        with socket.create_connection(listening.getsockname()[:2]) as client:
            accepted, _ = listening.accept()
            with accepted:
                assert client_of(accepted) == f"uid {os.geteuid()}"
                client.close()
                # Nobody owns it any more, least of all root.
                assert client_of(accepted) == f"address {host}"


def test_a_bucket_gives_its_burst_and_then_so_many_a_second() -> None:
    bucket = Bucket(2.0, 3.0)
    assert [bucket.take(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bucket.take(101.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def asked(limits: ClientLimits, client: str, path: str) -> int:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    asyncio.run(limits({"type": "http", "path": path, "state": {"client": client}}, receive, send))
    return int(sent[0]["status"])


async def ok(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_each_client_has_limits_of_its_own_and_costly_questions_narrower_ones() -> None:
    limits = ClientLimits(ok, costly=["/costly"], streams=[])
    first = [asked(limits, "uid 1", "/costly") for _ in range(40)]
    assert (first[:20], first[-1]) == ([200] * 20, 429)
    assert asked(limits, "uid 1", "/cheap") == 200
    assert asked(limits, "uid 2", "/costly") == 200


def test_slow_work_is_done_one_after_the_other_and_what_waits_can_be_dropped() -> None:
    slow, is_over = OneAtATime("test"), threading.Event()
    first = slow.submit(lambda: is_over.wait(10))
    second, third = slow.submit(lambda: 2), slow.submit(lambda: 3)
    assert second.cancel()
    is_over.set()
    assert (first.result(10), third.result(10)) == (True, 3)
    with pytest.raises(CancelledError):
        second.result()
    slow.close()
