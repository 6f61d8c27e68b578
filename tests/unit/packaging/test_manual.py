"""The man pages and completions that tools/manual.py makes: no option is missing, and bash really completes."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

import manual
from sowatch.cli._main import COMMANDS, command_parser

PAGES = manual.man_pages("1.2.3")
COMPLETIONS = manual.completions()


def options(command: str) -> list[str]:
    """The long options of a command that its help shows; the page leaves out --help."""
    _, parser = command_parser(command)
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return [name for action in shown for name in action.option_strings if name not in ("-h", "--help")]


def test_each_command_has_a_page_and_the_first_one_names_them_all() -> None:
    assert list(PAGES) == ["sowatch.1", *(f"sowatch-{name}.1" for name in COMMANDS)]
    for name in COMMANDS:
        assert f"\\fBsowatch\\-{name}\\fR(1)" in PAGES["sowatch.1"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_has_every_option_of_its_command_and_its_name(command: str) -> None:
    page = PAGES[f"sowatch-{command}.1"]
    for option in options(command):
        escaped = option.replace("-", "\\-")
        assert f"\\fB{escaped}\\fR" in page, option
    assert page.startswith(f'.TH SOWATCH\\-{command.upper()} "1"')
    assert '"sowatch 1.2.3"' in page.splitlines()[0]
    assert f"sowatch\\-{command} \\- " in page


@pytest.mark.parametrize("name", PAGES)
def test_no_line_of_text_is_taken_for_a_request_of_roff(name: str) -> None:
    known = {"TH", "SH", "TP", "B", "nf", "fi"}
    requests = [line.split()[0][1:] for line in PAGES[name].splitlines() if line.startswith(".")]
    assert set(requests) <= known
    assert not [line for line in PAGES[name].splitlines() if line.startswith("'")]
    assert requests.count("nf") == requests.count("fi")


def test_examples_are_lines_of_their_own() -> None:
    page = PAGES["sowatch-watch.1"].replace("\\-", "-")
    examples = page[page.index(".SH EXAMPLES") :]
    assert "\n.nf\n  sowatch watch                                  every shared library\n" in examples


@pytest.mark.parametrize("shell", COMPLETIONS)
@pytest.mark.parametrize("command", COMMANDS)
def test_completions_of_each_shell_have_every_command_and_option(shell: str, command: str) -> None:
    text = COMPLETIONS[shell]
    assert command in text
    for option in options(command):
        # fish has them without their dashes.
        assert (f"-l {option[2:]}" if shell == "fish" and option.startswith("--") else option) in text, option


def complete(tmp_path: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words, as it does after TAB."""
    (tmp_path / "sowatch").write_text(COMPLETIONS["bash"])
    script = """
        source "$1"; shift
        function_name=$(complete -p sowatch | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        "$function_name" sowatch "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = ["bash", "--norc", "-c", script, "bash", str(tmp_path / "sowatch"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    return {line for line in done.stdout.splitlines() if line}


def test_bash_completes_commands(tmp_path: Path) -> None:
    assert complete(tmp_path, "sowatch", "") >= set(COMMANDS)
    assert complete(tmp_path, "sowatch", "wa") == {"watch"}


def test_bash_completes_the_options_of_a_command(tmp_path: Path) -> None:
    assert complete(tmp_path, "sowatch", "list", "--st") == {"--stale", "--strategy"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("watch", "--strategy", "pr"), {"procfs", "prebuilt"}),
        (("list", "--by", "u"), {"unit"}),
        (("http", "--side", ""), {"client", "server"}),
        (("watch", "--kind", "exe"), {"executable"}),
    ],
)
def test_bash_completes_values(tmp_path: Path, words, offered: set[str]) -> None:
    assert complete(tmp_path, "sowatch", *words) == offered


def test_bash_completes_files_where_an_option_takes_one(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    assert "config.toml" in complete(tmp_path, "sowatch", "serve", "--config", "conf")


@pytest.mark.parametrize("command", ["list", "top", "trace"])
def test_each_group_that_is_offered_is_one_that_the_command_takes(command: str) -> None:
    from sowatch.cli import _main

    help_text = command_parser(command)[1].format_help()
    for word in manual._BY[command]:
        assert word in help_text, f"{_main.COMMANDS[command]}"
