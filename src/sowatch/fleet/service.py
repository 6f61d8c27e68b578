"""`sowatch fleet receive`, put together: the store, what serves it, and its end. On the main thread."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, NoReturn

from sowatch.fleet.page import FleetPage
from sowatch.fleet.receive import Receiver
from sowatch.fleet.store import SOCKET_NAME, Store
from sowatch.model.errors import UsageError
from sowatch.web.bounds import App, HostCheck
from sowatch.web.notify import Notifier
from sowatch.web.servers import MAX_ACCEPTED, MAX_OF_ADDRESS, HttpThread, UnixSocket, bind_tcp, is_loopback

__all__ = ["DEFAULT_LISTEN", "DEFAULT_STORE", "serve"]

LOG = logging.getLogger("sowatch.fleet")

DEFAULT_LISTEN: Final = "127.0.0.1:4318"
DEFAULT_STORE: Final = "/var/lib/sowatch/fleet"
#: How long requests under way are waited for at the end: an insert may take seconds.
_STOP_S: Final = 10.0
_TURN_S: Final = 1.0


def serve(
    directory: str,
    *,
    listen: str = DEFAULT_LISTEN,
    token: str | None = None,
    page_token: str | None = None,
    is_open: bool = False,
    tls: tuple[str, str] | None = None,
) -> int:
    """Receives until SIGTERM or SIGINT; what was accepted is stored then.

    Args:
        directory: of the store; made if it is missing.
        listen: address and port; the port may be 0.
        token: that has to be sent; None: nothing has to be.
        page_token: that who reads the page has to give; None: the same.
        is_open: no token is meant, although others can reach the port.
        tls: certificate and key, as files.

    Returns:
        0 after a signal, 1 if it ended by itself.

    Raises:
        SowatchError: the store cannot be opened, or the port not be used.
    """
    is_local = is_loopback(listen, key="--listen")
    if not is_local and token is None and not is_open:
        raise UsageError(
            f"{listen} can be reached by others, and they could write records of any host. Give a token, --token-file "
            "or SOWATCH_FLEET_TOKEN, and the same to the agents; or say that none is wanted: --no-token."
        )
    stopping = threading.Event()
    notifier = Notifier()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(stopping))
        # All of this host have one address.
        tcp = bind_tcp(listen, key="--listen", most=MAX_ACCEPTED, most_of_one=None if is_local else MAX_OF_ADDRESS)
        stack.callback(tcp.close)
        store = Store(directory)
        stack.callback(_unless_asked, store, store.close)
        asked = UnixSocket(os.path.join(store.directory, SOCKET_NAME))
        stack.callback(asked.close)
        page = FleetPage(store, token=page_token or token)
        stack.callback(_unless_asked, store, page.close)
        receiver = Receiver(store, token=token, pages=page.routes())
        stack.callback(receiver.close)
        app: App = receiver.for_tcp()
        if is_local:
            # A page of somebody else may let its name point to 127.0.0.1.
            app = HostCheck(app, {"localhost"}, takes_addresses=True)
        served = [(tcp, app), (asked.socket, receiver.for_socket())]
        http = HttpThread(served, distinguishes_clients=False, tls=tls, stop_s=_STOP_S)
        stack.callback(http.stop)
        host, port = tcp.getsockname()[:2]
        http.start()
        where = f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"
        LOG.info("receiving on %s/v1/logs into %s; the page is %s/", where, store.directory, where)
        notifier.ready(f"receiving on {where}")
        while not stopping.wait(_TURN_S) and http.is_alive:
            notifier.alive()
        notifier.stopping()
        # Those that wait for their turn would have it while connections end.
        store.end_questions(0.0)
    status = 0 if stopping.is_set() else 1
    if store.is_open:
        _leave(status)
    return status


def _unless_asked(store: Store, close: Callable[[], None]) -> None:
    """Closes what waits for the question under way, which may take two minutes; not while there is one."""
    if store.end_questions(0.0):
        close()


def _leave(status: int) -> NoReturn:
    """Ends the process although a question is under way.

    The engine is not closed under it. The end of the interpreter would wait for its thread, and the destructors of the
    engine run beside it: so neither has its turn, and the kernel ends all threads at once. What was accepted is on the
    disk by then; the next one that opens the store finds it as after SIGKILL.
    """
    LOG.warning("a question was under way at the end; it is not answered")
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
