"""Questions to the receiver that has a store, over its unix socket: HTTP, answers as lines of JSON."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from sowatch.model.encoding import dumps
from sowatch.model.errors import NotPermitted, SowatchError

__all__ = ["SOCKET_NAME", "StoreClient"]

#: Of the socket, in the directory of the store.
SOCKET_NAME: Final = "receive.sock"
#: A question is ended by the store before.
_ANSWER_S: Final = 150.0
_CONNECT_S: Final = 5.0


class StoreClient:
    """Asks the receiver behind a socket.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def reach(cls, path: Path) -> StoreClient | None:
        """A client of the receiver that listens there; None: nobody does.

        Raises:
            NotPermitted: this user may not ask it.
        """
        try:
            with _connected(path, _CONNECT_S):
                return cls(path)
        except PermissionError as error:
            raise NotPermitted(
                f"cannot ask the receiver at {os.fspath(path)!r}",
                "its socket is for the user that it runs as",
                "Run this command as that user, or as root.",
            ) from error
        except OSError:
            return None

    def ask(self, sql: str, parameters: Mapping[str, str] | None = None) -> Iterable[bytes]:
        """The rows as JSONEachRow of one SELECT: see `sowatch.fleet.asks`.

        Raises:
            SowatchError: it cannot be answered, or the receiver has ended.
        """
        connection = http.client.HTTPConnection("localhost", timeout=_ANSWER_S)
        try:
            connection.sock = _connected(self._path, _ANSWER_S)
            connection.request("POST", "/ask", dumps({"sql": sql, "parameters": dict(parameters or {})}).encode())
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = (
                os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error) or "it ended"
            )
            raise SowatchError(
                f"the receiver at {os.fspath(self._path)!r} did not answer: {reason}. See its log, and ask again."
            ) from error
        finally:
            connection.close()
        if answer.status != 200:
            try:
                reason = str(json.loads(body)["error"])
            except (ValueError, KeyError, TypeError):
                reason = f"status {answer.status}"
            raise SowatchError(reason)
        return (body,)

    def close(self) -> None:
        """Nothing is kept open between questions."""


def _connected(path: Path, timeout_s: float) -> socket.socket:
    """A connection to a unix socket; its path may be longer than the 107 bytes that a name has."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.settimeout(timeout_s)
        try:
            made.connect(os.fspath(path))
        except OSError as error:
            if error.errno not in (None, errno.ENAMETOOLONG):
                raise
            fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                made.connect(f"/proc/self/fd/{fd}/{path.name}")
            finally:
                os.close(fd)
    except BaseException:
        made.close()
        raise
    return made
