"""Asks a running agent over its unix socket: plain HTTP and JSON, so a client needs no extra."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any, Final
from urllib.parse import quote

from sowatch.model.encoding import dumps, restore
from sowatch.model.errors import NotPermitted, SowatchError

__all__ = ["Agent"]

#: An audit of a large host takes seconds, and others may be waiting for their turn.
TIMEOUT_S: Final = 120.0


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Agent:
    """The agent behind a socket.

    Args:
        path: of the socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, route: str) -> Any:
        """The JSON that a route answers.

        Raises:
            SowatchError: nobody answers, or it refuses.
        """
        status, body = self._ask("GET", route)
        try:
            found = restore(json.loads(body))
        except ValueError as error:
            raise SowatchError(
                f"{self._path!r} gave no JSON (status {status}). Is it the socket of `sowatch serve`?"
            ) from error
        if status != 200:
            said = found.get("error") if isinstance(found, dict) else None
            raise SowatchError(said or f"the agent refused with status {status}. See its log.")
        return found

    def explain(self, key: str, target: str) -> Any:
        """The explanation of what is named by ``key``: pid, path or rule. Raises as `get`."""
        return self.get(f"/explain?{key}={quote(target.encode('utf-8', 'surrogateescape'))}")

    def post(self, route: str, body: object) -> tuple[int, str]:
        """Status and text."""
        status, answer = self._ask("POST", route, dumps(body).encode())
        return status, answer.decode("utf-8", "replace").strip()

    def _ask(self, method: str, route: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = _Connection(self._path)
        try:
            connection.request(method, route, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except PermissionError as error:
            raise NotPermitted(
                f"cannot use {self._path!r}",
                "it belongs to somebody else",
                "Run it as the socket's owner: sudo sowatch debug ...",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SowatchError(
                f"no agent answers on {self._path!r}: {reason}. Start it with `sowatch serve`, or give --socket."
            ) from error
        finally:
            connection.close()
