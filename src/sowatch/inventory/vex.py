"""Statements of OpenVEX (https://github.com/openvex/spec): what somebody says of a vulnerability in a product.

A statement is about products, named by package URLs. It applies to a package if one of them names it, or if the package
is a subcomponent of one that the process runs: of the package of its executable. Products of another kind, such as
images of containers, are not known of a process, and so a statement about them applies to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct, field

from sowatch.inventory.osv import moment_of
from sowatch.linux.openat import open_regular
from sowatch.model.errors import SowatchError

if TYPE_CHECKING:
    from sowatch.inventory.packages import PackageIdentity

__all__ = ["Vex", "VexStatement", "VexStatus", "load_vex"]

VexStatus: TypeAlias = Literal["not_affected", "affected", "fixed", "under_investigation"]

_MAX_BYTES: Final = 64 << 20
_MAX_TEXT: Final = 500


class _Url(NamedTuple):
    """A package URL; a version or a qualifier that it lacks stands for all."""

    key: tuple[str, str, str]
    version: str | None
    qualifiers: frozenset[tuple[str, str]]

    def names(self, other: _Url) -> bool:
        """Whether the other one is a package that this one names."""
        return (
            self.key == other.key
            and self.version in (None, other.version)
            and self.qualifiers <= (other.qualifiers | {("type", self.key[0])})
        )


class _Product(NamedTuple):
    url: _Url
    subcomponents: tuple[_Url, ...]


class VexStatement(NamedTuple):
    """One statement.

    Attributes:
        status: as OpenVEX has it.
        ids: of the vulnerability, in capitals: its name and its aliases.
        name: of the vulnerability.
        justification: why, in the statement's words.
        time: of the statement, in UTC; the last one counts. The begin of all times if it has none.
        products: that it is about.
    """

    status: VexStatus
    ids: frozenset[str]
    name: str
    justification: str | None
    time: datetime
    products: tuple[_Product, ...]

    @property
    def is_of_versions(self) -> bool:
        """Whether it is about certain versions only."""
        return all(one.url.version is not None for one in self.products)


# ---- what a file has ----------------------------------------------------------------------------


class _Component(Struct):
    id: str = field(name="@id", default="")
    identifiers: dict[str, str] | None = None


class _ProductIn(Struct):
    id: str = field(name="@id", default="")
    identifiers: dict[str, str] | None = None
    subcomponents: list[_Component | str] | None = None


class _Vulnerability(Struct):
    id: str = field(name="@id", default="")
    name: str = ""
    aliases: list[str] | None = None


class _Statement(Struct):
    status: VexStatus
    vulnerability: _Vulnerability | str
    products: list[_ProductIn | str] | None = None
    subcomponents: list[_Component | str] | None = None
    timestamp: str | None = None
    last_updated: str | None = None
    justification: str | None = None
    impact_statement: str | None = None
    status_notes: str | None = None
    action_statement: str | None = None


class _Document(Struct):
    context: str = field(name="@context")
    statements: list[_Statement]
    timestamp: str = ""
    last_updated: str | None = None


class Vex:
    """Statements by package. Any thread."""

    def __init__(self, statements: Iterable[VexStatement] = ()) -> None:
        self._by_key: dict[tuple[str, str, str], list[VexStatement]] = {}
        self.statements = 0
        #: About what is no package of a process.
        self.without_package = 0
        for one in statements:
            self.statements += 1
            keys = {url.key for product in one.products for url in (product.url, *product.subcomponents)}
            self.without_package += not keys
            for key in keys:
                self._by_key.setdefault(key, []).append(one)

    def about(self, package: PackageIdentity, product: PackageIdentity | None = None) -> Iterator[VexStatement]:
        """Every statement that applies to a package, the last one first.

        Args:
            package: of a mapped file.
            product: the package of the executable that the process runs.
        """
        if not self._by_key:
            return
        ours = _urls_of(package)
        theirs = () if product is None else _urls_of(product)
        found = {id(one): one for url in ours for one in self._by_key.get(url.key, ())}
        for one in sorted(found.values(), key=lambda one: one.time, reverse=True):
            if any(_applies(product, ours, theirs) for product in one.products):
                yield one


def _applies(product: _Product, ours: Sequence[_Url], theirs: Sequence[_Url]) -> bool:
    if not product.subcomponents:
        return any(product.url.names(url) for url in ours)
    # The package itself as the product, or the program as the product and the package as a part of it.
    is_part = any(part.names(url) for part in product.subcomponents for url in ours)
    return is_part and any(product.url.names(url) for url in (*ours, *theirs))


def load_vex(places: Iterable[str]) -> Vex:
    """Reads documents.

    Raises:
        SowatchError: one is not there, or is no document of OpenVEX.
    """
    return Vex(one for place in places for one in _statements_of(place))


def _statements_of(place: str) -> Iterator[VexStatement]:
    try:
        with open(open_regular(place), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SowatchError(f"cannot read {place!r}: {error.strerror}. Name a document of OpenVEX.") from error
    if len(data) > _MAX_BYTES:
        raise SowatchError(f"{place!r} is larger than {_MAX_BYTES >> 20} MiB. Name a document of OpenVEX.")
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SowatchError(f"{place!r} is no document of OpenVEX: {error}. Correct it, or leave it out.") from error
    if "openvex" not in document.context:
        raise SowatchError(
            f"{place!r} is no document of OpenVEX: its @context is {document.context!r}. Convert it, or leave it out."
        )
    for one in document.statements:
        yield _statement(one, document, place)


def _statement(one: _Statement, document: _Document, place: str) -> VexStatement:
    vulnerability = one.vulnerability
    if isinstance(vulnerability, str):
        vulnerability = _Vulnerability(name=vulnerability)
    name = vulnerability.name or vulnerability.id.rpartition("/")[2]
    text = one.last_updated or one.timestamp or document.last_updated or document.timestamp
    time = moment_of(text) if text else datetime.min.replace(tzinfo=UTC)
    if time is None:
        raise SowatchError(
            f"{place!r} has a statement about {name!r} of {text[:_MAX_TEXT]!r}, which is no time. Correct it: the last "
            "statement counts."
        )
    words = (one.justification, one.impact_statement, one.status_notes, one.action_statement)
    return VexStatement(
        one.status,
        frozenset(text.upper() for text in (name, *(vulnerability.aliases or ())) if text),
        name,
        ": ".join(word for word in words if word)[:_MAX_TEXT] or None,
        time,
        tuple(found for product in one.products or () if (found := _product(product, one.subcomponents)) is not None),
    )


def _product(product: _ProductIn | str, inherited: Sequence[_Component | str] | None) -> _Product | None:
    url = _component(product)
    parts = inherited if isinstance(product, str) else product.subcomponents or inherited
    found = [_component(part) for part in parts or ()]
    if url is None or None in found:  # a part that is not known might be the one that matters
        return None
    return _Product(url, tuple(part for part in found if part is not None))


def _component(one: _Component | _ProductIn | str) -> _Url | None:
    text = one if isinstance(one, str) else (one.identifiers or {}).get("purl", one.id)
    return _parsed(text)


# ---- package URLs -------------------------------------------------------------------------------


def _urls_of(package: PackageIdentity) -> list[_Url]:
    """A package under its own name, and under that of its source package."""
    own = _parsed(package.purl)
    if own is None:
        return []
    if package.source is None:
        return [own]
    kind, namespace, _ = own.key
    qualifiers = {(key, value) for key, value in own.qualifiers if key != "arch"}
    versions = {package.source_version or package.version, own.version}
    return [own] + [
        _Url((kind, namespace, package.source), version, frozenset({*qualifiers, ("arch", "source")}))
        for version in versions
    ]


@lru_cache(16_384)
def _parsed(text: str) -> _Url | None:
    from packageurl import PackageURL

    try:
        url: Any = PackageURL.from_string(text)
    except ValueError:
        return None
    qualifiers = frozenset((str(key), str(value)) for key, value in dict(url.qualifiers or {}).items())
    return _Url((url.type, url.namespace or "", url.name), url.version, qualifiers)
