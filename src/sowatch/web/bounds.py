"""What no client may exceed: time to say what it wants, time to read, size of a body, names of the host.

uvicorn bounds the size of heads and the number of connections, but waits for ever for a client that sends its head
byte by byte, or reads nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["Body", "BodyTooLarge", "BodyTooSlow", "BoundedProtocol", "FramingCheck", "HostCheck", "read_body"]

#: A connection without a request under way is closed after this.
IDLE_S: Final = 10.0
#: A client that takes nothing for so long is cut off.
STUCK_S: Final = 30.0
#: Connections that one client may have, where clients are distinguished.
MAX_CONNECTIONS_OF_ONE: Final = 256
#: How long a body may take, and how large it may be: a pid and a name.
BODY_S: Final = 5.0
BODY_BYTES: Final = 16 << 10

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class BodyTooLarge(Exception):
    """The client sent more than it may."""


class BodyTooSlow(Exception):
    """The body did not arrive in time, or the client went away."""


def _nobody(_: asyncio.Transport) -> str | None:
    return None


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with the bounds that it lacks: two times, and connections of one client.

    ``who`` gives the client at the other end, None where clients are not distinguished; set in a subclass.
    """

    who: Callable[[asyncio.Transport], str | None] = staticmethod(_nobody)
    client_name: str | None = None

    _idle: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; its first head is waited for."""
        super().connection_made(transport)
        self.client_name = self.who(transport)
        if self.client_name is not None:
            self.app_state = {**self.app_state, "client": self.client_name}
            same = sum(getattr(one, "client_name", None) == self.client_name for one in self.connections)
            if same > MAX_CONNECTIONS_OF_ONE:
                transport.abort()
                return
        self._expect_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        for timer in (self._idle, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """One request is answered; the next head is waited for."""
        super().on_response_complete()
        self._expect_a_request()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None
        super().resume_writing()

    def _expect_a_request(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self.loop.call_later(IDLE_S, self._end_if_idle)

    def _end_if_idle(self) -> None:
        # uvicorn's annotation leaves out that there is none before the first request.
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.abort()


def _uncounted(_: int) -> None:
    pass


async def read_body(
    receive: Receive,
    max_bytes: int = BODY_BYTES,
    timeout_s: float = BODY_S,
    count: Callable[[int], None] = _uncounted,
) -> bytes:
    """The whole body of a request.

    Args:
        receive: gives the next part.
        max_bytes: that it may have.
        timeout_s: that it may take.
        count: takes the bytes of each part before the part is kept, and may raise.

    Raises:
        BodyTooLarge: it is larger than ``max_bytes``.
        BodyTooSlow: it did not come in time.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BodyTooSlow
                part = message.get("body", b"")
                count(len(part))
                body += part
                if len(body) > max_bytes:
                    raise BodyTooLarge
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise BodyTooSlow from error


class Body:
    """The body of a request, which may be refused before it was received."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_over = False

    async def receive(self) -> MutableMapping[str, Any]:
        """The next part, as of ASGI."""
        message = await self._receive()
        self._is_over = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self, max_bytes: int, timeout_s: float) -> None:
        """Reads what is left, up to a bound.

        A client that still sends when the connection ends sees that it broke, and not the answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while max_bytes > 0 and not self._is_over:
                    max_bytes -= len((await self.receive()).get("body", b""))


class FramingCheck:
    """Answers 400 to a request whose length is given in two ways, and ends the connection.

    A proxy before the agent might take the other one, and what is the end of a body here for the next request.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or refuses it."""
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] != "1.1"):
                body = b"the length of the body is given in two ways. Send Content-Length or Transfer-Encoding.\n"
                headers = [
                    (b"content-type", b"text/plain; charset=utf-8"),
                    (b"content-length", b"%d" % len(body)),
                    (b"connection", b"close"),
                ]
                await send({"type": "http.response.start", "status": 400, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self._app(scope, receive, send)


class HostCheck:
    """Answers only requests that name this host as one of ``hosts``, without their ports.

    They are in lower case, and looked up at each request: their owner may change them.

    A web page of somebody else may let its own name point to 127.0.0.1; the browser then sends that name. An address
    points to nothing else, so ``takes_addresses`` is for those who come by one that is not known here. ``advice`` is
    what to do else.
    """

    def __init__(
        self,
        app: App,
        hosts: Collection[str],
        *,
        takes_addresses: bool = False,
        advice: str = "add the name to allowed_hosts",
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._takes_addresses = takes_addresses
        self._advice = advice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 421."""
        if scope["type"] == "http" and not self._is_ours(scope):
            body = f"this name is not served here. Use localhost, or {self._advice}.\n".encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 421, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)

    def _is_ours(self, scope: Scope) -> bool:
        named = [value for name, value in scope["headers"] if name == b"host"]
        host = _host_of(named[0].decode("latin-1")) if len(named) == 1 else ""
        return bool(host) and (host in self._hosts or (self._takes_addresses and _is_address(host)))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(header: str) -> str:
    """The name in a Host header, without the port; of IPv6 without the brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
