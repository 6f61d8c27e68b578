"""docs/reliability.md names tests that exist, and leaves out none of those that were written for it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
PAGE = TESTS.parent / "docs" / "reliability.md"
WRITTEN_FOR_IT = (
    "test_decoys.py",
    "test_files.py",
    "test_hostile.py",
    "lifecycle/test_libraries.py",
    "lifecycle/test_lifecycle.py",
)


def names_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def named() -> set[str]:
    return set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))


def test_every_test_that_is_named_exists() -> None:
    there = set().union(*(names_in(path) for path in TESTS.rglob("test_*.py")))
    assert named() - there == set()


def test_no_test_that_was_written_for_the_page_is_missing() -> None:
    written = set().union(*(names_in(TESTS / "kernel" / "engine" / name) for name in WRITTEN_FOR_IT))
    assert len(written) > 50
    assert written - named() == set()


def test_every_row_has_a_case_a_test_and_what_it_gives() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| case |")]
    assert len(rows) > 60
    for row in rows:
        case, test, gives = (cell.strip() for cell in row.strip("|").split("|"))
        assert case
        assert re.fullmatch(r"`test_\w+`", test), row
        assert gives


def test_no_test_has_two_rows() -> None:
    rows = re.findall(r"^\| .* \| `(test_\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(set(rows))
