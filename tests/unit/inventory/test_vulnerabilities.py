"""Is a package affected? By advisories of OSV, lists of build ids and statements of VEX; unknown where nobody knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.inventory.ecosystems import covers, osv_package
from sowatch.inventory.osv import OsvData
from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.vulnerabilities import Finding, Vulnerabilities, load_vulnerabilities
from sowatch.model.errors import SowatchError, UsageError
from support.advisories import advisory, debian, package, statuses

BUILD_ID = "ab" * 20


def data(*advisories: Any) -> Vulnerabilities:
    osv = OsvData()
    for one in advisories:
        osv.add(json.dumps(one).encode(), one["id"])
    assert osv.problems == []
    return Vulnerabilities(osv)


def status_of(version: str, ranges: str | Sequence[str] | None, **further: Any) -> str:
    """Of a package of Debian's, by one advisory."""
    found = data(advisory("A-1", ranges=ranges, **further)).findings(debian(version))
    return found[0].status if found else "not_affected"


# ---- ranges -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "affected", "others"),
    [
        ("introduced 0", ["0.1-1", "9:9-9"], []),
        ("introduced 0, fixed 2.0-1", ["1.9-9", "2.0~rc1-1"], ["2.0-1", "2.0-1+deb12u1", "3-1"]),
        ("introduced 1.0-1, fixed 2.0-1", ["1.0-1", "1.5-1"], ["0.9-1", "1.0~rc1-1", "2.0-1"]),
        ("introduced 0, last_affected 2.0-1", ["1-1", "2.0-1"], ["2.0-2", "3-1"]),
        # A rebuild of the last affected version is as it is.
        ("introduced 0, last_affected 2.0-1", ["2.0-1+b1"], ["2.0-1+deb12u1"]),
        ("introduced 1.0-1, fixed 1.2-1, introduced 3.0-1, fixed 3.2-1", ["1.1-1", "3.1-1"], ["1.2-1", "2-1", "3.2-1"]),
        # Not sorted.
        ("fixed 3.2-1, introduced 3.0-1, fixed 1.2-1, introduced 0", ["0.1-1", "3.0-1"], ["1.2-1", "2-1", "3.2-1"]),
        (["introduced 0, fixed 1-1", "introduced 2-1, fixed 3-1"], ["0.5-1", "2.5-1"], ["1-1", "3-1"]),
        ("introduced 0, limit 2.0-1", ["1-1"], ["2.0-1", "3-1"]),
        ("introduced 0, limit 2.0-1, limit 3.0-1", ["1-1", "2.5-1"], ["3.0-1"]),
        ("introduced 0, limit *", ["1-1"], []),
        ("introduced 2-1, last_affected 2-1", ["2-1"], ["1-1", "2-2"]),
    ],
)
def test_a_version_is_affected_as_the_specification_evaluates_it(
    ranges: str, affected: list[str], others: list[str]
) -> None:
    assert [status_of(version, ranges) for version in affected] == ["affected"] * len(affected)
    assert [status_of(version, ranges) for version in others] == ["not_affected"] * len(others)


def test_versions_that_are_listed_are_affected_whatever_the_ranges_say() -> None:
    assert status_of("1.5-1", "introduced 0, fixed 1.0-1", versions=["1.5-1"]) == "affected"
    assert status_of("1.5-1", None, versions=["1.5-1"]) == "affected"
    assert status_of("1.6-1", None, versions=["1.5-1"]) == "not_affected"
    # Even one that nobody can compare.
    assert status_of("weird_1", "introduced 0, fixed 1", versions=["weird_1"]) == "affected"


def test_an_event_of_two_kinds_is_two_events() -> None:
    one = advisory("A-1", affected=[{"package": {"ecosystem": "Debian:12", "name": "lamp"}}])
    one["affected"][0]["ranges"] = [{"type": "ECOSYSTEM", "events": [{"introduced": "0", "fixed": "2-1"}]}]
    found = data(one)
    assert statuses(found.findings(debian("1-1"))) == [("affected", "A-1")]
    assert statuses(found.findings(debian("2-1"))) == []


