"""What a host or a container has really loaded, as components of a bill of materials: pure values, in a fixed order.

`sbom_cyclonedx` and `sbom_spdx` write them. What is not known is there all the same, as a file without a package.
docs/decisions/0073-runtime-sbom.md has the rules.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from sowatch.inventory.packages import IdentifiedBy, PackageIdentity
from sowatch.model.encoding import dumps
from sowatch.model.literals import Kind

__all__ = ["LoadedFile", "Occurrence", "Sbom", "SbomComponent", "confidence_of", "sbom_of", "shown"]

#: Names of serial numbers that are made of the content.
_NAMESPACE: Final = uuid.UUID("6f0f2a0e-9a0f-5d0e-8f9c-0c3f6d1b7a54")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

#: How sure the package of a file is. The note is what the builder wrote; a database is compared with the very file; the
#: metadata of npm names no files.
_CONFIDENCE: Final[dict[IdentifiedBy, str]] = {
    "note": "0.9",
    "dpkg": "1",
    "rpm": "1",
    "apk": "1",
    "pypi": "1",
    "npm": "0.8",
    "maven": "0.9",
}


class LoadedFile(Struct, frozen=True):
    """A file that is, or was, mapped by processes of one container or of none.

    Attributes:
        path: as the processes see it.
        kind: as of `Library`.
        build_id: the GNU build id, or ``htlhash:`` and a hash; None if neither can be had.
        soname: None if it has none.
        container: its id; None: of the host.
        package: None if it is unknown.
        processes: how many have it mapped now.
        is_stale: whether the file has been replaced or deleted since.
    """

    path: str
    kind: Kind
    build_id: str | None
    soname: str | None
    container: str | None
    package: PackageIdentity | None
    processes: int = 0
    is_stale: bool = False


class Occurrence(Struct, frozen=True, order=True):
    """Where a component was loaded from: a path, and the container (empty: the host)."""

    path: str
    container: str
    processes: int
    is_stale: bool


class SbomComponent(Struct, frozen=True):
    """One build of one package, or a file whose package is unknown.

    Attributes:
        ref: distinguishes it from all others of the document, and is the same in the next one.
        name: of the package, or the path.
        kind: ``executable`` if one of its files is.
        package: None: unknown.
        build_id: as of `LoadedFile`.
        sonames: sorted.
        occurrences: sorted.
    """

    ref: str
    name: str
    kind: Kind
    package: PackageIdentity | None
    build_id: str | None
    sonames: tuple[str, ...]
    occurrences: tuple[Occurrence, ...]

    @property
    def processes(self) -> int:
        """How many have it mapped now; 0: it was loaded, and has gone."""
        return sum(one.processes for one in self.occurrences)


class Sbom(Struct, frozen=True):
    """A bill of materials.

    Attributes:
        host: the name.
        host_id: machine-id, if it is known.
        container: what it is of, if not of the whole host.
        version: of sowatch.
        time_s: since the epoch.
        serial: a UUID.
        components: sorted by `SbomComponent.ref`.
        is_complete: whether all that was asked for is there; None: only some was asked for.
        limits: why it is not, and what else limits it.
        since_s: what was loaded since that time and has gone is there, too; None: only what is loaded now.
    """

    host: str
    host_id: str | None
    container: str | None
    version: str
    time_s: int
    serial: str
    components: tuple[SbomComponent, ...]
    is_complete: bool | None
    limits: tuple[str, ...]
    since_s: int | None = None


def sbom_of(
    files: Iterable[LoadedFile],
    *,
    host: str,
    host_id: str | None,
    container: str | None,
    version: str,
    time_s: int,
    is_complete: bool | None,
    limits: Sequence[str],
    since_s: int | None = None,
    serial: str | None = None,
) -> Sbom:
    """The document: equal for equal files, in whatever order these come.

    Args: as the attributes of `Sbom`; without a ``serial`` it is made of everything else.
    """
    groups: dict[tuple[str, str, str], list[LoadedFile]] = {}
    unnamed = 0
    for given in files:
        one = replace(given, path=shown(given.path), package=_shown_package(given.package))
        unnamed += one.package is None and given.package is not None
        key = (one.package.purl if one.package else "", "" if one.package else one.path, one.build_id or "")
        groups.setdefault(key, []).append(one)
    if unnamed:
        limits = [*limits, f"{unnamed} files without a package: the names of theirs make no package URL"]
    components = tuple(sorted(map(_component, groups.values()), key=lambda one: one.ref))
    made = Sbom(
        shown(host),
        host_id,
        container,
        version,
        time_s,
        serial or "",
        components,
        is_complete,
        tuple(map(shown, limits)),
        since_s,
    )
    if serial is not None:
        return made
    digest = hashlib.sha256(dumps(made).encode()).hexdigest()
    return replace(made, serial=str(uuid.uuid5(_NAMESPACE, digest)))


def _component(files: Sequence[LoadedFile]) -> SbomComponent:
    first = files[0]
    places: dict[tuple[str, str], Occurrence] = {}
    for one in files:
        key = (one.path, one.container or "")
        before = places.get(key)
        places[key] = Occurrence(
            *key,
            one.processes + (before.processes if before else 0),
            one.is_stale or (before is not None and before.is_stale),
        )
    kinds = {one.kind for one in files}
    kind: Kind = next((one for one in ("executable", "interpreter", "library") if one in kinds), first.kind)
    name = first.package.name if first.package else first.path
    base = first.package.purl if first.package else f"file:{name}"
    return SbomComponent(
        f"{base}#{first.build_id}" if first.build_id else base,
        name,
        kind,
        first.package,
        first.build_id,
        tuple(sorted({shown(one.soname) for one in files if one.soname})),
        tuple(sorted(places.values())),
    )


def _shown_package(package: PackageIdentity | None) -> PackageIdentity | None:
    """As text of any document; None: what its name makes is no package URL, as an image may have it."""
    if package is None or not _is_purl(package.purl):
        return None
    texts = (package.name, package.version, package.source, package.source_version)
    if not any(text and _UNPRINTABLE.search(text) for text in texts):
        return package
    name, version, source, source_version = (text and shown(text) for text in texts)
    return replace(package, name=name, version=version, source=source, source_version=source_version)


@lru_cache(16_384)
def _is_purl(text: str) -> bool:
    from packageurl import PackageURL

    try:
        PackageURL.from_string(text)
    except ValueError:
        return False
    return True


def confidence_of(identity: PackageIdentity) -> str:
    """How sure it is, from 0 to 1."""
    return _CONFIDENCE[identity.identified_by]


def shown(text: str) -> str:
    r"""A name as text of any document: control characters, and bytes that are not UTF-8, as ``\xNN`` or ``\uNNNN``."""
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)
