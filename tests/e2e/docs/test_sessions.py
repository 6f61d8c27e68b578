"""What the pages show to be typed does, in an empty directory, what they show."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.doc_blocks import Block
from support.screen import Terminal
from support.sessions import Shell, Step, missing_lines, pages, steps, steps_of

USER_OF_LIBSSL = "import ssl, sys; print('ready', flush=True); sys.stdin.read()"

#: The commands of a page together.
pytestmark = pytest.mark.timeout(300)


def test_there_are_pages_with_sessions() -> None:
    assert {"README.md", "docs/start.md", "docs/trace.md"} <= set(pages())


@pytest.mark.parametrize("page", pages())
def test_each_command_of_a_page_shows_what_the_page_shows(page: str, place: Path, spawn: Any, deadline: Any) -> None:
    if shutil.which("cc") is None:
        pytest.fail("this test needs a C compiler; run scripts/setup --for test")
    # Pages show what is mapped when a watch begins: by this process.
    user = spawn([sys.executable, "-c", USER_OF_LIBSSL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout.readline() == "ready\n"
    with Shell(place, deadline(60)) as shell:
        todo = iter(steps(page))
        for step in todo:
            if step.is_interrupted:
                beside(step, next(todo), shell, deadline)
                continue
            output = shell.type(step.typed)
            assert missing_lines(step.shown, output) == [], f"{step} wrote:\n{output}"


def beside(first: Step, second: Step, shell: Shell, deadline: Any) -> None:
    """Types the second command while the first one runs in a terminal, until that shows what the page shows."""
    command = shell.elsewhere(first.typed)
    with Terminal(command, columns=160, rows=500, timeout_s=deadline(30)) as terminal:
        terminal.wait_for(lambda lines: any("ready: " in line for line in lines), f"that {first} is ready")
        shell.type(second.typed)
        terminal.wait_for(lambda lines: not missing_lines(first.shown, "\n".join(lines)), f"all of {first}")
        terminal.press("\x03")
        assert terminal.wait_for_end() == 0


def block(language: str, text: str) -> Block:
    return Block("a.md", 1, language, text)


def test_a_console_block_has_commands_with_what_they_show() -> None:
    first, second = steps_of([block("console", "$ cat > x <<END\n> one\n>\n> END\n$ cat x\none\n\n")])
    assert (first.typed, first.shown) == ("cat > x <<END\none\n\nEND", ())
    assert (second.typed, second.shown) == ("cat x", ("one", ""))


def test_a_script_has_its_output_in_the_block_below() -> None:
    (step,) = steps_of([block("sh", "echo one\n"), block("text", "one\n")])
    assert (step.typed, step.shown, step.is_interrupted) == ("echo one\n", ("one",), False)


def test_a_session_that_is_interrupted_goes_on_meanwhile() -> None:
    first, second = steps_of([block("console", "$ tail -f x\none\n^Cbye\n"), block("console", "$ echo one\n")])
    assert (first.shown, first.is_interrupted, second.is_interrupted) == (("one", "bye"), True, False)


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("12:00:01.5 + mmap  42 python3  /usr/lib/libssl.so.3", "02:31:36.196 + mmap  7 python3  /lib64/libssl.so.1.1"),
        ("3", "3"),
        ("301 calls of f by", "12 calls of f by"),
        ("...", "anything"),
    ],
)
def test_numbers_times_and_directories_may_differ(shown: str, output: str) -> None:
    assert missing_lines([shown], output) == []


@pytest.mark.parametrize(
    ("shown", "output"),
    [
        ("1 + mmap  42 python3  /usr/lib/libssl.so.3", "1 - mmap  42 python3  /usr/lib/libssl.so.3"),
        ("1 + mmap  42 python3  /usr/lib/libssl.so.3", "1 + mmap  42 python3  /usr/lib/libz.so.3"),
        ("1 + mmap  42 python3  /usr/lib/libssl.so.3", "1 + mmap  42\npython3  /usr/lib/libssl.so.3"),
        ("3", "4"),
        ("no such function", ""),
    ],
)
def test_words_names_and_lines_may_not(shown: str, output: str) -> None:
    assert missing_lines([shown], output) == [shown]


def test_a_shell_keeps_its_state_and_reports_a_status(tmp_path: Path, deadline: Any) -> None:
    with Shell(tmp_path, deadline(20)) as shell:
        assert shell.type("f() { sh -c 'exit 7'; }; x=5; sleep 600 & f") == ""
        assert shell.type("echo $? $x; read line || echo nobody; kill $!") == "7 5\nnobody\n"
