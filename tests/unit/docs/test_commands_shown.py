"""Each `sowatch` command that README and docs show is one that the parser takes."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from itertools import takewhile

import pytest

from sowatch.cli._main import COMMANDS
from sowatch.cli._parser import Parser
from support.doc_blocks import ROOT, Block, blocks

_FOR_THE_SHELL = re.compile(r"[|&]|\d?[<>]")
COMMAND = re.compile(r"^(?:\$ )?(?:sudo )?(?:\.venv/bin/)?sowatch (?P<words>[a-z].*)$")


def shown() -> list[str]:
    """What follows `sowatch` on the lines of blocks that are for a shell, up to a pipe or redirection."""
    found = []
    lines = [f"sowatch {words}" for words in re.findall(r"`sowatch ([^`]+)`", (ROOT / "README.md").read_text("utf-8"))]
    for block in [*blocks(), Block("README.md", 0, "sh", "\n".join(lines))]:
        for line in block.text.splitlines() if block.language in ("", "sh", "console") else ():
            if match := COMMAND.match(line):
                words = shlex.split(match["words"], comments=True)
                found.append(shlex.join(takewhile(lambda word: not _FOR_THE_SHELL.match(word), words)))
    return sorted(set(found))


def test_there_are_commands_to_check() -> None:
    assert {line.split()[0] for line in shown()} >= {"watch", "list", "top", "audit", "explain", "doctor", "serve"}


@pytest.mark.parametrize("line", shown())
def test_a_command_that_a_page_shows_is_understood(line: str) -> None:
    name, *words = shlex.split(line)
    assert name in COMMANDS
    parser = Parser(prog=f"sowatch {name}", description=None)
    import_module(f"sowatch.cli.{name}").configure(parser)

    parser.parse_words(words)
