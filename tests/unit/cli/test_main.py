"""`sowatch` itself: its help, and how each error becomes one line and an exit code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sowatch import cli
from sowatch.cli import _main
from sowatch.model.errors import NotPermitted, SowatchError, UsageError

# --- help and version ---------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_names_every_command_with_the_first_line_of_its_file(
    option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([option]) == 0
    stdout, stderr = capfd.readouterr()

    width = max(map(len, _main.COMMANDS))
    for name in _main.COMMANDS:
        module = importlib.import_module(f"sowatch.cli.{name}")
        assert f"  {name:<{width}}  {module.__doc__.splitlines()[0]}\n" in stdout
    assert stderr == ""


@pytest.mark.parametrize("name", _main.COMMANDS)
def test_the_docstring_of_a_command_is_its_help(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    stdout, stderr = capfd.readouterr()

    assert importlib.import_module(f"sowatch.cli.{name}").__doc__.strip() in stdout
    assert stdout.startswith(f"usage: sowatch {name} ")
    assert stderr == ""


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0

    assert capfd.readouterr().out.startswith("sowatch")


def test_help_is_a_command_too(capfd: pytest.CaptureFixture[str]) -> None:
    shown = [
        (cli.main(words), capfd.readouterr().out)
        for words in (["help"], ["--help"], ["help", "list"], ["list", "--help"], ["-V"], ["--version"])
    ]
    assert shown[0::2] == shown[1::2]
    assert [code for code, _ in shown] == [0] * 6


@pytest.mark.parametrize("words", [["--help"], ["watch", "--help"], ["list", "--help"], ["watch", "("]])
def test_neither_help_nor_wrong_usage_imports_what_is_heavy(words: list[str]) -> None:
    code = (
        "import sys; from sowatch.cli import main; main(sys.argv[1:])\n"
        "heavy = {'rich', 'ctypes', 'cffi', '_cffi_backend', 'elftools', 'sowatch.watcher.watcher', 'sowatch.bpf'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)

    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["watch", "list", "top", "audit", "explain"])
def test_who_asks_no_agent_imports_nothing_that_asks_one(command: str) -> None:
    code = (
        f"import sys; import sowatch.cli.{command}, sowatch.watcher.watcher\n"
        "print(sorted({'http', 'email', 'ssl', 'sowatch.cli._client'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- errors -------------------------------------------------------------------------------------


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(_main, "_dispatch", fail)


def test_an_unexpected_error_is_one_line_that_says_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SOWATCH_TRACEBACK", raising=False)
    failing_with(ValueError("first\nsecond"), monkeypatch)

    assert cli.main(["watch"]) == 1
    assert capfd.readouterr().err == (
        "sowatch: internal error: ValueError: first\\nsecond. Please report it with the output of "
        "`sowatch doctor` and of this command under SOWATCH_TRACEBACK=1.\n"
    )


def test_the_traceback_is_shown_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOWATCH_TRACEBACK", "1")
    failing_with(ValueError("broken"), monkeypatch)

    assert cli.main(["watch"]) == 1
    stderr = capfd.readouterr().err
    assert "Traceback (most recent call last)" in stderr
    assert stderr.endswith("ValueError: broken\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(SowatchError("cannot."), 1), (UsageError("wrong."), 2), (NotPermitted("what", "missing", "Do this."), 3)],
)
def test_an_error_ends_with_its_own_exit_code(
    error: SowatchError, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing_with(error, monkeypatch)

    assert cli.main(["watch"]) == code
    assert capfd.readouterr().err == f"sowatch: {error}\n"


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    failing_with(KeyboardInterrupt(), monkeypatch)

    assert cli.main(["list"]) == 130
    assert capfd.readouterr().err == "sowatch: interrupted before it was done.\n"


def sowatch(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sowatch", *words], stderr=subprocess.PIPE, text=True, check=False, **options
    )


def test_a_closed_stdout_is_an_error_of_one_line() -> None:
    done = sowatch("watch", preexec_fn=lambda: os.close(1))

    assert done.returncode == 1
    assert done.stderr == "sowatch: standard output is closed. Redirect it to a file, a pipe or /dev/null.\n"


def test_a_closed_stderr_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "--help"], stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), check=False
    )

    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: sowatch")


def test_a_full_disk_is_an_error_of_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = sowatch("--help", stdout=full)

    assert done.returncode == 1
    assert done.stderr == (
        "sowatch: cannot write to standard output: No space left on device. Give it somewhere that takes the data.\n"
    )


def test_a_pipe_that_nobody_reads_ends_the_help_quietly() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = sowatch("--help", stdout=write_fd)
    os.close(write_fd)

    assert (done.returncode, done.stderr) == (0, "")
