"""`sowatch run`, and `watch --follow`: a command and all that it starts, on a terminal and in a pipe."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import strict
from support.printed import rest_of
from support.screen import Terminal

#: Of floods of others, as every watch has it.
LOSS = re.compile(r"[\d:.]{12} (lost|repaired)")

SOWATCH = Path(sysconfig.get_path("scripts")) / "sowatch"


def run_words(*options: str, script: str) -> list[str]:
    return [str(SOWATCH), "run", *options, "--", "sh", "-c", script]


def started_by(lines: Sequence[str], schema: Any) -> list[dict[str, Any]]:
    return [event for line in lines if (event := schema(line))["event"] in ("load", "unload")]


@pytest.fixture
def library(make_library: Any) -> Path:
    return Path(make_library("libfollowed.so"))


def test_a_command_is_watched_from_its_first_exec_with_all_that_it_starts_and_nobody_else(
    library: Path, tmp_path: Path, schema: Any, deadline: Any
) -> None:
    # Nothing of the shells between is wanted, so that nothing but their forks says whose the last one is.
    script = tmp_path / "inner.sh"
    script.write_text(f"LD_PRELOAD={library} sh -c 'exec cat /dev/null'\ntrue\n")
    words = run_words("--json", re.escape(str(library)), script=f"sh -c 'sh {script}; true' & wait; exit 7")
    outside = "while LD_PRELOAD=%s cat /dev/null; do :; done" % library  # noqa: UP031 - braces
    with subprocess.Popen(["sh", "-c", outside], start_new_session=True) as other:
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=deadline(60), check=False)
        finally:
            other.kill()
    lines = done.stdout.splitlines()

    assert done.returncode == 7
    found = started_by(lines, schema)
    assert len({event["process"]["pid"] for event in found}) == 1
    assert [(event["event"], event["cause"], event["process"]["comm"]) for event in found] == [
        ("load", "mmap", "sh"),
        ("unload", "exec", "sh"),
        ("load", "mmap", "cat"),
        ("unload", "exit", "cat"),
    ]
    assert [strict.loads(line)["event"] for line in (lines[0], lines[-1])] == ["ready", "stopped"]


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["no-such-command"], 127, "sowatch: cannot run 'no-such-command': No such file or directory. "),
        (["/dev/null"], 126, "sowatch: cannot run '/dev/null': Permission denied. "),
    ],
)
def test_the_exit_status_is_that_of_the_command_as_a_shell_has_it(
    command: list[str], code: int, said: str, tmp_path: Path, deadline: Any
) -> None:
    lines = tmp_path / "lines"
    words = [SOWATCH, "run", "nothing-has-this", "-o", lines, "--", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=deadline(60), check=False)

    assert done.returncode == code
    assert done.stdout == ""
    assert said in done.stderr
    written = [line for line in lines.read_text().splitlines() if not LOSS.match(line)]
    assert [line[13:].partition(":")[0] for line in written] == ["ready", "stopped"]


def test_lines_of_sowatch_and_of_the_command_come_as_they_are_written(
    library: Path, tmp_path: Path, deadline: Any
) -> None:
    script = f"cat; LD_PRELOAD={library} cat /dev/null; echo done >&2"
    words = run_words(re.escape(str(library)), script=script)
    done = subprocess.run(words, input="of stdin\n", capture_output=True, text=True, timeout=deadline(60), check=False)

    assert done.returncode == 0
    assert "done\n" in done.stderr
    written = [line for line in done.stdout.splitlines() if not LOSS.match(line)]
    shown = [re.sub(r"^[\d:.]{12} (?:([+-] \w+) +\d+)?", r"\1", line) for line in written]
    shown = [re.sub(" +", " ", line) for line in shown]
    assert shown[0].startswith("ready: ")
    assert shown[1:-1] == ["of stdin", f"+ mmap cat {library}", f"- exit cat {library}"]
    assert shown[-1].startswith("stopped: 1 load, 1 unload, ")


def test_a_command_that_cannot_be_watched_is_not_run(tmp_path: Path, deadline: Any) -> None:
    mark = tmp_path / "was-run"
    words = [SOWATCH, "run", "--proc-root", tmp_path, "--", "touch", mark]
    done = subprocess.run(words, capture_output=True, text=True, timeout=deadline(60), check=False)

    assert done.returncode not in (0, 127)
    assert done.stderr.startswith("sowatch: ")
    assert not mark.exists()


def test_without_a_command_it_says_where_one_goes() -> None:
    done = subprocess.run([SOWATCH, "run", "curl"], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr == "sowatch: no command given. Put it after two dashes: sowatch run -- COMMAND [ARGUMENT ...].\n"


def test_a_command_goes_on_though_nobody_reads_what_it_loads(library: Path, tmp_path: Path, deadline: Any) -> None:
    mark = tmp_path / "mark"
    script = f"read x; LD_PRELOAD={library} cat /dev/null; echo done > {mark}; exit 5"
    with subprocess.Popen(
        run_words(re.escape(str(library)), script=script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        assert "ready: " in running.stdout.readline()
        running.stdout.close()
        running.stdin.write("x\n")
        running.stdin.flush()
        assert running.wait(deadline(30)) == 5
    assert mark.read_text() == "done\n"


def test_a_command_is_not_run_if_its_lines_cannot_be_written(tmp_path: Path, deadline: Any) -> None:
    mark = tmp_path / "was-run"
    words = [SOWATCH, "run", "-o", "/dev/full", "--", "touch", mark]
    done = subprocess.run(words, capture_output=True, text=True, timeout=deadline(60), check=False)

    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert not mark.exists()


def test_a_command_goes_on_though_its_lines_can_be_written_no_longer(
    library: Path, tmp_path: Path, deadline: Any
) -> None:
    script = f"for n in $(seq 200); do LD_PRELOAD={library} cat /dev/null; done; exit 5"
    words = [SOWATCH, "run", "-o", tmp_path / "lines", re.escape(str(library)), "--", "sh", "-c", script]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=deadline(100),
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 5
    assert "File too large" in done.stderr


def test_what_a_signal_means_is_up_to_the_command(spawn: Any, deadline: Any) -> None:
    script = "trap 'echo got it; exit 9' TERM; echo up; while :; do sleep 0.1; done"
    running = spawn(run_words("nothing-has-this", script=script), stdout=subprocess.PIPE, text=True)
    while running.stdout.readline() != "up\n":
        pass
    running.send_signal(signal.SIGTERM)
    rest = rest_of(running, deadline(30))

    assert "got it\n" in rest
    assert "stopped: " in rest
    assert running.returncode == 9


def test_ctrl_c_reaches_the_command_once_and_the_terminal_is_its_own(deadline: Any) -> None:
    script = "trap 'n=$((n+1)); echo got $n' INT; echo up; until read x; do :; done; echo counted $n $x"
    words = run_words("nothing-has-this", script=script)
    with Terminal(words, columns=80, rows=20, timeout_s=deadline(60)) as terminal:
        terminal.wait_for(lambda lines: "up" in lines, "the command")
        terminal.press("\x03")
        terminal.wait_for(lambda lines: any("got 1" in line for line in lines), "the signal")
        terminal.press("word\n")
        terminal.wait_for(lambda lines: "counted 1 word" in lines, "the end")
        assert terminal.wait_for_end() == 0


def test_a_command_that_is_ended_while_it_waits_for_the_watch_ends_it(
    spawn: Any, wait_until: Any, deadline: Any
) -> None:
    running = spawn([SOWATCH, "run", "nothing-has-this", "--", "sleep", "1000"], stdout=subprocess.PIPE, text=True)

    def children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    command = wait_until(lambda: [pid for one in children(running.pid) for pid in children(one)], what="the fork")[0]
    os.kill(command, signal.SIGINT)
    stdout, _ = running.communicate(timeout=deadline(30))

    assert stdout.splitlines()[-1][13:].startswith("stopped: ")
    assert running.returncode == 130


def test_watch_follows_the_children_that_a_process_has_and_gets(
    library: Path, spawn: Any, schema: Any, deadline: Any
) -> None:
    parent = spawn(["sh", "-c", "sh; exit 0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(words: str) -> str:
        parent.stdin.write(words + "; echo done\n")
        parent.stdin.flush()
        return str(parent.stdout.readline())

    assert ask("true") == "done\n"  # the inner shell is there
    words = [SOWATCH, "watch", "--json", "--events", "load,unload", "--follow", re.escape(str(library))]
    feed = spawn([*words, "--pid", str(parent.pid)], stdout=subprocess.PIPE, text=True)
    assert schema(feed.stdout.readline())["event"] == "ready"
    subprocess.run(["true"], env={"LD_PRELOAD": str(library)}, check=True)
    assert ask(f"LD_PRELOAD={library} cat /dev/null") == "done\n"
    load, unload = schema(feed.stdout.readline()), schema(feed.stdout.readline())
    feed.send_signal(signal.SIGHUP)
    rest = rest_of(feed, deadline(30))

    assert (load["event"], load["process"]["comm"]) == ("load", "cat")
    assert (unload["event"], unload["cause"]) == ("unload", "exit")
    assert [strict.loads(line)["event"] for line in rest.splitlines()] == ["stopped"]
    assert feed.returncode == 0
