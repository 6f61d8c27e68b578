"""What a type checker knows of events: a script that asks for what may be None is refused, the others are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USES = """
from sowatch import Event, LibraryEvent, Load, awatch, decode, watch

for event in watch("libssl"):
    pid: int = event.process.pid
for one in watch("libssl", events=("load", "deactivate")):
    if one.event == "load":
        pid = one.process.pid

for told in watch("libssl", control=True, snapshot=False):
    if told.event == "lost":
        count: int = told.count

async def first() -> int:
    async for event in awatch("libssl"):
        return event.process.pid
    return 0

def mappings(event: Event) -> int:
    if event.event == "ready":
        return event.mappings
    return len(event.ranges) if isinstance(event, LibraryEvent) else 0

def of_line(line: bytes) -> str:
    event = decode(line)
    return event.cause if isinstance(event, Load) else event.event
"""


def checked(text: str, directory: Path) -> str:
    script = directory / "script.py"
    script.write_text(text, encoding="utf-8")
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_each_event_is_known_by_its_type_and_by_its_name(tmp_path: Path) -> None:
    assert checked(USES, tmp_path) == "Success: no issues found in 1 source file\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (
            '[one.process.pid for one in watch("x", events=("deactivate",))]',
            'of "Process | None" has no attribute "pid"',
        ),
        ('[one.mappings for one in watch("x")]', 'has no attribute "mappings"'),
        ('watch("x", snapshots=False)', 'No overload variant of "watch" matches'),
        ('watch("x", events=("loads",))', 'Argument "events" to "watch" has incompatible type'),
        ('[one.process.pid for one in watch("x", control=True)]', 'has no attribute "process"'),
        ('Load("r", None, None, "exit", None, 0)', "incompatible type"),
    ],
)
def test_what_an_event_may_not_have_is_an_error(line: str, error: str, tmp_path: Path) -> None:
    assert error in checked(f"from sowatch import Load, watch\n{line}\n", tmp_path)
