"""`OsvData`: advisories of OSV (https://ossf.github.io/osv-schema/), out of files that somebody else got. Read-only.

Nothing is fetched. Files are JSON, one advisory each, single, in directories or in zip archives, as osv-scanner keeps
them. Of each advisory only what an answer needs is kept, packed, and unpacked when its package is asked for.

Archives may be hostile: what one contains, and what comes of it, is bounded. What could not be read is counted, as an
answer without it would be incomplete.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Struct, field

from sowatch.inventory.ecosystems import base_of, covers
from sowatch.linux.openat import open_regular
from sowatch.model.errors import SowatchError

__all__ = [
    "Advisory",
    "AffectedPackage",
    "OsvData",
    "VersionEvent",
    "VersionRange",
    "load_osv",
    "moment_of",
    "state_of",
]

#: Of one advisory. The largest that are published have 3 MB.
MAX_RECORD_BYTES: Final = 32 << 20
#: Of everything that is unpacked for one load.
MAX_UNPACKED_BYTES: Final = 32 << 30
#: Of what is kept of all of it, packed.
MAX_KEPT_BYTES: Final = 1 << 30
MAX_RECORDS: Final = 2_000_000
#: Files and directories of one tree.
MAX_FILES: Final = 2_000_000
#: Of the table of an archive, which zipfile reads as one piece: half a million entries.
_MAX_DIRECTORY_BYTES: Final = 64 << 20
#: An entry that unpacks to more times its size is no text of people.
_MAX_RATIO: Final = 500
_PACK_ABOVE_BYTES: Final = 256
_MAX_TEXT: Final = 200
#: Problems that are named; the others are counted.
_NAMED_PROBLEMS: Final = 5
_NO_MOMENT: Final = datetime.min.replace(tzinfo=UTC)
_PROGRESS_EVERY: Final = 64

EventKind: TypeAlias = Literal["introduced", "fixed", "last_affected", "limit"]
_KINDS: Final[tuple[EventKind, ...]] = ("introduced", "fixed", "last_affected", "limit")


# ---- what is kept of an advisory ----------------------------------------------------------------


class VersionEvent(NamedTuple):
    """A version at which something changes; ``0`` introduces before every other, ``*`` limits after every other."""

    kind: EventKind
    version: str


class VersionRange(NamedTuple):
    """``is_semver``: in that order, whatever the ecosystem's is."""

    is_semver: bool
    events: tuple[VersionEvent, ...]


class AffectedPackage(NamedTuple):
    """What an advisory says of one package.

    Attributes:
        ecosystem: with its release, as ``Debian:12``.
        name: in that ecosystem.
        ranges: of versions that are affected.
        versions: that are affected, too.
        has_commits: there are ranges of commits, which no version can be compared with.
        severity: of this package, if it is not that of all.
    """

    ecosystem: str
    name: str
    ranges: tuple[VersionRange, ...]
    versions: tuple[str, ...]
    has_commits: bool
    severity: str | None


