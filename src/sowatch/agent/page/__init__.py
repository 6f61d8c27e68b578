"""The inventory page: one self-contained page, and the feed of changes behind it.

`routes` is all that the agent needs: the page at ``/``, its files, ``/page/updates`` and ``/page/stale``. Everything is
read-only. The page also asks the agent's ``/explain`` for why something is, or is not, covered, and ``/http`` for
endpoints.

The files in ``assets`` are sent as they are: no build step, nothing from elsewhere, no script in the HTML.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sowatch.agent.page.feed import CallSums, Feed, FeedResponse
from sowatch.agent.page.spells import history_dict
from sowatch.inventory.inventory import Inventory
from sowatch.inventory.stale_watch import StaleWatch
from sowatch.model.encoding import dumps

__all__ = ["HEADERS", "MAX_STREAMS", "routes"]

#: With every answer. Trusted types: even our own script may not turn text into markup.
HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
#: Each open page holds one stream; more than this are refused until some have gone.
MAX_STREAMS: Final = 256

_TYPES: Final = {"css": "text/css", "html": "text/html", "js": "text/javascript"}
_SCRIPTS: Final = (
    *("address", "charts", "details", "feed", "http", "page"),
    *("patch", "polled", "search", "stale", "table", "text", "views"),
)
_FILES: Final = {
    "/": "index.html",
    "/page/page.css": "page.css",
    **{f"/page/{name}.js": f"{name}.js" for name in _SCRIPTS},
}


def routes(inventory: Inventory, calls: CallSums = dict, stale: StaleWatch | None = None) -> list[Route]:
    """Routes for the agent's application: ``/``, ``/page/FILE``, ``/page/updates`` and ``/page/stale``.

    Args:
        inventory: started by the caller, and closed by it before the server ends: streams end with it.
        calls: what rules have counted, by file.
        stale: has the history of stale files; None: there is no ``/page/stale``.
    """
    feed = Feed(inventory, calls)

    async def updates(_: Request) -> Response:
        if feed.clients >= MAX_STREAMS:
            error = f"{MAX_STREAMS} pages are open already. Close some, or try again later."
            return JSONResponse({"error": error}, status_code=503, headers=HEADERS | {"Retry-After": "10"})
        return FeedResponse(feed, headers=HEADERS)

    files = [Route(path, _file(name), methods=["GET"]) for path, name in _FILES.items()]
    made = [*files, Route("/page/updates", updates, methods=["GET"])]
    return made if stale is None else [*made, Route("/page/stale", _history(stale), methods=["GET"])]


def _history(stale: StaleWatch) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        stale.ask()
        body = await asyncio.to_thread(lambda: dumps(history_dict(stale)).encode("ascii"))
        return Response(body, media_type="application/json", headers=HEADERS)

    return answer


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("sowatch.agent.page").joinpath("assets", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=HEADERS)

    return answer
