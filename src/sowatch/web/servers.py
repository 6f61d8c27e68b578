"""Sockets, and the thread that serves HTTP on them.

Sockets are bound by the thread that starts the agent, before privileges are dropped; the thread only accepts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import grp
import ipaddress
import logging
import math
import os
import pwd
import socket
import stat
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import uvicorn

from sowatch.model.errors import ConfigError, SowatchError
from sowatch.web.accepting import Listener
from sowatch.web.bounds import App, BoundedProtocol, FramingCheck
from sowatch.web.limits import client_of

__all__ = ["HttpThread", "UnixSocket", "bind_tcp", "check_socket", "is_loopback", "parse_listen"]

LOG = logging.getLogger("sowatch.agent")

#: Connections at once on each socket; beyond it the answer is 503.
MAX_CONNECTIONS: Final = 1024
BACKLOG: Final = 1024
#: Where a listener bounds what it keeps: so many more are kept for their 503, and what has a handshake under way is
#: among them; and the part of one address.
MAX_ACCEPTED: Final = MAX_CONNECTIONS + MAX_CONNECTIONS // 4
MAX_OF_ADDRESS: Final = MAX_CONNECTIONS // 4
#: A handshake of TLS that takes longer is ended, as is its end.
HANDSHAKE_S: Final = 5.0
#: Bytes of a head.
MAX_HEAD_BYTES: Final = 16 << 10
#: Between two lines about a lack of descriptors or memory.
COMPLAINT_S: Final = 60.0
_OUT_OF: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: How long answers under way are waited for at the end.
_STOP_S: Final = 2.0


class UnixSocket:
    """A listening unix socket with its owner and mode; `close` takes the path away again.

    A lock beside it (``PATH.lock``) keeps a second agent out, also one that hangs; a socket that is
    left over from an agent that died is replaced.

    Args:
        path: at most 107 bytes; its directory is made if only that is missing.
        owner: user name or number; None: who we are.
        group: group name or number, which then may use the socket, too (mode 0660); None: nobody else (0600).

    Raises:
        ConfigError: the path cannot be used, or there is no such user or group.
        SowatchError: a server is there already.
    """

    def __init__(self, path: str, *, owner: str | None = None, group: str | None = None) -> None:
        self.path = path
        uid, gid = _ids_of(path, owner, group)
        self._lock_fd = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._lock()
            self._make_way()
            # Nobody may connect between bind and chmod.
            before = os.umask(0o177)
            try:
                self.socket.bind(path)
            finally:
                os.umask(before)
            self._inode = _hand_over(path, uid, gid, 0o600 if group is None else 0o660)
            self.socket.listen(BACKLOG)
        except OSError as error:
            self._give_up()
            raise _no_place(path, error.strerror or str(error)) from error
        except BaseException:
            self._give_up()
            raise

    def close(self) -> None:
        """Closes it and removes the path, if it is still ours. Safe to call again."""
        with contextlib.suppress(OSError):
            if self._lock_fd >= 0 and os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        self._give_up()

    def _give_up(self) -> None:
        self.socket.close()
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _lock(self) -> None:
        parent = Path(self.path).parent
        with contextlib.suppress(FileExistsError):
            parent.mkdir(mode=0o755)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._lock_fd = os.open(f"{self.path}.lock", flags, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._taken() from error

    def _make_way(self) -> None:
        """Removes what an agent that died has left."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise _no_socket(self.path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as caller:
            caller.settimeout(1.0)
            try:
                caller.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)
                return
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise self._taken() from error
        raise self._taken()

    def _taken(self) -> SowatchError:
        return SowatchError(
            f"a server is listening on {self.path!r} already. End it, or give another path with --socket."
        )


def check_socket(path: str, owner: str | None, group: str | None) -> None:
    """Whether a `UnixSocket` could be made there if no agent has it; makes nothing.

    Raises:
        ConfigError: the path cannot be used, or there is no such user or group.
    """
    _ids_of(path, owner, group)
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise _no_socket(path)
    parent = os.path.dirname(os.path.abspath(path))
    # The last directory is made.
    place = parent if os.path.lexists(parent) else os.path.dirname(parent)
    if not os.path.isdir(place):
        raise _no_place(path, os.strerror(errno.ENOENT if not os.path.lexists(place) else errno.ENOTDIR))
    if os.geteuid() == 0 and not os.access(place, os.W_OK | os.X_OK):
        raise _no_place(path, os.strerror(errno.EACCES))


