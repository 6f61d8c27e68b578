"""Functions of an ELF file by name, as probes want them: every symbol table, patterns, and why one cannot be probed.

A name is searched for as ld.so does, then in ``.dynsym``, then in ``.symtab``; patterns in both, which are read whole,
within a budget; the files are hostile, as everywhere here. What was found in tables is kept for the next file that has
the same tables: the copies of one build in many containers. It is not kept by build id, which is only what a file says
of itself: one that lies would have functions of another probed at wrong places.

This reads files: never on the thread that drains the kernel.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import itertools
import os
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, NamedTuple

from sowatch.linux.descriptors import close_fd
from sowatch.linux.elf_file import PT_LOAD, ElfError, ElfFile, ElfLimits, Segment, is_regular, open_elf
from sowatch.linux.elf_symbols import dynamic_symbols, exported_functions
from sowatch.linux.mangled import qualified_name
from sowatch.model.errors import SowatchError

__all__ = [
    "Symbol",
    "SymbolError",
    "code_segments",
    "is_go",
    "list_functions",
    "native_machine_error",
    "open_checked",
    "resolve",
    "tables_digest",
]

#: A table of half a million symbols with their names: Debian's node has 130,000 in 24 MB.
_LIMITS: Final = ElfLimits(read_bytes=96 << 20)
#: More matches than this are a mistake in the pattern: each is a breakpoint.
MAX_MATCHES: Final = 512
#: What is kept of earlier searches; the largest is `MAX_MATCHES` symbols, most are one.
_KEPT_SEARCHES: Final = 2_048
_SHT_SYMTAB, _SHT_NOTE, _SHT_DYNSYM = 2, 7, 11
_SHT_GNU_VERNEED, _SHT_GNU_VERSYM = 0x6FFFFFFE, 0x6FFFFFFF
_SHN_UNDEF: Final = 0
_PF_X: Final = 1
_STT_NOTYPE, _STT_FUNC, _STT_GNU_IFUNC = 0, 2, 10
#: e_machine by ``os.uname().machine``; both are 64-bit, little-endian.
_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_MACHINE_NAMES: Final = {
    3: "x86 (32-bit)",
    40: "ARM (32-bit)",
    62: "x86-64",
    183: "AArch64",
    22: "s390x",
    243: "RISC-V",
}
_OFFSET: Final = re.compile(r"(?P<name>.+)\+(?P<offset>0x[0-9a-fA-F]+|\d+)")
_GLOB: Final = re.compile(r"[*?\[]")


class SymbolError(SowatchError):
    """A function that cannot be found or must not be probed; ``reason`` is one clause, ``near`` are similar names."""

    def __init__(self, symbol: str, reason: str, near: tuple[str, ...] = ()) -> None:
        self.symbol = symbol
        self.reason = reason
        self.near = near
        hint = f" Near: {', '.join(near)}." if near else " `sowatch trace --list LIB` shows what it has."
        super().__init__(f"{symbol}: {reason}.{hint}")


class Symbol(NamedTuple):
    """A function of a file: ``offset`` in the file and ``size`` in bytes; size 0 if the file does not say."""

    name: str
    offset: int
    size: int = 0


class _Row(NamedTuple):
    name: str
    kind: int
    is_defined: bool
    value: int
    size: int


def native_machine_error(fd: int) -> str | None:
    """Why a file cannot be probed at all: no ELF, or for another machine; None if it can be."""
    if not is_regular(fd):
        return "it is not a regular file"
    elf = open_elf(fd, _LIMITS)
    if elf is None:
        return "it is no ELF file"
    wanted = _MACHINES.get(os.uname().machine)
    if wanted is None or (elf.machine, elf.bits, elf.data) != (wanted, 64, 1):
        kind = _MACHINE_NAMES.get(elf.machine, f"machine {elf.machine}")
        return f"it is for {kind}, and this machine is {os.uname().machine}"
    return None


def is_go(fd: int) -> bool:
    """Whether a program was built by Go: its runtime moves stacks, and a return probe writes to them."""
    elf = open_elf(fd, _LIMITS)
    if elf is None:
        return False
    for segment in elf.segments:
        if segment.kind == 4 and b"\x04\x00\x00\x00Go\x00\x00" in elf.read(segment.offset, min(segment.filesz, 4096)):
            return True
    return any(name == ".go.buildinfo" for name, _ in _sections(elf))


def resolve(fd: int, pattern: str) -> list[Symbol]:
    """The functions that a pattern names, by offset, each once.

    Args:
        fd: of an ELF file; stays the caller's.
        pattern: see `sowatch.uprobes.probes.Probe.symbol`.

    Raises:
        SymbolError: there is none, it is indirect (IFUNC), imported, or the pattern names too many.
    """
    elf = _open(fd, pattern)
    name, extra = pattern, 0
    if match := _OFFSET.fullmatch(pattern):
        name, extra = match["name"], int(match["offset"], 0)
    try:
        found = _named(elf, name)
    except ElfError as error:
        raise SymbolError(name, error.reason) from error
    if extra:
        found = [_inside(one, extra, pattern) for one in found]
    return found


def list_functions(fd: int, pattern: str = "*") -> list[Symbol]:
    """The functions of a file that can be probed, by name; ``pattern`` is a glob.

    Raises:
        SymbolError: the file cannot be read.
    """
    elf = _open(fd, pattern)
    try:
        is_match = re.compile(fnmatch.translate(pattern)).match
        return sorted(_functions(elf, [row for row in _Tables(elf).rows() if is_match(row.name)]))
    except ElfError as error:
        raise SymbolError(pattern, error.reason) from error


def tables_digest(fd: int) -> bytes:
    """What files have in common that have the same functions at the same places.

    Raises:
        SymbolError: the file cannot be read.
    """
    elf = _open(fd, "*")
    try:
        return _Tables(elf).digest()
    except ElfError as error:
        raise SymbolError("*", error.reason) from error


def code_segments(fd: int) -> list[Segment]:
    """The executable segments that are loaded.

    Raises:
        SymbolError: the file cannot be read.
    """
    return [one for one in _open(fd, "*").segments if one.kind == PT_LOAD and one.flags & _PF_X]


def _open(fd: int, pattern: str) -> ElfFile:
    try:
        if wrong := native_machine_error(fd):
            raise SymbolError(pattern, wrong)
        elf = open_elf(fd, _LIMITS)
    except ElfError as error:
        raise SymbolError(pattern, error.reason) from error
    assert elf is not None
    return elf


class _Searches:
    """What earlier searches have found, by tables and name; any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[bytes, str], list[Symbol] | SymbolError] = OrderedDict()

    def get(self, key: tuple[bytes, str]) -> list[Symbol] | SymbolError | None:
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
            return found

    def put(self, key: tuple[bytes, str], found: list[Symbol] | SymbolError) -> None:
        with self._lock:
            self._found[key] = found
            if len(self._found) > _KEPT_SEARCHES:
                self._found.popitem(last=False)


