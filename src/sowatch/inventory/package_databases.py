"""The databases of dpkg and apk: which package lists a file, and what it says of that package. Read-only.

They lie inside a root that a container controls. So nothing here takes a link out of that root, opens anything but
regular files and directories, reads without a limit, or runs a container's programs.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import os
import re
import stat
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from msgspec import Struct

from sowatch.inventory.look_budget import spend
from sowatch.linux.descriptors import close_fd, is_exhausted
from sowatch.linux.openat import open_below, reopen

__all__ = [
    "DPKG_LISTS",
    "DatabaseIndex",
    "FileVersion",
    "Listed",
    "PackageRecord",
    "aliases",
    "apk_listed",
    "apk_records",
    "apk_state",
    "dpkg_digest",
    "dpkg_listed",
    "dpkg_records",
    "dpkg_state",
    "entries_below",
    "file_state",
    "read_below",
    "read_with_version",
]


_READ_BYTES: Final = 1 << 20
_MAX_LIST_BYTES: Final = 32 << 20
_MAX_DATABASE_BYTES: Final = 512 << 20
_MAX_DATABASE_FILES: Final = 50_000
_MAX_RECORDS: Final = 50_000
_MAX_LINES: Final = 2_000_000
_MAX_JOURNAL: Final = 1_000
#: An entry of the journal is one stanza.
_MAX_ENTRY_BYTES: Final = 1 << 20
_MAX_JOURNAL_BYTES: Final = 16 << 20
_MAX_DIVERSIONS: Final = 10_000
_MAX_DIVERSIONS_BYTES: Final = 4 << 20
#: Of a name, a version and so on: they go into labels of metrics.
_MAX_FIELD: Final = 256
#: Of a package or its source, by the rules of Debian and Alpine.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")

#: Where dpkg has the files of each package, and what it made of them.
DPKG_LISTS: Final = "/var/lib/dpkg/info"
_STATUS: Final = "/var/lib/dpkg/status"
#: dpkg writes changes here before it puts them into ``status``.
_UPDATES: Final = "/var/lib/dpkg/updates"
#: Images without dpkg itself have a file for each package instead.
_STATUS_D: Final = "/var/lib/dpkg/status.d"
#: apk-tools 3 may keep it below /usr.
_APK: Final = ("/lib/apk/db/installed", "/usr/lib/apk/db/installed")

#: Directories that a merged /usr turns into links, and that dpkg knows under either name.
_MERGED: Final = ("/bin/", "/lib/", "/lib32/", "/lib64/", "/libo32/", "/libx32/", "/sbin/")

#: Device, inode, size, and the times of modification and change of a file; another one means other content.
FileVersion = tuple[int, int, int, int, int]


class Listed(NamedTuple):
    """A package that lists a file.

    ``package`` is its name as its manager writes it, ``name`` that of the file on the list. ``digest`` is the
    algorithm and the hexadecimal hash of the file by the database, if that is known already. What was changed before
    ``listed_ns`` (ns since the epoch) is what the package has brought; 0: only its content shows that.
    """

    package: str
    name: str
    listed_ns: int = 0
    digest: tuple[str, str] | None = None
    #: The directory with the list, where what else the package has brought is beside it.
    place: str = ""


class PackageRecord(Struct, frozen=True, gc=False):
    """What a database says of a package. ``version`` is empty while it is being replaced."""

    name: str
    version: str
    source: str
    source_version: str
    architecture: str
    #: Of rpm, where it is not 0.
    epoch: str = ""


class DatabaseIndex:
    """The files of one database by hashes of their names, so that it is read again only where it has changed.

    8 bytes for each file; what it finds may own a file, and is then read. One thread uses it at a time.
    """

    def __init__(self) -> None:
        #: By the name of the list: what it was like when it was read, and the hashes of its lines.
        self.lists: dict[str, tuple[FileVersion, array[int]]] = {}
        self.records: tuple[object, dict[str, PackageRecord]] | None = None
        #: Much was read, and thrown away.
        self.was_read = False

    def __len__(self) -> int:
        lines = sum(len(hashes) + 32 for _, hashes in self.lists.values())
        return 64 + lines + (0 if self.records is None else 64 * len(self.records[1]))

    def may_have(self, name: str, version: FileVersion, wanted: set[int], read: Callable[[], Iterable[bytes]]) -> bool:
        """Whether a list may have one of these names (by their hashes); ``read`` gives its lines where it changed."""
        known = self.lists.get(name)
        if known is None or known[0] != version:
            known = self.lists[name] = version, array("q", map(hash, read()))
            self.was_read = True
        return not wanted.isdisjoint(known[1])


def read_below(root_fd: int, path: str, limit_bytes: int) -> bytes | None:
    """The content of a regular file, or ``None`` if it is missing, larger, or something else."""
    found = read_with_version(root_fd, path, limit_bytes)
    return None if found is None else found[0]


def _unless_exhausted(error: OSError) -> None:
    """What is not there is passed over. That there are no more descriptors is another thing.

    Raises:
        OSError: that.
    """
    if is_exhausted(error):
        raise error


def file_state(root_fd: int, path: str) -> FileVersion | None:
    """Of a file or directory; None if there is none, or it cannot be reached."""
    try:
        fd = open_below(root_fd, path, os.O_PATH)
    except OSError as error:
        _unless_exhausted(error)
        return None
    try:
        return _version(os.fstat(fd))
    except OSError:
        return None
    finally:
        close_fd(fd)


def _version(status: os.stat_result) -> FileVersion:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_with_version(root_fd: int, path: str, limit_bytes: int) -> tuple[bytes, FileVersion] | None:
    """As `read_below`, and what the file was like when it was opened."""
    try:
        found = open_below(root_fd, path, os.O_PATH)
    except OSError as error:
        _unless_exhausted(error)
        return None
    try:
        # Checked before it is opened: opening a device or a FIFO may do something.
        status = os.fstat(found)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            return None
        fd = reopen(found, os.O_RDONLY)
    except OSError as error:
        _unless_exhausted(error)
        return None
    finally:
        close_fd(found)
    try:
        parts = []
        left_bytes = limit_bytes  # it may grow while we read
        # A buffer as large as the file: a larger one is cut, and leaves holes in the heap.
        while left_bytes and (part := os.read(fd, min(left_bytes, status.st_size + 1, _READ_BYTES))):
            spend(size_bytes=len(part))
            parts.append(part)
            left_bytes -= len(part)
    except OSError:
        return None
    finally:
        close_fd(fd)
    return b"".join(parts), _version(status)


def aliases(path: str) -> tuple[str, ...]:
    """The names a package manager may know a path by: as it is, then through a merged /usr."""
    if path.startswith("/usr/") and path[4:].startswith(_MERGED):
        return path, path[4:]
    if path.startswith(_MERGED):
        return path, "/usr" + path
    return (path,)


class _Best:
    """The best owner found so far for each path: a literal name beats an alias."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._found: dict[str, tuple[int, Listed | None]] = dict.fromkeys(paths, (1 << 30, None))

    def offer(self, path: str, rank: int, listed: Listed) -> None:
        if rank < self._found[path][0]:
            self._found[path] = rank, listed

    def owners(self) -> dict[str, Listed | None]:
        return {path: listed for path, (_, listed) in self._found.items()}


