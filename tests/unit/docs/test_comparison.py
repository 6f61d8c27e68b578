"""What docs/comparison.md says of sowatch rests on tests, and each table is whole."""

from __future__ import annotations

from support.doc_blocks import ROOT

PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


def tables() -> list[list[list[str]]]:
    """The rows of each table, cell by cell; the first is its head."""
    found: list[list[list[str]]] = [[]]
    for line in PAGE.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[row for row in table if set(row) != {"---"}] for table in found if table]


def test_every_row_of_a_table_has_all_cells() -> None:
    assert len(tables()) == 4
    for head, *rows in tables():
        assert {len(row) for row in rows} == {len(head)}


def test_each_case_of_sowatch_has_a_test() -> None:
    cases, tests, *_ = tables()
    assert [row[0] for row in cases[1:]] == [row[0] for row in tests[1:]]
    assert {row[1] for row in cases[1:]} == {"yes"}
    assert all(row[1].startswith("`test_") for row in tests[1:])


def test_every_feature_of_sowatch_is_answered() -> None:
    features, fleets = tables()[2:]
    assert all(row[1] for row in [*features[1:], *fleets[1:]])
