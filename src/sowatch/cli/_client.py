"""Asks a running agent over its unix socket: plain HTTP and JSON, so a client needs no extra, no BPF and no root.

Each way that this can fail is an error of its own that ends with the next step: nobody is there, this user may not,
the agent hangs, ends within its answer, or is older than what is asked.
"""

from __future__ import annotations

import errno
import grp
import http.client
import json
import os
import pwd
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import quote

import msgspec

from sowatch.model.encoding import dumps, restore
from sowatch.model.errors import NotPermitted, SowatchError

__all__ = ["ANSWER_TIMEOUT_S", "Agent", "AgentStream"]

T = TypeVar("T")

#: What an agent answers from memory; one that takes longer hangs.
QUICK_TIMEOUT_S: Final = 5.0
#: An audit of a large host takes seconds, and others may be waiting for their turn.
ANSWER_TIMEOUT_S: Final = 120.0
#: An agent sends a comment after 15 s without an event (`sowatch.agent.hub`), so after three of them it hangs.
SILENCE_TIMEOUT_S: Final = 45.0
_READ_BYTES: Final = 1 << 16
#: struct ucred: pid, uid, gid (unix(7)).
_UCRED: Final = struct.Struct("3i")


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class AgentStream:
    """The lines of an answer that goes on. One thread reads; `close` from any."""

    def __init__(
        self,
        agent: Agent,
        connection: _Connection,
        answer: http.client.HTTPResponse,
        own_socket: socket.socket,
        timeout_s: float,
    ) -> None:
        self._agent = agent
        self._connection = connection
        self._answer = answer
        self._socket = own_socket
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[bytes]:
        """Each line, without what ends it, until the agent has ended its answer.

        Raises:
            SowatchError: the agent has ended within it, or does not send anything any more.
        """
        rest = b""
        while True:
            try:
                data = self._answer.read1(_READ_BYTES)  # not readline: that takes a connection that broke for the end
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._agent.fail(error, self._timeout_s)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines

    def close(self) -> None:
        """Ends it, for its reader too. Safe to call again."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Gives the connection back; nobody reads any more."""
        self._answer.close()
        self._connection.close()