# --- dpkg ---------------------------------------------------------------------------------------


def dpkg_listed(root_fd: int, paths: Collection[str], index: DatabaseIndex | None = None) -> dict[str, Listed | None]:
    """Which package lists each file, by dpkg's lists or those of an image without dpkg.

    Args:
        root_fd: of the root directory.
        paths: as a process with that root sees them.
        index: of this database, for another time.
    """
    best = _Best(paths)
    diversions = _diversions(root_fd)
    # By the name on dpkg's lists: who asked for it, and which packages do not count.
    asked: dict[bytes, list[tuple[str, int, Callable[[str], bool]]]] = {}
    for path in paths:
        for rank, alias in enumerate(aliases(path)):
            for name, counts in _names_on_lists(alias, diversions):
                asked.setdefault(os.fsencode(name), []).append((path, rank, counts))
    if asked:
        for package, listing, changed_ns in _dpkg_lists(root_fd, asked.keys(), index):
            for listed in {line for line in _lines(listing) if line in asked}:
                for path, rank, counts in asked[listed]:
                    if counts(package.partition(":")[0]):
                        best.offer(path, rank, Listed(package, os.fsdecode(listed), changed_ns, None, DPKG_LISTS))
        for package, sums in _sums_without_dpkg(root_fd):
            for listed in asked.keys() & sums.keys():
                for path, rank, _ in asked[listed]:
                    name = os.fsdecode(listed)
                    best.offer(path, rank, Listed(package, name, 0, ("md5", sums[listed]), _STATUS_D))
    return best.owners()


