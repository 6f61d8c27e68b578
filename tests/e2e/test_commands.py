"""The commands from end to end: one process that opens a library and ends, one that keeps it.

SOWATCH_TEST_OPTIONS adds options to each command, for instance ``--strategy core``; `scripts/matrix` runs this
file once for each strategy that a kernel must have.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

from support.programs import Mapper

OPTIONS = os.environ.get("SOWATCH_TEST_OPTIONS", "").split()


def sowatch(command: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "sowatch", command, "--json", *OPTIONS, *words]


def lines_of(*words: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the lines of a command that ends by itself."""
    done = subprocess.run(sowatch(*words), stdout=subprocess.PIPE, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_watch_tells_of_a_process_that_opens_a_library_and_ends(spawn, programs, make_library, deadline, schema):
    library = make_library("libseen.so")
    # The duration is only there so that it ends if the events never come.
    watching = spawn(
        sowatch("watch", re.escape(str(library)), "--duration", f"{deadline(30):g}"), stdout=subprocess.PIPE, text=True
    )
    ready = schema(watching.stdout.readline())
    loader = spawn([programs["loader"], library])
    told = [schema(watching.stdout.readline()) for _ in range(4)]
    watching.send_signal(signal.SIGTERM)
    stopped = schema(watching.stdout.readline())

    assert ready["event"] == "ready"
    assert [(line["event"], line.get("cause")) for line in told] == [
        ("activate", None),
        ("load", "mmap"),
        ("unload", "exit"),
        ("deactivate", None),
    ]
    assert {line["process"]["pid"] for line in told[1:3]} == {loader.pid}
    assert {(line["library"]["path"], line["library"]["inode"]) for line in told} == {
        (str(library), library.stat().st_ino)
    }
    assert (stopped["event"], stopped["loads"], stopped["unloads"], stopped["lost"]) == ("stopped", 1, 1, 0)
    assert watching.wait(deadline(10)) == 0


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
    assert report["lost"] == 0
    assert rc == 0
