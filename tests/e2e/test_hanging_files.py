"""A file system that takes requests and answers none: commands that answer once say so, answer the rest, and end."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.hostile import SOWATCH
from support.silent_fs import SilentFileSystem

OURS = r"/lib(silent|honest)\.so$"


@pytest.fixture
def silent(make_library: Any, tmp_path: Path) -> Iterator[SilentFileSystem]:
    """A process has mapped ``libsilent.so``, whose file system is silent, and ``libhonest.so``, which was replaced."""
    (tmp_path / "mnt").mkdir()
    honest = make_library("libhonest.so")
    with SilentFileSystem(tmp_path / "mnt", make_library("libserved.so"), honest) as silent:
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

    found = {Path(line["library"]["path"]).name: (line["stale"], line["stale_reason"]) for line in lines}
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


def test_explain_ends(silent: SilentFileSystem, answer: Any) -> None:
    (report,) = answer("explain", "--json", "--rule", OURS, silent.pid)

    (one,) = [one for one in report["mappings"] if re.search("libsilent", one["library"]["path"])]
    assert one["file"]["elf"] == "no_answer"
