"""A server on a unix socket that answers as an agent of a script: what a real one does only in bad moments."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sowatch.model.events import Event
from sowatch.model.lines import to_json

__all__ = ["CUT", "HANG", "answer", "scripted_agent", "stream"]

#: Parts of a script: the connection is closed there, or nothing more is sent until the client goes.
CUT = b"\0cut"
HANG = b"\0hang"


def answer(found: Any, status: int = 200) -> list[bytes]:
    """One JSON object."""
    body = json.dumps(found).encode()
    return [
        b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)),
        body,
    ]


def stream(events: Sequence[Event], end: bytes = b"") -> list[bytes]:
    """Server-sent events, and how they end: `CUT`, `HANG`, or as they should."""
    data = "".join(f"event: {event.event}\ndata: {to_json(event, seq)}\n\n" for seq, event in enumerate(events))
    text = f"retry: 2000\n\n: nothing new\n\n{data}".encode()
    head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(text)
    return [head, text, b"\r\n", end or b"0\r\n\r\n"]


@contextlib.contextmanager
def scripted_agent(path: Path, script: dict[str, list[list[bytes]]]) -> Iterator[list[str]]:
    """Serves ``script``: by the beginning of a route, the answers one after the other, the last one again and again.

    Gives the routes that were asked for.
    """
    asked: list[str] = []
    ending = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while request := connection.recv(1 << 16):
                route = request.split(b" ", 2)[1].decode()
                asked.append(route)
                answers = next((found for start, found in script.items() if route.startswith(start)), [answer({}, 404)])
                for part in answers.pop(0) if len(answers) > 1 else answers[0]:
                    if part == HANG:
                        ending.wait()
                    if part in (CUT, HANG):
                        connection.shutdown(socket.SHUT_RDWR)
                        return
                    connection.sendall(part)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                workers.append(threading.Thread(target=serve, args=(connection,)))
                workers[-1].start()

    workers: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield asked
        finally:
            ending.set()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for worker in workers:
                worker.join()
