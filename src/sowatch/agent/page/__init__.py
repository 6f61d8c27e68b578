"""The inventory page: one self-contained page, and the feed of changes behind it.

`routes` is all that the agent needs: the page at ``/``, its files, ``/page/updates`` and ``/page/stale``. Everything is
read-only. The page also asks the agent's ``/explain`` for why something is, or is not, covered, and ``/http`` for
endpoints.

The files in ``assets`` are sent as they are, with those that pages share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sowatch.agent.page.feed import CallSums, Feed, FeedResponse
from sowatch.agent.page.spells import history_dict
from sowatch.inventory.inventory import Inventory
from sowatch.inventory.stale_watch import StaleWatch
from sowatch.model.encoding import dumps
from sowatch.web.pages import HEADERS, SHARED, file_routes

__all__ = ["MAX_STREAMS", "routes"]

#: Each open page holds one stream; more than this are refused until some have gone.
MAX_STREAMS: Final = 256

_SCRIPTS: Final = ("charts", "details", "feed", "http", "page", "polled", "search", "stale", "table", "views")
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

    files = [*file_routes("sowatch.web", SHARED), *file_routes("sowatch.agent.page", _FILES)]
    made = [*files, Route("/page/updates", updates, methods=["GET"])]
    return made if stale is None else [*made, Route("/page/stale", _history(stale), methods=["GET"])]


def _history(stale: StaleWatch) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        stale.ask()
        body = await asyncio.to_thread(lambda: dumps(history_dict(stale)).encode("ascii"))
        return Response(body, media_type="application/json", headers=HEADERS)

    return answer
