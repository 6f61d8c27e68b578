"""What is traced, what is blocked, and commands by hand: the routes that the origin's debugger has.

Answers and status codes are the origin's; a ``ProgramType`` is a rule here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sowatch.engine.activation import FileRegistry
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError
from sowatch.telemetry import MetricRegistry
from sowatch.watcher.watcher import Watcher
from sowatch.web.bounds import BodyTooLarge, BodyTooSlow, read_body

__all__ = ["Debugger", "blocked_files", "traced_files"]


def traced_files(registry: FileRegistry) -> list[dict[str, Any]] | None:
    """Every file of every rule with the processes that hold it; None if there is none."""
    return [
        {
            "ProgramType": file.rule,
            "Rule": file.rule,
            "FilePath": file.library.path,
            "PIDs": sorted(process.pid for process in file.processes),
            "State": file.state,
            "Dev": file.library.id.dev,
            "Inode": file.library.id.inode,
        }
        for file in registry.files()
    ] or None


def blocked_files(registry: FileRegistry) -> list[dict[str, Any]] | None:
    """The files whose activation failed, by rule; None if there is none."""
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for one in registry.blocked():
        entry = {"Dev": one.id.dev, "Inode": one.id.inode, "SamplePath": one.sample_path, "Reason": one.reason}
        by_rule.setdefault(one.rule, []).append(entry)
    return [{"ProgramType": rule, "Rule": rule, "PathIdentifiers": files} for rule, files in by_rule.items()] or None


class Debugger:
    """The routes below ``/debug``.

    Args:
        watcher: whose registry is shown, and which carries out commands.
        metrics: what ``/debug/telemetry`` shows.
    """

    def __init__(self, watcher: Watcher, metrics: MetricRegistry) -> None:
        self._watcher = watcher
        self._metrics = metrics

    def reading_routes(self) -> list[Route]:
        """Those that change nothing."""
        return [
            Route("/debug/traced_programs", self._traced),
            Route("/debug/blocked_processes", self._blocked),
            Route("/debug/telemetry", self._telemetry),
        ]

    def changing_routes(self) -> list[Route]:
        """Those that do; for the unix socket only."""
        return [
            Route("/debug/clear_blocked", self._clear_blocked),
            # Every method: the origin's answer to a wrong one is a text of its own.
            Route("/debug/attach-pid", self._attach, methods=_METHODS),
            Route("/debug/detach-pid", self._detach, methods=_METHODS),
        ]

    async def _traced(self, _: Request) -> Response:
        return _json(traced_files(self._watcher.registry))

    async def _blocked(self, _: Request) -> Response:
        return _json(blocked_files(self._watcher.registry))

    async def _clear_blocked(self, request: Request) -> Response:
        if request.method != "GET":  # HEAD is served wherever GET is, and must not change anything
            return PlainTextResponse(status_code=405, headers={"Allow": "GET"})
        return _json({"cleared": self._watcher.registry.clear_blocked()})

    async def _telemetry(self, _: Request) -> Response:
        return _json(self._metrics.report())

    async def _attach(self, request: Request) -> Response:
        return await self._by_hand(request, "attaching", "attached", self._watcher.attach_pid)

    async def _detach(self, request: Request) -> Response:
        return await self._by_hand(request, "detaching", "detached", self._watcher.detach_pid)

    async def _by_hand(self, request: Request, doing: str, done: str, carry_out: Callable[[int, str], int]) -> Response:
        if request.method != "POST":
            return PlainTextResponse("Only POST requests are allowed\n", 405, {"Allow": "POST"})
        try:
            pid, rule = _order(await read_body(request.receive))
        except BodyTooLarge:
            return PlainTextResponse("Error decoding request body: it is too large\n", 413)
        except BodyTooSlow:
            return PlainTextResponse("Error decoding request body: it did not arrive in time\n", 408)
        except ValueError as error:
            return PlainTextResponse(f"Error decoding request body: {error}\n", 400)
        if rule not in {one.name for one in self._watcher.rules}:
            return PlainTextResponse(f'Module "{rule}" is not enabled\n'.encode("utf-8", "backslashreplace"), 400)
        try:
            await asyncio.to_thread(carry_out, pid, rule)
        except SowatchError as error:
            text = f"Error {doing} PID: {error}\n"
            return PlainTextResponse(text.encode("utf-8", "backslashreplace"), 500)
        return PlainTextResponse(f"{rule} successfully {done} PID {pid}\n".encode("utf-8", "backslashreplace"))


def _json(found: object) -> Response:
    return Response(dumps(found).encode("ascii"), media_type="application/json")


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _order(body: bytes) -> tuple[int, str]:
    """Pid and rule in a body.

    Raises:
        ValueError: it is no such object.
    """
    try:
        found = json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError('it is no object. Send {"pid": 1234, "type": "RULE"}')  # noqa: TRY004 - one kind of error
    pid, rule = found.get("pid"), found.get("type")
    if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 1 << 32:
        raise ValueError('"pid" is no process id. Send {"pid": 1234, "type": "RULE"}')
    if not isinstance(rule, str):
        raise ValueError('"type" is no name of a rule. Send {"pid": 1234, "type": "RULE"}')  # noqa: TRY004
    return pid, rule