def _ids_of(path: str, owner: str | None, group: str | None) -> tuple[int, int]:
    """Numbers of the owner and the group of a socket, -1 for who we are."""
    uid = -1 if owner is None else _id_of("socket_owner", owner, lambda name: pwd.getpwnam(name).pw_uid)
    gid = -1 if group is None else _id_of("socket_group", group, lambda name: grp.getgrnam(name).gr_gid)
    if len(os.fsencode(path)) > 107:
        raise ConfigError("socket", f"{path!r} is longer than the 107 bytes of a socket's name. Use a shorter one.")
    return uid, gid


def _no_place(path: str, why: str) -> ConfigError:
    return ConfigError(
        "socket",
        f"cannot listen on {path!r}: {why}. Give a path in a directory that exists and that this user may write to.",
    )


def _no_socket(path: str) -> ConfigError:
    return ConfigError("socket", f"{path!r} exists and is no socket. Give another path, or remove it.")


def _hand_over(path: str, uid: int, gid: int, mode: int) -> int:
    """Gives a socket its owner and mode: the very one that was opened, not what has its name by then. Its inode."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(place)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.ENOTSOCK, "somebody else has taken the name")
        if (uid, gid) != (-1, -1):
            os.chown(f"/proc/self/fd/{place}", uid, gid)
        os.chmod(f"/proc/self/fd/{place}", mode)
        return found.st_ino
    finally:
        os.close(place)


def _id_of(key: str, name: str, look_up: Callable[[str], int]) -> int:
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return look_up(name)
    except KeyError as error:
        raise ConfigError(key, f"there is no {name!r} on this host. Give a name or a number that exists.") from error


def parse_listen(text: str, *, is_for_metrics: bool = False, key: str | None = None) -> tuple[str, int]:
    """Address and port of ``HOST:PORT``; the address must be of the loopback interface unless another is for it.

    Args:
        text: what was given.
        is_for_metrics: any address.
        key: any address, too; the setting, for errors.

    Raises:
        ConfigError: it is not.

    >>> parse_listen("localhost:9400")
    ('127.0.0.1', 9400)
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        host = "127.0.0.1"
    takes_any = is_for_metrics or key is not None
    try:
        is_allowed = ipaddress.ip_address(host).is_loopback or takes_any
    except ValueError:
        is_allowed = False
    if not colon or not is_allowed or not (port.isascii() and port.isdigit() and 0 <= int(port[:6]) < 1 << 16):
        if takes_any:
            raise ConfigError(
                key or "listen_metrics",
                f"{text!r} is no address with a port. Use 0.0.0.0:PORT, [::]:PORT, or the address of an interface.",
            )
        raise ConfigError(
            "listen",
            f"{text!r} is no port of the loopback interface. Use 127.0.0.1:PORT or [::1]:PORT; "
            "for other hosts put a proxy with authentication before it.",
        )
    return host, int(port)


def is_loopback(listen: str, *, key: str) -> bool:
    """Whether only this host can reach ``HOST:PORT``. Raises as `parse_listen`."""
    return ipaddress.ip_address(parse_listen(listen, key=key)[0]).is_loopback


def bind_tcp(
    listen: str,
    *,
    is_for_metrics: bool = False,
    key: str | None = None,
    most: int | None = None,
    most_of_one: int | None = None,
) -> socket.socket:
    """A listening socket on a loopback address, or on any for metrics or where a key is given.

    Args:
        listen: address and port.
        is_for_metrics: any address.
        key: any address, too; the setting, for errors.
        most: connections that it keeps, those before their handshake among them; None: any number.
        most_of_one: of them, those of one address.

    Raises:
        ConfigError: the address is none, or the port is taken or not allowed.
    """
    host, port = parse_listen(listen, is_for_metrics=is_for_metrics, key=key)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = Listener(family, most=most, most_of_one=most_of_one)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(
            key or ("listen_metrics" if is_for_metrics else "listen"),
            f"cannot listen on {listen}: {error.strerror}. Give another port, or end who has it.",
        ) from error
    return made