@given(st.lists(st.sampled_from(["introduced", "fixed", "last_affected", "limit"]), max_size=6), st.data())
def test_the_answer_is_that_of_the_pseudocode(kinds: list[str], drawn: Any) -> None:
    """Of whole numbers, which every order has in common."""
    events = [(kind, drawn.draw(st.integers(0 if kind == "introduced" else 1, 6))) for kind in kinds]
    version = drawn.draw(st.integers(1, 7))
    limits = [number for kind, number in events if kind == "limit"]
    expected = False
    if not limits or any(version < number for number in limits):
        for kind, number in sorted((one for one in events if one[0] != "limit"), key=lambda one: one[1]):
            if kind == "introduced" and version >= number:
                expected = True
            elif (kind == "fixed" and version >= number) or (kind == "last_affected" and version > number):
                expected = False
    one = advisory("A-1", affected=[{"package": {"ecosystem": "Debian:12", "name": "lamp"}, "ranges": []}])
    one["affected"][0]["ranges"] = [{"type": "ECOSYSTEM", "events": [{kind: str(number)} for kind, number in events]}]
    assert [found.status for found in data(one).findings(debian(str(version)))] == ["affected"] * expected


def test_the_fixed_version_is_the_next_one() -> None:
    found = data(advisory("A-1", ranges="introduced 1-1, fixed 1.2-1, introduced 3-1, fixed 3.2-1"))
    assert [one.fixed_version for one in found.findings(debian("1.1-1"))] == ["1.2-1"]
    assert [one.fixed_version for one in found.findings(debian("3.1-1"))] == ["3.2-1"]
    (open_,) = data(advisory("A-1", ranges="introduced 0")).findings(debian("1-1"))
    assert open_.fixed_version is None


def test_semver_ranges_are_compared_as_such() -> None:
    npm = package("pkg:npm/%40acme/lamp@1.10.0", "1.10.0", "@acme/lamp", by="npm")
    one = advisory("A-1", "npm", "@acme/lamp", "introduced 1.9.0-0, fixed 1.11.0-rc.1", kind="SEMVER")
    assert statuses(data(one).findings(npm)) == [("affected", "A-1")]
    assert statuses(data(one).findings(package("pkg:npm/%40acme/lamp@1.11.0", "1.11.0", "x", by="npm"))) == []


# ---- unknown ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (None, "its package is not known"),
        (debian("1-1", release="13"), "the data have nothing of Debian 13"),
        (debian("1-1", release=""), "the release of Debian that it is of is not known"),
        (package("pkg:deb/kali/x@1?distro=kali-2026", "1", "x"), "no ecosystem of OSV is known"),
        (package("pkg:rpm/fedora/x@1-1.fc44?distro=fedora-44", "1-1.fc44", "x"), "no ecosystem of OSV is known"),
        (package("not a purl", "1", "x"), "no ecosystem of OSV is known"),
        (package("pkg:pypi/x@1", "1", "x", by="pypi"), "the data have nothing of PyPI"),
    ],
)
def test_what_the_data_say_nothing_of_is_unknown(identity: PackageIdentity | None, reason: str) -> None:
    (found,) = data(advisory("A-1", ranges="introduced 0")).findings(identity, BUILD_ID)
    assert (found.status, found.id, found.is_open) == ("unknown", None, True)
    assert found.reason is not None
    assert reason in found.reason


def test_empty_data_know_nothing() -> None:
    assert statuses(Vulnerabilities(OsvData()).findings(debian("1-1"))) == [("unknown", None)]


@pytest.mark.parametrize(
    ("version", "ranges", "reason"),
    [
        ("1.0_x-1", "introduced 0, fixed 2-1", "1.0_x-1 cannot be compared with 2-1"),
        ("1.0-1", "introduced 0, fixed two", "1.0-1 cannot be compared with two"),
        ("1.0-1", None, "the advisory names no version"),
    ],
)
def test_a_version_that_cannot_be_compared_is_unknown(version: str, ranges: str | None, reason: str) -> None:
    (found,) = data(advisory("A-1", ranges=ranges)).findings(debian(version))
    assert (found.status, found.id, found.reason) == ("unknown", "A-1", reason)