_SEARCHES: Final = _Searches()
#: Near names: how much longer or shorter they may be, how many are found in a table, how many compared (20 us each).
_LENGTH_APART: Final = 4
_FOUND: Final = 50_000
_COMPARED: Final = 4_000


def _named(elf: ElfFile, name: str) -> list[Symbol]:
    """The functions of one name or pattern."""
    is_plain = not name.startswith("cpp:") and _GLOB.search(name) is None
    if is_plain:
        size_bytes = elf.size_bytes
        exported = [one for one in exported_functions(elf, name) if one[0] < size_bytes]
        if exported:
            return [Symbol(name, offset, size) for offset, size in exported]
    tables = _Tables(elf)
    key = (tables.digest(), name)
    found = _SEARCHES.get(key)
    if found is None:
        found = _search(elf, tables, name)
        _SEARCHES.put(key, found)
    if isinstance(found, SymbolError):
        # A new one: an exception that is kept would keep what its traceback holds.
        raise SymbolError(found.symbol, found.reason, found.near)
    return list(found)


def _search(elf: ElfFile, tables: _Tables, name: str) -> list[Symbol] | SymbolError:
    rows = _rows_named(tables, name)
    found = _functions(elf, rows)
    if not found:
        return _why_not(elf, tables, name, rows)
    if name.startswith("cpp:") and len(found) > 1:
        overloads = tuple(one.name for one in found[:10])
        return SymbolError(name, f"it has {len(found)} overloads; give one by its symbol", overloads)
    if len(found) > MAX_MATCHES:
        return SymbolError(name, f"{len(found)} functions match, and at most {MAX_MATCHES} can be probed at once")
    return found


