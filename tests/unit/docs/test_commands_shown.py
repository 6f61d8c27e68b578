"""Each `sowatch` command that README and docs show is one that the parser takes."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import pytest

from sowatch.cli._main import COMMANDS
from sowatch.cli._parser import Parser
from support.doc_blocks import blocks

COMMAND = re.compile(r"^(?:\$ )?(?:sudo )?(?:\.venv/bin/)?sowatch (?P<words>[a-z].*)$")


def shown() -> list[str]:
    """What follows `sowatch` on the lines of blocks that are for a shell, up to a pipe."""
    found = []
    for block in blocks():
        for line in block.text.splitlines() if block.language in ("", "sh", "console") else ():
            if match := COMMAND.match(line):
                words = shlex.split(match["words"], comments=True)
                found.append(shlex.join(words[: words.index("|")] if "|" in words else words))
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