class _Diversions(NamedTuple):
    """By the name that a file was diverted to: its original one, and the package that diverted it; by that the package.

    The package is ``:`` for local diversions.
    """

    originals: dict[str, tuple[str, str]]
    packages: dict[str, str]


def _names_on_lists(path: str, diversions: _Diversions) -> list[tuple[str, Callable[[str], bool]]]:
    """Under which names the owner of ``path`` lists it, and which packages may be that owner.

    A diverted file keeps its original name on its package's list, but lies elsewhere; at the
    original name lies the file of the package that diverted it (of none, if that is ``:``).
    """
    here = aliases(path)
    for name in here:
        if name in diversions.originals:
            original, package = diversions.originals[name]
            return [(alias, package.__ne__) for alias in aliases(original)]
    for name in here:
        if name in diversions.packages:
            return [(path, diversions.packages[name].__eq__)]
    return [(path, lambda _: True)]


def _diversions(root_fd: int) -> _Diversions:
    found = _Diversions({}, {})
    lines = _lines(read_below(root_fd, "/var/lib/dpkg/diversions", _MAX_DIVERSIONS_BYTES) or b"")
    names = map(os.fsdecode, itertools.islice(lines, 3 * _MAX_DIVERSIONS))
    for original, diverted, package in zip(names, names, names, strict=False):
        found.originals.setdefault(diverted, (original, package))
        found.packages.setdefault(original, package)
    return found


def _dpkg_lists(
    root_fd: int, wanted: Collection[bytes] = (), index: DatabaseIndex | None = None
) -> Iterator[tuple[str, bytes, int]]:
    """Each package's list of files, and when it changed. Stops at a size no honest database has.

    With an index only lists that may have one of the wanted names.
    """
    hashes = {hash(one) for one in wanted}
    left_bytes, left_lines = _MAX_DATABASE_BYTES, _MAX_LINES
    for fd, name in entries_below(root_fd, DPKG_LISTS):
        if left_bytes <= 0 or left_lines <= 0:
            return
        if not name.endswith(".list"):
            continue
        if index is not None:
            try:
                version = _version(os.stat(name, dir_fd=fd, follow_symlinks=False))
            except OSError:
                continue
            read = _Reader(fd, name)
            is_wanted = index.may_have(name, version, hashes, read.lines)
            left_bytes -= read.size_bytes
            left_lines -= len(index.lists[name][1])
            if not is_wanted:
                continue
        found = read_with_version(fd, name, _MAX_LIST_BYTES)
        if found is not None:
            left_bytes -= len(found[0])
            yield name.removesuffix(".list"), found[0], found[1][4]


def _lines(text: bytes) -> Iterator[bytes]:
    """One after the other, as lists may have a hundred thousand."""
    spend(lines=text.count(b"\n"))
    return (line.rstrip(b"\n") for line in io.BytesIO(text))


class _Reader:
    """The lines of a list, read when they are asked for."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self.size_bytes = 0

    def lines(self) -> Iterator[bytes]:
        found = read_below(self._fd, self._name, _MAX_LIST_BYTES) or b""
        self.size_bytes = len(found)
        return _lines(found)


def entries_below(root_fd: int, path: str) -> Iterator[tuple[int, str]]:
    """A descriptor of a directory with each name in it, in some order; open until the next one is asked for."""
    try:
        fd = open_below(root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        _unless_exhausted(error)
        return
    try:
        with os.scandir(fd) as entries:
            for number, entry in enumerate(entries):
                if number >= _MAX_DATABASE_FILES:
                    return
                yield fd, entry.name
    except OSError:
        return
    finally:
        close_fd(fd)


def _sums_without_dpkg(root_fd: int) -> Iterator[tuple[str, dict[bytes, str]]]:
    """Of each package of an image without dpkg: its files as dpkg's lists name them, with the MD5 of each."""
    left_bytes = _MAX_DATABASE_BYTES
    for fd, name in entries_below(root_fd, _STATUS_D):
        if left_bytes <= 0:
            return
        if name.endswith(".md5sums"):
            data = read_below(fd, name, _MAX_LIST_BYTES) or b""
            left_bytes -= len(data)
            yield name.removesuffix(".md5sums"), dict(_sums(data))


