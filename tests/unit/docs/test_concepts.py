"""What docs/concepts.md and the how-to pages say of times, causes and strategies is what the code has."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest

from sowatch.agent.settings import Settings
from sowatch.model.literals import STRATEGIES, LoadCause, UnloadCause
from sowatch.uprobes import Attacher
from support.doc_blocks import ROOT

PAGE = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    text = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert text
    return text


def test_causes_are_those_of_events() -> None:
    rows = [row.strip("|").split("|") for row in section("Load and unload").splitlines() if row.startswith("| ")][1:]
    loads, unloads = ({name for row in rows for name in re.findall(r"`(\w+)`", row[column])} for column in (1, 2))
    assert loads == set(get_args(LoadCause))
    assert unloads == set(get_args(UnloadCause))


def test_strategies_are_those_that_there_are() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", section("Strategies"), re.MULTILINE)) == set(STRATEGIES) - {"auto"}


@pytest.mark.parametrize(
    ("page", "words", "seconds"),
    [
        ("concepts.md", "does it every five minutes", Settings().audit_interval_s / 300),
        ("concepts.md", "verified every ten seconds", inspect.signature(Attacher).parameters["verify_s"].default / 10),
        ("how-to/restart-after-upgrade.md", "with the disk every ten seconds", Settings().stale_interval_s / 10),
    ],
)
def test_times_are_the_defaults(page: str, words: str, seconds: float) -> None:
    assert words in " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    assert seconds == 1
