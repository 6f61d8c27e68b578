"""`Vulnerabilities`: what is known to be wrong with a package, by data that somebody brings. Nothing is fetched.

Three sources: advisories of OSV, which name packages and versions; lists of build ids, which name files; and statements
of OpenVEX, which say of a product that a vulnerability does not concern it, or does. An answer is *affected*, *not
affected* or *unknown*, and never one of the first two where the package is not known, the data have nothing of its
distribution, or its version cannot be compared. docs/decisions/0078-vulnerabilities.md has the rules.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cmp_to_key
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from cachetools import LRUCache
from msgspec import Struct
from msgspec.structs import replace

from sowatch.inventory.ecosystems import OsvPackage, base_of, covers, is_extended, osv_package
from sowatch.inventory.osv import Advisory, AffectedPackage, OsvData, VersionEvent, VersionRange, load_osv
from sowatch.inventory.package_versions import VersionScheme, compare_versions
from sowatch.inventory.vex import Vex, VexStatement, load_vex
from sowatch.linux.openat import open_regular
from sowatch.model.errors import SowatchError, UsageError

if TYPE_CHECKING:
    from sowatch.inventory.packages import PackageIdentity

__all__ = ["Finding", "FindingStatus", "NamedVulnerability", "Vulnerabilities", "load_vulnerabilities"]

#: ``fixed``, ``not_affected`` and ``under_investigation`` are the words of a VEX statement; what is under investigation
#: is unknown to who states it, too.
FindingStatus: TypeAlias = Literal["affected", "unknown", "under_investigation", "fixed", "not_affected"]
FoundBy: TypeAlias = Literal["osv", "build_ids", "vex"]

_ORDER: Final[tuple[FindingStatus, ...]] = ("affected", "unknown", "under_investigation", "fixed", "not_affected")
#: Answers that are kept.
_MAX_KEPT: Final = 16_384
#: Ids that one vulnerability may have.
_MAX_NAMES: Final = 1_000
_MAX_LIST_BYTES: Final = 64 << 20
#: Names that a reason lists; the others are counted.
_NAMED: Final = 5
_BUILD_ID: Final = re.compile("[0-9a-f]{2,128}")
_CVE: Final = re.compile(r"CVE-[0-9]{4}-[0-9]+")

NO_PACKAGE: Final = "its package is not known"
NO_BUILD_ID: Final = "it has no build id"


class Finding(Struct, frozen=True):
    """What is known of one package, or file, and one vulnerability.

    Attributes:
        status: see `FindingStatus`.
        id: a CVE if it has one, else that of the advisory; None: it is unknown what the package is affected by at all.
        aliases: its other ids.
        upstream: ids of what it is the consequence of; an advisory about several has each of them.
        severity: a word of the advisory's, or a CVSS vector; None: it has none.
        fixed_version: the next version without it; None: there is none, or it is not known.
        reason: why it is unknown, what a VEX statement or a list of build ids says of it.
        summary: of the advisory.
        found_by: its source.
    """

    status: FindingStatus
    id: str | None = None
    aliases: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    severity: str | None = None
    fixed_version: str | None = None
    reason: str | None = None
    summary: str = ""
    found_by: FoundBy = "osv"

    @property
    def is_open(self) -> bool:
        """Whether it may be affected, and nobody knows."""
        return self.status in ("unknown", "under_investigation")

    @property
    def names(self) -> frozenset[str]:
        """Under which it may be asked for, in capitals."""
        return frozenset(name.upper() for name in (self.id, *self.aliases, *self.upstream) if name)


class _Verdict(NamedTuple):
    """Whether a version is affected; None: unknown, for that reason."""

    is_affected: bool | None
    fixed_version: str | None = None
    reason: str | None = None


class Vulnerabilities:
    """Answers whether packages are affected. Any thread may ask.

    Args:
        osv: advisories; None: nobody gave any, and what is wrong with versions is not asked.
        build_ids: by a build id in small letters, what is wrong with that very build: ids, each with a note.
        vex: statements.
    """

    def __init__(
        self,
        osv: OsvData | None = None,
        build_ids: Mapping[str, Sequence[tuple[str, str]]] | None = None,
        vex: Vex | None = None,
    ) -> None:
        self._asks_versions = osv is not None
        self.osv = OsvData() if osv is None else osv
        self.build_ids = build_ids or {}
        self.vex = vex or Vex()
        self._kept: LRUCache[tuple[object, ...], tuple[Finding, ...]] = LRUCache(_MAX_KEPT)

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read of the data: while there are some, what is not found is unknown."""
        return tuple(self.osv.problems)

    def findings(
        self, identity: PackageIdentity | None, build_id: str | None = None, product: PackageIdentity | None = None
    ) -> tuple[Finding, ...]:
        """What a file is affected by, or may be; the worst first. Takes 1 us for what was asked before.

        What an advisory says a version is not affected by is not in it; what a VEX statement took away is.

        Args:
            identity: the package of a mapped file; None: it is not known, and so it is unknown what it is affected by.
            build_id: of that file.
            product: the package of the executable that has it mapped, which VEX statements may be about.
        """
        key = (identity, build_id, product if self.vex.statements else None)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = tuple(sorted(self._findings(identity, build_id, product), key=_rank))
        return found

    def affected_by(self, name: str) -> NamedVulnerability:
        """One vulnerability, to be asked about many packages.

        Args:
            name: a CVE, or the id of an advisory, in capitals or not. Aliases count, and so do the advisories of
                distributions that name it as what they are the consequence of.
        """
        names, waiting = {name.upper()}, [name.upper()]
        advisories: dict[str, Advisory] = {}
        while waiting and len(names) < _MAX_NAMES:
            for one in self.osv.named(waiting.pop()):
                advisories[one.id] = one
                new = {text.upper() for text in (one.id, *one.aliases)} - names
                names |= new
                waiting += new
        return NamedVulnerability(self, name, frozenset(names), tuple(advisories.values()))

    # ---- answers ------------------------------------------------------------------------------

    def _findings(
        self, identity: PackageIdentity | None, build_id: str | None, product: PackageIdentity | None
    ) -> Iterator[Finding]:
        listed = self.build_ids.get((build_id or "").lower(), ())
        found = [Finding("affected", name, reason=note or None, found_by="build_ids") for name, note in listed]
        if not self._asks_versions and not build_id:
            found.append(Finding("unknown", reason=NO_BUILD_ID, found_by="build_ids"))
        if identity is None:
            yield from found
            if self._asks_versions:
                yield Finding("unknown", reason=NO_PACKAGE)
            return
        package = osv_package(identity) if self._asks_versions else None
        decided: set[str] = set()
        reason = self.why_unknown(identity, package) if self._asks_versions else None
        if reason is not None:
            found.append(Finding("unknown", reason=reason))
        elif package is not None:
            for group in _grouped(self.osv.of_package(package.ecosystem, package.names)):
                decided.update(name.upper() for one in group for name in one.names)
                found += _finding(group, package)
        yield from self._with_statements(found, decided, identity, product)

    def why_unknown(self, identity: PackageIdentity, package: OsvPackage | None) -> str | None:
        """Why the data have no answer for a package, whatever the advisories are; None: they have one."""
        if package is None:
            return f"no ecosystem of OSV is known for {identity.purl}"
        has_data = self.osv.has_data(package.ecosystem, package.release)
        if has_data:
            return None
        if has_data is None:
            return f"the release of {package.ecosystem} that it is of is not known"
        return f"the data have nothing of {' '.join(filter(None, (package.ecosystem, package.release)))}"

    def _with_statements(
        self, found: Iterable[Finding], decided: set[str], identity: PackageIdentity, product: PackageIdentity | None
    ) -> Iterator[Finding]:
        statements = list(self.vex.about(identity, product))
        said: set[str] = set()
        for one in found:
            said |= one.names
            yield _with_said(one, statements)
        for statement in statements:
            if statement.ids & said:
                continue
            said |= statement.ids
            # An advisory that found this version not affected knows more than a statement about all versions.
            if statement.status in ("affected", "under_investigation") and (
                statement.is_of_versions or not statement.ids & decided
            ):
                aliases = tuple(sorted(statement.ids - {statement.name.upper()}))
                yield _stated(Finding("unknown", statement.name, aliases, found_by="vex"), statement)


