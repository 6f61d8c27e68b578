"""`sowatch trace` as it is typed: on copies of libraries in the test's own directory, called by its own processes."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.callers import Caller
from support.printed import printed
from support.programs import build

TraceLines = Callable[..., list[dict[str, Any]]]


class Tracing:
    """A running ``sowatch trace --json``."""

    def __init__(self, spawn: Any, *words: str) -> None:
        command = [sys.executable, "-m", "sowatch", "trace", "--json", "--interval", "0.2", *words]
        self.process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(self, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for line in self.process.stdout:
            found = printed(line)
            if is_there(found):
                return found
        raise AssertionError(f"the trace ended: {self.process.stderr.read()}")

    def end(self) -> list[dict[str, Any]]:
        self.process.send_signal(signal.SIGINT)
        # Not communicate(): what `until` has read ahead is in the stream's buffer.
        rest, errors = self.process.stdout.read(), self.process.stderr.read()
        assert (self.process.wait(timeout=60), errors) == (0, "")
        return [printed(line) for line in rest.splitlines()]


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
    # The command waits for a process that does the work.
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    for path in (path for one in (pid, *workers) for path in Path(f"/proc/{one}/fdinfo").iterdir()):
        with contextlib.suppress(OSError):
            texts.append(path.read_text(encoding="ascii"))
    # The attacher's self-test is a link, too: on a function of our own binding.
    return sum("probe_multi" in text and "_libbpf" not in text for text in texts)


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
        (["libz:f(double)"], 2, "registers that a probe cannot read"),
        (["libz:f", "--stacks", "0"], 2, "not a number from 1 to 1000"),
        (["libz:f", "--kind", "moon"], 2, "unknown kind 'moon'"),
        (["--list", "no-such-library-anywhere"], 1, "no process has 'no-such-library-anywhere' mapped"),
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


@pytest.fixture
def speaker(place: Path) -> Callable[..., Path]:
    """``speaker(*flags)`` is a copy of tests/programs/speaker.c as a program of the test's own."""

    def make(*flags: str) -> Path:
        made = build("speaker", place / "built", flags=["-fno-omit-frame-pointer", "-Wl,--build-id", *flags])
        program = Path(shutil.copyfile(made, place / "speaker"))
        program.chmod(0o755)
        return program

    return make


class Speaking:
    """A running speaker."""

    def __init__(self, spawn: Any, program: Path) -> None:
        self.process = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = int(self.process.stdout.readline().split()[1])

    def does(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def does_until_seen(tracing: Tracing, speaking: Speaking, word: str, event: str) -> dict[str, Any]:
    import threading

    seen = threading.Event()

    def work() -> None:
        while not seen.is_set():
            speaking.does(word)
            seen.wait(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        return tracing.until(lambda line: line["event"] == event)
    finally:
        seen.set()
        thread.join()


@pytest.mark.parametrize("flags", [[], ["-static"], ["-static-pie", "-fPIE"]], ids=["dynamic", "static", "static-pie"])
def test_calls_of_a_main_program_are_told_with_arguments_and_result(spawn: Any, speaker: Any, flags: list[str]) -> None:
    program = speaker(*flags)
    speaking = Speaking(spawn, program)
    tracing = Tracing(spawn, f"{program}:say(str:16, long, str) -> int", "--kind", "executable")
    line = does_until_seen(tracing, speaking, "say hello", "call")
    assert (line["symbol"], line["arguments"], line["result"]) == ("say", ["hello", 5, {"unreadable": "0x10"}], 5)
    assert (line["process"]["pid"], line["library"]["kind"]) == (speaking.pid, "executable")
    assert line["returned"]
    assert line["duration_ns"] > 0
    tracing.end()


def test_the_lines_of_calls_stand_before_the_table(spawn: Any, speaker: Any, deadline: Any, wait_until: Any) -> None:
    program = speaker()
    speaking = Speaking(spawn, program)
    command = [sys.executable, "-m", "sowatch", "trace", f"{program}:say(str:3, long, _) -> int", "--interval", "0.2"]
    tracing = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: uprobe_links(tracing.pid) == 2, 30, "entries and returns are attached")
    speaking.does('say "\\')
    speaking.does("say hello")
    tracing.send_signal(signal.SIGINT)
    output, errors = tracing.communicate(timeout=deadline(60))
    assert (tracing.returncode, errors) == (0, "")
    first, second, head, row, *_ = output.splitlines()
    assert first.split(maxsplit=1)[1].startswith(f'{speaking.pid} speaker say("\\"\\\\", 2) = 2 <')
    assert second.split(maxsplit=1)[1].startswith(f'{speaking.pid} speaker say("hel"..., 5) = 5 <')
    assert (head.split()[:2], row.split()[0]) == (["CALLS", "RATE/S"], "2")


def test_callers_have_names_also_when_their_process_and_its_file_are_gone(
    spawn: Any, speaker: Any, wait_until: Any
) -> None:
    program = speaker()
    speaking = Speaking(spawn, program)
    tracing = Tracing(spawn, f"{program}:say", "--stacks", "3", "--interval", "1.5")
    # The first figures come late enough for the process to be gone by then.
    wait_until(lambda: uprobe_links(tracing.process.pid) == 2, 30, "entries and returns are attached")
    for _ in range(5):
        speaking.does("say x")
    speaking.end()
    program.unlink()
    line = tracing.until(lambda found: found["event"] == "stack")
    assert (line["symbol"], line["calls"]) == ("say", 5)
    assert [frame["symbol"] for frame in line["frames"][:2]] == ["relay", "main"]
    assert {frame["path"] for frame in line["frames"][:2]} == {str(program)}
    assert len(line["frames"][0]["build_id"]) == 40
    tracing.end()


def test_each_of_two_targets_of_one_file_is_traced(spawn: Any, programs: Any, library: Any) -> None:
    path = library()
    caller = Caller(spawn, programs["caller"], path)
    tracing = Tracing(spawn, f"{path}:plain", f"{path.name}$:nested(int)")
    call_until_seen(tracing, caller, "plain")
    caller.call("nested", 4)
    line = tracing.until(lambda found: found["event"] == "call")
    assert (line["symbol"], line["arguments"], line["returned"]) == ("nested", [4], False)
    tracing.end()


def test_the_same_build_under_other_names_is_one_row_by_build(
    spawn: Any, programs: Any, library: Any, deadline: Any, wait_until: Any
) -> None:
    callers = [Caller(spawn, programs["caller"], library(f"libbuild{number}.so")) for number in range(3)]
    command = [sys.executable, "-m", "sowatch", "trace", r"libbuild\d:plain", "--by", "build", "--no-latency"]
    tracing = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: uprobe_links(tracing.pid) == 3, 30, "each file is attached")
    for caller in callers:
        caller.call("plain", times=7)
    tracing.send_signal(signal.SIGINT)
    output, _ = tracing.communicate(timeout=deadline(60))
    head, row, _ = output.splitlines()
    assert head.split() == ["CALLS", "RATE/S", "SYMBOL", "BUILD", "ID"]
    assert (row.split()[0], row.split()[2], len(row.split()[3])) == ("21", "plain", 12)