def _sums(data: bytes) -> Iterator[tuple[bytes, str]]:
    for line in _lines(data):
        md5, _, name = line.partition(b"  ")
        if len(md5) == 32 and name:
            yield b"/" + name.removeprefix(b"./").lstrip(b"/"), md5.decode("ascii", "replace").lower()


def dpkg_digest(root_fd: int, listed: Listed) -> tuple[str, str] | None:
    """The hash that the package was made with for a file that it lists; None if it has brought none."""
    if listed.digest is not None:
        return listed.digest
    data = read_below(root_fd, f"{DPKG_LISTS}/{listed.package}.md5sums", _MAX_LIST_BYTES)
    wanted = os.fsencode(listed.name)
    md5 = next((md5 for name, md5 in _sums(data or b"") if name == wanted), None)
    return None if md5 is None else ("md5", md5)


def dpkg_state(root_fd: int) -> tuple[FileVersion | None, ...]:
    """What is another one as soon as dpkg has changed what it says of any package."""
    return tuple(file_state(root_fd, path) for path in (_STATUS, _UPDATES, _STATUS_D))


def dpkg_records(root_fd: int) -> dict[str, PackageRecord]:
    """What dpkg says of each package that is installed, by its name, and by ``name:architecture``."""
    found: dict[str, PackageRecord] = {}
    left_bytes = _MAX_DATABASE_BYTES
    for fd, name in entries_below(root_fd, _STATUS_D):
        if name.endswith(".md5sums") or left_bytes <= 0:
            continue
        text = read_below(fd, name, _MAX_LIST_BYTES) or b""
        left_bytes -= len(text)
        record = _dpkg_record(_stanza(text), needs_state=False)
        if record is not None and len(found) < _MAX_RECORDS:
            found[name] = record  # its lists go by the name of the file
    texts = itertools.chain([read_below(root_fd, _STATUS, _MAX_LIST_BYTES * 2) or b""], _journal(root_fd))
    for text in texts:
        for stanza in _stanzas(text):
            record = _dpkg_record(_stanza(stanza), needs_state=True)
            if record is not None and len(found) < _MAX_RECORDS:
                # Of two architectures of a package only one has a list without its architecture in the name.
                found[record.name] = record
                found[f"{record.name}:{record.architecture}"] = record
    return found


def _journal(root_fd: int) -> Iterator[bytes]:
    names = sorted(name for _, name in entries_below(root_fd, _UPDATES) if name.isascii() and name.isdigit())
    left_bytes = _MAX_JOURNAL_BYTES
    for name in names[:_MAX_JOURNAL]:
        text = read_below(root_fd, f"{_UPDATES}/{name}", min(_MAX_ENTRY_BYTES, left_bytes)) or b""
        left_bytes -= len(text)
        yield text


#: What of a stanza is used.
_FIELDS: Final = (b"Package", b"Version", b"Source", b"Architecture", b"Status")
#: As dpkg(1) has them: the files of the version that is named are in place.
_IN_PLACE: Final = ("installed", "unpacked", "half-configured", "triggers-awaited", "triggers-pending")