class NamedVulnerability:
    """One vulnerability under all its ids; made by `Vulnerabilities.affected_by`.

    Attributes:
        name: as it was asked for.
        ids: all of them, in capitals.
        advisories: that are about it.
    """

    def __init__(self, data: Vulnerabilities, name: str, ids: frozenset[str], advisories: tuple[Advisory, ...]) -> None:
        self._data = data
        self._own = _same_as(name, advisories)
        self.name = name
        self.ids = ids
        self.advisories = advisories

    @property
    def is_known(self) -> bool:
        """Whether any data name it: if not, it is unknown of everything."""
        return bool(self.advisories or self.build_ids)

    @property
    def packages(self) -> frozenset[tuple[str, str]]:
        """Ecosystem (without a release) and name of every package that an advisory names."""
        return frozenset(
            (base_of(one.ecosystem), one.name) for advisory in self.advisories for one in advisory.packages
        )

    @property
    def build_ids(self) -> frozenset[str]:
        """Those that lists name."""
        return frozenset(
            build_id
            for build_id, listed in self._data.build_ids.items()
            if any(name.upper() in self.ids for name, _ in listed)
        )

    def status_of(
        self, identity: PackageIdentity | None, build_id: str | None = None, product: PackageIdentity | None = None
    ) -> Finding:
        """Whether a file is affected by it; arguments as of `Vulnerabilities.findings`."""
        found = [one for one in self._data.findings(identity, build_id, product) if one.names & self.ids]
        if identity is None:
            return found[0] if found else Finding("unknown", self.name, reason=NO_PACKAGE)
        # An advisory may be about others, too, of which nothing is stated.
        about = self._data.vex.about(identity, product)
        statement = next((one for one in about if one.ids & self._own), None)
        if statement is not None and (found or statement.status in ("not_affected", "fixed")):
            return _stated(found[0] if found else Finding("unknown", self.name, found_by="vex"), statement)
        if found:
            return found[0]
        reason = self._data.why_unknown(identity, osv_package(identity))
        if reason is None and not self.advisories:
            reason = "no advisory names it"
        if reason is None and self._data.problems:
            reason = "some of the data could not be read"
        return Finding("not_affected" if reason is None else "unknown", self.name, reason=reason)