def test_an_advisory_of_commits_only_says_nothing_of_a_version() -> None:
    (found,) = data(advisory("A-1", ranges="introduced 0", kind="GIT")).findings(debian("1-1"))
    assert (found.status, found.reason) == ("unknown", "the advisory names commits only")


def test_a_note_without_an_epoch_is_not_compared_with_one() -> None:
    note = package("pkg:rpm/rocky/lamp@1-1.el9?distro=rocky-9.3", "1-1.el9", "lamp", by="note")
    rpm = package("pkg:rpm/rocky/lamp@1-1.el9?distro=rocky-9.3", "1-1.el9", "lamp", by="rpm")
    with_epoch = data(advisory("A-1", "Rocky Linux:9", "lamp", "introduced 0, fixed 1:1-2.el9"))
    assert statuses(with_epoch.findings(note)) == [("unknown", "A-1")]
    assert statuses(with_epoch.findings(rpm)) == [("affected", "A-1")]
    without = data(advisory("A-1", "Rocky Linux:9", "lamp", "introduced 0, fixed 0:1-2.el9"))
    assert statuses(without.findings(note)) == [("affected", "A-1")]


def test_what_is_affected_comes_before_what_is_unknown() -> None:
    found = data(
        advisory("A-1", ranges="introduced 0, fixed x"),
        advisory("A-2", ranges="introduced 0"),
        advisory("A-3", ranges=["introduced 0, fixed x", "introduced 0"]),
    ).findings(debian("1-1"))
    assert statuses(found) == [("affected", "A-2"), ("affected", "A-3"), ("unknown", "A-1")]


# ---- names and releases -------------------------------------------------------------------------


def test_debian_ubuntu_and_alpine_are_asked_by_source_package() -> None:
    found = data(
        advisory("A-1", package="lamp", ranges="introduced 0"),
        advisory("A-2", package="liblamp1", ranges="introduced 0"),
    )
    assert statuses(found.findings(debian("1-1"))) == [("affected", "A-1")]
    assert statuses(found.findings(debian("1-1", source=None))) == [("affected", "A-2")]


def test_the_version_of_the_source_package_counts() -> None:
    # The binary package has a version of its own, as those of gcc-defaults do.
    one = data(advisory("A-1", ranges="introduced 0, fixed 2-1"))
    assert statuses(one.findings(debian("4:12.2-3", source_version="1-1"))) == [("affected", "A-1")]
    assert statuses(one.findings(debian("1-1", source_version="2-1"))) == []


def test_rpm_is_asked_by_both_names() -> None:
    rpm = package("pkg:rpm/almalinux/lamp-libs@1-1.el9?distro=almalinux-9.4", "1-1.el9", "lamp-libs", "lamp", "rpm")
    for name in ("lamp", "lamp-libs"):
        one = advisory("A-1", "AlmaLinux:9", name, "introduced 0, fixed 1-2.el9")
        assert statuses(data(one).findings(rpm)) == [("affected", "A-1")]


@pytest.mark.parametrize(
    ("url", "ecosystem", "name"),
    [
        ("pkg:pypi/Zope.Interface@1.0", "PyPI", "zope-interface"),
        ("pkg:npm/lamp@1.0.0", "npm", "lamp"),
        ("pkg:npm/%40acme/lamp@1.0.0", "npm", "@acme/lamp"),
        ("pkg:maven/org.acme/lamp@1.0", "Maven", "org.acme:lamp"),
        ("pkg:deb/ubuntu/lamp@1?distro=ubuntu-24.04", "Ubuntu", "lamp"),
        ("pkg:apk/alpine/lamp@1?distro=alpine-3.19.1", "Alpine", "lamp"),
        ("pkg:rpm/opensuse/lamp@1?distro=opensuse-leap-15.5", "openSUSE", "lamp"),
    ],
)
def test_a_package_has_the_name_that_osv_has(url: str, ecosystem: str, name: str) -> None:
    found = osv_package(package(url, "1", url.partition("@")[0].rpartition("/")[2]))
    assert found is not None
    assert (found.ecosystem, name in found.names) == (ecosystem, True)


