"""The fleet page: one self-contained page on the receiver, and the answers behind it.

`FleetPage.routes` is all that the receiver needs: the page at ``/``, its files, and ``/api/...``, which gives what
``sowatch fleet ... --json`` prints, a page of rows at a time. Everything is read-only. Where a token is set, browsers
ask for it (HTTP Basic, any user name), programs send it as ``Authorization: Bearer``. The reasons:
docs/decisions/0080-fleet-page.md.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response

from sowatch.fleet.asks import Asks
from sowatch.fleet.page.answers import DAYS, TooBusy, Views
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError, UsageError
from sowatch.web.bounds import HostCheck
from sowatch.web.pages import HEADERS, SHARED, file_routes

__all__ = ["FleetPage"]

#: Rows of one answer, at most.
MAX_ROWS: Final = 500
_FILES: Final = {
    "/": "index.html",
    "/page/fleet.css": "fleet.css",
    **{f"/page/{name}.js": f"{name}.js" for name in ("answers", "chart", "fleet", "rows", "views")},
}
_Answer = Callable[[Request], Awaitable[Response]]


class FleetPage:
    """The page of a store. Used on one event loop.

    Args:
        asks: the store. It is asked on a thread of this page, one question at a time.
        token: what a reader has to give; None: everybody who reaches the port may read.
    """

    def __init__(self, asks: Asks, *, token: str | None = None) -> None:
        self._token = None if token is None else token.encode()
        self._views = Views(asks)

    def routes(self) -> list[Route]:
        """``/``, ``/page/FILE`` and ``/api/...``."""
        views = self._views
        questions: dict[str, Callable[[dict[str, str]], Awaitable[Any]]] = {
            "coverage": lambda query: views.coverage(
                _text(query, "state"), _text(query, "search"), _text(query, "host")
            ),
            "reasons": lambda _: views.reasons(),
            "libraries": lambda query: views.libraries(_text(query, "search")),
            "versions": lambda query: views.versions(_what(query)),
            "who": lambda query: views.who(_what(query)),
            "history": lambda query: views.history(_what(query)),
            "stale": lambda _: views.stale(),
        }
        made = [*file_routes("sowatch.web", SHARED), *file_routes("sowatch.fleet.page", _FILES)]
        made += [Route(f"/api/{name}", self._paged(ask), methods=["GET"]) for name, ask in questions.items()]
        made.append(Route("/api/time", self._answered(self._time), methods=["GET"]))
        return [Route(one.path, self._checked(one.endpoint), methods=["GET"]) for one in made]

    def _checked(self, answer: _Answer) -> Any:
        """For who has the token; without one, for who names this host: a page of others may let its name point here."""
        if self._token is not None:
            return self._with_token(answer)
        hosts = {"localhost", socket.gethostname().lower()}
        advice = "the address of this host, or set a token"
        return HostCheck(request_response(answer), hosts, takes_addresses=True, advice=advice)

    def close(self) -> None:
        """Ends its thread; questions that wait are dropped. Safe to call again."""
        self._views.close()

    def _with_token(self, answer: _Answer) -> _Answer:
        async def checked(request: Request) -> Response:
            if hmac.compare_digest(_given(request), self._token or b""):
                return await answer(request)
            text = "Give the token of the receiver as password, with any user name; or send it as a Bearer token.\n"
            asked = {"WWW-Authenticate": 'Basic realm="sowatch fleet", charset="UTF-8"'}
            return Response(text, 401, HEADERS | asked, "text/plain")

        return checked

    def _paged(self, ask: Callable[[dict[str, str]], Awaitable[Any]]) -> _Answer:
        async def page(query: dict[str, str]) -> bytes:
            offset, limit = _number(query, "offset", 0, 1 << 31), _number(query, "limit", 100, MAX_ROWS)
            found = await ask(query)
            return await asyncio.to_thread(lambda: bytes(found.page(offset, limit)))

        return self._answered(page)

    async def _time(self, query: dict[str, str]) -> bytes:
        return await self._views.over_time(_what(query), max(1, _number(query, "days", 7, DAYS)))

    def _answered(self, answer: Callable[[dict[str, str]], Awaitable[bytes]]) -> _Answer:
        async def answered(request: Request) -> Response:
            try:
                return _json(await answer(_query(request)))
            except UsageError as error:
                return _refusal(error, 400)
            except TooBusy as error:
                return _refusal(error, 503, {"Retry-After": "5"})
            except SowatchError as error:
                return _refusal(error, 503)

        return answered


def _given(request: Request) -> bytes:
    """The token that a request has."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value.encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _query(request: Request) -> dict[str, str]:
    """The parameters, the last of each name."""
    text = request.scope["query_string"].decode("latin-1")
    try:
        found = parse_qs(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=20)
    except ValueError:
        return {}
    return {name: values[-1] for name, values in found.items()}


def _text(query: dict[str, str], name: str) -> str:
    return query.get(name, "").strip()


def _what(query: dict[str, str]) -> str:
    found = _text(query, "what")
    if not found:
        raise UsageError("say what: ?what=libssl.so.3, or a path, build id or purl.")
    return found


def _number(query: dict[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise UsageError(f"{name}={text[:20]!r} is no number. Give one from 0 to {most}.")
    return min(int(text), most)


def _json(body: bytes, status: int = 200, more: dict[str, str] | None = None) -> Response:
    return Response(body, status, HEADERS | (more or {}), "application/json")


def _refusal(error: SowatchError, status: int, more: dict[str, str] | None = None) -> Response:
    return _json(dumps({"error": str(error)}).encode("ascii") + b"\n", status, more)