# ---- one advisory -------------------------------------------------------------------------------


def _same_as(name: str, advisories: Iterable[Advisory]) -> frozenset[str]:
    """The ids of one vulnerability, in capitals: what its advisories are the consequence of is another one."""
    found, left = {name.upper()}, [{text.upper() for text in (one.id, *one.aliases)} for one in advisories]
    while near := [names for names in left if names & found]:
        found.update(*near)
        left = [names for names in left if not names & found]
    return frozenset(found)


def _grouped(advisories: Iterable[Advisory]) -> list[list[Advisory]]:
    """Those that are aliases of each other together."""
    groups: list[tuple[set[str], list[Advisory]]] = []
    for one in advisories:
        names = {name.upper() for name in (one.id, *one.aliases)}
        members = [one]
        rest = []
        for group in groups:
            if group[0] & names:
                names |= group[0]
                members = group[1] + members
            else:
                rest.append(group)
        groups = [*rest, (names, members)]
    return [members for _, members in groups]


def _finding(group: Sequence[Advisory], package: OsvPackage) -> Iterator[Finding]:
    """What several advisories about one vulnerability say of a package: the worst; nothing if it is not affected."""
    found = [(one, entry, _verdict(entry, package)) for one in group for entry in _entries(one, package)]
    certain = [one for one in found if one[2].is_affected]
    open_ = [one for one in found if one[2].is_affected is None]
    if not certain and not open_:
        return
    advisory, entry, verdict = (certain or open_)[0]
    own = list(dict.fromkeys(name for one in group for name in (one.id, *one.aliases)))
    upstream = list(dict.fromkeys(name for one in group for name in one.upstream if name not in own))
    shown = _shown_name(group, (*own, *upstream))
    yield Finding(
        "affected" if certain else "unknown",
        shown,
        tuple(name for name in own if name != shown),
        tuple(name for name in upstream if name != shown),
        entry.severity or advisory.severity or next((one.severity for one in group if one.severity), None),
        verdict.fixed_version,
        verdict.reason,
        advisory.summary or next((one.summary for one in group if one.summary), ""),
    )