def test_a_library_that_nobody_has_is_said(spawn: Any) -> None:
    command = [sys.executable, "-m", "sowatch", "trace", "libnobodyhasthis:f", "--duration", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no process had 'libnobodyhasthis' mapped: nothing of it was traced. See: sowatch list." in done.stderr


def test_a_trace_of_nothing_but_functions_that_are_not_there_fails(spawn: Any, programs: Any, library: Any) -> None:
    path = library()
    Caller(spawn, programs["caller"], path)
    command = [sys.executable, "-m", "sowatch", "trace", f"{path}:plane", "--duration", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"not attached: {path}: plane: " in done.stdout
    assert "there is no such function (near: plain)" in done.stdout


def test_the_functions_of_what_is_mapped_are_listed_by_stem(spawn: Any, programs: Any, library: Any) -> None:
    path = library("libsowatchlist-3e69114b.so.1")
    Caller(spawn, programs["caller"], path)
    command = [sys.executable, "-m", "sowatch", "trace", "--list", "libsowatchlist", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {line["symbol"]: line for line in map(printed, done.stdout.splitlines())}
    assert {"plain", "hidden"} <= set(found)
    assert found["plain"]["library"]["path"] == str(path)


def test_of_several_files_that_are_listed_one_that_cannot_be_traced_is_named_and_the_rest_is_listed(
    spawn: Any, programs: Any, library: Any
) -> None:
    path = library("libsowatchmany.so.1")
    other = path.with_name("libsowatchmany-0.so")  # comes first
    other.write_bytes(b"text" * 1024)
    Caller(spawn, programs["caller"], path)
    words = ["trace", "--kind", "library", "--kind", "other", "--list"]
    command = [sys.executable, "-m", "sowatch", *words]
    with other.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_EXEC):
        many = subprocess.run([*command, "libsowatchmany"], capture_output=True, text=True, check=False)
        alone = subprocess.run([*command, other.name], capture_output=True, text=True, check=False)
    assert (many.returncode, alone.returncode, alone.stdout) == (0, 1, "")
    assert f"{path} " in many.stdout
    assert {"plain", "hidden"} <= set(many.stdout.split())
    for done in (many, alone):
        assert f"{other} cannot be traced: it is no ELF file." in done.stderr
        assert done.stderr.count("\n") == 1
