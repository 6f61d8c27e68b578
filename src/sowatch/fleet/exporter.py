"""Records to an OTLP receiver, one request at a time, over HTTP or gRPC. Needs the extra ``sowatch[otlp]``.

The SDK's exporter encodes and sends. Its own retries are bypassed where they can be: what a receiver says of when to
try again reaches `sowatch.fleet.sender.Sender`, which waits without a time limit.
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sowatch.fleet.records import Record
from sowatch.linux.openat import open_regular
from sowatch.model.errors import ConfigError
from sowatch.model.plural import counted
from sowatch.telemetry.otlp import Otlp, Protocol

__all__ = ["FleetExporter", "Refusal"]

#: What a receiver may ask for at most.
_MAX_RETRY_AFTER_S: Final = 300.0
#: A receiver that answers so will not take these records at any later time.
_TOO_LARGE: Final = 413
_FINAL: Final = frozenset({400, 405, 411, 413, 414, 415, 422, 431})
_MAX_TOKEN_BYTES: Final = 16_384


class Refusal(Exception):
    """The receiver did not take records.

    Attributes:
        retry_after_s: when it wants to be asked again, from now; None: it did not say.
        is_final: it will never take them.
        is_too_large: not so many at once.
    """

    def __init__(
        self,
        reason: str,
        *,
        retry_after_s: float | None = None,
        is_final: bool = False,
        is_too_large: bool = False,
    ) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.is_final = is_final
        self.is_too_large = is_too_large


class FleetExporter:
    """Sends records as logs of scope ``sowatch.fleet``.

    Args:
        endpoint, protocol, headers, timeout_s, resource: as of `sowatch.telemetry.otlp.Otlp`.
        token_file: its content is sent as ``Authorization: Bearer``; read for each request, so that it may be renewed.

    Raises:
        UsageError: the OpenTelemetry SDK is not installed.
        ConfigError: an unknown protocol, an endpoint that is no URL, or a file that cannot be read.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        protocol: Protocol = "http",
        headers: Mapping[str, str] | None = None,
        token_file: str | None = None,
        timeout_s: float = 10.0,
        resource: Mapping[str, str] | None = None,
    ) -> None:
        self._token_file = token_file
        self._headers = dict(headers or {})
        self._token = None if token_file is None else _read_token(token_file)
        self._endpoint, self._protocol = endpoint, protocol
        self._timeout_s, self._resource = timeout_s, resource
        self._open()

    def _open(self) -> None:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        is_grpc = self._protocol == "grpc"
        extra = {"authorization": f"Bearer {self._token}"} if is_grpc and self._token else {}
        headers = {**self._headers, **extra}
        self._otlp = Otlp(self._endpoint, self._protocol, headers, self._timeout_s, self._resource)
        self._scope: Any = InstrumentationScope("sowatch.fleet")
        self._session: Any = None if is_grpc else _session(self._token_file)
        self._exporter: Any = self._otlp.log_exporter(gzip=True, session=self._session)
        self.where = self._otlp.where

    def send(self, records: Sequence[Record]) -> None:
        """Sends records as one request.

        Raises:
            Refusal: they did not arrive, as far as is known.
        """
        from opentelemetry.sdk._logs.export import LogRecordExportResult

        if self._session is None:
            self._renew_token()
        else:
            self._session.refusal = None
        logs = [self._log(one) for one in records]
        try:
            result = self._exporter.export(logs)
        except Exception as error:  # Version 1.39 lets through what its HTTP client raises.
            refusal = self._session and self._session.refusal
            raise refusal or Refusal(f"{self.where} did not answer: {error}") from error
        if result is not LogRecordExportResult.SUCCESS:
            if self._session is not None and self._session.refusal is not None:
                raise self._session.refusal
            raise Refusal(f"{self.where} did not take {counted(len(records), 'record')}; see whether it listens there")

    def close(self) -> None:
        """Closes the connection; from another thread it ends the waiting of `send`. Safe to call again."""
        exporter, self._exporter = self._exporter, _Closed()
        exporter.shutdown()

    def _renew_token(self) -> None:
        """The headers of gRPC are those of its exporter."""
        if self._token_file is None:
            return
        try:
            token = _read_token(self._token_file)
        except ConfigError as error:
            raise Refusal(str(error)) from error
        if token != self._token:
            self._token = token
            self._exporter.shutdown()
            self._open()

    def _log(self, one: Record) -> Any:
        from opentelemetry._logs import LogRecord, SeverityNumber
        from opentelemetry.sdk._logs import ReadableLogRecord

        record = LogRecord(
            timestamp=one.version_ns,
            observed_timestamp=one.version_ns,
            severity_number=SeverityNumber.INFO,
            attributes=one.attributes,
            event_name=one.event,
        )
        return ReadableLogRecord(record, self._otlp.resource, self._scope)


class _Closed:
    """In the place of an exporter that was shut down."""

    def export(self, _records: Sequence[Any]) -> None:
        return None

    def shutdown(self) -> None:
        return None


def _read_token(path: str) -> str:
    try:
        with open(open_regular(path), encoding="ascii") as file:
            token = file.read(_MAX_TOKEN_BYTES).strip()
    except OSError as error:
        raise ConfigError("token_file", f"cannot read {path!r}: {error.strerror}. Give a file with a token.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "token_file", f"{path!r} has other characters than ASCII. Give a file with a token."
        ) from error
    if not token or any(not char.isprintable() or char == " " for char in token):
        raise ConfigError("token_file", f"{path!r} has no token of one word. Write it into the file.")
    return token


def _session(token_file: str | None) -> Any:
    """A session of requests that notes why a request was refused, and ends the SDK's own retries."""
    import requests

    class Session(requests.Session):
        refusal: Refusal | None = None

        def request(self, *arguments: Any, **options: Any) -> Any:
            try:
                answer = super().request(*arguments, **options)
            except ConfigError as error:
                self.refusal = Refusal(str(error))
                raise self.refusal from error
            except requests.RequestException as error:
                self.refusal = Refusal(f"the receiver cannot be reached: {error}")
                raise self.refusal from error
            # A redirect is not followed, and the SDK takes it for a success.
            if answer.status_code >= 300:
                text = answer.content[:200].decode("utf-8", "replace").strip()
                self.refusal = Refusal(
                    f"the receiver answers {answer.status_code} {answer.reason or ''}: {text or 'no reason given'}",
                    retry_after_s=_retry_after_s(answer.headers.get("Retry-After")),
                    is_final=answer.status_code in _FINAL,
                    is_too_large=answer.status_code == _TOO_LARGE,
                )
                raise self.refusal
            return answer

    def bearer(request: Any) -> Any:
        assert token_file is not None
        request.headers["Authorization"] = f"Bearer {_read_token(token_file)}"
        return request

    made = Session()
    if token_file is not None:
        made.auth = bearer  # a header would give way to what ~/.netrc has of the host
    return made


def _retry_after_s(text: str | None) -> float | None:
    """RFC 9110: seconds, or a date."""
    if text is None:
        return None
    try:
        found = (
            float(text) if text.strip().isdigit() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, found), _MAX_RETRY_AFTER_S)