def _shown_name(group: Sequence[Advisory], names: Sequence[str]) -> str:
    """A CVE, if it is one only."""
    cves = [name for name in names if _CVE.fullmatch(name)]
    return cves[0] if len(cves) == 1 else group[0].id


def _entries(advisory: Advisory, package: OsvPackage) -> list[AffectedPackage]:
    """What an advisory says of this release of a package."""
    found = [
        one
        for one in advisory.packages
        if base_of(one.ecosystem) == package.ecosystem
        and one.name in package.names
        and covers(one.ecosystem, package.release)
    ]
    extended = [one for one in found if is_extended(one.ecosystem)]
    if extended and "esm" in package.version:
        return extended
    # Who has no subscription has the same flaw, though not that fix: also where a release is mended for nobody else.
    return [one for one in found if one not in extended] or extended


def _verdict(entry: AffectedPackage, package: OsvPackage) -> _Verdict:
    if package.version in entry.versions:
        fixed = (_in_range(one, package).fixed_version for one in entry.ranges)
        return _Verdict(True, next((one for one in fixed if one), None))
    verdicts = [_in_range(one, package) for one in entry.ranges]
    for wanted in (True, None):
        for one in verdicts:
            if one.is_affected is wanted:
                return one
    if entry.ranges or entry.versions:
        return _Verdict(False)
    return _Verdict(
        None, reason="the advisory names commits only" if entry.has_commits else "the advisory names no version"
    )


def _in_range(found: VersionRange, package: OsvPackage) -> _Verdict:
    """As the specification of OSV evaluates it."""
    scheme: VersionScheme = "semver" if found.is_semver else package.scheme
    places: dict[VersionEvent, int] = {}
    for event in found.events:
        place = _place(event, scheme, package)
        if place is None:
            return _Verdict(None, reason=f"{package.version} cannot be compared with {event.version}")
        places[event] = place
    limits = [place for event, place in places.items() if event.kind == "limit"]
    if limits and min(limits) >= 0:
        return _Verdict(False)
    is_affected, fixed = False, None
    # A stable sort: of events at the same version the last one counts, as they are written.
    for event in sorted((one for one in found.events if one.kind != "limit"), key=_event_order(scheme)):
        place = places[event]
        if event.kind == "introduced":
            is_affected = is_affected or place >= 0
        elif place > 0 or (place == 0 and event.kind == "fixed"):
            is_affected = False
        elif event.kind == "fixed":
            fixed = fixed or event.version
    return _Verdict(is_affected, fixed if is_affected else None)


def _place(event: VersionEvent, scheme: VersionScheme, package: OsvPackage) -> int | None:
    """-1, 0 or 1 as the version of a package is before, at or behind an event; None: that is not known."""
    kind, version = event
    if version == "0":
        return 1
    if kind == "limit" and "*" in version:
        return -1
    if not package.has_epoch and re.match("[1-9][0-9]*:", version):
        return None
    return compare_versions(scheme, package.version, version)


def _event_order(scheme: VersionScheme) -> Callable[[VersionEvent], Any]:
    def compare(one: VersionEvent, other: VersionEvent) -> int:
        if "0" in (one.version, other.version):
            return (other.version == "0") - (one.version == "0")
        return compare_versions(scheme, one.version, other.version) or 0

    return cmp_to_key(compare)