@pytest.mark.parametrize(
    ("ecosystem", "release", "expected"),
    [
        ("Debian", "12", True),
        ("Debian:12", "12", True),
        ("Debian:1", "12", False),
        ("Debian:sid", "12", False),
        ("Debian:12", None, None),
        ("Ubuntu:22.04:LTS", "22.04", True),
        ("Ubuntu:23.10", "23.10", True),
        ("Ubuntu:Pro:22.04:LTS", "22.04", True),
        ("Ubuntu:Pro:FIPS:22.04:LTS", "22.04", False),
        ("Ubuntu:22.04:LTS", "24.04", False),
        ("Alpine:v3.19", "3.19.1", True),
        ("Alpine:v3.1", "3.19.1", False),
        ("AlmaLinux:9", "9.4", True),
        ("AlmaLinux:9", "8.10", False),
        ("Rocky Linux:9", "9.4", True),
        ("Red Hat:enterprise_linux:9::baseos", "9.4", True),
        ("Red Hat:enterprise_linux:8::baseos", "9.4", False),
        ("Red Hat:rhel_eus:9.4::appstream", "9.4", True),
        ("Red Hat:rhel_eus:9.4::appstream", "9.6", False),
        ("Red Hat:rhel_e4s:9.0::baseos", "9.0", True),
        ("Red Hat:rhel_aus:8.2::baseos", "8.2", True),
        ("Red Hat:rhel_els:7", "7.9", True),
        ("Red Hat:rhel_els:7", "8.10", False),
        ("Red Hat:openshift:4.14::el9", "9.4", False),
        ("SUSE:Linux Enterprise Module for Basesystem 15 SP5", "15.5", True),
        ("SUSE:Linux Enterprise Server 15 SP5-LTSS", "15.5", True),
        ("SUSE:Linux Enterprise Server 15 SP5-LTSS", "15.6", False),
        ("SUSE:Linux Enterprise High Performance Computing 15 SP4-ESPOS", "15.4", True),
        ("SUSE:Linux Enterprise Server LTSS Extended Security 12 SP5", "12.5", True),
        ("SUSE:Linux Enterprise Server 15 SP4", "15.5", False),
        ("openSUSE:Leap 15.5", "15.5", True),
        ("openSUSE:Tumbleweed", "20261128", True),
        ("openSUSE:Leap 15.5", "20261128", False),
        ("Mageia:9", "9", True),
        ("PyPI", "", True),
        ("Maven:https://repo.example", "", True),
        ("Wolfi", "", True),
    ],
)
def test_which_data_are_about_which_release(ecosystem: str, release: str | None, expected: bool | None) -> None:
    assert covers(ecosystem, release) is expected


def test_only_what_is_said_of_its_own_release_counts() -> None:
    affected = [
        {"package": {"ecosystem": one, "name": "lamp"}, "ranges": [{"type": "ECOSYSTEM", "events": events}]}
        for one, events in (
            ("Debian:11", [{"introduced": "0"}]),
            ("Debian:12", [{"introduced": "0"}, {"fixed": "1-1"}]),
            ("Ubuntu:22.04:LTS", [{"introduced": "0"}]),
        )
    ]
    assert statuses(data(advisory("A-1", affected=affected)).findings(debian("1-1"))) == []


def test_who_has_no_subscription_has_the_flaw_that_subscribers_have_fixed() -> None:
    def ubuntu(version: str) -> PackageIdentity:
        return package(f"pkg:deb/ubuntu/lamp@{version}?distro=ubuntu-18.04", version, "lamp", "lamp")

    def entry(ecosystem: str, fixed: str | None) -> dict[str, Any]:
        events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
        return {
            "package": {"ecosystem": ecosystem, "name": "lamp"},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }

    pro = entry("Ubuntu:Pro:18.04:LTS", "1-1ubuntu1+esm2")
    open_ = entry("Ubuntu:18.04:LTS", None)
    only_pro, both = advisory("A-1", affected=[pro]), advisory("A-2", affected=[open_, pro])
    assert statuses(data(only_pro).findings(ubuntu("1-1ubuntu1"))) == [("affected", "A-1")]
    assert statuses(data(both).findings(ubuntu("1-1ubuntu1"))) == [("affected", "A-2")]
    assert statuses(data(both).findings(ubuntu("1-1ubuntu1+esm1"))) == [("affected", "A-2")]
    assert statuses(data(only_pro, both).findings(ubuntu("1-1ubuntu1+esm2"))) == []


