"""What no request may cost the receiver: time to unpack it, room before it sends anything, a body without a token."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest

from sowatch.fleet import receive
from sowatch.fleet.receive import MAX_BODIES_BYTES, MAX_BODY_BYTES, MAX_MEMBERS, Receiver

Part = dict[str, Any]
RECORDS = b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"eventName": "e"}]}]}]}'


class Rows:
    """What the rows go to."""

    def __init__(self) -> None:
        self.inserts = 0

    def insert(self, rows: Iterable[bytes]) -> None:
        self.inserts += len(list(rows)) > 0

    def end_questions(self, _wait_s: float) -> bool:
        return True


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(Rows())  # type: ignore[arg-type]
    yield made
    made.close()


async def never() -> Part:
    """A client that sends nothing more."""
    await asyncio.Event().wait()
    raise AssertionError


def sends(*parts: bytes, then: Callable[[], Awaitable[Part]] | None = None) -> Callable[[], Awaitable[Part]]:
    """A client that sends these; after them ``then``, else it is done."""
    left = list(parts)

    async def given() -> Part:
        if not left and then is not None:
            return await then()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or then is not None}

    return given


async def post(receiver: Receiver, client: Callable[[], Awaitable[Part]], **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers of the answer."""
    given = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/logs",
        "query_string": b"",
        "headers": [(name.encode(), text.encode()) for name, text in given.items()],
    }
    sent: list[Part] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await receiver.for_tcp()(scope, client, send)
    return sent[0]["status"], {name.decode(): text.decode() for name, text in sent[0]["headers"]}


@pytest.mark.parametrize(("members", "status"), [(MAX_MEMBERS, 200), (MAX_MEMBERS + 1, 400)])
def test_members_of_gzip_are_bounded(receiver: Receiver, members: int, status: int) -> None:
    body = gzip.compress(b"", mtime=0) * (members - 1) + gzip.compress(RECORDS, mtime=0)
    assert asyncio.run(post(receiver, sends(body), content_encoding="gzip"))[0] == status


@pytest.mark.parametrize("headers", [{"content_length": str(MAX_BODY_BYTES)}, {"transfer_encoding": "chunked"}])
def test_requests_that_send_nothing_leave_the_others_their_room(receiver: Receiver, headers: dict[str, str]) -> None:
    async def run() -> int:
        slow = [
            asyncio.create_task(post(receiver, sends(b" ", then=never), **headers))
            for _ in range(2 * MAX_BODIES_BYTES // MAX_BODY_BYTES)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        status, _ = await post(receiver, sends(RECORDS))
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return status

    assert asyncio.run(run()) == 200


def test_bytes_that_have_arrived_are_bounded_and_given_back(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "MAX_BODIES_BYTES", 1000)

    async def run() -> list[int]:
        slow = asyncio.create_task(post(receiver, sends(b" " * 950, then=never)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        found = [(await post(receiver, sends(RECORDS)))[0]]
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return [*found, (await post(receiver, sends(RECORDS)))[0], (await post(receiver, sends(b" " * 1001)))[0]]

    assert asyncio.run(run()) == [503, 200, 503]


def test_of_a_body_without_the_token_little_is_read_and_its_connection_ends() -> None:
    receiver = Receiver(Rows(), token="s3cret")  # type: ignore[arg-type]
    read = 0

    async def endless() -> Part:
        nonlocal read
        read += 1 << 14
        return {"type": "http.request", "body": b" " * (1 << 14), "more_body": True}

    async def run() -> list[tuple[int, str]]:
        clients = [endless, sends(b" ", then=never)]
        # Half a minute was the time of a body.
        answers = [await asyncio.wait_for(post(receiver, one, authorization="Bearer x"), 15) for one in clients]
        return [(status, headers["connection"]) for status, headers in answers]

    try:
        assert asyncio.run(run()) == [(401, "close")] * 2
        assert read <= 128 << 10
    finally:
        receiver.close()