def _stanzas(text: bytes) -> Iterator[bytes]:
    """One after the other: a second copy of a database as a whole would stay in the heap."""
    start = 0
    while start < len(text):
        end = text.find(b"\n\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 2


def _stanza(text: bytes) -> dict[bytes, str]:
    fields: dict[bytes, str] = {}
    for line in _lines(text):
        name, colon, value = line.partition(b":")
        if colon and name in _FIELDS:
            fields.setdefault(name, value.strip().decode("utf-8", "replace"))
    return fields


def _dpkg_record(fields: Mapping[bytes, str], *, needs_state: bool) -> PackageRecord | None:
    name, version = fields.get(b"Package", ""), fields.get(b"Version", "")
    state = fields.get(b"Status", "").rpartition(" ")[2]
    if needs_state and state not in _IN_PLACE:
        version = ""
    source, _, rest = fields.get(b"Source", name).partition(" ")
    own = rest.strip().removeprefix("(").removesuffix(")")
    return _record(name, version, source, own or version, fields.get(b"Architecture", ""))


def _record(name: str, version: str, source: str, source_version: str, architecture: str) -> PackageRecord | None:
    """None where it is of no package that a manager would have made."""
    texts = (name, version, source, source_version, architecture)
    if not (_NAME.fullmatch(name) and _NAME.fullmatch(source)) or max(map(len, texts)) > _MAX_FIELD:
        return None
    return PackageRecord(*texts)


# --- apk ----------------------------------------------------------------------------------------


def apk_listed(root_fd: int, paths: Collection[str], index: DatabaseIndex | None = None) -> dict[str, Listed | None]:
    """Owners from apk's database: ``P:`` names a package, ``F:`` a directory, ``R:`` a file in it, ``Z:`` its hash.

    Args: as of `dpkg_listed`.
    """
    best = _Best(paths)
    asked: dict[bytes, list[tuple[str, int]]] = {}
    for path in paths:
        for rank, alias in enumerate(aliases(path)):
            asked.setdefault(os.fsencode(alias.lstrip("/")), []).append((path, rank))
    hashes = {hash(name) for name in asked}
    for place in _APK if asked else ():
        if index is not None:
            version = file_state(root_fd, place)
            if version is None:
                continue

            def names(place: str = place) -> Iterator[bytes]:
                return (name for name, _, _ in _apk_files(read_below(root_fd, place, _MAX_LIST_BYTES) or b""))

            if not index.may_have(place, version, hashes, names):
                continue
        for name, package, digest in _apk_files(read_below(root_fd, place, _MAX_LIST_BYTES) or b""):
            for path, rank in asked.get(name, ()):
                best.offer(path, rank, Listed(os.fsdecode(package), os.fsdecode(name), 0, _apk_digest(digest)))
    return best.owners()


def _apk_files(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Name, package and hash of each file."""
    package, directory, name, digest = b"", b"", b"", b""
    for line in _lines(data):
        key, value = line[:2], line[2:]
        if key == b"Z:":
            digest = value
            continue
        if name and (key in (b"R:", b"F:", b"P:") or not line):
            yield name, package, digest
            name = digest = b""
        if key == b"P:":
            package = value
        elif key == b"F:":
            directory = value + b"/" if value else b""
        elif key == b"R:":
            name, digest = directory + value, b""
    if name:
        yield name, package, digest


def _apk_digest(text: bytes) -> tuple[str, str] | None:
    """``Q1`` and a SHA-1, or ``Q2`` and a SHA-256, in base64."""
    algorithm = {b"Q1": "sha1", b"Q2": "sha256"}.get(text[:2])
    if algorithm is None or len(text) > 100:
        return None
    try:
        return algorithm, base64.b64decode(text[2:], validate=True).hex()
    except (binascii.Error, ValueError):
        return None


def apk_records(root_fd: int) -> dict[str, PackageRecord]:
    """What apk says of each package, by its name."""
    found: dict[str, PackageRecord] = {}
    for place in _APK:
        for stanza in _stanzas(read_below(root_fd, place, _MAX_LIST_BYTES) or b""):
            fields: dict[bytes, str] = {}
            for line in _lines(stanza):
                if line[:2] in (b"P:", b"V:", b"o:", b"A:"):
                    fields.setdefault(line[:2], line[2:].strip().decode("utf-8", "replace"))
            name, version = fields.get(b"P:", ""), fields.get(b"V:", "")
            record = _record(name, version, fields.get(b"o:") or name, version, fields.get(b"A:", ""))
            if record is not None and len(found) < _MAX_RECORDS:
                found[name] = record
    return found


def apk_state(root_fd: int) -> tuple[FileVersion | None, ...]:
    """What is another one as soon as apk has changed anything."""
    return tuple(file_state(root_fd, path) for path in _APK)
