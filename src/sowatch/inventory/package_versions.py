"""Which of two versions of a package comes first, by the rules of its package manager. Pure.

The order itself is that of univers. What it would take for a version though it is none, and what a version has that is
not part of the order, is dealt with here: an answer is None where there is none, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias

__all__ = ["VersionScheme", "comparable", "compare_versions"]

VersionScheme: TypeAlias = Literal["deb", "rpm", "apk", "pypi", "semver", "maven"]

#: Longer ones are none: some comparisons take the square of the length.
_MAX_LENGTH: Final = 256
_NUMBER: Final = r"(?:0|[1-9][0-9]*)"
_PRERELEASE: Final = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_FORMS: Final[Mapping[VersionScheme, re.Pattern[str]]] = {
    # deb-version(7). A colon in what is upstream's is left out: univers does not know it.
    "deb": re.compile(r"(?:[0-9]{1,9}:)?[0-9][A-Za-z0-9.+~-]*"),
    # rpm-version(7).
    "rpm": re.compile(r"(?:[0-9]{1,9}:)?[A-Za-z0-9._+~^]+(?:-[A-Za-z0-9._+~^]+)?"),
    # apk-package(5), without the suffixes and the hash of a commit that univers does not know.
    "apk": re.compile(r"[0-9]+(?:\.[0-9]+)*[a-z]?(?:_(?:alpha|beta|pre|rc|p)[0-9]*)*(?:-r[0-9]+)?"),
    # PEP 440, which packaging itself checks.
    "pypi": re.compile(r"[!-~]+"),
    # SemVer 2.0.0, section 2, 9 and 10.
    "semver": re.compile(
        rf"v?{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRERELEASE}(?:\.{_PRERELEASE})*)?(?:\+[0-9A-Za-z.-]+)?"
    ),
    "maven": re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*"),
}
#: A rebuild of the same source for one architecture (binNMU).
_REBUILD: Final = re.compile(r"\+b[0-9]+$")


def comparable(scheme: VersionScheme, version: str) -> str:
    """What of a version its order is about: without a rebuild of the same source, a local part, or build metadata.

    >>> comparable("deb", "3.0.11-1~deb12u2+b1")
    '3.0.11-1~deb12u2'
    >>> comparable("pypi", "2.0.1+cu118")
    '2.0.1'
    """
    if scheme == "deb":
        return _REBUILD.sub("", version)
    if scheme in ("pypi", "semver"):
        version = version.partition("+")[0]
        return version.removeprefix("v") if scheme == "semver" else version
    return version


def compare_versions(scheme: VersionScheme, one: str, other: str) -> int | None:
    """-1, 0 or 1 as the first is older than the other, the same, or newer; None: one of them is no version.

    >>> compare_versions("deb", "1.0~rc1-1", "1.0-1")
    -1
    >>> compare_versions("rpm", "1.0^git1-1.el9", "1.0-1.el9")
    1
    >>> compare_versions("apk", "1.0_rc1-r0", "1.0-r0")
    -1
    >>> compare_versions("semver", "1.0", "1.0.0") is None
    True
    """
    if scheme == "rpm" and ("-" in one) != ("-" in other):
        # As rpm does: a release counts where both have one.
        one, other = one.partition("-")[0], other.partition("-")[0]
    first, second = _parsed(scheme, one), _parsed(scheme, other)
    if first is None or second is None:
        return None
    try:
        return int(first > second) - int(first < second)
    except (TypeError, ValueError, IndexError, AttributeError):  # what univers raises of what it took
        return None


@lru_cache(65_536)
def _parsed(scheme: VersionScheme, version: str) -> Any:
    """A value with an order; None: it is no version."""
    text = comparable(scheme, version.strip())
    if len(text) > _MAX_LENGTH or not _FORMS[scheme].fullmatch(text):
        return None
    try:
        return _classes()[scheme](text).value if scheme != "apk" else _classes()[scheme](text)
    except (TypeError, ValueError, IndexError, AttributeError):
        return None


@lru_cache(1)
def _classes() -> Mapping[VersionScheme, Callable[[str], Any]]:
    # Takes 85 ms: imported where versions are compared.
    from univers import versions

    return {
        "deb": versions.DebianVersion,
        "rpm": versions.RpmVersion,
        "apk": versions.AlpineLinuxVersion,
        "pypi": versions.PypiVersion,
        "semver": versions.SemverVersion,
        "maven": versions.MavenVersion,
    }
