"""Pages that are files: sent as they are, with nothing from elsewhere and no script in the HTML.

``assets`` has what pages share: texts of others made safe to show, addresses, nodes that are renewed, and the style.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["HEADERS", "SHARED", "file_routes"]

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
_TYPES: Final = {"css": "text/css", "html": "text/html", "js": "text/javascript"}

#: By address, the files that pages share.
SHARED: Final = {f"/page/{name}": name for name in ("address.js", "base.css", "patch.js", "text.js")}


def file_routes(package: str, files: Mapping[str, str]) -> list[Route]:
    """A route for each file.

    Args:
        package: has the files in its ``assets``.
        files: their names, by address.
    """
    return [Route(path, _file(package, name), methods=["GET"]) for path, name in files.items()]


def _file(package: str, name: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(package).joinpath("assets", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=HEADERS)

    return answer