def _rows_named(tables: _Tables, name: str) -> list[_Row]:
    if name.startswith("cpp:"):
        wanted = name.removeprefix("cpp:")
        # A constructor has no name of its own in its symbol, nor has an operator.
        part = max(re.findall(r"\w+", wanted.removesuffix("operator")) or [""], key=len)
        part = "" if part in ("std", "operator") or "allocator" in part or "basic_" in part else part
        return [row for row in tables.rows() if part in row.name and qualified_name(row.name) == wanted]
    if _GLOB.search(name):
        is_match = re.compile(fnmatch.translate(name)).match
        return [row for row in tables.rows() if is_match(row.name)]
    return list(tables.rows(only=name))


def _functions(elf: ElfFile, rows: list[_Row]) -> list[Symbol]:
    """Those that are defined functions in code; of several names for one place the first."""
    found: dict[int, Symbol] = {}
    size_bytes = elf.size_bytes
    for row in rows:
        if not row.is_defined or row.kind not in (_STT_NOTYPE, _STT_FUNC) or not elf.is_code(row.value):
            continue
        offset = elf.offset_of(row.value)
        if offset is not None and offset < size_bytes and offset not in found:
            found[offset] = Symbol(row.name, offset, row.size)
    return [found[offset] for offset in sorted(found)]


def _why_not(elf: ElfFile, tables: _Tables, name: str, rows: list[_Row]) -> SymbolError:
    if any(row.is_defined and row.kind == _STT_GNU_IFUNC for row in rows):
        return SymbolError(
            name, "it is indirect (IFUNC): the symbol is that of the resolver, which runs once", _near(tables, name)
        )
    if any(not row.is_defined for row in rows):
        origin = tables.origin_of(name)
        if origin is not None:
            return SymbolError(name, f"it is imported here, defined in {origin}: use that")
        needed = ", ".join(_needed(elf)) or "one of its libraries"
        return SymbolError(name, f"it is imported here; use the library that defines it ({needed})")
    if any(row.is_defined for row in rows):
        return SymbolError(name, "it is no function")
    return SymbolError(name, "there is no such function", _near(tables, name))


def _near(tables: _Tables, name: str) -> tuple[str, ...]:
    """Names of functions that are spelled nearly so, the nearest first; at most three."""
    if name.startswith("cpp:"):
        rows = [row for row in tables.rows() if row.is_defined and row.kind == _STT_FUNC]
        names = {f"cpp:{plain}" for row in rows if (plain := qualified_name(row.name)) is not None}
        alike = sorted(names, key=lambda one: (abs(len(one) - len(name)), one))
        return tuple(difflib.get_close_matches(name, alike[:_COMPARED], n=3, cutoff=0.7))
    # A program may have half a million symbols: their strings are searched, not the symbols.
    alike = sorted(tables.names_like(name), key=lambda one: (abs(len(one) - len(name)), one))
    nearest = difflib.get_close_matches(name, alike[:_COMPARED], n=12, cutoff=0.7)
    functions = (one for one in nearest if any(row.kind == _STT_FUNC and row.is_defined for row in tables.rows(one)))
    return tuple(itertools.islice(functions, 3))


