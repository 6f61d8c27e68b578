"""A file system that takes requests and answers none: commands that answer once say so, answer the rest, and end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.hostile import SOWATCH
from support.printed import rest_of
from support.silent_fs import SilentFileSystem

pytestmark = pytest.mark.alone

OURS = r"/lib(silent|honest)\.so$"


@pytest.fixture
def silent(make_library: Any, tmp_path: Path) -> Iterator[SilentFileSystem]:
    """A process has mapped ``libsilent.so``, whose file system is silent, and ``libhonest.so``, which was replaced."""
    (tmp_path / "mnt").mkdir()
    honest = make_library("libhonest.so", exports=["tiny"])
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so", exports=["tiny"]), honest) as silent:
        make_library("libhonest.so.new").rename(honest)
        silent.fall_silent()
        yield silent


@pytest.fixture
def answer(silent: SilentFileSystem, deadline: Any) -> Any:
    """The lines of a command that has ended, and whose output has."""

    def run(*words: object) -> list[dict[str, Any]]:
        done = subprocess.run(
            [SOWATCH, *map(str, words)], capture_output=True, check=False, timeout=deadline(30), text=True
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("strategy", ["core", "prebuilt", "procfs"])
@pytest.mark.parametrize("words", [["list"], ["list", "--stale"]])
def test_list_ends_and_says_of_what_lies_there_that_it_is_unknown(
    silent: SilentFileSystem, answer: Any, strategy: str, words: list[str]
) -> None:
    lines = answer(*words, "--json", "--strategy", strategy, "--pid", silent.pid, OURS)

    found = {
        Path(line["library"]["path"]).name: (line["stale"], line["stale_reason"]) for line in lines if "library" in line
    }
    assert found == {
        "libsilent.so": ("unknown", "its file system does not answer"),
        "libhonest.so": ("replaced", None),
    }


@pytest.mark.parametrize("by", ["library", "process"])
def test_top_that_prints_once_ends_and_has_the_rest_of_the_table(
    silent: SilentFileSystem, answer: Any, by: str
) -> None:
    lines = answer("top", "--once", "--json", "--by", by, "--pid", silent.pid, OURS)

    if by == "process":
        assert [(line["libraries"], line["stale_libraries"], line["unknown_libraries"]) for line in lines] == [
            (2, 1, 1)
        ]
    else:
        assert {line["stale"] for line in lines} == {"unknown", "replaced"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("strategy", ["core", "prebuilt", "procfs"])
def test_a_watch_ends_when_it_is_told_to(
    silent: SilentFileSystem, spawn: Any, deadline: Any, strategy: str, number: signal.Signals
) -> None:
    words = ["watch", "--json", "--strategy", strategy, "--pid", str(silent.pid), OURS]
    watch = spawn([SOWATCH, *words], stdout=subprocess.PIPE, text=True)
    begun = list(iter_until(watch, "ready"))
    loads = [line for line in begun if line["event"] == "load"]
    # Its facts are not awaited for ever, and each load is there once.
    assert sorted(Path(line["library"]["path"]).name for line in loads) == ["libhonest.so", "libsilent.so"]
    watch.send_signal(number)
    rest, _ = watch.communicate(timeout=deadline(15))
    assert watch.returncode == 0
    assert json.loads(rest.splitlines()[-1])["event"] == "stopped"


def iter_until(command: subprocess.Popen[str], last: str) -> Iterator[dict[str, Any]]:
    """The events of a command up to the first of that kind."""
    assert command.stdout is not None
    for line in command.stdout:
        event = json.loads(line)
        yield event
        if event["event"] == last:
            return


def test_a_trace_ends_when_it_is_told_to(silent: SilentFileSystem, spawn: Any, deadline: Any) -> None:
    words = ["trace", "--json", "--pid", str(silent.pid), r"libsilent\.so:tiny", r"libhonest\.so:absent"]
    trace = spawn([SOWATCH, *words], stdout=subprocess.PIPE, text=True)
    assert trace.stdout is not None
    lines = [json.loads(trace.stdout.readline())]
    trace.send_signal(signal.SIGTERM)
    rest = rest_of(trace, deadline(15))
    lines += [json.loads(line) for line in rest.splitlines()]
    # Nothing was attached, and the one that does not answer is not waited for.
    failed = {Path(line["library"]["path"]).name: line["event"] for line in lines}
    assert failed["libhonest.so"] == "attach_failed"
    assert trace.returncode == 1, lines


@pytest.mark.parametrize("words", [["explain", "--rule", OURS], ["audit", OURS, "--pid"], ["list", OURS, "--pid"]])
def test_a_command_that_answers_once_ends_when_it_is_told_to(
    silent: SilentFileSystem, spawn: Any, deadline: Any, words: list[str]
) -> None:
    command = spawn([SOWATCH, *words, str(silent.pid)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert silent.asked.wait(deadline(20))
    command.send_signal(signal.SIGTERM)
    # Both pipes are closed, too, though a thread of it waits for the file system.
    command.communicate(timeout=deadline(9))
    assert command.returncode == -signal.SIGTERM


def test_run_ends_with_its_command_though_its_lines_can_be_written_no_more(
    silent: SilentFileSystem, make_library: Any, spawn: Any, tmp_path: Path, deadline: Any
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with SilentFileSystem(other, make_library("libtaken.so")) as taken:
        lines = f"/proc/{taken.pid}/root{taken.path}"
        words = ["run", "-o", lines, "nothing-has-this", "--", "sh", "-c", "echo up; read x; exit 7"]
        running = spawn([SOWATCH, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert running.stdout.readline() == b"up\n"
        assert Path(lines).read_text()[13:].startswith("ready: ")
        taken.fall_silent()
        _, said = running.communicate(b"x\n", timeout=deadline(30))
        assert taken.asked.is_set()
    assert running.returncode == 7
    assert b"the file system of its output does not answer" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_whose_output_cannot_be_opened_ends_when_it_is_told_to(
    silent: SilentFileSystem, spawn: Any, deadline: Any, number: signal.Signals
) -> None:
    lines = f"/proc/{silent.pid}/root{silent.path}"
    running = spawn([SOWATCH, "run", "-o", lines, "--", "true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert silent.asked.wait(deadline(20))
    running.send_signal(number)
    running.communicate(timeout=deadline(15))
    assert running.returncode == (-number if number == signal.SIGTERM else 130)


def test_explain_ends(silent: SilentFileSystem, answer: Any) -> None:
    (report,) = answer("explain", "--json", "--rule", OURS, silent.pid)

    (one,) = [one for one in report["mappings"] if re.search("libsilent", one["library"]["path"])]
    assert one["file"]["elf"] == "no_answer"
