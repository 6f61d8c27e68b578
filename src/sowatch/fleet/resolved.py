"""What a target means in a store: its builds, and the conditions for rows of them. Texts of others are parameters.

What cannot be decided stays open: `may_be` finds the rows of which it is not known whether they are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from sowatch.fleet.asks import Asks, rows
from sowatch.fleet.targets import Target, purl_matches, purl_name
from sowatch.model.errors import UsageError
from sowatch.model.escape import visible

__all__ = ["Build", "Resolved", "VulnerableBuilds", "may_be", "resolve"]

#: Of a soname, or of a file that has none: the whole name, or its beginning up to `.so`.
_NAMED: Final = """arrayExists(
    one -> soname = one OR startsWith(soname, concat(one, '.so'))
        OR soname = '' AND (substringIndex(path, '/', -1) = one
            OR startsWith(substringIndex(path, '/', -1), concat(one, '.so'))),
    {texts:Array(String)})"""
_AT_PATH: Final = "path IN {texts:Array(String)}"

#: By what is asked for, which rows of fleet_builds it means.
_BUILDS_OF: Final = {
    "build_id": "startsWith(build_id, {text:String})",
    "purl": "startsWith(purl, {text:String})",
    "soname": _NAMED,
    "path": _AT_PATH,
    "cve": "1",
}
_BUILDS: Final = """
SELECT build_id, soname, path, purl, package, package_version, source_package, identified_by
FROM fleet_builds FINAL
WHERE {condition}
ORDER BY build_id, purl, soname, path
"""

#: Builds of which no host could name the package. Without a build id, files of different packages are one of them.
_OF_NO_PACKAGE: Final = """
purl = '' AND (build_id = '' OR build_id NOT IN (SELECT build_id FROM fleet_builds WHERE purl != ''))
"""

#: By the same, which rows of fleet_in_force it means. A file whose package was not read has that of another host.
_OF_BUILD: Final = "build_id IN {builds:Array(String)}"
_OF_PACKAGE: Final = f"{_OF_BUILD} AND (purl = '' OR purl IN {{purls:Array(String)}})"
_ROWS_OF: Final = {
    "build_id": _OF_BUILD,
    "purl": _OF_PACKAGE,
    "soname": f"{_OF_BUILD} AND {_NAMED}",
    "path": f"{_OF_BUILD} AND {_AT_PATH}",
    "cve": _OF_PACKAGE,
}

#: Of builds of which it is not known whether they are meant; without a build id only the path tells one from another.
_OF_UNKNOWN: Final = f"{_OF_PACKAGE} AND (build_id != '' OR path IN {{paths:Array(String)}})"

#: A file without a build id, which could not be hashed either, may be any build of its name, or any whose name is not
#: known.
_UNNAMED: Final = "build_id = ''"
_UNNAMED_AS: Final = (
    f"{_UNNAMED} AND (path IN {{paths:Array(String)}} OR soname != '' AND soname IN {{sonames:Array(String)}})"
)


class Build(Struct, frozen=True, gc=False):
    """A build under one of the names and packages that hosts reported for it."""

    build_id: str
    soname: str
    path: str
    purl: str
    package: str = ""
    package_version: str = ""
    source_package: str = ""
    identified_by: str = ""


#: Which of the builds a vulnerability is in, and of which that is unknown.
VulnerableBuilds = Callable[[str, Sequence[Build]], tuple[Sequence[Build], Sequence[Build]]]


class Resolved(Struct, frozen=True):
    """What a target means in this store: conditions for rows, with their parameters."""

    target: Target
    builds: tuple[Build, ...]
    condition: str
    parameters: dict[str, Any]
    #: Builds of which it is not known whether they are meant.
    unknown: tuple[Build, ...] = ()


def resolve(asks: Asks, target: Target, vulnerable: VulnerableBuilds | None = None) -> Resolved:
    """What a target means.

    Args:
        asks: the store.
        target: what is asked for.
        vulnerable: finds the builds with a vulnerability.

    Raises:
        UsageError: it is a vulnerability, and nothing finds the builds with it.
    """
    text = target.text
    if target.kind == "purl":
        text = purl_name(text)
        # Percent signs are written in more than one way: `purl_matches` compares.
        text = text[: min((at for one in "%@:" if (at := text.find(one, 4)) > 0), default=len(text))]
    # Agents send names as `visible` has them, and that is how answers show them: both may be asked for.
    texts = sorted({target.text, visible(target.text)})
    builds = _builds(asks, _BUILDS_OF[target.kind], text=text, texts=texts)
    unknown: Sequence[Build] = ()
    if target.kind == "purl":
        unknown = _of_no_package(asks, [one for one in builds if purl_matches(purl_name(target.text), one.purl)])
        builds = [one for one in builds if purl_matches(target.text, one.purl)]
    if target.kind == "cve":
        if vulnerable is None:
            raise UsageError(f"which builds have {target.text} is data of yours. Name it with --osv PATH.")
        affected, unknown = vulnerable(target.text, builds)
        builds = list(affected)
    condition = _ROWS_OF[target.kind]
    given = _needed(condition, builds=_ids(builds), purls=_purls(builds), texts=texts)
    return Resolved(target, tuple(builds), condition, given, tuple(unknown))


def may_be(found: Resolved) -> Iterator[Resolved]:
    """The rows of which it is not known whether they are what was found."""
    if found.unknown:
        parameters = {
            "builds": _ids(found.unknown),
            "purls": _purls(found.unknown),
            "paths": sorted({one.path for one in found.unknown if not one.build_id}),
        }
        yield Resolved(found.target, (), _OF_UNKNOWN, parameters)
    if found.builds:
        names = {
            "paths": sorted({one.path for one in found.builds}),
            "sonames": sorted({one.soname for one in found.builds}),
        }
        yield Resolved(found.target, (), _UNNAMED_AS, names)
    elif found.target.kind == "build_id":
        yield Resolved(found.target, (), _UNNAMED, {})


def _builds(asks: Asks, condition: str, **parameters: str | list[str]) -> list[Build]:
    return list(rows(asks, _BUILDS.replace("{condition}", condition), Build, **_needed(condition, **parameters)))


def _needed(condition: str, **parameters: str | list[str]) -> dict[str, Any]:
    """Those that the condition has."""
    return {name: value for name, value in parameters.items() if f"{{{name}:" in condition}


def _of_no_package(asks: Asks, of_name: Sequence[Build]) -> list[Build]:
    """Builds that may be of a package: those that are called as what was reported of it, in any version; or all.

    Args:
        asks: the store.
        of_name: what was reported of the package, in any version.
    """
    names = {name for one in of_name for name in _names(one)}
    return [one for one in _builds(asks, _OF_NO_PACKAGE) if not names or names & _names(one)]


def _names(one: Build) -> set[str]:
    """Of a file, up to `.so`: an older version may have another number."""
    return {name.partition(".so")[0] for name in (one.soname, one.path.rpartition("/")[2]) if name}


def _ids(builds: Iterable[Build]) -> list[str]:
    return sorted({one.build_id for one in builds})


def _purls(builds: Iterable[Build]) -> list[str]:
    return sorted({one.purl for one in builds if one.purl})
