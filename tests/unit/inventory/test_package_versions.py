"""The order of versions, of each package manager, where it is not what one would think."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.inventory.package_versions import VersionScheme, comparable, compare_versions

ORDERED: dict[VersionScheme, list[str]] = {
    # deb-version(7): a tilde before all, even the end; letters before the rest; an epoch before everything.
    "deb": [
        *("1.0~~", "1.0~~a", "1.0~rc1-1", "1.0-0.1", "1.0-1", "1.0-1ubuntu1", "1.0-1+deb12u1", "1.0-1+deb12u10"),
        *("1.0-2~deb12u1", "1.0-2", "1.0a-1", "1.0+dfsg-1", "1.0.1-1", "1.9-1", "1.10-1", "1:0.1-1", "2:0.0-1"),
    ],
    # rpm-version(7): a caret behind the version, but before one that goes on.
    "rpm": [
        *("1.0~rc1-1.el9", "1.0~rc2-1.el9", "1.0-1.el9", "1.0-1.el9_2.1", "1.0-2.el9", "1.0-10.el9"),
        *("1.0^20240101git1-1.el9", "1.0.a-1.el9", "1.0.1-1.el9", "1.10-1.el9", "1:0.9-1.el9"),
    ],
    # apk: suffixes before and behind; a letter; the revision last.
    "apk": [
        *("1.0_alpha1-r0", "1.0_beta2-r0", "1.0_pre1-r0", "1.0_rc1-r0", "1.0-r0", "1.0-r1", "1.0-r10", "1.0_p1-r0"),
        *("1.0a-r0", "1.0b-r0", "1.0.1-r0", "1.1.1t-r3", "1.1.1w-r0", "1.10-r0", "20240226-r0"),
    ],
    "pypi": [
        *("1.0.dev1", "1.0a1", "1.0b2", "1.0rc1", "1.0", "1.0.post1", "1.0.1.dev3", "1.0.1", "1.9", "1.10", "1!0.1"),
    ],
    "semver": [
        *("1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11"),
        *("1.0.0-rc.1", "1.0.0", "1.0.1", "1.9.0", "1.10.0", "10.0.0"),
    ],
    "maven": [
        *("1.0-alpha-1", "1.0-beta-1", "1.0-milestone-1", "1.0-rc1", "1.0-SNAPSHOT", "1.0", "1.0-sp", "1.0-1", "1.0.1"),
        *("1.9", "1.10"),
    ],
}
EQUAL: list[tuple[VersionScheme, str, str]] = [
    ("deb", "1.0", "1.0-0"),
    ("deb", "0:1.0-1", "1.0-1"),
    ("deb", "1.00-1", "1.0-1"),
    ("deb", "1.0-1+b1", "1.0-1"),  # the same source, built again
    ("rpm", "1.0-1", "1.0"),  # a release counts where both have one
    ("rpm", "1.00-1", "1.0-1"),
    ("rpm", "0:1.0-1", "1.0-1"),
    ("pypi", "1.0", "1.0.0"),
    ("pypi", "2.0.1+cu118", "2.0.1"),  # a build of somebody's own of that version
    ("pypi", "1.0-rc1", "1.0rc1"),
    ("semver", "1.0.0+build.1", "1.0.0+build.2"),
    ("semver", "v1.0.0", "1.0.0"),
    ("maven", "1.0.0", "1"),
    ("maven", "1.0.Final", "1.0"),
]
#: What no package manager takes for a version, or what is not known to be ordered here.
NONE: list[tuple[VersionScheme, str]] = [
    *[("deb", text) for text in ("", "v1", "1.0_1", "a:1.0", "1.0 1", "1.0é", "1" * 300)],
    *[("rpm", text) for text in ("", "x:1.0", "1.0-1-1", "1.0é-1", "1.0 -1")],
    # apk knows these, univers does not.
    *[("apk", text) for text in ("", "1.0_git20240101-r0", "1.0~abcdef-r0", "1.0-r1x", "007-r0", "1.0_foo-r0")],
    *[("pypi", text) for text in ("", "2004d", "1.0-foo-bar", "französisch")],
    *[("semver", text) for text in ("", "1", "1.0", "1.0.0.0", "01.0.0", "1.0.0-01", "1.x", "latest")],
    *[("maven", text) for text in ("", "[1.0,2.0)", "${version}")],
]


@pytest.mark.parametrize("scheme", ORDERED)
def test_each_version_is_older_than_all_behind_it(scheme: VersionScheme) -> None:
    versions = ORDERED[scheme]
    for at, one in enumerate(versions):
        found = [compare_versions(scheme, one, other) for other in versions]
        assert found == [1] * at + [0] + [-1] * (len(versions) - at - 1), one


@pytest.mark.parametrize(("scheme", "one", "other"), EQUAL)
def test_versions_that_are_written_in_two_ways_are_one(scheme: VersionScheme, one: str, other: str) -> None:
    assert compare_versions(scheme, one, other) == 0
    assert compare_versions(scheme, other, one) == 0


@pytest.mark.parametrize(("scheme", "text"), NONE)
def test_what_is_no_version_has_no_place_in_the_order(scheme: VersionScheme, text: str) -> None:
    good = ORDERED[scheme][0]
    assert compare_versions(scheme, text, good) is None
    assert compare_versions(scheme, good, text) is None


@given(st.sampled_from(sorted(ORDERED)), st.text(max_size=40), st.text(max_size=40))
def test_no_text_raises(scheme: VersionScheme, one: str, other: str) -> None:
    assert compare_versions(scheme, one, other) in (-1, 0, 1, None)


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg is not installed")
@settings(max_examples=60, deadline=None)
@given(
    *[
        st.builds(
            lambda epoch, upstream, revision: epoch + upstream + revision,
            st.sampled_from(["", "0:", "1:", "2:"]),
            st.from_regex(r"\A[0-9][A-Za-z0-9.+~]{0,6}\Z"),
            st.from_regex(r"\A(?:-[A-Za-z0-9.+~]{1,5})?\Z"),
        )
    ]
    * 2
)
def test_the_order_of_debian_is_that_of_dpkg(one: str, other: str) -> None:
    asked = [comparable("deb", text) for text in (one, other)]
    for operator, order in (("lt", -1), ("eq", 0), ("gt", 1)):
        done = subprocess.run(["dpkg", "--compare-versions", asked[0], operator, asked[1]], check=False)
        if done.returncode == 0:
            assert compare_versions("deb", one, other) == order
            return
    raise AssertionError(f"dpkg has no order for {asked}")
