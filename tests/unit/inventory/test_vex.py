"""Statements of OpenVEX about findings: which they change, and which they leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sowatch.inventory.vulnerabilities import Vulnerabilities, load_vulnerabilities
from sowatch.model.errors import SowatchError
from support.advisories import advisory, debian, statement, statuses, write_tree, write_vex

BUILD_ID = "ab" * 20


def with_vex(tmp_path: Path, *statements: Any, advisories: Sequence[Any] = ()) -> Vulnerabilities:
    tree = write_tree(
        tmp_path / "osv", advisories or [advisory("A-1", ranges="introduced 0", aliases=["CVE-1900-0001"])]
    )
    return load_vulnerabilities([str(tree)], vex=[str(write_vex(tmp_path / "vex.json", *statements))])


PURL = "pkg:deb/debian/liblamp1"


@pytest.mark.parametrize(
    ("status", "further", "reason"),
    [
        (
            "not_affected",
            {"justification": "vulnerable_code_not_present"},
            "VEX: not_affected, vulnerable_code_not_present",
        ),
        ("not_affected", {"impact_statement": "it is off"}, "VEX: not_affected, it is off"),
        ("fixed", {}, "VEX: fixed"),
        ("under_investigation", {"status_notes": "ask again"}, "VEX: under_investigation, ask again"),
        ("affected", {"action_statement": "restart it"}, "VEX: affected, restart it"),
    ],
)
def test_a_statement_changes_a_finding_and_says_why(tmp_path: Path, status: str, further: Any, reason: str) -> None:
    (found,) = with_vex(tmp_path, statement("CVE-1900-0001", status, {"@id": PURL}, **further)).findings(debian("1-1"))
    assert (found.status, found.id, found.reason) == (status, "CVE-1900-0001", reason)


@pytest.mark.parametrize(
    ("product", "applies"),
    [
        ({"@id": "pkg:deb/debian/liblamp1@1-1"}, True),
        ({"@id": "pkg:deb/debian/liblamp1@1-2"}, False),
        ({"@id": "pkg:deb/debian/liblamp1@1-1?arch=amd64"}, True),
        ({"@id": "pkg:deb/debian/liblamp1@1-1?arch=arm64"}, False),
        ({"@id": "pkg:deb/debian/liblamp1?distro=debian-12"}, True),
        ({"@id": "pkg:deb/debian/lamp?arch=source"}, True),  # by its source package
        ({"@id": "pkg:deb/debian/lamp@1-1"}, True),
        ({"@id": "pkg:deb/ubuntu/liblamp1"}, False),
        ({"@id": "https://x.example/1", "identifiers": {"purl": "pkg:deb/debian/liblamp1"}}, True),
        ("pkg:deb/debian/liblamp1", True),
        ({"@id": "https://x.example/1"}, False),
        # A part of the program that the process runs.
        ({"@id": "pkg:deb/debian/server", "subcomponents": [{"@id": "pkg:deb/debian/liblamp1"}]}, True),
        ({"@id": "pkg:deb/debian/server", "subcomponents": [{"@id": "pkg:deb/debian/other"}]}, False),
        ({"@id": "pkg:deb/debian/another", "subcomponents": [{"@id": "pkg:deb/debian/liblamp1"}]}, False),
        # Which image a process is of is not known.
        ({"@id": "pkg:oci/image@sha256%3Aabc", "subcomponents": [{"@id": "pkg:deb/debian/liblamp1"}]}, False),
        ({"@id": "pkg:deb/debian/server"}, False),
    ],
)
def test_a_statement_is_about_what_its_products_name(tmp_path: Path, product: Any, applies: bool) -> None:
    found = with_vex(tmp_path, statement("CVE-1900-0001", "not_affected", product))
    server = debian("3-1", "server", None)
    (one,) = found.findings(debian("1-1"), None, server)
    assert one.status == ("not_affected" if applies else "affected")


def test_a_statement_about_parts_of_a_program_is_not_about_another_program(tmp_path: Path) -> None:
    part = {"@id": "pkg:deb/debian/server", "subcomponents": [{"@id": PURL}]}
    found = with_vex(tmp_path, statement("CVE-1900-0001", "not_affected", part))
    assert [one.status for one in found.findings(debian("1-1"), None, debian("3-1", "server", None))] == [
        "not_affected"
    ]
    assert [one.status for one in found.findings(debian("1-1"), None, debian("3-1", "client", None))] == ["affected"]
    assert [one.status for one in found.findings(debian("1-1"))] == ["affected"]


def test_the_last_statement_counts(tmp_path: Path) -> None:
    found = with_vex(
        tmp_path,
        statement("CVE-1900-0001", "affected", {"@id": PURL}, timestamp="2026-03-01T00:00:00Z"),
        statement("CVE-1900-0001", "not_affected", {"@id": PURL}, timestamp="2026-04-01T00:00:00Z"),
        statement("CVE-1900-0001", "under_investigation", {"@id": PURL}, timestamp="2026-01-01T00:00:00Z"),
    )
    assert [one.status for one in found.findings(debian("1-1"))] == ["not_affected"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2026-03-01T23:00:00+05:00", "2026-03-01T19:00:00Z"),
        ("2026-03-01T10:00:00Z", "2026-03-01T10:00:00.250Z"),
        ("2026-03-01T09:00:00Z", "2026-03-01T05:00:00-05:00"),
    ],
)
def test_the_last_statement_is_that_by_time_not_by_text(tmp_path: Path, before: str, after: str) -> None:
    for first, last in (("affected", "not_affected"), ("not_affected", "affected")):
        statements = [
            statement("CVE-1900-0001", first, {"@id": PURL}, timestamp=before),
            statement("CVE-1900-0001", last, {"@id": PURL}, timestamp=after),
        ]
        for order in (statements, statements[::-1]):
            assert [one.status for one in with_vex(tmp_path, *order).findings(debian("1-1"))] == [last]


@pytest.mark.parametrize("time", ["yesterday", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+23:00"])
def test_a_statement_of_no_time_is_refused(tmp_path: Path, time: str) -> None:
    with pytest.raises(SowatchError, match="which is no time"):
        with_vex(tmp_path, statement("A-1", "not_affected", {"@id": PURL}, timestamp=time))


def test_a_statement_names_a_vulnerability_by_any_of_its_ids(tmp_path: Path) -> None:
    for ids in ("A-1", "cve-1900-0001", {"@id": "https://x.example/CVE-1900-0001"}, {"name": "Z", "aliases": ["A-1"]}):
        found = with_vex(tmp_path, statement(ids, "fixed", {"@id": PURL}))
        assert [one.status for one in found.findings(debian("1-1"))] == ["fixed"], ids
    other = with_vex(tmp_path, statement("CVE-1900-0002", "fixed", {"@id": PURL}))
    assert [one.status for one in other.findings(debian("1-1"))] == ["affected"]


SEVERAL = advisory("DSA-1", ranges="introduced 0", upstream=["CVE-1900-0001", "CVE-1900-0002"])
ONE, TWO = "CVE-1900-0001", "CVE-1900-0002"


@pytest.mark.parametrize(
    ("stated", "status", "reason"),
    [
        ({ONE: "not_affected"}, "affected", f"VEX: not_affected, of {ONE}; nothing is stated of {TWO}"),
        ({ONE: "fixed"}, "affected", f"VEX: fixed, of {ONE}; nothing is stated of {TWO}"),
        ({ONE: "not_affected", TWO: "fixed"}, "fixed", f"VEX: not_affected, of {ONE}; VEX: fixed, of {TWO}"),
        ({ONE: "not_affected", TWO: "affected"}, "affected", f"VEX: not_affected, of {ONE}; VEX: affected, of {TWO}"),
        ({"DSA-1": "not_affected"}, "not_affected", "VEX: not_affected"),
    ],
)
def test_a_statement_about_one_of_several_vulnerabilities_takes_none_of_the_others_away(
    tmp_path: Path, stated: dict[str, str], status: str, reason: str
) -> None:
    statements = [statement(name, one, {"@id": PURL}) for name, one in stated.items()]
    (found,) = with_vex(tmp_path, *statements, advisories=[SEVERAL]).findings(debian("1-1"))
    assert (found.status, found.id, found.reason) == (status, "DSA-1", reason)


def test_one_of_several_vulnerabilities_is_answered_by_its_own_statement(tmp_path: Path) -> None:
    found = with_vex(tmp_path, statement(ONE, "not_affected", {"@id": PURL}), advisories=[SEVERAL])
    asked = {name: found.affected_by(name).status_of(debian("1-1")).status for name in (ONE, TWO, "DSA-1")}
    assert asked == {ONE: "not_affected", TWO: "affected", "DSA-1": "affected"}
    of_advisory = with_vex(tmp_path, statement("DSA-1", "fixed", {"@id": PURL}), advisories=[SEVERAL])
    assert [of_advisory.affected_by(name).status_of(debian("1-1")).status for name in (ONE, TWO)] == ["fixed"] * 2


def test_a_statement_about_many_vulnerabilities_has_a_short_reason(tmp_path: Path) -> None:
    many = [f"CVE-1900-{number:04}" for number in range(1, 300)]
    found = with_vex(
        tmp_path,
        statement(many[0], "not_affected", {"@id": PURL}),
        advisories=[advisory("DSA-1", ranges="introduced 0", upstream=many)],
    )
    (one,) = found.findings(debian("1-1"))
    assert one.status == "affected"
    assert one.reason is not None
    assert one.reason.endswith("CVE-1900-0006 and 293 more")


def test_what_a_vendor_says_of_a_version_counts_without_an_advisory(tmp_path: Path) -> None:
    found = with_vex(
        tmp_path,
        statement("CVE-1900-0007", "affected", {"@id": f"{PURL}@1-1"}),
        statement("CVE-1900-0008", "not_affected", {"@id": PURL}),
        advisories=[advisory("A-1", ranges="introduced 0, fixed 1-1")],
    )
    assert [(one.status, one.id, one.found_by) for one in found.findings(debian("1-1"))] == [
        ("affected", "CVE-1900-0007", "vex")
    ]
    assert found.findings(debian("2-1")) == ()


def test_an_advisory_that_knows_the_fix_is_not_undone_by_a_statement_about_all_versions(tmp_path: Path) -> None:
    fixed = [advisory("A-1", ranges="introduced 0, fixed 1-1")]
    every = with_vex(tmp_path, statement("A-1", "affected", {"@id": PURL}), advisories=fixed)
    assert every.findings(debian("1-1")) == ()
    one = with_vex(tmp_path, statement("A-1", "affected", {"@id": f"{PURL}@1-1"}), advisories=fixed)
    assert statuses(one.findings(debian("1-1"))) == [("affected", "A-1")]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "is no document of OpenVEX"),
        ("[]", "is no document of OpenVEX"),
        (
            '{"@context": "https://openvex.dev/ns", "statements": [{"status": "fine", "vulnerability": "A"}]}',
            "Invalid enum",
        ),
        ('{"@context": "https://other.example", "statements": []}', "its @context is"),
    ],
)
def test_a_document_that_is_none_is_an_error(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "vex.json").write_text(text)
    with pytest.raises(SowatchError, match=wanted):
        load_vulnerabilities(vex=[str(tmp_path / "vex.json")])


def test_statements_of_the_first_version_of_openvex_are_read(tmp_path: Path) -> None:
    old = {
        "vulnerability": "CVE-1900-0001",
        "products": ["pkg:deb/debian/server"],
        "subcomponents": [PURL],
        "status": "not_affected",
    }
    found = with_vex(tmp_path, old)
    assert [one.status for one in found.findings(debian("1-1"), None, debian("1", "server", None))] == ["not_affected"]
    assert [one.status for one in found.findings(debian("1-1"))] == ["affected"]
