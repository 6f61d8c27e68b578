"""The commands from end to end: one process that opens a library and ends, one that keeps it.

`support.forced` adds options to each command; `scripts/matrix` runs this file once for each strategy that a kernel
must have. What they promise of a library that is open for a moment is data, in `PROMISES`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from support import strict
from support.forced import OPTIONS
from support.programs import Mapper

#: By strategy, what may become of a library that is open for a moment: whether it is told, and whether anything is
#: counted as lost.
PROMISES = {
    "core": {(True, False)},
    "runtime": {(True, False)},
    "prebuilt": {(True, False), (True, True), (False, True)},
    "procfs": {(True, False), (False, False)},
}


def sowatch(command: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "sowatch", command, "--json", *OPTIONS, *words]


def lines_of(*words: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the lines of a command that ends by itself."""
    done = subprocess.run(sowatch(*words), stdout=subprocess.PIPE, check=False)
    return done.returncode, [strict.loads(line) for line in done.stdout.splitlines()]


def take_until(is_last: Callable[[dict[str, Any]], bool], lines: Iterator[str], schema: Any) -> list[dict[str, Any]]:
    """The library events up to the one that is the last."""
    reported = []
    for line in lines:
        event = schema(line)
        if "library" in event:
            reported.append(event)
            if is_last(event):
                return reported
    raise AssertionError(f"the watch ended, and told only: {reported}")


def test_watch_tells_of_a_process_that_opens_a_library_and_ends(
    spawn, programs, make_library, tmp_path, deadline, schema
):
    kept, brief = make_library("libkept.so"), make_library("libbrief.so")
    pattern = "|".join(re.escape(str(library)) for library in (kept, brief))
    # The duration is only there so that it ends if the events never come.
    watching = spawn(sowatch("watch", pattern, "--duration", f"{deadline(30):g}"), stdout=subprocess.PIPE, text=True)
    ready = schema(watching.stdout.readline())
    loader = spawn([programs["loader"], brief])
    assert loader.wait(deadline(10)) == 0
    with Mapper(programs["mapper"], tmp_path) as keeper:
        keeper.map(kept)
        reported = take_until(lambda event: event["event"] == "load" and is_of(kept, event), watching.stdout, schema)
    reported += take_until(lambda event: event["event"] == "deactivate" and is_of(kept, event), watching.stdout, schema)
    watching.send_signal(signal.SIGTERM)
    stopped = [schema(line) for line in watching.stdout][-1]

    assert ready["event"] == "ready"
    assert story([event for event in reported if is_of(kept, event)]) == story_of(keeper.pid)
    of_brief = story([event for event in reported if is_of(brief, event)])
    assert of_brief in (story_of(loader.pid), [])
    assert {event["library"]["path"] for event in reported} <= {str(kept), str(brief)}
    assert (bool(of_brief), stopped["lost"] > 0) in PROMISES[ready["strategy"]]
    held = 1 + bool(of_brief)
    assert (stopped["event"], stopped["loads"], stopped["unloads"]) == ("stopped", held, held)
    assert watching.wait(deadline(10)) == 0


def is_of(library: Path, event: dict[str, Any]) -> bool:
    return event["library"]["inode"] == library.stat().st_ino


def story(reported: list[dict[str, Any]]) -> list[tuple[str, str | None, int | None]]:
    """Events, loads and unloads with their causes and pids."""
    return [
        (one["event"], one["cause"], one["process"]["pid"]) if "cause" in one else (one["event"], None, None)
        for one in reported
    ]


def story_of(pid: int) -> list[tuple[str, str | None, int | None]]:
    """That of a process that maps a file and ends, the only one that has it."""
    return [("activate", None, None), ("load", "mmap", pid), ("unload", "exit", pid), ("deactivate", None, None)]


def test_ready_names_the_strategy_that_doctor_decides_for(spawn, deadline, schema):
    rc, (report,) = lines_of("doctor")
    watching = spawn(sowatch("watch", "no-such-library"), stdout=subprocess.PIPE, text=True)
    ready = schema(watching.stdout.readline())

    assert rc == 0
    for said in ("strategy", "hooks", "guarantee", "attempts"):
        assert ready[said] == report["decision"][said]


def test_list_shows_the_process_that_keeps_a_library(programs, make_library, tmp_path):
    library = make_library("libkept.so")
    with Mapper(programs["mapper"], tmp_path) as keeper:
        keeper.map(library)
        rc, lines = lines_of("list", re.escape(str(library)))

        assert rc == 0
        assert [(line["process"]["pid"], line["library"]["path"]) for line in lines if line["event"] == "mapping"] == [
            (keeper.pid, str(library))
        ]


def test_audit_finds_that_the_map_is_what_proc_says():
    rc, (report,) = lines_of("audit")

    assert report["differences"] == []
    assert report["mappings"] > 0
    assert rc == 0
