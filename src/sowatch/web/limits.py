"""What one client may ask of the agent over TCP, where every local user may connect.

A client is a user: the kernel says whose socket is at the other end of a loopback connection. Each has so many
connections, streams and requests a second, and fewer of those questions that take a while. What takes a while is done
one at a time, and for a part of the time only. So one user's loop costs the host little and leaves the others theirs.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from cachetools import LRUCache

from sowatch.model.encoding import dumps
from sowatch.web.bounds import App, Receive, Scope, Send

__all__ = ["Bucket", "ClientLimits", "OneAtATime", "client_of"]

T = TypeVar("T")

#: Requests a second, and how many at once after a quiet time: opening the page takes a dozen.
REQUESTS_S: Final = 50.0
REQUESTS_BURST: Final = 200.0
#: The same for questions that take a while.
COSTLY_S: Final = 4.0
COSTLY_BURST: Final = 20.0
#: Of those, as many may wait for their answers.
COSTLY_AT_ONCE: Final = 4
#: Streams that one client may follow at once.
STREAMS: Final = 64
#: Clients that are remembered; the least recent one is forgotten, which fills its buckets.
_CLIENTS: Final = 1024
#: A refusal comes this late, so that who asks again at once is slowed down rather than refused a thousand times.
REFUSAL_S: Final = 0.05
#: Slow questions may take this part of one CPU.
SHARE: Final = 0.25
_LONGEST_PAUSE_S: Final = 2.0

# SOCK_DIAG_BY_FAMILY (linux/sock_diag.h), struct inet_diag_req_v2 and inet_diag_msg (linux/inet_diag.h).
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_HEAD: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBBBI2s2s16s16sI8s")
_UID_AT: Final = _HEAD.size + 64
_ESTABLISHED: Final = 1


def client_of(connection: socket.socket | None) -> str:
    """Who is at the other end of a TCP connection: ``uid N`` on this host, else its address.

    >>> client_of(None)
    'unknown'
    """
    try:
        if connection is None:
            return "unknown"
        here, there = connection.getsockname(), connection.getpeername()
        uid = _owner_of(connection.family, there, here)
    except (OSError, ValueError, struct.error):
        return "unknown"
    return f"address {there[0]}" if uid is None else f"uid {uid}"


def _owner_of(family: int, local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """The user who made the established TCP socket with these two ends; None if it is not in our network namespace."""
    source, target = (socket.inet_pton(family, end[0]).ljust(16, b"\0") for end in (local, remote))
    ports = (struct.pack("!H", end[1]) for end in (local, remote))
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF, *ports, source, target, 0, b"\xff" * 8)
    head = _HEAD.pack(_HEAD.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asked:
        asked.settimeout(0.1)
        asked.sendto(head + request, (0, 0))
        answer = asked.recv(4096)
    kind = _HEAD.unpack_from(answer)[1]
    # A socket that was closed has no owner any more, and says 0.
    if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _UID_AT + 4 or answer[_HEAD.size + 1] != _ESTABLISHED:
        return None
    return int(struct.unpack_from("=I", answer, _UID_AT)[0])


class Bucket:
    """So many a second, and so many at once after a quiet time."""

    __slots__ = ("_burst", "_filled_s", "_left", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left = burst
        self._filled_s = 0.0

    def take(self, now_s: float) -> bool:
        """Whether one more may be."""
        self._left = min(self._burst, self._left + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ClientLimits:
    """Passes on what a client may ask; answers the rest with 429. Used on one event loop.

    The client is ``scope["state"]["client"]``.

    Args:
        app: what is asked.
        costly: paths of questions that take a while.
        streams: paths of streams that end when the client goes.
    """

    def __init__(self, app: App, *, costly: Collection[str], streams: Collection[str]) -> None:
        self._app = app
        self._costly = frozenset(costly)
        self._streams = frozenset(streams)
        self._buckets: LRUCache[tuple[str, bool], Bucket] = LRUCache(2 * _CLIENTS)
        #: Streams, and questions that take a while, that are not answered yet.
        self._open: Counter[tuple[str, bool]] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 429."""
        client, path = scope.get("state", {}).get("client", "unknown"), scope.get("path", "")
        is_costly, is_stream = path in self._costly, path in self._streams
        if not self._may_ask(client, is_costly=is_costly):
            await _refuse(send, "you ask too often. Ask again in a second.")
        elif not (is_costly or is_stream):
            await self._app(scope, receive, send)
        elif self._open[client, is_stream] >= (STREAMS if is_stream else COSTLY_AT_ONCE):
            most = f"read {STREAMS} streams" if is_stream else f"wait for {COSTLY_AT_ONCE} answers"
            await _refuse(send, f"you {most} already. Ask again when one has ended.")
        else:
            self._open[client, is_stream] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._open[client, is_stream] -= 1
                if not self._open[client, is_stream]:
                    del self._open[client, is_stream]

    def _may_ask(self, client: str, *, is_costly: bool) -> bool:
        now_s = time.monotonic()
        return self._bucket(client, is_costly=False).take(now_s) and (
            not is_costly or self._bucket(client, is_costly=True).take(now_s)
        )

    def _bucket(self, client: str, *, is_costly: bool) -> Bucket:
        bucket = self._buckets.get((client, is_costly))
        if bucket is None:
            bucket = Bucket(COSTLY_S, COSTLY_BURST) if is_costly else Bucket(REQUESTS_S, REQUESTS_BURST)
            self._buckets[client, is_costly] = bucket
        return bucket


async def _refuse(send: Send, why: str) -> None:
    await asyncio.sleep(REFUSAL_S)
    body = dumps({"error": why}).encode("ascii") + b"\n"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"1"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class OneAtATime:
    """Does what takes a while, one after the other, on a thread that rests after each: `SHARE` of the time it works."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._is_over = threading.Event()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """The answer to be; the rest comes after it."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            begun_s = time.monotonic()
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it goes to the one that asked
                answer.set_exception(error)
            spent_s = time.monotonic() - begun_s
            self._is_over.wait(min(_LONGEST_PAUSE_S, spent_s * (1 / SHARE - 1)))

        self._thread.submit(run)
        return answer

    async def run(self, work: Callable[[], T]) -> T:
        """The same, awaited."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Drops what waits. Safe to call again."""
        self._is_over.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
