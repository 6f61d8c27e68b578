"""What `sowatch fleet receive` answers: OTLP/HTTP for logs, questions of other commands, metrics and health.

Handlers run on one event loop. Bodies are decoded on one thread, rows inserted on another one
(`sowatch.fleet.commits`), questions asked on a few: 200 is answered once the records are on the disk.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from sowatch.fleet.commits import Commits, QueueFull
from sowatch.fleet.log_requests import Decoded, NotOtlp, answer_of, decode, status_of
from sowatch.fleet.store import Store
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError
from sowatch.telemetry import MetricRegistry, PrometheusExporter, names
from sowatch.web.bounds import App, Body, BodyTooLarge, BodyTooSlow, read_body

__all__ = ["Receiver"]

T = TypeVar("T")

#: Bytes of a body, as it is sent and decompressed: some 8,000 records of an agent.
MAX_BODY_BYTES: Final = 8 << 20
#: Members of gzip of a body: each costs a copy of what follows it.
MAX_MEMBERS: Final = 64
#: Bodies that are received or wait to be decoded have so many bytes together.
MAX_BODIES_BYTES: Final = 128 << 20
#: How long a body may take.
BODY_S: Final = 30.0
#: What is read of a body without the token, and how long.
UNKNOWN_BYTES: Final = 64 << 10
UNKNOWN_S: Final = 1.0
#: A question has no more bytes.
MAX_QUESTION_BYTES: Final = 1 << 20
#: Questions under way at once; the store answers them one after the other.
_QUESTIONS: Final = 2
#: At the end the one under way is waited for so long.
QUESTION_END_S: Final = 5.0
#: A page of metrics may be so old.
_METRICS_AGE_S: Final = 0.25
#: When to send again what was refused for want of space or of time, in seconds.
RETRY_SOON: Final = 2
RETRY_LATER: Final = 30

_PROTOBUF: Final = "application/x-protobuf"
_JSON: Final = "application/json"
#: google.rpc.Code
_INVALID, _EXHAUSTED, _UNIMPLEMENTED, _UNAVAILABLE, _UNAUTHENTICATED = 3, 8, 12, 14, 16


class _Refusal(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, code: int, text: str, *, retry_after_s: int | None = None) -> None:
        self.status = status
        self.code = code
        self.text = text
        self.retry_after_s = retry_after_s


class Receiver:
    """The applications of a receiver. Used on one event loop.

    Args:
        store: closed by the one who made it, after `close`.
        token: that has to be sent as ``Authorization: Bearer TOKEN``; None: nothing has to be.
        pages: routes for people, which check who asks by themselves.
    """

    def __init__(self, store: Store, *, token: str | None = None, pages: Sequence[BaseRoute] = ()) -> None:
        self._pages = pages
        self._store = store
        self._token = None if token is None else token.encode()
        self.commits = Commits(store)
        self._decoding = ThreadPoolExecutor(1, "sowatch-decode")
        self._asking = ThreadPoolExecutor(_QUESTIONS, "sowatch-ask")
        self._bodies_bytes = 0
        self._metrics = MetricRegistry(sample_interval_s=_METRICS_AGE_S)
        self._metrics.add_source(self._update_metrics)
        self._prometheus = PrometheusExporter(self._metrics, max_age_s=_METRICS_AGE_S)
        self._rejected = 0

    def for_tcp(self) -> App:
        """What agents and collectors send to."""
        routes: list[BaseRoute] = [
            Route("/v1/logs", self._logs, methods=["POST"]),
            Route("/v1/metrics", self._not_taken, methods=["POST"]),
            Route("/v1/traces", self._not_taken, methods=["POST"]),
            Route("/healthz", self._healthz),
            Route("/metrics", self._show_metrics),
            *self._pages,
        ]
        return Starlette(routes=routes)

    def for_socket(self) -> App:
        """What other commands ask that need the store."""
        return Starlette(routes=[Route("/ask", self._ask, methods=["POST"]), Route("/healthz", self._healthz)])

    def close(self) -> None:
        """Stores what was accepted, and ends the threads. Safe to call again.

        A question under way is waited for `QUESTION_END_S`; after that its thread is left in the store, which then must
        not be closed: see `Store.end_questions`.
        """
        self._store.end_questions(0.0)
        self._decoding.shutdown(wait=True, cancel_futures=True)
        self.commits.close()
        is_done = self._store.end_questions(QUESTION_END_S)
        self._asking.shutdown(wait=is_done, cancel_futures=True)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    # ---- records ------------------------------------------------------------------------------

    async def _logs(self, request: Request) -> Response:
        is_json = _media_type(request) == _JSON
        body = Body(request.receive)
        try:
            self._check_token(request)
            is_packed = _is_packed(request)
            _check_type(request)
            decoded = await self._received(request, body, is_json=is_json, is_packed=is_packed)
            if decoded.records:
                await asyncio.wrap_future(self.commits.submit(decoded))
        except _Refusal as error:
            if error.status == 401:
                await body.discard(UNKNOWN_BYTES, UNKNOWN_S)
            else:
                await body.discard(4 * MAX_BODY_BYTES, BODY_S)
            return self._refused(error, is_json=is_json)
        except QueueFull as error:
            return self._refused(_Refusal(429, _EXHAUSTED, str(error), retry_after_s=RETRY_SOON), is_json=is_json)
        except SowatchError as error:
            # Not 500, after which a Collector drops what it has.
            return self._refused(_Refusal(503, _UNAVAILABLE, str(error), retry_after_s=RETRY_LATER), is_json=is_json)
        self._rejected += decoded.rejected
        return self._answer(200, answer_of(decoded, is_json=is_json), is_json=is_json)

    async def _received(self, request: Request, body: Body, *, is_json: bool, is_packed: bool) -> Decoded:
        length = request.headers.get("content-length", "")
        expected = min(int(length) if length.isascii() and length.isdigit() else MAX_BODY_BYTES, 1 << 40)
        if expected > MAX_BODY_BYTES:
            raise _Refusal(
                413, _INVALID, f"the body has more than {MAX_BODY_BYTES >> 20} MiB: send fewer records at once"
            )
        arrived = 0

        def count(size: int) -> None:
            # What came, not what is announced: that would be room that costs its sender nothing.
            nonlocal arrived
            if self._bodies_bytes + size > MAX_BODIES_BYTES:
                raise _Refusal(503, _UNAVAILABLE, "too many requests at once", retry_after_s=RETRY_SOON)
            self._bodies_bytes += size
            arrived += size

        try:
            try:
                data = await read_body(body.receive, MAX_BODY_BYTES, BODY_S, count)
            except BodyTooLarge as error:
                text = f"the body has more than {MAX_BODY_BYTES >> 20} MiB: send fewer records at once"
                raise _Refusal(413, _INVALID, text) from error
            except BodyTooSlow as error:
                text = "the body did not arrive in time"
                raise _Refusal(503, _UNAVAILABLE, text, retry_after_s=RETRY_SOON) from error

            def work() -> Decoded:
                return decode(_unpacked(data) if is_packed else data, is_json=is_json, now_ns=time.time_ns())

            try:
                return await self._in(self._decoding, work)
            except NotOtlp as error:
                raise _Refusal(400, _INVALID, f"this is no request for logs: {error}") from error
        finally:
            self._bodies_bytes -= arrived

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Both are compared in any case: how long it takes says nothing.
        is_right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise _Refusal(401, _UNAUTHENTICATED, "send the token of the receiver: Authorization: Bearer TOKEN")

    async def _not_taken(self, request: Request) -> Response:
        kind = request.url.path.rpartition("/")[2]
        text = f"this receiver takes logs, not {kind}. Send them to /v1/logs, and {kind} to a Collector."
        return self._refused(_Refusal(404, _UNIMPLEMENTED, text), is_json=_media_type(request) == _JSON)

    # ---- answers ------------------------------------------------------------------------------

    def _refused(self, why: _Refusal, *, is_json: bool) -> Response:
        headers = {} if why.retry_after_s is None else {"Retry-After": str(why.retry_after_s)}
        if why.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if why.status in (401, 413, 503):
            # What is left of the body is not read.
            headers["Connection"] = "close"
        return self._answer(why.status, status_of(why.code, why.text, is_json=is_json), headers, is_json=is_json)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, is_json: bool) -> Response:
        self._metrics.counter(names.RECEIVER_REQUESTS.name, f"status:{status}").add()
        return Response(body, status, headers, _JSON if is_json else _PROTOBUF)

    async def _healthz(self, _: Request) -> Response:
        failure = self.commits.failure
        if failure is not None:
            return PlainTextResponse(f"{failure}\n", 503)
        return PlainTextResponse("ok\n")

    async def _show_metrics(self, request: Request) -> Response:
        content_type, body = self._prometheus.render(request.headers.get("accept"))
        return Response(body, headers={"Content-Type": content_type})

    def _update_metrics(self) -> None:
        counts = self.commits.counts
        figures = {
            "records": counts.records,
            "rejected": self._rejected,
            "bytes": counts.bytes,
            "inserts": counts.inserts,
            "failures": counts.failures,
            "insert_seconds": counts.insert_s,
            "waiting_records": counts.waiting_records,
            "waiting_bytes": counts.waiting_bytes,
            "last_insert_seconds": -1.0 if counts.last_s is None else time.monotonic() - counts.last_s,
        }
        for field, definition in names.RECEIVER.items():
            if definition.kind == "gauge":
                self._metrics.gauge(definition.name).set(figures[field])
            else:
                counter = self._metrics.counter(definition.name)
                counter.add(figures[field] - counter.get())

    # ---- questions ----------------------------------------------------------------------------

    async def _ask(self, request: Request) -> Response:
        try:
            body = await read_body(request.receive, MAX_QUESTION_BYTES, BODY_S)
            question = msgspec.json.decode(body)
            sql, parameters = question["sql"], question["parameters"]
        except (BodyTooLarge, BodyTooSlow, msgspec.DecodeError, KeyError, TypeError):
            return _json({"error": 'no question. Send {"sql": "SELECT ...", "parameters": {}}.'}, 400)
        try:
            found = await self._in(self._asking, lambda: b"".join(self._store.ask(sql, parameters)))
        except SowatchError as error:
            return _json({"error": str(error)}, 400)
        return Response(found, media_type="application/x-ndjson")


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_type(request: Request) -> None:
    if _media_type(request) not in (_PROTOBUF, _JSON):
        raise _Refusal(415, _INVALID, f"send {_PROTOBUF} or {_JSON}")


def _is_packed(request: Request) -> bool:
    named = request.headers.get("content-encoding", "identity").strip().lower()
    if named not in ("gzip", "identity", ""):
        raise _Refusal(415, _INVALID, f"send Content-Encoding: gzip, or none: {named[:40]!r} is not known here")
    return named == "gzip"


def _unpacked(body: bytes) -> bytes:
    """What gzip has made smaller, of any number of members.

    Raises:
        NotOtlp: it is not that of gzip, or has more than `MAX_MEMBERS`.
        _Refusal: it is too large.
    """
    made = bytearray()
    for _ in range(MAX_MEMBERS):
        if not body:
            return bytes(made)
        member = zlib.decompressobj(wbits=31)
        try:
            made += member.decompress(body, MAX_BODY_BYTES + 1 - len(made))
        except zlib.error as error:
            raise NotOtlp(f"it is not compressed by gzip: {error}") from error
        if len(made) > MAX_BODY_BYTES:
            raise _Refusal(
                413, _INVALID, f"the body has more than {MAX_BODY_BYTES >> 20} MiB: send fewer records at once"
            )
        if not member.eof:
            raise NotOtlp("what is compressed by gzip ends too early")
        body = member.unused_data
    if body:
        raise NotOtlp(f"what is compressed by gzip has more than {MAX_MEMBERS} members")
    return bytes(made)


def _json(found: Any, status: int) -> Response:
    return Response(dumps(found).encode() + b"\n", status, media_type=_JSON)
