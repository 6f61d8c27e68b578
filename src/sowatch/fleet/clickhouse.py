"""Asks a ClickHouse over its HTTP interface, as a reader only.

https://clickhouse.com/docs/interfaces/http has it. Each question has ``readonly=1``, and its values go in as
``param_NAME``, in a form beside the query.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from sowatch.model.errors import NotPermitted, SowatchError, UsageError

__all__ = ["ClickHouse"]

_READ_BYTES: Final = 1 << 16
_TIMEOUT_S: Final = 300.0
#: Code: 516. DB::Exception: ... AUTHENTICATION_FAILED and its kin answer with these.
_REFUSED: Final = (401, 403)
_PORTS: Final = {"http": 8123, "https": 8443}


class ClickHouse:
    """A store behind a URL.

    Args:
        url: http or https, host, port (8123, 8443) and, where it is not the user's own, ``?database=NAME``.
        user: by name. Default: of the server.
        password: of that user.
        timeout_s: for each piece of an answer.

    Raises:
        UsageError: the URL is none of http.
    """

    def __init__(
        self, url: str, *, user: str | None = None, password: str | None = None, timeout_s: float = _TIMEOUT_S
    ) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._parts = _parsed(url)
        self._headers = {}
        if user is not None:
            self._headers["X-ClickHouse-User"] = user
        if password is not None:
            self._headers["X-ClickHouse-Key"] = password

    def ask(self, sql: str, parameters: Mapping[str, str]) -> Iterator[bytes]:
        """The rows as JSONEachRow, in pieces that may end anywhere.

        Raises:
            NotPermitted: the user or the password is wrong, or the user may not read the tables.
            SowatchError: nobody answers, or the server refuses.
        """
        settings = {**dict(parse_qsl(self._parts.query)), "readonly": "1"}
        fields = {"query": f"{sql.strip()}\nFORMAT JSONEachRow"}
        fields |= {f"param_{name}": value for name, value in parameters.items()}
        # As a form, not in the address: a list of builds may be longer than that takes.
        body, kind = _form(fields)
        address = f"{self._parts.path or '/'}?{urlencode(settings)}"
        connection = self._connection()
        try:
            connection.request("POST", address, body, {**self._headers, "Content-Type": kind})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                self._refuse(answer.status, answer.read(_READ_BYTES))
            while piece := answer.read1(_READ_BYTES):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SowatchError(
                f"{self.url} does not answer: {reason}. Check that a ClickHouse listens there, with `curl {self.url}`."
            ) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host = self._parts.hostname or ""
        port = self._parts.port or _PORTS[self._parts.scheme]
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(host, port, timeout=self._timeout_s)

    def _refuse(self, status: int, body: bytes) -> None:
        text = body.decode("utf-8", "backslashreplace").strip()
        first = text.splitlines()[0] if text else f"HTTP {status}"
        if status in _REFUSED or "AUTHENTICATION_FAILED" in text or "ACCESS_DENIED" in text:
            raise NotPermitted(
                f"{self.url} refuses",
                first,
                "Give CLICKHOUSE_USER and CLICKHOUSE_PASSWORD, or the password's file in CLICKHOUSE_PASSWORD_FILE, "
                "of a user that may SELECT from the tables and views whose names begin with fleet_.",
            )
        if "UNKNOWN_TABLE" in text or "UNKNOWN_FUNCTION" in text:
            raise SowatchError(
                f"{self.url} has no tables of a fleet: {first} Make them with "
                "`sowatch fleet schema | clickhouse-client --multiquery`, or name their database: ?database=NAME."
            )
        raise SowatchError(f"{self.url} refuses: {first} See its log for more.")


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises where it is none)
    except ValueError as error:
        raise UsageError(f"--url {url!r} is no URL: {error}. Write http://HOST:8123.") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UsageError(f"--url {url!r} is no URL of http or https. Write http://HOST:8123.")
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "a password in --url can be read by every process of the host. Give it as CLICKHOUSE_PASSWORD, or in a "
            "file, CLICKHOUSE_PASSWORD_FILE."
        )
    return parts


def _form(values: Mapping[str, str]) -> tuple[bytes, str]:
    """A multipart body with the values, and its type."""
    boundary = "sowatch-5f1ce0c7b21d4b0f"
    while any(boundary in value for value in values.values()):
        boundary += "x"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in values.items()
    ]
    return "".join([*parts, f"--{boundary}--\r\n"]).encode("utf-8"), f"multipart/form-data; boundary={boundary}"