class Advisory(NamedTuple):
    """One that was not withdrawn.

    Attributes:
        id: in the data base that it is of.
        modified: RFC 3339.
        aliases: ids of the same vulnerability elsewhere.
        upstream: ids of what it is the consequence of; where an advisory has neither these nor aliases, what is related
            to it, as distributions named CVEs before there was a field for it.
        summary: one line.
        severity: a word if it has one, else a CVSS vector.
        packages: that it is about.
    """

    id: str
    modified: str
    aliases: tuple[str, ...]
    upstream: tuple[str, ...]
    summary: str
    severity: str | None
    packages: tuple[AffectedPackage, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Under which it may be asked for: its own first."""
        return (self.id, *self.aliases, *self.upstream)


# ---- what a file has ----------------------------------------------------------------------------


class _Severity(Struct):
    type: str = ""
    score: str = ""


class _Event(Struct):
    introduced: str | None = None
    fixed: str | None = None
    last_affected: str | None = None
    limit: str | None = None


class _Range(Struct):
    type: str = ""
    events: list[_Event] | None = None


class _Package(Struct):
    ecosystem: str = ""
    name: str = ""


class _Specific(Struct):
    severity: str | None = None


class _Affected(Struct):
    package: _Package | None = None
    ranges: list[_Range] | None = None
    versions: list[str] | None = None
    severity: list[_Severity] | None = None
    ecosystem_specific: msgspec.Raw = field(default_factory=msgspec.Raw)
    database_specific: msgspec.Raw = field(default_factory=msgspec.Raw)


class _Record(Struct):
    id: str | None = None
    modified: str = ""
    withdrawn: str | None = None
    aliases: list[str] | None = None
    upstream: list[str] | None = None
    related: list[str] | None = None
    summary: str | None = None
    severity: list[_Severity] | None = None
    affected: list[_Affected] | None = None
    database_specific: msgspec.Raw = field(default_factory=msgspec.Raw)


_decode_record: Final = msgspec.json.Decoder(_Record).decode
_decode_specific: Final = msgspec.json.Decoder(_Specific).decode
_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(Advisory).decode


def _advisory(record: _Record) -> Advisory:
    upstream = record.upstream or (() if record.aliases else record.related) or ()
    return Advisory(
        record.id or "",
        record.modified,
        tuple(record.aliases or ()),
        tuple(upstream),
        (record.summary or "")[:_MAX_TEXT],
        _severity(record.severity, record.database_specific),
        tuple(_affected(one, one.package) for one in record.affected or () if one.package is not None),
    )


def _affected(one: _Affected, package: _Package) -> AffectedPackage:
    ranges = one.ranges or ()
    return AffectedPackage(
        package.ecosystem,
        package.name,
        tuple(
            VersionRange(
                found.type == "SEMVER",
                tuple(
                    VersionEvent(kind, version)
                    for event in found.events or ()
                    for kind in _KINDS
                    if (version := getattr(event, kind)) is not None
                ),
            )
            for found in ranges
            if found.type != "GIT"
        ),
        tuple(one.versions or ()),
        any(found.type == "GIT" for found in ranges),
        _severity(one.severity, one.ecosystem_specific, one.database_specific),
    )


def _severity(scores: Sequence[_Severity] | None, *specific: msgspec.Raw) -> str | None:
    """A word if there is one, else the vector of the newest CVSS."""
    words = [one.score for one in scores or () if not one.type.startswith("CVSS") and one.score]
    for raw in specific:
        try:
            word = _decode_specific(raw).severity if raw else None
        except (msgspec.DecodeError, RecursionError):  # anything may stand there
            continue
        if word:
            words.append(word)
    vectors = sorted((one.type, one.score) for one in scores or () if one.type.startswith("CVSS") and one.score)
    return words[0][:_MAX_TEXT].lower() if words else vectors[-1][1][:_MAX_TEXT] if vectors else None


# ---- the data -----------------------------------------------------------------------------------


class OsvData:
    """Advisories by id and by package. Any thread may ask once they are loaded.

    Args:
        packs: takes twice the time and half of the memory: for who keeps them.

    Attributes:
        newest: when the advisory that was changed last was changed, RFC 3339; empty without any.
        withdrawn: advisories that were left out as their data base withdrew them.
        others: JSON files that are no advisories.
        problems: what could not be read, one sentence each; the last one may speak of many.
        ecosystems: how many entries there are of each, by its whole name.
    """

    def __init__(self, *, packs: bool = True) -> None:
        self._pack_above = _PACK_ABOVE_BYTES if packs else sys.maxsize
        self._blobs: list[bytes] = []
        self._numbers: dict[str, int] = {}
        self._by_name: dict[str, array[int]] = {}
        self._by_package: dict[str, array[int]] = {}
        self._withdrawn: dict[str, str] = {}
        self._kept_bytes = 0
        self._unreadable = 0
        self._newest = _NO_MOMENT
        self.newest = ""
        self.others = 0
        self.problems: list[str] = []
        self.ecosystems: Counter[str] = Counter()
        self._advisory = lru_cache(4_096)(self._unpacked)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def withdrawn(self) -> int:
        """See above."""
        return len(self._withdrawn)

    @property
    def is_complete(self) -> bool:
        """Whether everything that was named could be read."""
        return not self.problems

    def has_data(self, ecosystem: str, release: str | None) -> bool | None:
        """Whether there is anything of a release of an ecosystem; None: there may be, the release is not known."""
        found = [covers(one, release) for one in self.ecosystems if base_of(one) == ecosystem]
        return True if True in found else None if None in found else False

    def of_package(self, ecosystem: str, names: Iterable[str]) -> Iterator[Advisory]:
        """Advisories on a package, under any of its names, in whatever release; each once.

        Args:
            ecosystem: without a release.
            names: that the ecosystem may have for it.
        """
        numbers = {number for name in names for number in self._by_package.get(f"{ecosystem}\n{name}", ())}
        for number in sorted(numbers):
            yield self._advisory(number)

    def named(self, name: str) -> Iterator[Advisory]:
        """Those that have an id as their own, as an alias, or as what they are the consequence of."""
        for number in self._by_name.get(name.upper(), ()):
            yield self._advisory(number)

    # ---- filled by `load_osv` -----------------------------------------------------------------

    def add(self, data: bytes, source: str) -> None:
        """Takes one file.

        Raises:
            SowatchError: there are more than can be kept.
        """
        try:
            record = _decode_record(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.add_problem(source, str(error))
            return
        if not record.id or (record.affected is None and record.withdrawn is None):
            self.others += 1
            return
        known = self._numbers.get(record.id)
        before = self._unpacked(known).modified if known is not None else self._withdrawn.get(record.id)
        changed = _changed(record.modified)
        if before is not None and _changed(before) >= changed:
            return  # the one that was changed last counts
        if changed > self._newest:
            self._newest, self.newest = changed, record.modified
        if record.withdrawn is not None:
            self._withdrawn[record.id] = record.modified
            if known is not None:
                del self._numbers[record.id]
                self._replace(known, Advisory(record.id, record.modified, (), (), "", None, ()))
            return
        self._withdrawn.pop(record.id, None)
        self._index(_advisory(record), known)

    def add_problem(self, source: str, reason: str) -> None:
        """Something could not be read."""
        self._unreadable += 1
        if self._unreadable <= _NAMED_PROBLEMS:
            self.problems.append(f"cannot read {source}: {reason}")
        else:
            self.problems[_NAMED_PROBLEMS:] = [f"{self._unreadable - _NAMED_PROBLEMS} more could not be read"]

    def _index(self, advisory: Advisory, number: int | None) -> None:
        if number is None:
            number = len(self._blobs)
            self._blobs.append(b"")
        if number >= MAX_RECORDS:
            raise SowatchError(f"there are more than {MAX_RECORDS:,} advisories. Name fewer ecosystems.")
        self._numbers[advisory.id] = number
        self._replace(number, advisory)
        for name in advisory.names:
            _note(self._by_name, name.upper(), number)
        for package in advisory.packages:
            _note(self._by_package, f"{base_of(package.ecosystem)}\n{package.name}", number)
            self.ecosystems[package.ecosystem] += 1

    def _replace(self, number: int, advisory: Advisory) -> None:
        blob = _pack(advisory)
        # Versions of a package repeat each other.
        blob = b"z" + zlib.compress(blob, 1) if len(blob) > self._pack_above else b"-" + blob
        self._kept_bytes += len(blob) - len(self._blobs[number])
        if self._kept_bytes > MAX_KEPT_BYTES:
            raise SowatchError(f"the advisories take more than {MAX_KEPT_BYTES >> 20} MiB. Name fewer ecosystems.")
        self._blobs[number] = blob

    def _unpacked(self, number: int) -> Advisory:
        blob = self._blobs[number]
        return _unpack(zlib.decompress(blob[1:]) if blob[:1] == b"z" else blob[1:])


def moment_of(text: str) -> datetime | None:
    """An RFC 3339 time in UTC, whatever its offset; None: it is none.

    >>> moment_of("2026-01-02T01:00:00+02:00") == moment_of("2026-01-01T23:00:00.0Z")
    True
    """
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _changed(text: str) -> datetime:
    return moment_of(text) or _NO_MOMENT  # one that does not say it gives way to every other


def _note(index: dict[str, array[int]], key: str, number: int) -> None:
    found = index.get(key)
    if found is None:
        index[key] = array("I", (number,))
    elif number > found[-1] or number not in found:
        found.append(number)


# ---- files --------------------------------------------------------------------------------------


def load_osv(places: Iterable[str], on_progress: Callable[[], None] = lambda: None, *, packs: bool = True) -> OsvData:
    """Reads everything that is at some places.

    Args:
        places: JSON files, zip archives, and directories, of which every ``.json`` and ``.zip`` below counts.
        on_progress: called again and again; may wait, or raise.
        packs: as of `OsvData`.

    Raises:
        SowatchError: a place is not there, or there is more than can be kept.
    """
    data = OsvData(packs=packs)
    budget = _Budget(on_progress)
    for place in places:
        for path in _files_at(place, data):
            budget.go_on()
            try:
                with _Archive(io.FileIO(open_regular(path))) as file:
                    if path.lower().endswith(".zip"):
                        _read_archive(file, path, data, budget)
                    else:
                        data.add(budget.read(file, path, MAX_RECORD_BYTES), path)
            except _ARCHIVE_ERRORS as error:
                data.add_problem(path, _reason(error))
    data.ecosystems = Counter(dict(sorted(data.ecosystems.items())))
    return data


class _TooLargeError(Exception):
    """More than an honest file has."""


#: What zipfile raises of an entry: RuntimeError of an encrypted one, NotImplementedError of a compression it lacks.
_ENTRY_ERRORS: Final = (
    *(OSError, EOFError, RuntimeError, NotImplementedError),
    *(_TooLargeError, zlib.error, zipfile.BadZipFile),
)
#: And of a table of contents, whose names may be no texts.
_ARCHIVE_ERRORS: Final = (*_ENTRY_ERRORS, ValueError, struct.error)


class _Budget:
    """What may still be unpacked."""

    def __init__(self, on_progress: Callable[[], None]) -> None:
        self._left_bytes = MAX_UNPACKED_BYTES
        self._on_progress = on_progress
        self._reads = 0

    def go_on(self) -> None:
        """Before each file: the caller may want to pause the load, or to give it up."""
        self._reads += 1
        if self._reads % _PROGRESS_EVERY == 0:
            self._on_progress()

    def read(self, file: IO[bytes], name: str, limit_bytes: int) -> bytes:
        data = file.read(limit_bytes + 1)
        self._left_bytes -= len(data)
        if len(data) > limit_bytes:
            raise _TooLargeError(f"{name} is larger than {limit_bytes >> 20} MiB")
        if self._left_bytes < 0:
            raise SowatchError(f"the advisories are larger than {MAX_UNPACKED_BYTES >> 30} GiB. Name fewer ecosystems.")
        return data


class _Archive(io.BufferedReader):
    """A file of which no more is read at once than the table of half a million entries."""

    def read(self, size: int | None = -1, /) -> bytes:
        # Without a size zipfile asks for the end of the file, where an archive begins to be read.
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise _TooLargeError(f"its table of contents is larger than {_MAX_DIRECTORY_BYTES >> 20} MiB")
        return super().read(_MAX_DIRECTORY_BYTES if size is None or size < 0 else size)


def _read_archive(file: _Archive, path: str, data: OsvData, budget: _Budget) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.filename.lower().endswith(".json") or entry.is_dir():
                continue
            name = f"{path}: {entry.filename}"
            budget.go_on()
            try:
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _TooLargeError("it is compressed in a way that may take any memory. Use deflate")
                if entry.file_size > max(MAX_RECORD_BYTES >> 5, _MAX_RATIO * entry.compress_size):
                    raise _TooLargeError("it unpacks to more than any text does")
                with archive.open(entry) as opened:
                    data.add(budget.read(opened, name, MAX_RECORD_BYTES), name)
            except _ENTRY_ERRORS as error:
                data.add_problem(name, _reason(error))


def _files_at(place: str, data: OsvData) -> Iterator[str]:
    if not os.path.isdir(place):
        if not os.path.exists(place):
            raise SowatchError(f"there is no {place!r}. Name a file or a directory of OSV's advisories.")
        yield place
        return

    def refused(error: OSError) -> None:
        data.add_problem(str(error.filename), _reason(error))

    count = 0
    for directory, directories, names in os.walk(place, onerror=refused):
        directories.sort()
        for name in sorted(names):
            count += 1
            if count > MAX_FILES:
                data.add_problem(place, f"it has more than {MAX_FILES:,} files")
                return
            if name.lower().endswith((".json", ".zip")):
                yield os.path.join(directory, name)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) else str(error)
    return text or type(error).__name__


def state_of(places: Iterable[str]) -> Mapping[str, tuple[int, int, int]]:
    """Inode, size and modification time of everything that `load_osv` would read."""
    found = {}
    for place in places:
        try:
            for path in _files_at(place, OsvData()):
                status = os.stat(path)
                found[path] = status.st_ino, status.st_size, status.st_mtime_ns
        except (OSError, SowatchError):
            found[place] = 0, 0, 0
    return found