# ---- ids ----------------------------------------------------------------------------------------


def test_advisories_that_are_aliases_are_one_finding_under_the_cve() -> None:
    (found,) = data(
        advisory("GHSA-1", ranges="introduced 0, fixed 1-1", aliases=["CVE-1900-0001"]),
        advisory("PYSEC-1", ranges="introduced 0, fixed 2-1", aliases=["cve-1900-0001"], summary="A lamp burns"),
        advisory("X-1", ranges="introduced 9-1", aliases=["PYSEC-1"], severity=[{"type": "Ubuntu", "score": "low"}]),
    ).findings(debian("1.5-1"))
    # The worst of them counts.
    assert (found.status, found.id, found.fixed_version, found.summary) == (
        *("affected", "CVE-1900-0001"),
        *("2-1", "A lamp burns"),
    )
    assert {"GHSA-1", "PYSEC-1", "X-1"} <= set(found.aliases)
    assert found.severity == "low"


def test_an_advisory_about_several_cves_keeps_its_name() -> None:
    (found,) = data(advisory("DSA-1", ranges="introduced 0", upstream=["CVE-1900-0001", "CVE-1900-0002"])).findings(
        debian("1-1")
    )
    assert (found.id, found.aliases, found.upstream) == ("DSA-1", (), ("CVE-1900-0001", "CVE-1900-0002"))


def test_one_vulnerability_is_asked_for_by_any_of_its_ids() -> None:
    found = data(
        advisory("GHSA-1", "PyPI", "lamp", "introduced 0, fixed 2", aliases=["CVE-1900-0001"]),
        advisory("DSA-1", ranges="introduced 0, fixed 2-1", upstream=["CVE-1900-0001", "CVE-1900-0002"]),
        advisory("A-9", "npm", "other", "introduced 0"),
    )
    asked = found.affected_by("ghsa-1")
    assert asked.ids == {"GHSA-1", "CVE-1900-0001", "DSA-1"}
    assert asked.packages == {("PyPI", "lamp"), ("Debian", "lamp")}
    assert asked.is_known

    assert asked.status_of(debian("1-1")).status == "affected"
    assert asked.status_of(debian("2-1")).status == "not_affected"
    assert asked.status_of(debian("1-1", source="torch")).status == "not_affected"
    assert asked.status_of(debian("1-1", release="13")).status == "unknown"
    assert asked.status_of(None, BUILD_ID).status == "unknown"
    assert asked.status_of(package("pkg:npm/lamp@1.0.0", "1.0.0", "lamp", by="npm")).status == "not_affected"


def test_a_vulnerability_that_no_data_name_is_unknown_everywhere() -> None:
    asked = data(advisory("A-1", ranges="introduced 0")).affected_by("CVE-1900-0404")
    assert not asked.is_known
    assert asked.status_of(debian("1-1")) == Finding("unknown", "CVE-1900-0404", reason="no advisory names it")


def test_incomplete_data_answer_not_affected_to_nobody() -> None:
    found = data(advisory("A-1", ranges="introduced 0, fixed 1-1"))
    assert found.affected_by("A-1").status_of(debian("1-1")).status == "not_affected"
    found.osv.add_problem("x.json", "it is broken")
    assert found.affected_by("A-1").status_of(debian("1-1")).status == "unknown"
    assert found.problems == ("cannot read x.json: it is broken",)