def _inside(symbol: Symbol, extra: int, pattern: str) -> Symbol:
    if symbol.size and extra >= symbol.size:
        raise SymbolError(pattern, f"{symbol.name} has {symbol.size} bytes only")
    return Symbol(f"{symbol.name}+{extra:#x}", symbol.offset + extra)


# ---- tables ---------------------------------------------------------------------------------------


class _Section(NamedTuple):
    kind: int
    offset: int
    size: int
    link: int


def _sections(elf: ElfFile) -> list[tuple[str, _Section]]:
    """Names and headers of the sections; empty where there are none that can be read."""
    offset, size, count = elf.section_table
    record = elf.layout.section
    if offset == 0 or size != record.size:
        return []
    data = elf.read(offset, min(count, elf.limits.sections) * size)
    headers = [
        (fields[0], _Section(fields[1], fields[4], fields[5], fields[6]))
        for fields in record.iter_unpack(data[: len(data) // size * size])
    ]
    names_at = int.from_bytes(elf.head[62:64], "little")
    names = headers[names_at][1] if names_at < len(headers) else None
    text = b"" if names is None else elf.read(names.offset, min(names.size, 1 << 20))
    return [(text[at : text.find(b"\0", at)].decode("ascii", "replace"), section) for at, section in headers]


class _Tables:
    """The symbol tables of a file as it has them: ``.dynsym``, then ``.symtab``; without sections what ld.so sees.

    Raises:
        ElfError: they are larger than the budget, or cannot be read.
    """

    def __init__(self, elf: ElfFile) -> None:
        self._elf = elf
        self._sections = [section for _, section in _sections(elf)]
        #: Symbols and their strings.
        self._tables: list[tuple[bytes, bytes]] = []
        self._dynamic: _Section | None = None
        for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
            for section in self._sections:
                if section.kind == kind and section.link < len(self._sections):
                    strings = self._sections[section.link]
                    self._tables.append(
                        (elf.read(section.offset, section.size), elf.read(strings.offset, strings.size))
                    )
                    if kind == _SHT_DYNSYM and self._dynamic is None:
                        self._dynamic = section
        if self._dynamic is None:
            self._tables[:0] = dynamic_symbols(elf)

    def digest(self) -> bytes:
        """What is the same for files in which a search finds the same."""
        found = hashlib.blake2b(self._elf.head[:64], digest_size=32)
        found.update(repr((self._elf.size_bytes, self._elf.segments)).encode("ascii"))
        for symbols, strings in self._tables:
            found.update(struct.pack("<QQ", len(symbols), len(strings)) + symbols)
            found.update(strings)
        # What an imported name comes from.
        found.update(repr((self._sections, _needed(self._elf))).encode("utf-8", "surrogateescape"))
        return found.digest()

    def rows(self, only: str | None = None) -> Iterator[_Row]:
        """Every named symbol; with ``only`` those that have this name."""
        for symbols, strings in self._tables:
            yield from self._named_rows(symbols, strings, only)

    def _named_rows(self, symbols: bytes, strings: bytes, only: str | None) -> Iterator[_Row]:
        record = self._elf.layout.symbol
        symbols = symbols[: len(symbols) // record.size * record.size]
        places = None if only is None else _places_of(strings, only.encode("utf-8", "surrogateescape"))
        if places is not None:
            # st_name comes first in each symbol; an own machine's file (`native_machine_error`) is little-endian.
            names = memoryview(symbols).cast("I")[:: record.size // 4]
            at = [number for number, name in enumerate(names.tolist()) if name in places]
            symbols = b"".join(symbols[number * record.size : (number + 1) * record.size] for number in at)
        for name, info, _, section, value, size in record.iter_unpack(symbols):
            end = strings.find(b"\0", name, name + 4096) if name else 0
            if end > 0:
                label = strings[name:end].decode("utf-8", "surrogateescape")
                # A version may be part of the name in .symtab: malloc@@GLIBC_2.2.5.
                yield _Row(label.partition("@")[0], info & 15, section != _SHN_UNDEF, value, size)

    def names_like(self, name: str) -> set[str]:
        """Names that begin with the same letter or, where the first one is wrong, go on with the next two alike."""
        raw = name.encode("utf-8", "surrogateescape")
        first, next_two = re.escape(raw[:1]), re.escape(raw[1:3])
        pattern = rb"\0((?:" + first + rb"|." + next_two + rb")[^\0@]{%d,%d})(?=[\0@])"
        bounds = (max(0, len(raw) - 1 - _LENGTH_APART), len(raw) - 1 + _LENGTH_APART)
        return {
            match[1].decode("utf-8", "surrogateescape")
            for _, strings in self._tables
            for match in itertools.islice(re.finditer(pattern % bounds, strings), _FOUND)
        }

    def origin_of(self, name: str) -> str | None:
        """The library that an imported function comes from, where the file asks for it by version; None: unknown."""
        versions = next((one for one in self._sections if one.kind == _SHT_GNU_VERSYM), None)
        needs = next((one for one in self._sections if one.kind == _SHT_GNU_VERNEED), None)
        if self._dynamic is None or versions is None or needs is None or needs.link >= len(self._sections):
            return None
        elf, record = self._elf, self._elf.layout.symbol
        symbols, strings = self._tables[0]
        places = _places_of(strings, name.encode("utf-8", "surrogateescape"))
        for at in range(len(symbols) // record.size):
            if int.from_bytes(symbols[at * record.size : at * record.size + 4], "little") in places:
                number = int.from_bytes(elf.read(versions.offset + 2 * at, 2), "little") & 0x7FFF
                # 0 and 1 are no versions.
                return _library_of(elf, needs, self._sections[needs.link], number) if number > 1 else None
        return None


def _places_of(strings: bytes, name: bytes) -> set[int]:
    """Where a name stands in a string table, by itself or as the end of a longer one, as linkers put it."""
    places: set[int] = set()
    for wanted in (name + b"\0", name + b"@"):
        at = strings.find(wanted)
        while at >= 0 and len(places) < 4096:
            places.add(at)
            at = strings.find(wanted, at + 1)
    return places


def _library_of(elf: ElfFile, needs: _Section, strings: _Section, version: int) -> str | None:
    """The file that Elf64_Verneed names for a version; both records have 16 bytes."""
    data = elf.read(needs.offset, min(needs.size, 1 << 16))
    at = 0
    for _ in range(len(data) // 16):
        if at + 16 > len(data):
            break
        _, count, file, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(min(count, len(data) // 16)):
            if entry + 16 > len(data):
                break
            _, _, other, _, step = struct.unpack_from("<IHHII", data, entry)
            if other == version:
                text = elf.read(strings.offset + file, 256).partition(b"\0")[0]
                return text.decode("utf-8", "surrogateescape")
            if not step:
                break
            entry += step
        if not following:
            break
        at += following
    return None


def _needed(elf: ElfFile) -> list[str]:
    """The libraries that a file asks for (DT_NEEDED); the tags of `ElfFile.dynamic` keep one of them only."""
    names = []
    for name, section in _sections(elf):
        if name == ".dynamic":
            strings = [other for label, other in _sections(elf) if label == ".dynstr"]
            text = elf.read(strings[0].offset, strings[0].size) if strings else b""
            record = elf.layout.dynamic
            data = elf.read(section.offset, min(section.size, 4096 * record.size))
            for tag, value in record.iter_unpack(data[: len(data) // record.size * record.size]):
                if tag == 1:  # DT_NEEDED
                    names.append(text[value : text.find(b"\0", value)].decode("utf-8", "replace"))
    return names


def open_checked(path: str) -> int:
    """A descriptor of a regular file, to list its functions; the caller closes it.

    Raises:
        SowatchError: it cannot be opened, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SowatchError(f"cannot open {path}: {error.strerror}. Give the path of a library.") from error
    try:
        is_library = is_regular(fd)
    except BaseException:
        close_fd(fd)
        raise
    if not is_library:
        close_fd(fd)
        raise SowatchError(f"{path} is not a regular file. Give the path of a library.")
    return fd