class HttpThread:
    """Serves applications on sockets, on one thread with one event loop.

    Args:
        served: each socket, listening, and its application. The sockets are closed at the end.
        beside: coroutines that run on the same loop until `stop`.
        distinguishes_clients: over TCP, where every local user may connect: none may have more than its part of the
            connections.
        tls: certificate and key, as files in PEM, of what is served over TCP; None: without TLS.
        stop_s: how long answers under way are waited for at the end.

    Raises:
        SowatchError: the certificate or the key cannot be used.
    """

    def __init__(
        self,
        served: Sequence[tuple[socket.socket, App]],
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
        *,
        distinguishes_clients: bool = True,
        tls: tuple[str, str] | None = None,
        stop_s: float = _STOP_S,
    ) -> None:
        self._stop_s = stop_s
        self._beside = tuple(beside)
        self._sockets = [one for one, _ in served]
        protocol = _TcpProtocol if distinguishes_clients else BoundedProtocol
        self._servers = [
            _Server(
                _config(app, stop_s)
                if one.family == socket.AF_UNIX
                else _config(app, stop_s, protocol=protocol, tls=tls)
            )
            for one, app in served
        ]
        self._thread = threading.Thread(target=self._run, name="sowatch-http", daemon=True)
        self._is_up = threading.Event()
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Starts the thread; returns once every socket is served.

        Raises:
            SowatchError: it could not.
        """
        self._thread.start()
        self._is_up.wait()
        if self._failure is not None:
            raise SowatchError(f"cannot serve HTTP: {self._failure}. Please report it.") from self._failure

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Takes no more connections, lets answers end for a while, ends the thread. Safe to call again."""
        for server in self._servers:
            server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(2 * self._stop_s + 1)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            LOG.exception("HTTP is not served any more")
        finally:
            self._is_up.set()

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(_Complaints())
        beside = [asyncio.create_task(make()) for make in self._beside]
        servers = [
            asyncio.create_task(server.serve(sockets=[one]))
            for server, one in zip(self._servers, self._sockets, strict=True)
        ]
        await asyncio.gather(*(server.is_up.wait() for server in self._servers))
        self._is_up.set()
        try:
            await asyncio.gather(*servers)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


class _Server(uvicorn.Server):
    """uvicorn's server; says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept."""
        if self.config.ssl is None:
            await super().startup(sockets)
        else:
            await self._accept_tls(sockets or [])
        self.is_up.set()

    async def _accept_tls(self, sockets: list[socket.socket]) -> None:
        # uvicorn has no setting for the time of a handshake, and asyncio waits for it a minute.
        def made() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                made,
                sock=one,
                ssl=self.config.ssl,
                backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=HANDSHAKE_S,
            )
            for one in sockets
        ]
        self.started = True


class _TcpProtocol(BoundedProtocol):
    """Of TCP, where every local user may connect."""

    who = staticmethod(lambda transport: client_of(transport.get_extra_info("socket")))


class _Complaints:
    """The event loop's exception handler: one line in a while about what happens again and again.

    Out of descriptors asyncio fails to accept a thousand times a second, and says so each time.
    """

    def __init__(self) -> None:
        self._last_s = -math.inf
        self._count = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Logs it, or counts it."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF:
            loop.default_exception_handler(context)
            return
        self._count += 1
        if loop.time() - self._last_s >= COMPLAINT_S:
            LOG.error(
                "cannot take connections: %s (%d times since the last such line). Raise LimitNOFILE, or end clients.",
                os.strerror(error.errno),
                self._count,
            )
            self._last_s, self._count = loop.time(), 0


def _config(
    app: App, stop_s: float, *, protocol: type[BoundedProtocol] = BoundedProtocol, tls: tuple[str, str] | None = None
) -> uvicorn.Config:
    made = uvicorn.Config(
        FramingCheck(app),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=BACKLOG,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(stop_s),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ssl_certfile=None if tls is None else tls[0],
        ssl_keyfile=None if tls is None else tls[1],
    )
    if tls is not None:
        try:
            # Read now: later only a line of a log would say that it cannot be.
            made.load()
        except OSError as error:
            raise SowatchError(
                f"cannot use the certificate {tls[0]!r} with the key {tls[1]!r}: {error.strerror or error}. "
                "Give both as files in PEM that belong together."
            ) from error
    return made
