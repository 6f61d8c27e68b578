"""What OSV calls a package that was found on a host: its ecosystem, the release of that, and its names there. Pure.

https://ossf.github.io/osv-schema/#defined-ecosystems has the ecosystems. Distributions have packages under the names of
their source packages there, and those of rpm often under the names of the binary ones.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from sowatch.inventory.package_versions import VersionScheme, comparable

if TYPE_CHECKING:
    from sowatch.inventory.packages import PackageIdentity

__all__ = ["OsvPackage", "base_of", "covers", "is_extended", "osv_package", "scheme_of"]


class OsvPackage(NamedTuple):
    """A package as OSV has it.

    Attributes:
        ecosystem: without a release.
        release: of the distribution, as its os-release has it; None if unknown, empty where there are none.
        names: under which it may be found.
        version: to be compared.
        scheme: by which order.
        has_epoch: whether the version would have its epoch, if it has one.
    """

    ecosystem: str
    release: str | None
    names: tuple[str, ...]
    version: str
    scheme: VersionScheme
    has_epoch: bool = True


#: By type and namespace of a package URL, or the name of the distribution in it.
_DISTRIBUTIONS: Final = {
    ("deb", "debian"): "Debian",
    ("deb", "ubuntu"): "Ubuntu",
    ("apk", "alpine"): "Alpine",
    ("apk", "wolfi"): "Wolfi",
    ("apk", "chainguard"): "Chainguard",
    ("rpm", "almalinux"): "AlmaLinux",
    ("rpm", "azl"): "Azure Linux",
    ("rpm", "azurelinux"): "Azure Linux",
    ("rpm", "mageia"): "Mageia",
    ("rpm", "openeuler"): "openEuler",
    ("rpm", "opensuse"): "openSUSE",
    ("rpm", "opensuse-leap"): "openSUSE",
    ("rpm", "opensuse-tumbleweed"): "openSUSE",
    ("rpm", "photon"): "Photon OS",
    ("rpm", "redhat"): "Red Hat",
    ("rpm", "rhel"): "Red Hat",
    ("rpm", "rocky"): "Rocky Linux",
    ("rpm", "rocky-linux"): "Rocky Linux",
    ("rpm", "sled"): "SUSE",
    ("rpm", "sles"): "SUSE",
    ("rpm", "suse"): "SUSE",
}
#: Those whose data are not divided by releases.
_ROLLING: Final = frozenset({"Wolfi", "Chainguard"})
_LANGUAGES: Final = {"pypi": "PyPI", "npm": "npm", "maven": "Maven"}
_SCHEMES: Final[dict[str, VersionScheme]] = {
    **{ecosystem: _kind for (_kind, _), ecosystem in _DISTRIBUTIONS.items()},  # type: ignore[misc]
    "PyPI": "pypi",
    "npm": "semver",
    "Maven": "maven",
}
_VERSION: Final = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_SUSE: Final = re.compile(r"(?:^|.* )([0-9]+)(?: SP([0-9]+))?(?:-(?:LTSS|ESPOS|BCL)\b.*)?")
#: Longer support of one minor release (EUS, AUS, TUS, E4S), and of a major one after its end (ELS).
_RHEL_EXTENDED: Final = re.compile(r"rhel_(?:els|eus|eus_long_life|aus|tus|e4s)")
_EXTENDED: Final = re.compile(rf"Ubuntu:Pro|Red Hat:{_RHEL_EXTENDED.pattern}(?:$|:)|SUSE:.*\b(?:LTSS|ESPOS|BCL)\b")


def base_of(ecosystem: str) -> str:
    """The ecosystem without a release.

    >>> base_of("Ubuntu:22.04:LTS")
    'Ubuntu'
    """
    return ecosystem.partition(":")[0]


def scheme_of(ecosystem: str) -> VersionScheme | None:
    """By which rules its versions are compared; None: that is not known here."""
    return _SCHEMES.get(base_of(ecosystem))


@lru_cache(16_384)
def osv_package(identity: PackageIdentity) -> OsvPackage | None:
    """What OSV calls a package; None: OSV has no such ecosystem, or it is not known which one it is of.

    The version of a package of Debian's is that of its source package, as OSV has those.
    """
    from packageurl import PackageURL

    try:
        url = PackageURL.from_string(identity.purl)
    except ValueError:
        return None
    release: str | None = ""
    if url.type in _LANGUAGES:
        ecosystem = _LANGUAGES[url.type]
        names = [_language_name(url.type, url.namespace or "", url.name)]
    else:
        # `opensuse-leap-15.5`: the last dash is that before the version.
        distribution, dash, number = dict(url.qualifiers).get("distro", "").rpartition("-")
        if not dash:
            distribution, number = number, ""
        found = _DISTRIBUTIONS.get((url.type, distribution)) or _DISTRIBUTIONS.get((url.type, url.namespace or ""))
        if found is None:
            return None
        ecosystem, release = found, "" if found in _ROLLING else number or None
        names = [identity.source or identity.name, *([identity.name] if url.type == "rpm" else [])]
    scheme = _SCHEMES[ecosystem]
    version = (identity.source_version if scheme == "deb" else None) or identity.version
    return OsvPackage(
        ecosystem,
        release,
        tuple(dict.fromkeys(names)),
        comparable(scheme, version),
        scheme,
        # The note in a file has neither the epoch nor a place for it.
        has_epoch=not (scheme == "rpm" and identity.identified_by == "note"),
    )


def _language_name(kind: str, namespace: str, name: str) -> str:
    if kind == "pypi":
        return re.sub(r"[-_.]+", "-", name).lower()
    if kind == "maven":
        return f"{namespace}:{name}"
    return f"{namespace}/{name}" if namespace else name


def is_extended(ecosystem: str) -> bool:
    """Whether it is of what is fixed for subscribers only: Ubuntu Pro (ESM), ELS and EUS of Red Hat, LTSS of SUSE.

    >>> [is_extended(f"Red Hat:{product}:7") for product in ("rhel_els", "enterprise_linux")]
    [True, False]
    """
    return _EXTENDED.match(ecosystem) is not None


def covers(ecosystem: str, release: str | None) -> bool | None:
    """Whether data of an ecosystem are about a release of it; None: the release is not known, and would have to be.

    Args:
        ecosystem: with its suffix, if it has one: ``Debian:12``.
        release: as os-release has it, or empty where there are none.

    >>> covers("Debian:12", "12"), covers("Ubuntu:22.04:LTS", "22.04"), covers("Alpine:v3.19", "3.19.1")
    (True, True, True)
    >>> covers("Rocky Linux:9", "8.10"), covers("PyPI", "")
    (False, True)
    """
    base, _, suffix = ecosystem.partition(":")
    if not suffix or base in _LANGUAGES.values() or base in _ROLLING:
        return True
    if not release:
        return None
    check = _BY_BASE.get(base)
    return _is_same_release(suffix, release) if check is None else check(suffix, release)


def _is_same_release(suffix: str, release: str) -> bool:
    """``9`` is every 9.x; ``v3.19`` is 3.19.1."""
    if not (found := _VERSION.match(suffix.removeprefix("v"))):
        return suffix == release
    theirs, ours = found[0].split("."), release.split(".")
    return theirs == ours[: len(theirs)]


def _is_of_ubuntu(suffix: str, release: str) -> bool:
    # Further words are of other builds (FIPS, Realtime): the release does not show what such a host has.
    return [part for part in suffix.split(":") if part not in ("LTS", "Pro")] == [release]


def _is_of_red_hat(suffix: str, release: str) -> bool:
    # A part of a CPE: enterprise_linux:9::baseos, rhel_eus:9.4::appstream. Other products are subscriptions, which a
    # host does not show.
    product, _, rest = suffix.partition(":")
    number = rest.split(":")[0]
    if product == "enterprise_linux":
        number = number.split(".")[0]
    elif not _RHEL_EXTENDED.fullmatch(product):
        return False
    return _is_same_release(number, release)


def _is_of_suse(suffix: str, release: str) -> bool:
    # ``Linux Enterprise Module for Basesystem 15 SP5`` is of 15.5, and so is ``Linux Enterprise Server 15 SP5-LTSS``.
    found = _SUSE.fullmatch(suffix)
    major, _, minor = release.partition(".")
    return found is not None and (found[1], found[2] or "0") == (major, minor or "0")


def _is_of_opensuse(suffix: str, release: str) -> bool:
    name, _, version = suffix.rpartition(" ")
    return version == release or (not name and suffix == "Tumbleweed" and release.isdecimal() and len(release) == 8)


_BY_BASE: Final = {
    "Ubuntu": _is_of_ubuntu,
    "Red Hat": _is_of_red_hat,
    "SUSE": _is_of_suse,
    "openSUSE": _is_of_opensuse,
}