class Agent:
    """The agent behind a socket.

    Args:
        path: of the socket.
        option: of the command line that names another socket.
    """

    def __init__(self, path: str, *, option: str = "--agent") -> None:
        self.path = path
        self._option = option

    def get(self, route: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The JSON that a route answers; a route that is not there is one of a later version.

        Raises:
            SowatchError: nobody answers in time, or it refuses.
        """
        status, body = self._ask("GET", route, None, timeout_s)
        try:
            found = restore(json.loads(body))
        except ValueError as error:
            if status == 404:
                raise self.is_older(f"has no {route.partition('?')[0]}") from error
            raise SowatchError(
                f"{self.path!r} gave no JSON (status {status}). Is it the socket of `sowatch serve`?"
            ) from error
        if status == 503 and route == "/readyz" and isinstance(found, dict) and "ready" in found:
            return found
        if status != 200:
            raise _refusal(found, status)
        return found

    def ready(self) -> dict[str, Any]:
        """What ``/readyz`` says: version, host, strategy, rules. Raises as `get`."""
        found = self.get("/readyz", QUICK_TIMEOUT_S)
        if not isinstance(found, dict) or not isinstance(found.get("rules"), list):
            raise SowatchError(f"{self.path!r} is the socket of another server. Name that of `sowatch serve`.")
        return found

    def problems(self, route: str) -> list[str]:
        """Why ``/healthz`` or ``/readyz`` answers that it is not well; none: it is.

        Raises:
            SowatchError: nobody answers in time, or another server does.
        """
        status, body = self._ask("GET", route, None, QUICK_TIMEOUT_S)
        text = body.decode("utf-8", "replace").strip()
        if route == "/healthz" and status in (200, 503):
            return [] if status == 200 else [text]
        if route == "/readyz" and status in (200, 503):
            found = self.read_as(lambda: [str(one) for one in json.loads(text)["problems"]])
            return found if status == 200 else found or ["it gives no reason"]
        raise SowatchError(f"{self.path!r} answered {route} with status {status}. Is it the socket of `sowatch serve`?")

    def explain(self, key: str, target: str) -> Any:
        """The explanation of what is named by ``key``: pid, path or rule. Raises as `get`."""
        return self.get(f"/explain?{key}={quote(target.encode('utf-8', 'surrogateescape'))}")

    def paths_named(self, name: str) -> list[str]:
        """The files that are mapped under a base name. Raises as `get`."""
        found = self.get(f"/paths?name={quote(name.encode('utf-8', 'surrogateescape'))}")
        return self.read_as(lambda: [str(path) for path in found["paths"]])

    def open(self, route: str, timeout_s: float | None = None) -> AgentStream:
        """An answer that goes on; without a byte for ``timeout_s``, or `SILENCE_TIMEOUT_S`, the agent hangs.

        Raises:
            SowatchError: as of `get`.
        """
        if timeout_s is None:
            timeout_s = SILENCE_TIMEOUT_S
        connection = _Connection(self.path, timeout_s)
        try:
            connection.connect()
            own_socket = connection.sock
            connection.request("GET", route)
            answer = connection.getresponse()
            if answer.status == 200:
                return AgentStream(self, connection, answer, own_socket, timeout_s)
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.fail(error, timeout_s)
        connection.close()
        if answer.status == 404:
            raise self.is_older(f"has no {route.partition('?')[0]}")
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        raise _refusal(found, answer.status)

    def post(self, route: str, body: object) -> tuple[int, str]:
        """Status and text."""
        status, answer = self._ask("POST", route, dumps(body).encode(), ANSWER_TIMEOUT_S)
        return status, answer.decode("utf-8", "replace").strip()

    def peer_pid(self) -> int | None:
        """The agent's process as this pid namespace has it; None where it is not in it, or does not answer."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as caller:
            caller.settimeout(QUICK_TIMEOUT_S)
            caller.connect(self.path)
            found = _UCRED.unpack(caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return int(found[0]) or None
        return None

    def read_as(self, call: Callable[[], T]) -> T:
        """What ``call`` makes of an answer.

        Raises:
            SowatchError: the answer is that of another version.
        """
        try:
            return call()
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise self.is_older(f"answers in another form ({error})") from error

    def is_older(self, what: str) -> SowatchError:
        """The error of an agent that does not know what is asked."""
        return SowatchError(
            f"the agent on {self.path!r} {what}: it is of another version than this command. "
            "Restart it with the version that is installed: systemctl restart sowatch."
        )

    def _ask(self, method: str, route: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
        connection = _Connection(self.path, timeout_s)
        try:
            connection.request(method, route, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.fail(error, timeout_s)
        finally:
            connection.close()

    def fail(self, error: Exception, timeout_s: float) -> NoReturn:
        """Raises what an error means, with the next step."""
        if isinstance(error, PermissionError):
            raise self._not_permitted() from error
        if isinstance(error, TimeoutError) or getattr(error, "errno", None) == errno.EAGAIN:
            raise SowatchError(
                f"the agent on {self.path!r} has not answered for {timeout_s:.0f} s: it hangs, or was stopped. "
                "See its log, and restart it: systemctl restart sowatch."
            ) from error
        if isinstance(
            error, http.client.HTTPException | ConnectionResetError | BrokenPipeError | ValueError | AttributeError
        ):
            raise SowatchError(
                f"the agent on {self.path!r} ended before its answer was complete. "
                "See its log, and start it again with `sowatch serve`."
            ) from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SowatchError(
            f"no agent answers on {self.path!r}: {reason}. Start it with `sowatch serve`, or name the socket of "
            f"another one with {self._option}."
        ) from error

    def _not_permitted(self) -> NotPermitted:
        what = f"cannot use {self.path!r}"
        try:
            found = os.stat(self.path)
        except OSError:
            directory = os.path.dirname(self.path) or "."
            return NotPermitted(
                what,
                f"this user may not enter {directory!r}",
                "Run it as root, `sudo sowatch ...`, or give the socket a place that its group may enter.",
            )
        owner = _name(lambda: pwd.getpwuid(found.st_uid).pw_name, found.st_uid)
        group = _name(lambda: grp.getgrgid(found.st_gid).gr_name, found.st_gid)
        if found.st_mode & stat.S_IWGRP:
            return NotPermitted(
                what,
                f"it is for user {owner} and group {group}",
                f"Join the group, `sudo usermod -aG {group} $USER`, and log in again; or run it as root.",
            )
        return NotPermitted(
            what,
            f"it is for user {owner} only",
            "Set socket_group in the agent's configuration to a group that you are in, or run it as root, "
            "`sudo sowatch ...`.",
        )


def _name(look_up: Callable[[], str], number: int) -> str:
    try:
        return look_up()
    except KeyError:
        return str(number)


def _refusal(found: object, status: int) -> SowatchError:
    said = found.get("error") if isinstance(found, dict) else None
    return SowatchError(said or f"the agent refused with status {status}. See its log.")
