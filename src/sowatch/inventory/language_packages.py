"""Packages of languages: wheels of Python, packages of npm, archives of Java. Read-only.

By what is beside a file, or in the archives that its process has open; all of that is a container's, see
`package_databases`.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import Struct

from sowatch.inventory.look_budget import BudgetError, spend
from sowatch.inventory.package_databases import Listed, entries_below, read_with_version
from sowatch.linux.descriptors import close_fd, is_exhausted
from sowatch.linux.openat import reopen
from sowatch.linux.proc import Miss, ProcFs

if TYPE_CHECKING:
    # Imported where an archive is read: an agent may never see one.
    from zipfile import ZipFile

__all__ = ["jar_package", "npm_package", "wheel_of", "wheels_listed"]

_MAX_METADATA_BYTES: Final = 1 << 20
_MAX_RECORD_BYTES: Final = 16 << 20
_MAX_RECORDS_BYTES: Final = 256 << 20
#: Of a name or a version.
_MAX_TEXT: Final = 214
_PRINTABLE: Final = re.compile(r"[!-~]+")
#: As each registry allows them; of what it does not allow no package URL can be made.
_WHEEL_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_NPM_NAME: Final = re.compile(r"(@[A-Za-z0-9~-][A-Za-z0-9._~-]*/)?[A-Za-z0-9~_-][A-Za-z0-9._~-]*")
_MAVEN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_SITE: Final = ("site-packages", "dist-packages")


def _is_name(text: str, pattern: re.Pattern[str]) -> bool:
    return len(text) <= _MAX_TEXT and pattern.fullmatch(text) is not None


def _is_version(text: str) -> bool:
    return _is_name(text, _PRINTABLE) and text.strip("/") != ""


# ---- Python ------------------------------------------------------------------------------------


def wheels_listed(root_fd: int, paths: Iterable[str]) -> dict[str, Listed]:
    """The RECORDs that list files below ``site-packages``: ``package`` is the directory with the metadata.

    Each RECORD is read once for all of them.

    Args:
        root_fd: of the root directory.
        paths: of the files, as a process with that root sees them.
    """
    sites: dict[str, dict[str, str]] = {}
    for path in paths:
        parts = path.split("/")
        places = [place for place, part in enumerate(parts) if part in _SITE]
        if places:
            site, below = "/".join(parts[: places[-1] + 1]), "/".join(parts[places[-1] + 1 :])
            sites.setdefault(site, {})[below] = path
    found: dict[str, Listed] = {}
    left_bytes = _MAX_RECORDS_BYTES
    for site, wanted in sites.items():
        names = [name for _, name in entries_below(root_fd, site) if name.endswith(".dist-info")]
        _sort_likely_first(names, wanted)
        for name in names:
            if not wanted or left_bytes <= 0:
                break
            record = read_with_version(root_fd, f"{site}/{name}/RECORD", _MAX_RECORD_BYTES)
            if record is None:
                continue
            data, version = record
            left_bytes -= len(data)
            for file, digest in _record_rows(data):
                path_of_file = wanted.pop(file, None)
                if path_of_file is not None:
                    found[path_of_file] = Listed(f"{site}/{name}", file, version[4], digest, site)
    return found


def _sort_likely_first(names: list[str], wanted: Iterable[str]) -> None:
    """Those that are called as the directories of the files are most likely the ones."""
    tops = tuple({_normalized(below.partition("/")[0].partition(".")[0]) for below in wanted})
    names.sort(key=lambda name: not _normalized(name.partition("-")[0]).startswith(tops))


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _record_rows(data: bytes) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Each file of a RECORD (CSV: path, hash, size), and its hash."""
    import csv

    spend(lines=data.count(b"\n"))
    try:
        for row in csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")):
            if row:
                yield row[0], _record_digest(row[1] if len(row) > 1 else "")
    except csv.Error:  # a field beyond the limit, or a line that is none
        return


def _record_digest(text: str) -> tuple[str, str] | None:
    algorithm, _, encoded = text.partition("=")
    if algorithm not in ("sha256", "sha384", "sha512") or len(encoded) > 100:
        return None
    try:
        return algorithm, base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    except (binascii.Error, ValueError):
        return None


def wheel_of(root_fd: int, listed: Listed) -> tuple[str, str] | None:
    """Name and version by the METADATA beside a RECORD; the name as the index normalizes it."""
    found = read_with_version(root_fd, f"{listed.package}/METADATA", _MAX_METADATA_BYTES)
    if found is None:
        return None
    fields: dict[str, str] = {}
    for line in found[0].decode("utf-8", "replace").splitlines():
        if not line:
            break  # what follows is the description
        key, _, value = line.partition(":")
        fields.setdefault(key, value.strip())
    name, version = fields.get("Name", ""), fields.get("Version", "")
    return (_normalized(name), version) if _is_name(name, _WHEEL_NAME) and _is_version(version) else None


# ---- npm ---------------------------------------------------------------------------------------


class _PackageJson(Struct):
    name: str
    version: str


def npm_package(root_fd: int, path: str) -> tuple[str, str] | None:
    """Name (with its scope) and version by the ``package.json`` of the nearest package below ``node_modules``."""
    parts = path.split("/")
    place = next((at for at in range(len(parts) - 1, -1, -1) if parts[at] == "node_modules"), None)
    if place is None:
        return None
    count = 2 if place + 1 < len(parts) and parts[place + 1].startswith("@") else 1
    if len(parts) < place + count + 2:  # the file lies beside the packages
        return None
    directory = "/".join(parts[: place + count + 1])
    found = read_with_version(root_fd, f"{directory}/package.json", _MAX_METADATA_BYTES)
    if found is None:
        return None
    try:
        package = msgspec.json.decode(found[0], type=_PackageJson)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    is_sane = _is_name(package.name, _NPM_NAME) and _is_version(package.version)
    return (package.name, package.version) if is_sane else None


