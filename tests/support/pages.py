"""Serves the inventory page of a watch on loopback, as the agent does, and opens it in a real Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import uvicorn
from playwright.sync_api import Browser, Locator, Page, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sowatch.agent.page import routes
from sowatch.explain import to_dict
from sowatch.inventory.inventory import Inventory
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError
from sowatch.watcher.watcher import Watcher

__all__ = ["PageServer", "Visit", "chromium"]


class PageServer:
    """The page and ``/explain`` of a watcher, on a port of loopback; a context manager."""

    def __init__(self, watcher: Watcher, timeout_s: float) -> None:
        self._watcher = watcher
        self._timeout_s = timeout_s
        self._socket = _bound(0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.inventory: Inventory | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._socket.close()

    def start(self) -> None:
        """Serves from now on; after `stop` on the same port again."""
        if self._socket.fileno() < 0:
            self._socket = _bound(self.port)
        self.inventory = Inventory(self._watcher)
        self.inventory.start()
        application = Starlette(routes=[*routes(self.inventory), Route("/explain", self._explain)])
        config = uvicorn.Config(application, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        end = time.monotonic() + self._timeout_s
        while not self._server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.005)

    def stop(self) -> None:
        """Ends the server and what stands behind it; the watcher goes on. Safe to call again."""
        if self._server is None or self._thread is None or self.inventory is None:
            return
        self.inventory.close()
        self._server.should_exit = True
        self._thread.join(self._timeout_s)
        assert not self._thread.is_alive(), "the server did not end"
        self._socket.close()
        self._server = self._thread = None

    async def _explain(self, request: Request) -> Response:
        pid = request.query_params.get("pid")
        try:
            report = await asyncio.to_thread(
                self._watcher.explain, int(pid) if pid is not None else request.query_params["path"]
            )
        except SowatchError as error:
            return Response(dumps({"error": str(error)}), status_code=404)
        return Response(dumps(to_dict(report)), media_type="application/json")


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


class Visit:
    """A page in the browser, and whatever went wrong in it."""

    def __init__(self, browser: Browser, url: str, timeout_s: float, **options: Any) -> None:
        self._context = browser.new_context(**options)
        self.page: Page = self._context.new_page()
        self._context.set_default_timeout(timeout_s * 1000)
        #: Messages of the console (violations of the policy are among them) and errors of scripts.
        self.faults: list[str] = []
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)
        self.page.wait_for_selector("#state[data-state=live]")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.close()

    def search(self, text: str) -> None:
        self.page.fill("#search", text)

    def links(self) -> int:
        """How many rows of the table are in the page."""
        return int(self.page.locator("#table tbody a").count())

    def wait_for_paths(self, *expected: str) -> None:
        """Waits until just these are shown, in any order."""
        self.page.wait_for_function(
            "want => JSON.stringify([...document.querySelectorAll('#table tbody a')].map(a => a.textContent).sort())"
            " === JSON.stringify(want.sort())",
            arg=list(expected),
        )

    def wait_for_link(self, text: str) -> None:
        """Waits until a link is shown as this text."""
        self._link(text).wait_for()

    def wait_for_total(self, title: str, wanted: str) -> None:
        """Waits until the total of this title makes the JavaScript expression true."""
        self.page.wait_for_function(
            f"title => [...document.querySelectorAll('#totals div')].some(one => one.firstChild.textContent === title"
            f" && (value => {wanted})(Number(one.lastChild.textContent)))",
            arg=title,
        )

    def open(self, path: str) -> None:
        """Opens the details of the row that is shown as ``path``."""
        self._link(path).click()
        self.page.wait_for_selector("#details[open]")

    def hover(self, path: str) -> None:
        """Puts the pointer on the row that is shown as ``path``."""
        self._link(path).hover()

    def _link(self, text: str) -> Locator:
        return self.page.locator("#table, #details").get_by_role("link", name=text, exact=True)

    def details(self) -> str:
        """All text of the details, once the agent has explained."""
        self.page.wait_for_selector("#explained :is(dl, p.warning)")
        return self.page.inner_text("#details")

    def close_details(self) -> None:
        self.page.keyboard.press("Escape")
        self.page.wait_for_selector("#details:not([open])", state="attached")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without a window."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program is not None, "no chromium is installed. Run `scripts/setup --for test`."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        try:
            yield browser
        finally:
            browser.close()
