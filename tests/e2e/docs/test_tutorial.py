"""The commands of docs/trace.md's tutorial do, in an empty directory, what the page shows."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.doc_blocks import blocks

#: What differs from run to run: numbers, times, hexadecimal places, paths; and the bars of a table.
WORD = re.compile(r"[A-Za-z_]{2,}")
CHANGES = re.compile(r"/[^\s\"]+|0x[0-9a-f]+|\b[0-9a-f]{12}\b|[0-9.]+(?:[mun]?s)?\b")


def words(text: str) -> set[str]:
    return set(WORD.findall(CHANGES.sub(" ", text)))


@pytest.fixture
def shell(place: Path) -> Path:
    """A directory, and before the PATH one in which `sudo` and `sowatch` are those of this checkout."""
    (place / "bin").mkdir()
    sowatch = place / "bin" / "sowatch"
    sowatch.write_text(f'#!/bin/sh\nexec {sys.executable} -m sowatch "$@"\n', encoding="ascii")
    sudo = place / "bin" / "sudo"
    sudo.write_text('#!/bin/sh\nexec "$@"\n', encoding="ascii")
    for one in (sowatch, sudo):
        one.chmod(0o755)
    return place


def has_ended(pid: int) -> bool:
    """Whether it is gone, or only its parent has not noticed, which is nobody of ours."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_each_command_of_the_tutorial_shows_what_the_page_shows(shell: Path, wait_until: Any) -> None:
    if shutil.which("cc") is None:
        pytest.fail("this test needs a C compiler; run scripts/setup --for test")
    steps: list[tuple[str, str | None]] = []
    for block in blocks():
        if block.page == "docs/trace.md" and block.language == "sh":
            steps.append((block.text, None))
        elif block.page == "docs/trace.md" and block.language == "text":
            steps[-1] = (steps[-1][0], block.text)
    assert len(steps) >= 7
    try:
        for command, shown in steps:
            # Into files: the program that goes on in the background would hold a pipe open.
            with (shell / "out").open("wb") as out, (shell / "errors").open("wb") as err:
                done = subprocess.run(
                    ["sh", "-c", f'PATH="$PWD/bin:$PATH"\n{command}'],
                    cwd=shell,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    check=False,
                )
            output = (shell / "out").read_text(encoding="utf-8")
            errors = (shell / "errors").read_text(encoding="utf-8")
            assert (done.returncode, errors) == (0, ""), command
            if shown is not None:
                assert words(shown) <= words(output), command
    finally:
        pid = int((shell / "till.pid").read_text())
        with contextlib.suppress(ProcessLookupError):  # the last command ends it
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: has_ended(pid), what="the program has ended")
