"""docs/reliability.md names tests that exist, and leaves out none of those that were written for it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
PAGE = TESTS.parent / "docs" / "reliability.md"
HTTP_PAGE = TESTS.parent / "docs" / "http.md"
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
    assert (named() | set(http_faults().values())) - there == set()


def http_faults() -> dict[str, str]:
    """By fault of others the test that would find it here."""
    section = HTTP_PAGE.read_text(encoding="utf-8").partition("## Faults of others\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return {fault.strip(): test.strip(" `") for _, fault, test in rows}


def test_each_fault_of_other_tools_that_read_tls_has_a_test_of_its_own() -> None:
    faults = http_faults()
    assert len(faults) == 39
    assert len(set(faults.values())) == 39


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
