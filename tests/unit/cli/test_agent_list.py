"""`list --agent`: what an agent could not read, and what of that a command line asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sowatch.cli import main
from sowatch.inventory.coverage import Coverage, coverage_line
from sowatch.linux.origin import origin_of
from sowatch.linux.proc import ProcFs
from sowatch.model.encoding import dumps
from sowatch.model.events import Process
from sowatch.model.lines import head_line
from support.scripted_agent import answer, scripted_agent

NGINX = Process(1 << 22, 5, comm="nginx", uid=33, container="3f2a9c8b1d0e")
OTHER = Process((1 << 22) + 1, 5, comm="other", uid=1000)


def lines(*parts: object) -> list[bytes]:
    """What ``/mappings`` answers."""
    body = "".join(f"{dumps(one)}\n" for one in parts).encode()
    head = b"HTTP/1.1 200 X\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n" % len(body)
    return [head, body]


def code_of(tmp_path: Path, coverage: Coverage, unreadable: Sequence[Process] | None, *words: str) -> int:
    """The exit code of ``list --stale --check`` of an agent that knows of nothing that is stale."""
    head = head_line(origin_of(ProcFs()), time.time_ns(), 1)
    script = {
        "/mappings": [lines(head, coverage_line(coverage, 2, unreadable))],
        "/readyz": [answer({"ready": True, "rules": ["all"], "version": "0.1.0"})],
    }
    socket = tmp_path / str(time.monotonic_ns())
    with scripted_agent(socket, script):
        return main(["list", "--stale", "--check", "--agent", str(socket), *words])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 3),
        (("--comm", "nginx"), 3),
        (("--comm", "!other,!nginx"), 0),
        (("--user", "0"), 0),
        (("--user", "1000"), 3),
        (("--container", "3f2a"), 3),
        (("--container", "3f2a", "--comm", "other"), 0),
    ],
)
def test_processes_that_the_filters_leave_out_leave_no_answer_open(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    coverage = Coverage(5, 2, is_hidden=False)
    assert code_of(tmp_path, coverage, (NGINX, OTHER), *words) == code


def test_who_is_not_known_may_be_asked_for(tmp_path: Path) -> None:
    assert code_of(tmp_path, Coverage(5, 3, is_hidden=False), (NGINX, OTHER), "--user", "0") == 3
    assert code_of(tmp_path, Coverage(5, 2, is_hidden=False), None, "--user", "0") == 3  # an older agent
