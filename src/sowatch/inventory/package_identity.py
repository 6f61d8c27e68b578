"""`PackageIdentity`, and how one is made of what a note, a database or the metadata of a language says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

from msgspec import Struct

from sowatch.inventory.package_databases import PackageRecord, read_below
from sowatch.inventory.purl import purl
from sowatch.linux.package_note import PackageNote

__all__ = ["IdentifiedBy", "PackageIdentity", "Release", "by_note", "by_record", "is_borrowed", "plain", "release_of"]

#: What named the package: the file itself, the database of a package manager, or the metadata beside or around it.
IdentifiedBy: TypeAlias = Literal["note", "dpkg", "rpm", "apk", "pypi", "npm", "maven"]

_MAX_RELEASE_BYTES: Final = 1 << 16
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_TEXT: Final = 256
_OF_GLIBC: Final = re.compile(
    r"ld(64)?\.so\.\d|ld-linux[A-Za-z0-9._-]*\.so\.\d|libc\.so\.6(\.1)?|libm\.so\.6(\.1)?|libmvec\.so\.1|libpthread\.so\.0"
    r"|lib(dl|nss_[a-z]+|resolv)\.so\.2(\.1)?|lib(anl|rt|util|nsl|thread_db|BrokenLocale)\.so\.1(\.1)?"
    r"|libc_malloc_debug\.so\.0|libmemusage\.so|libpcprofile\.so"
)


class PackageIdentity(Struct, frozen=True):
    """The package of a mapped file.

    Attributes:
        name: as its manager names it, without an architecture; of a note that of the source package.
        version: as its manager writes it.
        source: the package that it was built from, as OSV names packages of Debian, Ubuntu and Alpine; None if unknown.
        purl: all of it as a package URL, with the distribution as qualifier ``distro``.
        identified_by: what named it.
        source_version: of the source package; None if unknown.
    """

    name: str
    version: str
    source: str | None
    purl: str
    identified_by: IdentifiedBy
    source_version: str | None = None


class Release(NamedTuple):
    """Of a distribution, by its os-release: the name, and the name with the version."""

    name: str = ""
    distro: str = ""


_KINDS: Final[Mapping[str, str]] = {"dpkg": "deb", "apk": "apk", "rpm": "rpm"}


def by_record(record: PackageRecord, manager: Literal["dpkg", "apk", "rpm"], release: Release) -> PackageIdentity:
    """Of a record in the database of that manager."""
    upstream = record.source
    if record.source_version != record.version:
        upstream += f"@{record.source_version}"
    qualifiers = {
        "arch": record.architecture,
        "distro": release.distro,
        "epoch": record.epoch,
        "upstream": "" if upstream == record.name else upstream,
    }
    url = purl(_KINDS[manager], release.name, record.name, record.version, qualifiers)
    version = f"{record.epoch}:{record.version}" if record.epoch else record.version
    return PackageIdentity(record.name, version, record.source, url, manager, record.source_version)


def by_note(note: PackageNote, release: Release) -> PackageIdentity:
    """The note names the source package, and the distribution that built it, which may be another than the root's."""
    name = note.os or release.name
    # A note without the version of the distribution (Ubuntu's) is of this one, if that is the one of the root.
    is_of_root = not note.os or (not note.os_version and note.os == release.name)
    distro = release.distro if is_of_root else f"{note.os}-{note.os_version}".rstrip("-")
    kind = note.type if note.type in _KINDS.values() else "generic"
    qualifiers = {"arch": note.architecture, "distro": distro}
    url = purl(kind, name if kind != "generic" else "", note.name, note.version, qualifiers)
    return PackageIdentity(note.name, note.version, note.name, url, "note", note.version)


def is_borrowed(note: PackageNote, soname: str | None) -> bool:
    """Whether a note may be of the C library's startup files only, which each program is linked with.

    On Ubuntu ``Scrt1.o`` has brought the note of glibc itself since 24.10.
    """
    return note.type == "deb" and note.name == "glibc" and (soname is None or _OF_GLIBC.fullmatch(soname) is None)


def plain(by: Literal["pypi", "npm", "maven"], namespace: str, name: str, version: str) -> PackageIdentity:
    """Of a language: no distribution has built it."""
    full = {"npm": f"{namespace}/{name}", "maven": f"{namespace}:{name}"}.get(by, name) if namespace else name
    return PackageIdentity(full, version, None, purl(by, namespace, name, version), by)


def release_of(root_fd: int) -> Release:
    """The distribution of a root directory; what is not a plain word is left out."""
    data = read_below(root_fd, "/etc/os-release", _MAX_RELEASE_BYTES)
    if data is None:
        data = read_below(root_fd, "/usr/lib/os-release", _MAX_RELEASE_BYTES) or b""
    fields = dict(line.partition("=")[::2] for line in data.decode("utf-8", "replace").splitlines())
    values = {name: fields.get(name, "").strip().strip("\"'") for name in ("ID", "VERSION_ID", "VERSION_CODENAME")}
    words = {name: value if _WORD.fullmatch(value) and len(value) < _MAX_TEXT else "" for name, value in values.items()}
    version = words["VERSION_ID"] or words["VERSION_CODENAME"]
    return Release(words["ID"], f"{words['ID']}-{version}" if words["ID"] and version else words["ID"])