# ---- Java --------------------------------------------------------------------------------------

_MAX_DESCRIPTORS: Final = 16_384
_MAX_JARS: Final = 2_000
_MAX_JAR_BYTES: Final = 2 << 30
#: Of the list of what a jar has, which is read as a whole.
_MAX_DIRECTORY_BYTES: Final = 8 << 20
_MAX_LIBRARY_BYTES: Final = 256 << 20
_MAX_POM_BYTES: Final = 1 << 16
_MAX_POMS: Final = 200
_CHUNK: Final = 1 << 20
#: End of central directory record: signature, six fields of which the last two are size and offset, comment length.
_END: Final = b"PK\5\6"
#: It stands before that, if there is another record for large archives.
_END_64_LOCATOR: Final = b"PK\6\7"
_JAR_NAMES: Final = (".jar", ".war", ".ear")
_POM: Final = re.compile(r"META-INF/maven/([^/]+)/([^/]+)/pom\.properties")


class _Content(NamedTuple):
    """What a zip archive says of a file that it has."""

    size: int
    crc: int


def jar_package(proc: ProcFs, pid: int, fd: int) -> tuple[str, str, str] | None:
    """Group, artifact and version of the archive that a library was unpacked from; None where that is not certain.

    Programs on Java unpack the libraries of their archives into temporary files, of any name. An archive that the
    process has open has one with the very content (its length and CRC-32), and says by one ``pom.properties``, or by
    the one that is called as itself, which artifact it is.

    Args:
        proc: the host's.
        pid: who has the library mapped.
        fd: of the library.
    """
    jars = _open_jars(proc, pid)
    content: _Content | None = None
    for path, name in jars:
        if content is None:
            content = _content_of(fd)
            if content is None:
                return None
        found = _artifact(path, name, content)
        if found is not None:
            return found
    return None


def _open_jars(proc: ProcFs, pid: int) -> Iterator[tuple[str, str]]:
    """The links of the descriptors that are of archives by their names, and those names."""
    thread = proc.live_thread(pid)
    if isinstance(thread, Miss):
        return
    directory, seen = f"{proc.root}/{thread}/fd", set[str]()
    try:
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                spend()
                if number >= _MAX_DESCRIPTORS or len(seen) >= _MAX_JARS:
                    return
                try:
                    target = os.readlink(entry.path).removesuffix(" (deleted)")
                except OSError:
                    continue
                if target.endswith(_JAR_NAMES) and target not in seen:
                    seen.add(target)
                    yield entry.path, os.path.basename(target)
    except OSError:
        return


def _content_of(fd: int) -> _Content | None:
    crc = 0
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_LIBRARY_BYTES:
            return None
        for at in range(0, size, _CHUNK):
            spend(content_bytes=_CHUNK)
            crc = zlib.crc32(os.pread(fd, _CHUNK, at), crc)
    except OSError:
        return None
    return _Content(size, crc)


def _artifact(path: str, name: str, content: _Content) -> tuple[str, str, str] | None:
    import zipfile

    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if is_exhausted(error):
            raise
        return None
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_JAR_BYTES:
            return None
        fd = reopen(place, os.O_RDONLY)
    except OSError:
        return None
    finally:
        close_fd(place)
    try:
        with open(fd, "rb") as file:
            directory_bytes = _directory_bytes(file, status.st_size)
            if directory_bytes is None or directory_bytes > _MAX_DIRECTORY_BYTES:
                return None
            spend(size_bytes=directory_bytes)
            with zipfile.ZipFile(file) as archive:
                return _artifact_in(archive, name, content)
    except BudgetError:
        raise
    except Exception:  # noqa: BLE001 - whatever an archive of a container makes the library raise
        return None


def _directory_bytes(file: io.BufferedReader, size: int) -> int | None:
    """How long the list of what the archive has is, which is read as a whole; None: it has none that is read.

    Of an archive beyond 4 GB or 65,535 files the length is elsewhere: the library believes that one.
    """
    length = min(size, 20 + 22 + 0xFFFF)
    file.seek(size - length)
    tail = file.read(length)
    at = tail.rfind(_END)
    is_large = at >= 20 and tail[at - 20 : at - 16] == _END_64_LOCATOR
    return int.from_bytes(tail[at + 12 : at + 16], "little") if 0 <= at <= len(tail) - 22 and not is_large else None


def _artifact_in(archive: ZipFile, name: str, content: _Content) -> tuple[str, str, str] | None:
    import zipfile

    infos = archive.infolist()
    if not any((info.file_size, info.CRC) == content for info in infos):
        return None
    poms = [(found[2], info) for info in infos if (found := _POM.fullmatch(info.filename))][:_MAX_POMS]
    if len(poms) > 1:  # those of what was packed into it, too
        poms = [(artifact, info) for artifact, info in poms if re.match(re.escape(artifact) + r"(-\d|\.)", name)]
    if len(poms) != 1 or poms[0][1].file_size > _MAX_POM_BYTES:
        return None
    # Other methods let the archive say how much memory it takes to read it; no tool makes an archive of Java with them.
    if poms[0][1].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return None
    with archive.open(poms[0][1]) as file:
        text = file.read(_MAX_POM_BYTES).decode("latin-1")
    fields = dict(line.partition("=")[::2] for line in text.splitlines() if not line.startswith("#"))
    group, artifact, version = (fields.get(key, "").strip() for key in ("groupId", "artifactId", "version"))
    is_sane = _is_name(group, _MAVEN_NAME) and _is_name(artifact, _MAVEN_NAME) and _is_version(version)
    return (group, artifact, version) if is_sane else None