@pytest.mark.parametrize(
    ("extended", "general", "distro"),
    [
        ("Red Hat:rhel_els:7", "Red Hat:enterprise_linux:7", "rhel-7.9"),
        ("Red Hat:rhel_eus:9.4::baseos", "Red Hat:enterprise_linux:9::baseos", "rhel-9.4"),
        ("SUSE:Linux Enterprise Server 15 SP4-LTSS", "SUSE:Linux Enterprise Server 15 SP4", "sles-15.4"),
    ],
)
def test_what_is_fixed_for_subscribers_only_is_a_flaw_of_that_release_for_all(
    extended: str, general: str, distro: str
) -> None:
    def status(version: str, *advisories: Any) -> list[str]:
        one = package(f"pkg:rpm/x/lamp@{version}?distro={distro}", version, "lamp", by="rpm")
        return [found.status for found in data(*advisories).findings(one)]

    other = advisory("A-9", general, "torch", "introduced 0")
    only = advisory("A-1", extended, "lamp", "introduced 0, fixed 0:2-1")
    assert status("1-1", only, other) == ["affected"]
    assert status("2-1", only, other) == []
    entries = [*only["affected"], *advisory("A-1", general, "lamp", "introduced 0, fixed 0:3-1")["affected"]]
    both = advisory("A-1", affected=entries)
    assert status("2-1", both, other) == ["affected"]  # the entry that is for all counts


# ---- build ids ----------------------------------------------------------------------------------


def test_a_build_that_a_list_names_is_affected_whatever_its_package(tmp_path: Path) -> None:
    (tmp_path / "builds.csv").write_text(
        f'build_id,id,note\n# a comment\n\n{BUILD_ID.upper()},CVE-1900-0001,"seen, in the lab"\n{BUILD_ID},X-2\n'
    )
    found = load_vulnerabilities(build_ids=[str(tmp_path / "builds.csv")])
    (one, two) = found.findings(None, BUILD_ID)
    assert (one.status, one.id, one.reason, one.found_by) == (
        *("affected", "CVE-1900-0001"),
        *("seen, in the lab", "build_ids"),
    )
    assert (two.id, two.reason) == ("X-2", None)
    assert found.findings(debian("1-1"), "cd" * 20) == ()
    # Without a build id a list cannot say.
    assert statuses(found.findings(debian("1-1"))) == [("unknown", None)]
    assert found.affected_by("cve-1900-0001").build_ids == {BUILD_ID}
    assert found.affected_by("cve-1900-0001").status_of(None, BUILD_ID).status == "affected"


@pytest.mark.parametrize("line", ["xyz,A-1", BUILD_ID, f"{BUILD_ID},", ",A-1"])
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "builds.csv").write_text(f"{BUILD_ID},A-1\n{line}\n")
    with pytest.raises(UsageError, match="line 2: this is not BUILD_ID,ID"):
        load_vulnerabilities(build_ids=[str(tmp_path / "builds.csv")])


def test_a_note_that_is_too_long_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "builds.csv").write_text(f"{BUILD_ID},A-1\n{BUILD_ID},A-2,{'x' * 200_000}\n")
    with pytest.raises(UsageError, match="line 2: this is not BUILD_ID,ID"):
        load_vulnerabilities(build_ids=[str(tmp_path / "builds.csv")])


def test_a_note_may_have_any_separator_of_lines_in_it(tmp_path: Path) -> None:
    (tmp_path / "builds.csv").write_text(f"{BUILD_ID},A-1,one\x0ctwo\u2028three\r\n{BUILD_ID},A-2\n", newline="")
    found = load_vulnerabilities(build_ids=[str(tmp_path / "builds.csv")]).findings(None, BUILD_ID)
    assert [(one.id, one.reason) for one in found] == [("A-1", "one\x0ctwo\u2028three"), ("A-2", None)]


def test_a_list_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SowatchError, match="cannot read"):
        load_vulnerabilities(build_ids=[str(tmp_path / "nowhere.csv")])


# ---- all of it ----------------------------------------------------------------------------------


def test_each_identity_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = data(advisory("A-1", ranges="introduced 0"))
    asked: list[object] = []
    real = found._findings
    monkeypatch.setattr(found, "_findings", lambda *words: asked.append(words) or real(*words))
    for _ in range(3):
        found.findings(debian("1-1"), BUILD_ID)
        found.findings(debian("1-1"), BUILD_ID, debian("1", "server"))
    assert len(asked) == 1
