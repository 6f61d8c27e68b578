"""What a type checker knows of events: a script that asks for what may be None is refused, the others are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.doc_blocks import blocks, prelude_of

ROOT = Path(__file__).resolve().parents[2]

USES = """
from sowatch import Event, LibraryEvent, Load, Watcher, awatch, decode, watch

for event in watch("libssl"):
    pid: int = event.process.pid
for one in watch("libssl", events=("load", "deactivate")):
    if one.event == "load":
        pid = one.process.pid

for one in watch("libssl", events=("load",)):
    print(one.library.path)
Watcher().subscribe(events=("load",))
Watcher().subscribe(events={"stale"})

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


#: What a script may not do, and what mypy says of it.
ERRORS = [
    ('[one.process.pid for one in watch("x", events=("deactivate",))]', 'of "Process | None" has no attribute "pid"'),
    ('[one.mappings for one in watch("x")]', 'has no attribute "mappings"'),
    ('watch("x", snapshots=False)', 'No overload variant of "watch" matches'),
    ('watch("x", events=("loads",))', 'Argument "events" to "watch" has incompatible type'),
    ('[one.process.pid for one in watch("x", control=True)]', 'has no attribute "process"'),
    ('Load("r", None, None, "exit", None, 0)', "incompatible type"),
    ("Watcher().explain(1).path", '"ProcessReport" has no attribute "path"'),
    ('Watcher().explain("/x").pid', '"PathReport" has no attribute "pid"'),
    ("Watcher(snapshots=False)", 'Unexpected keyword argument "snapshots"'),
    ('Watcher().subscribe(events=("loads",))', 'Argument "events" to "subscribe"'),
    ('Rule("x", kind="libary")', 'Argument "kind" to "Rule" has incompatible type'),
    ('Rule("x", on_load=lambda event: event.causes)', '"Load" has no attribute "causes"'),
    ('Rule("x", on_activate=lambda file: file.descriptor)', '"ActiveFile" has no attribute "descriptor"'),
    ('Rule("x", on_load=needs_unload)', 'Argument "on_load" to "Rule" has incompatible type'),
    ('Config(strategy="cores")', 'Argument "strategy" to "Config" has incompatible type'),
]
PRELUDE = """from sowatch import Config, Load, Rule, Unload, Watcher, watch
def needs_unload(event: Unload) -> None: ...
"""


def checked(*scripts: Path) -> str:
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        *map(str, scripts),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_what_scripts_and_the_examples_of_readme_and_docs_do_is_right(tmp_path: Path) -> None:
    scripts = [tmp_path / "uses.py"]
    scripts[0].write_text(USES, encoding="utf-8")
    for number, block in enumerate(one for one in blocks() if one.language == "python"):
        scripts.append(tmp_path / f"example{number}.py")
        scripts[-1].write_text(prelude_of(block) + block.text, encoding="utf-8")
    assert len(scripts) > 9
    assert checked(*scripts) == f"Success: no issues found in {len(scripts)} source files\n"


def test_a_typo_and_what_an_event_may_not_have_are_errors(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(PRELUDE + "".join(f"{line}\n" for line, _ in ERRORS), encoding="utf-8")
    said = checked(script)
    first = PRELUDE.count("\n") + 1
    missing = [
        line
        for number, (line, error) in enumerate(ERRORS, first)
        if not any(f"wrong.py:{number}:" in one and error in one for one in said.splitlines())
    ]
    assert missing == [], said