def _with_said(one: Finding, statements: Sequence[VexStatement]) -> Finding:
    """What statements, the last one first, leave of a finding.

    A statement about one of several vulnerabilities of an advisory says nothing of the others: so it takes the advisory
    away only together with statements about each of these.
    """
    names = [name.upper() for name in (one.id, *one.aliases, *one.upstream) if name]
    parts = [name for name in names if _CVE.fullmatch(name)] or [name.upper() for name in one.upstream]
    whole = {name.upper() for name in (one.id, *one.aliases) if name}.difference(parts)
    if not parts:
        return _stated(one, next((statement for statement in statements if statement.ids & whole), None))
    said = {
        part: statement
        for part in parts
        if (statement := next((found for found in statements if found.ids & {part, *whole}), None)) is not None
    }
    if not said:
        return one
    rest = [part for part in parts if part not in said]
    worst = min(said.values(), key=lambda statement: _ORDER.index(statement.status))
    if not rest and len({id(statement) for statement in said.values()}) == 1:
        return _stated(one, worst)
    texts = [one.reason] if one.reason else []
    texts += [f"{_text(found)}, of {_listed(part for part in said if said[part] is found)}" for found in _each(said)]
    texts += [f"nothing is stated of {_listed(rest)}"] if rest else []
    statuses = (worst.status, one.status) if rest else (worst.status,)
    return replace(one, status=min(statuses, key=_ORDER.index), reason="; ".join(texts))


def _each(said: Mapping[str, VexStatement]) -> Iterable[VexStatement]:
    return {id(statement): statement for statement in said.values()}.values()


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _stated(one: Finding, statement: VexStatement | None) -> Finding:
    return one if statement is None else replace(one, status=statement.status, reason=_text(statement))


def _text(statement: VexStatement) -> str:
    return f"VEX: {statement.status}" + (f", {statement.justification}" if statement.justification else "")


def _rank(one: Finding) -> tuple[int, str]:
    return _ORDER.index(one.status), one.id or ""


# ---- what a user names --------------------------------------------------------------------------


def load_vulnerabilities(
    osv: Iterable[str] = (),
    build_ids: Iterable[str] = (),
    vex: Iterable[str] = (),
    *,
    on_progress: Callable[[], None] = lambda: None,
    packs: bool = True,
) -> Vulnerabilities:
    """Reads data from files.

    Args:
        osv: advisories; see `sowatch.inventory.osv.load_osv`.
        build_ids: files of lines ``BUILD_ID,ID[,NOTE]``.
        vex: documents of OpenVEX.
        on_progress: called again and again; may wait, or raise.
        packs: as of `sowatch.inventory.osv.OsvData`.

    Raises:
        SowatchError: something is not there, or not what it was named as.
    """
    _check_parts()
    listed: dict[str, list[tuple[str, str]]] = {}
    for path in build_ids:
        for build_id, name, note in _build_ids_in(path):
            listed.setdefault(build_id, []).append((name, note))
    places = list(osv)
    return Vulnerabilities(load_osv(places, on_progress, packs=packs) if places else None, listed, load_vex(vex))


def _check_parts() -> None:
    try:
        import packageurl  # noqa: F401
        import univers  # noqa: F401
    except ImportError as error:
        raise SowatchError(
            f"{error.name} is not installed, and versions are compared by it. Install it: "
            "pip install 'sowatch[vulnerabilities]'."
        ) from error


def _build_ids_in(path: str) -> Iterator[tuple[str, str, str]]:
    try:
        with open(open_regular(path), encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = file.read(_MAX_LIST_BYTES + 1)
    except OSError as error:
        raise SowatchError(f"cannot read {path!r}: {error.strerror}. Name a file of build ids.") from error
    if len(lines) > _MAX_LIST_BYTES:
        raise SowatchError(f"{path!r} is larger than {_MAX_LIST_BYTES >> 20} MiB. Name a file of build ids.")
    for number, row in enumerate(_rows_of(lines, path), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#") or (number == 1 and cells[0].lower() == "build_id"):
            continue
        if len(cells) < 2 or not cells[1] or not _BUILD_ID.fullmatch(cells[0].lower()):
            raise UsageError(
                f"{path!r}, line {number}: this is not BUILD_ID,ID[,NOTE]. Write the build id in hexadecimal digits, "
                "and after a comma the id of what is wrong with it."
            )
        yield cells[0].lower(), cells[1], ", ".join(cells[2:])


def _rows_of(text: str, path: str) -> Iterator[list[str]]:
    rows = csv.reader(io.StringIO(text, newline=""))  # other separators of lines may be in a note
    try:
        yield from rows
    except csv.Error as error:
        raise UsageError(
            f"{path!r}, line {rows.line_num}: this is not BUILD_ID,ID[,NOTE]: {error}. Shorten the note, or quote it."
        ) from error
