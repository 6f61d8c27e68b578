"""Requests to the agent while a file system hangs: what one has left behind, none of the next ones leaves again."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sowatch.agent.webapp import WebApp
from sowatch.explain.records import FileLook, MappingReport, ProcessReport, VerdictAnswer
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Process, Ready
from sowatch.model.identity import FileId
from sowatch.model.stats import Mapped
from sowatch.telemetry import MetricRegistry
from support.silent_fs import SilentFileSystem

READY = Ready(1, "h", None, "core", "exact", None, (), (), 0, 0, 0.0)
UNKNOWN = "its file system does not answer"


def ask(answer_to: Callable[[Request], Any], query: str) -> list[dict[str, Any]]:
    """The objects of one answer."""

    async def answered() -> bytes:
        scope = {"type": "http", "method": "GET", "headers": [], "query_string": query.encode()}
        response: Response = await answer_to(Request(scope))
        if isinstance(response, StreamingResponse):
            return b"".join([bytes(part) async for part in response.body_iterator])  # type: ignore[arg-type]
        return bytes(response.body)

    return [json.loads(line) for line in asyncio.run(answered()).splitlines()]


def left_behind() -> set[int | None]:
    """Threads that read the disk for a request, which ends those that can be ended."""
    return {thread.ident for thread in threading.enumerate() if thread.name == "sowatch-disk"}


@pytest.mark.parametrize("route", ["mappings", "explain"])
def test_requests_while_a_file_system_hangs_leave_nothing_more_behind_each_time(
    route: str, make_library: Any, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so")) as silent:
        rows, stat = ProcFs().executable_maps(silent.pid), ProcFs().stat(silent.pid)
        assert isinstance(rows, list)
        assert stat
        [row] = [row for row in rows if row.path == os.fsencode(silent.path)]
        process = Process(silent.pid, stat.start_ns)
        library = Library(str(silent.path), FileId(row.major, row.minor, row.inode))
        ranges = ((row.start, row.end),)
        one = Mapped(process, library, "all", ranges, "mmap", time.time_ns())
        none: Any = None
        verdict = VerdictAnswer("none", None)
        file = MappingReport(library, none, (), None, None, (), None, verdict, FileLook("ok"), (), (), ())
        report = ProcessReport(process, "running", 1, True, False, None, None, None, (file,), (), ())
        watcher: Any = SimpleNamespace(
            is_running=True, ready=READY, rules=(), unread=(), snapshot=lambda: [one], explain=lambda _: report
        )
        attachments: Any = SimpleNamespace(added_to=lambda report: report)
        app = WebApp(watcher, MetricRegistry(), none, none, attachments)

        def reasons() -> list[str]:
            """What the answer says of the file, which is why its staleness is unknown."""
            if route == "mappings":
                return [line["stale_reason"] for line in ask(app._mappings, "") if line["event"] == "mapping"]
            return [one["stale_reason"] for one in ask(app._explain, f"pid={silent.pid}")[0]["mappings"]]

        silent.fall_silent()
        assert reasons() == [UNKNOWN]
        left = left_behind()
        assert left
        for _ in range(3):
            assert reasons() == [UNKNOWN]
        app.close()
        assert left_behind() == left
