"""`sowatch trace` as it is typed: on copies of libraries in the test's own directory, called by its own processes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.callers import Caller

TraceLines = Callable[..., list[dict[str, Any]]]


class Tracing:
    """A running ``sowatch trace --json``."""

    def __init__(self, spawn: Any, *words: str) -> None:
        command = [sys.executable, "-m", "sowatch", "trace", "--json", "--interval", "0.2", *words]
        self.process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(self, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for line in self.process.stdout:
            found: dict[str, Any] = json.loads(line)
            if is_there(found):
                return found
        raise AssertionError(f"the trace ended: {self.process.stderr.read()}")

    def end(self) -> list[dict[str, Any]]:
        self.process.send_signal(signal.SIGINT)
        rest, errors = self.process.communicate(timeout=60)
        assert (self.process.returncode, errors) == (0, "")
        return [json.loads(line) for line in rest.splitlines()]


def call_until_seen(tracing: Tracing, caller: Caller, symbol: str) -> dict[str, Any]:
    """The first line of a symbol: it is attached by then."""
    import threading

    seen = threading.Event()

    def call() -> None:
        while not seen.is_set():
            caller.call(symbol)
            seen.wait(0.02)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        return tracing.until(lambda line: line["event"] == "trace" and line["symbol"] == symbol)
    finally:
        seen.set()
        thread.join()


def test_calls_of_a_running_and_of_a_later_process_are_told_by_process(
    spawn: Any, programs: Any, library: Any, place: Path
) -> None:
    path = library()
    before = Caller(spawn, programs["caller"], path)
    tracing = Tracing(spawn, f"{path}:plain")
    first = call_until_seen(tracing, before, "plain")
    assert (first["schema"], first["process"]["pid"], first["final"]) == (1, before.pid, False)
    assert first["library"]["path"] == str(path)
    later = Caller(spawn, programs["caller"], path)
    later.call("plain", times=7)
    line = tracing.until(lambda found: found["process"]["pid"] == later.pid and found["calls"] == 7)
    latency = line["latency_ns"]
    assert (latency["count"], sum(number for _, number in latency["buckets"])) == (7, 7)
    assert 0 < latency["p50"] <= latency["p99"]
    later.end()
    tracing.until(lambda found: found["process"]["pid"] == later.pid and found["final"])
    last = tracing.end()
    assert [(one["process"]["pid"], one["final"]) for one in last][-1:] == [(before.pid, True)]


def test_only_the_process_that_was_asked_for_is_counted(spawn: Any, programs: Any, library: Any) -> None:
    path = library()
    wanted, other = (Caller(spawn, programs["caller"], path) for _ in range(2))
    tracing = Tracing(spawn, f"{path}:plain", "--pid", str(wanted.pid))
    call_until_seen(tracing, wanted, "plain")
    other.call("plain", times=50)
    wanted.call("plain", times=3)
    assert {line["process"]["pid"] for line in tracing.end()} == {wanted.pid}


def test_a_library_with_a_hash_in_its_name_is_found_by_its_stem(
    spawn: Any, programs: Any, library: Any, place: Path
) -> None:
    path = library("libsowatchtest-3e69114b.so.1.2")
    caller = Caller(spawn, programs["caller"], path)
    tracing = Tracing(spawn, "libsowatchtest:plain", "--no-latency")
    line = call_until_seen(tracing, caller, "plain")
    assert line["latency_ns"]["count"] == 0
    tracing.end()


def test_what_cannot_be_attached_is_told_with_the_reason(spawn: Any, programs: Any, library: Any) -> None:
    path = library()
    caller = Caller(spawn, programs["caller"], path)
    tracing = Tracing(spawn, f"{path}:plain", f"{path}:plane", f"{path}:indirect")
    failed = {}
    while len(failed) < 2:
        line = tracing.until(lambda found: found["event"] == "attach_failed")
        failed[line["symbol"]] = line
    assert failed["plane"]["reason"] == "there is no such function (near: plain)"
    assert failed["indirect"]["reason"].startswith("it is indirect (IFUNC)")
    assert {line["permanent"] for line in failed.values()} == {True}
    call_until_seen(tracing, caller, "plain")
    tracing.end()


def uprobe_links(pid: int) -> int:
    """How many links on functions of files a process holds."""
    texts = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            texts.append(path.read_text(encoding="ascii"))
    return sum("probe_multi" in text for text in texts)


def test_the_table_shows_calls_rates_and_what_is_attached(
    spawn: Any, programs: Any, library: Any, deadline: Any, wait_until: Any
) -> None:
    path = library()
    caller = Caller(spawn, programs["caller"], path)
    command = [sys.executable, "-m", "sowatch", "trace", f"{path}:plain", f"{path}:nested", "--interval", "0.2"]
    tracing = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: uprobe_links(tracing.pid) == 2, 30, "entries and returns are attached")
    caller.call("plain", times=100)
    caller.call("nested", times=5)
    tracing.send_signal(signal.SIGINT)
    output, errors = tracing.communicate(timeout=deadline(60))
    assert (tracing.returncode, errors) == (0, "")
    head, *rows = output.splitlines()
    assert head.split() == ["CALLS", "RATE/S", "P50<", "P99<", "SYMBOL", "PID", "COMM", "CONTAINER", "LIBRARY"]
    found = {row.split()[4]: row.split() for row in rows[:2]}
    assert found["plain"][0] == "105"
    assert found["nested"][0] == "5"
    assert found["plain"][5:] == [str(caller.pid), "caller", "-", str(path)]
    assert rows[2] == "4 of 4 probes attached, 0 calls lost"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "nothing to trace"),
        (["libz"], 2, "is no LIB:SYMBOL"),
        (["libz:deflate", "--by", "moon"], 2, "unknown group 'moon'"),
        (["libz:deflate", "--interval", "0"], 2, "--interval is at least 0.1"),
        (["(:f"], 2, "bad pattern"),
        (["--list", "/nonexistent.so"], 1, "cannot open /nonexistent.so"),
        (["--list", "/dev/null"], 1, "is not a regular file"),
    ],
)
def test_bad_input_ends_with_the_next_step(words: list[str], code: int, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "trace", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_functions_of_a_file_are_listed(library: Any) -> None:
    path = library()
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "trace", "--list", str(path)], capture_output=True, text=True, check=True
    )
    assert {"plain", "recursive", "hidden"} <= set(done.stdout.split())
