"""What the agent answers over HTTP: the routes, for the unix socket and for TCP.

Handlers run on the event loop; what takes long goes to a few threads of its own, so a slow question delays no scrape.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import parse_qs

from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from sowatch.agent.attachments import Attachments
from sowatch.agent.debugger import Debugger
from sowatch.agent.hub import EventHub, HubIsFull
from sowatch.agent.loaded_set import LoadedSet
from sowatch.agent.mappings import mapping_lines
from sowatch.explain import PathReport, ProcessReport, paths_named, to_dict
from sowatch.explain.audit import AuditReport, audit_line
from sowatch.inventory.explained import with_staleness
from sowatch.inventory.stale_watch import StaleWatch, file_key
from sowatch.inventory.staleness import StaleAnswer, Staleness, badness
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.proc import ProcFs
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.lines import SCHEMA, library_dict, process_dict, stamp
from sowatch.model.literals import EVENT_KINDS, STREAM_KINDS
from sowatch.model.stats import Mapped
from sowatch.telemetry import MetricRegistry, PrometheusExporter
from sowatch.watcher.watcher import Watcher
from sowatch.web.bounds import App, HostCheck
from sowatch.web.limits import ClientLimits, OneAtATime

__all__ = ["Readiness", "WebApp", "inventory_dict"]

T = TypeVar("T")

#: Slow questions under way at once; more wait for their turn.
_THREADS: Final = 4
#: A page that hundreds scrape in the same moment is made once.
METRICS_AGE_S: Final = 0.25
#: An audit is answered with the last one if that is no older.
_AUDIT_AGE_S: Final = 1.0
_AUDIT_AGE_TCP_S: Final = 10.0
#: So is an inventory over TCP.
_INVENTORY_AGE_S: Final = 1.0
#: Questions that take a while, and those whose answer goes on.
_COSTLY: Final = (
    "/explain",
    "/inventory",
    "/audit",
    "/debug/traced_programs",
    "/debug/blocked_processes",
    "/debug/telemetry",
)
_STREAMS: Final = ("/events", "/page/updates")
#: A GNU build id has 20 bytes, others up to 64.
_BUILD_ID: Final = re.compile("[0-9a-fA-F]{2,128}")
#: A draining thread that has not gone round for so long is stalled; it does so once a second.
STALLED_S: Final = 10.0
_NOT_TO_KEEP: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_Do = Callable[[Callable[[], ProcessReport | PathReport]], Awaitable[ProcessReport | PathReport]]


class Readiness(Struct, frozen=True):
    """What ``/readyz`` says; ``problems`` are why it is not ready, ``facts`` are for people and dashboards."""

    problems: tuple[str, ...]
    facts: dict[str, Any]


class WebApp:
    """The routes of an agent. Used on one event loop.

    Args:
        watcher: started.
        metrics: what ``/metrics`` shows.
        hub: runs on the same loop.
        readiness: asked for each ``/readyz``; any thread.
        attachments: what rules have attached, for explanations.
        pages: further routes that only read, such as those of the page at ``/``.
        shows_flows_over_tcp: whether every local user may see single HTTP flows; asked for each stream.
        proc: the host's.
        http: what ``/http`` answers, with single flows or without; None: `[http]` is off. Any thread.
        stale: what compares mapped files with the disk, for ``/inventory``.
        loaded: what was loaded, for ``/sbom``.
    """

    def __init__(
        self,
        watcher: Watcher,
        metrics: MetricRegistry,
        hub: EventHub,
        readiness: Callable[[], Readiness],
        attachments: Attachments,
        pages: Sequence[BaseRoute] = (),
        shows_flows_over_tcp: Callable[[], bool] = lambda: False,
        http: Callable[[bool], dict[str, Any] | None] = lambda _: None,
        stale: StaleWatch | None = None,
        proc: ProcFs | None = None,
        loaded: LoadedSet | None = None,
    ) -> None:
        self._proc = proc or ProcFs()
        self._watcher = watcher
        self._hub = hub
        self._readiness = readiness
        self._attachments = attachments
        self._pages = tuple(pages)
        self._shows_flows_over_tcp = shows_flows_over_tcp
        self._http = http
        self._stale = stale
        self._loaded = loaded
        #: No request reads what another, or the comparison, waits for in vain.
        self._hanging = HangingCalls() if stale is None else stale.hanging
        self._prometheus = PrometheusExporter(metrics, max_age_s=METRICS_AGE_S)
        self._debugger = Debugger(watcher, metrics)
        self._threads = ThreadPoolExecutor(_THREADS, "sowatch-http")
        #: For what is asked over TCP.
        self._modest = OneAtATime("sowatch-http-tcp")
        self._audit: Future[tuple[float, AuditReport]] | None = None
        self._listed: Future[tuple[float, bytes]] | None = None

    def for_socket(self) -> App:
        """Everything."""
        routes = [
            *self._reading_routes(),
            Route("/events", self._events),
            Route("/explain", self._explain),
            Route("/inventory", self._inventory),
            Route("/mappings", self._mappings),
            Route("/sbom", self._sbom),
            Route("/paths", self._paths),
            Route("/http", self._http_endpoints),
            Route("/audit", self._audit_now),
        ]
        return Starlette(routes=[*routes, *self._debugger.changing_routes()])

    def for_tcp(self, hosts: Collection[str]) -> App:
        """What changes nothing and needs none of the agent's rights, for requests that name one of ``hosts``.

        Every local user may connect. So `/explain` answers from the published map only: the agent opens, follows and
        looks up nothing for who asks here.
        """
        routes = [
            *self._reading_routes(),
            Route("/events", self._events_over_tcp),
            Route("/explain", self._explain_published),
            Route("/inventory", self._shared_inventory),
            Route("/http", self._http_endpoints_over_tcp),
            Route("/audit", self._audit_sometimes),
        ]
        limited = ClientLimits(Starlette(routes=routes), costly=_COSTLY, streams=_STREAMS)
        return HostCheck(limited, hosts)

    def for_metrics(self, hosts: Collection[str]) -> App:
        """What Prometheus and probes ask for, from any host: metrics, whether it watches, whether it is ready.

        Requests name an address, or one of ``hosts``.
        """
        routes = [
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz_in_short),
        ]
        limited = ClientLimits(Starlette(routes=routes), costly=(), streams=())
        return HostCheck(limited, hosts, takes_addresses=True)

    def close(self) -> None:
        """Ends the threads that are idle; the others as soon as they are."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._modest.close()

    def _reading_routes(self) -> list[BaseRoute]:
        return [
            *self._pages,
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            *self._debugger.reading_routes(),
        ]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ---- state --------------------------------------------------------------------------------

    async def _healthz(self, _: Request) -> Response:
        if not self._watcher.is_running:
            return PlainTextResponse("the watch has ended\n", 503, _NOT_TO_KEEP)
        silent_s = self._watcher.silent_s
        if silent_s >= STALLED_S:
            text = f"the draining thread has not gone round for {silent_s:.0f} s\n"
            return PlainTextResponse(text, 503, _NOT_TO_KEEP)
        return PlainTextResponse("ok\n", headers=_NOT_TO_KEEP)

    async def _readyz(self, _: Request) -> Response:
        found = self._readiness()
        body = {"ready": not found.problems, "problems": list(found.problems), **found.facts}
        return _json(body, 503 if found.problems else 200)

    async def _readyz_in_short(self, _: Request) -> Response:
        """Without what names processes, files and other hosts."""
        problems = list(self._readiness().problems)
        return _json({"ready": not problems, "problems": problems}, 503 if problems else 200)

    async def _metrics(self, request: Request) -> Response:
        content_type, body = self._prometheus.render(request.headers.get("accept"))
        return Response(body, headers={"Content-Type": content_type, **_NOT_TO_KEEP})

    async def _http_endpoints(self, _: Request) -> Response:
        return _json(self._http(True), 200)

    async def _http_endpoints_over_tcp(self, _: Request) -> Response:
        return _json(self._http(self._shows_flows_over_tcp()), 200)

    # ---- the map ------------------------------------------------------------------------------

    async def _inventory(self, _: Request) -> Response:
        def make() -> bytes:
            return _encode(inventory_dict(self._watcher.snapshot(), self._stale))

        return Response(await self._in_thread(make), media_type="application/json", headers=_NOT_TO_KEEP)

    async def _mappings(self, request: Request) -> Response:
        query = _query(request)
        try:
            pids = _pids(query.get("pid", ""))
            with_owners = _flag("owners", query.get("owners", "0"))
        except UsageError as error:
            return _refusal(error, 400)
        ready = self._watcher.ready
        if ready is None or not self._watcher.is_running:
            return _refusal(SowatchError("the watch is not running. See the agent's log."), 503)
        packages = None if self._loaded is None else self._loaded.packages
        lines = mapping_lines(
            self._watcher, ready, self._proc, pids, self._hanging, packages=packages, with_owners=with_owners
        )
        return StreamingResponse(self._chunks(lines), media_type="application/x-ndjson", headers=_NOT_TO_KEEP)

    async def _sbom(self, request: Request) -> Response:
        """What is loaded, or was since the start, with its packages."""
        query = _query(request)
        try:
            pids, without = (_pids(query.get(name, "")) for name in ("pid", "without"))
            since_start = _flag("since_start", query.get("since_start", "0"))
        except UsageError as error:
            return _refusal(error, 400)
        ready, loaded = self._watcher.ready, self._loaded
        if ready is None or loaded is None or not self._watcher.is_running:
            return _refusal(SowatchError("the watch is not running. See the agent's log."), 503)

        def make() -> bytes:
            return _encode(loaded.answer(ready, self._stale, pids=pids, without=without, since_start=since_start))

        return Response(await self._in_thread(make), media_type="application/json", headers=_NOT_TO_KEEP)

    async def _chunks(self, lines: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Each chunk is made on one of our threads."""
        while chunk := await self._in_thread(lambda: next(lines, b"")):
            yield chunk

    async def _shared_inventory(self, _: Request) -> Response:
        """One answer for all who ask while it is made, or within a second after."""
        listed = self._listed
        if listed is None or _is_old(listed, _INVENTORY_AGE_S):

            def make() -> tuple[float, bytes]:
                found = _encode(inventory_dict(self._watcher.snapshot(), self._stale))
                return time.monotonic(), found

            listed = self._listed = self._modest.submit(make)
        found = (await _shared(listed))[1]
        return Response(found, media_type="application/json", headers=_NOT_TO_KEEP)

    async def _events_over_tcp(self, request: Request) -> Response:
        if self._shows_flows_over_tcp():
            return await self._events(request)
        if "http" in _query(request).get("events", "").split(","):
            hidden = SowatchError(
                "single HTTP flows are not shown over TCP. Ask the socket, or set flows_over_tcp = true in [http]."
            )
            return _refusal(hidden, 403)
        return await self._events(request, EVENT_KINDS)

    async def _events(self, request: Request, default: Collection[str] = STREAM_KINDS) -> Response:
        query = _query(request)
        try:
            events = _kinds(query.get("events", "")) or default
            wants_snapshot = _flag("snapshot", query.get("snapshot", "1"))
            self._check_rule(query.get("rule"))
            client = self._hub.join(
                events=events,
                rule=query.get("rule"),
                last_id=request.headers.get("last-event-id") or query.get("after"),
                wants_snapshot=wants_snapshot,
            )
        except UsageError as error:
            return _refusal(error, 400)
        except HubIsFull:
            full = SowatchError("too many clients read the events, or the watch is ending. Try again later.")
            return _refusal(full, 503)
        if request.method == "HEAD":
            self._hub.leave(client)
            return Response(media_type="text/event-stream", headers=_NOT_TO_KEEP)
        return StreamingResponse(self._hub.stream(client), media_type="text/event-stream", headers=_NOT_TO_KEEP)

    def _check_rule(self, name: str | None) -> None:
        known = [rule.name for rule in self._watcher.rules]
        if name is not None and name not in known:
            raise UsageError(f"there is no rule {name!r}. Use one of: {', '.join(known)}.")

    async def _explain(self, request: Request) -> Response:
        def explain(target: _Target) -> ProcessReport | PathReport:
            wanted = target.path if target.pid is None else target.pid
            if wanted is None:
                return self._watcher.explain_published(build_id=target.build_id)
            report = self._watcher.explain(wanted)
            return with_staleness(report, self._proc, self._hanging) if isinstance(report, ProcessReport) else report

        return await self._answer_why(request, explain, self._in_thread)

    async def _paths(self, request: Request) -> Response:
        """The files that are mapped under a base name, or have it as their soname."""
        name = _query(request).get("name", "")
        if not name or "/" in name or "\0" in name:
            return _refusal(UsageError("give the base name of a file: /paths?name=libssl.so.3."), 400)

        def look() -> tuple[str, ...]:
            by_soname = {one.library.path for one in self._watcher.snapshot() if one.library.soname == name}
            return paths_named(self._proc, name, by_soname)

        try:
            return _json({"paths": list(await self._in_thread(look))})
        except SowatchError as error:
            return _refusal(error, 404)

    async def _explain_published(self, request: Request) -> Response:
        def explain(target: _Target) -> ProcessReport | PathReport:
            return self._watcher.explain_published(pid=target.pid, path=target.path, build_id=target.build_id)

        return await self._answer_why(request, explain, self._modest.run)

    async def _answer_why(
        self, request: Request, explain: Callable[[_Target], ProcessReport | PathReport], do: _Do
    ) -> Response:
        try:
            target = _target(_query(request))
            if target.rule is not None:
                return _json(self._attachments.explain_rule(target.rule))
            report = await do(lambda: self._attachments.added_to(explain(target)))
        except UsageError as error:
            return _refusal(error, 400)
        except SowatchError as error:
            return _refusal(error, 404 if self._watcher.is_running else 503)
        return _json(to_dict(report))

    async def _audit_now(self, _: Request) -> Response:
        return await self._answer_audit(self._threads.submit, _AUDIT_AGE_S)

    async def _audit_sometimes(self, _: Request) -> Response:
        return await self._answer_audit(self._modest.submit, _AUDIT_AGE_TCP_S)

    async def _answer_audit(self, submit: Callable[..., Future[tuple[float, AuditReport]]], age_s: float) -> Response:
        try:
            report = (await _shared(self._shared_audit(submit, age_s)))[1]
        except SowatchError as error:
            return _refusal(error, 503)
        return _json(audit_line(report, self._watcher.stats))

    def _shared_audit(
        self, submit: Callable[..., Future[tuple[float, AuditReport]]], age_s: float
    ) -> Future[tuple[float, AuditReport]]:
        """One audit for all who ask while it runs, or within a time after it."""
        audit = self._audit
        if audit is None or _is_old(audit, age_s):

            def run() -> tuple[float, AuditReport]:
                report = self._watcher.audit()
                return time.monotonic(), report

            audit = self._audit = submit(run)
        return audit


async def _shared(answer: Future[T]) -> T:
    """What others wait for, too: who goes away does not take it from them."""
    return await asyncio.shield(asyncio.wrap_future(answer))


def _is_old(answer: Future[tuple[float, T]], age_s: float) -> bool:
    """Whether an answer was made so long ago, or could not be made."""
    return answer.done() and (
        answer.cancelled() or answer.exception() is not None or time.monotonic() - answer.result()[0] > age_s
    )


def inventory_dict(mapped: Sequence[Mapped], stale: StaleWatch | None = None) -> dict[str, Any]:
    """The map as the object of ``GET /inventory``: each process and each library once.

    ``libraries[].processes`` are places in ``processes``, whose own ``libraries`` count how many they have.
    ``libraries[].stale_processes`` are those of them for which the file is not the one on disk, ``unknown_processes``
    those of which that cannot be determined; ``stale`` and ``stale_reason`` are of the worst of them, as in `top`.
    ``staleness`` says when that was ``compared``, null: not yet.
    """
    answers = {} if stale is None else stale.answers
    worst: dict[Any, StaleAnswer] = {}
    processes: dict[Any, dict[str, Any]] = {}
    places: dict[Any, int] = {}
    libraries: dict[Any, dict[str, Any]] = {}
    for one in mapped:
        if one.process.id not in places:
            places[one.process.id] = len(places)
            processes[one.process.id] = {
                **process_dict(one.process),
                "libraries": 0,
                "library_count": 0,
                "stale_libraries": 0,
            }
        key = (one.rule, one.library.id, one.library.path, one.library.kind, one.library.deleted)
        if key not in libraries:
            of_library: dict[str, Any] = {
                name: [] for name in ("processes", "process_indexes", "stale_processes", "unknown_processes")
            }
            libraries[key] = {"rule": one.rule, **library_dict(one.library), "stale": None, **of_library}
        for name in ("processes", "process_indexes"):
            libraries[key][name].append(places[one.process.id])
        for name in ("libraries", "library_count"):
            processes[one.process.id][name] += 1
        answer = answers.get((one.process.id, file_key(one)))
        if answer is None:
            continue
        is_stale = answer.stale is not Staleness.UNKNOWN
        libraries[key]["stale_processes" if is_stale else "unknown_processes"].append(places[one.process.id])
        processes[one.process.id]["stale_libraries"] += is_stale
        worst[key] = max(worst.get(key, answer), answer, key=badness)
    for key, answer in worst.items():
        libraries[key] |= {"stale": answer.stale, "stale_reason": answer.reason}
    compared = {
        "compared": None if stale is None or stale.compared_ns is None else stamp(stale.compared_ns),
        "complete": stale is not None and stale.is_complete,
    }
    return {
        "schema": SCHEMA,
        "event": "inventory",
        "seq": 1,
        "time": stamp(time.time_ns()),
        "mappings": len(mapped),
        "mapping_count": len(mapped),
        "staleness": compared,
        "comparison": compared,
        "libraries": list(libraries.values()),
        "processes": list(processes.values()),
    }


# ---- requests and answers ---------------------------------------------------------------------


def _query(request: Request) -> dict[str, str]:
    """The parameters, the last of each name; bytes that are not UTF-8 as surrogate escapes."""
    text = request.scope["query_string"].decode("latin-1")
    try:
        found = parse_qs(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=20)
    except ValueError:
        return {}
    return {name: values[-1] for name, values in found.items()}


def _kinds(text: str) -> Collection[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in STREAM_KINDS:
            raise UsageError(f"unknown event {name!r}. Use some of: {', '.join(STREAM_KINDS)}.")
    return names


def _flag(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise UsageError(f"{name}={text} is neither 0 nor 1. Use {name}=0 or {name}=1.")
    return text == "1"


class _Target(NamedTuple):
    """What to explain: one of them is not None."""

    pid: int | None = None
    path: str | None = None
    build_id: str | None = None
    rule: str | None = None


def _target(query: dict[str, str]) -> _Target:
    pid, path, build_id, rule = found = [query.get(name) for name in _Target._fields]
    if found.count(None) != len(found) - 1:
        raise UsageError(
            "say what to explain: /explain?pid=1234, /explain?path=/usr/lib/libz.so.1, /explain?build_id=HEX or "
            "/explain?rule=NAME."
        )
    if rule is not None:
        return _Target(rule=rule)
    if path is not None:
        if not path.startswith("/") or "\0" in path:
            raise UsageError("the path is not absolute. Give it from the root on, as this machine sees it.")
        return _Target(path=path)
    if build_id is not None:
        if not _BUILD_ID.fullmatch(build_id):
            raise UsageError("the build id is none. Give its hexadecimal digits, as `readelf -n` shows them.")
        return _Target(build_id=build_id.lower())
    assert pid is not None
    return _Target(pid=_pid(pid))


def _pid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:10]) <= 1 << 22 and len(text) < 9):
        raise UsageError(f"{text!r} is not a process id. Give a number, as `ps` shows it.")
    return int(text)


def _pids(text: str) -> frozenset[int]:
    return frozenset(_pid(one) for one in text.split(",") if one)


def _encode(found: object) -> bytes:
    return dumps(found).encode("ascii") + b"\n"


def _json(found: object, status: int = 200) -> Response:
    return Response(_encode(found), status, _NOT_TO_KEEP, "application/json")


def _refusal(error: SowatchError, status: int) -> Response:
    return _json({"error": str(error)}, status)
