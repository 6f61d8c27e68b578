"""Functions of an ELF file by name, as probes want them: every symbol table, patterns, and why one cannot be probed.

Names and patterns are looked for in ``.dynsym`` and ``.symtab``, which are read whole, within a budget; the files are
hostile, as everywhere here.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import platform
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

from sowatch.linux.elf_file import ElfError, ElfFile, ElfLimits, is_regular, open_elf
from sowatch.model.errors import SowatchError

__all__ = ["Symbol", "SymbolError", "is_go", "list_functions", "native_machine_error", "resolve"]

#: A table of half a million symbols with their names: Debian's node has 130,000 in 24 MB.
_LIMITS: Final = ElfLimits(read_bytes=96 << 20)
#: More matches than this are a mistake in the pattern: each is a breakpoint.
MAX_MATCHES: Final = 512
_SHT_SYMTAB, _SHT_NOTE, _SHT_DYNSYM = 2, 7, 11
_SHN_UNDEF: Final = 0
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
#: The beginning of a mangled name (Itanium C++ ABI 5.1.2), with its nested names.
_NESTED: Final = re.compile(r"_ZN[rVK]*[RO]?(?P<names>.*)")


class SymbolError(SowatchError):
    """A function that cannot be found or must not be probed; ``reason`` is one clause, ``near`` are similar names."""

    def __init__(self, symbol: str, reason: str, near: tuple[str, ...] = ()) -> None:
        self.symbol = symbol
        self.reason = reason
        self.near = near
        hint = f" Near: {', '.join(near)}." if near else " `sowatch trace --list FILE` shows what it has."
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
    wanted = _MACHINES.get(platform.machine())
    if wanted is None or (elf.machine, elf.bits, elf.data) != (wanted, 64, 1):
        kind = _MACHINE_NAMES.get(elf.machine, f"machine {elf.machine}")
        return f"it is for {kind}, and this machine is {platform.machine()}"
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
        rows = _rows_named(elf, name)
        found = _functions(elf, rows)
        if not found:
            raise _why_not(elf, name, rows)
    except ElfError as error:
        raise SymbolError(name, error.reason) from error
    if len(found) > MAX_MATCHES:
        raise SymbolError(name, f"{len(found)} functions match, and at most {MAX_MATCHES} can be probed at once")
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
        return sorted(_functions(elf, [row for row in _all_rows(elf) if fnmatch.fnmatchcase(row.name, pattern)]))
    except ElfError as error:
        raise SymbolError(pattern, error.reason) from error


def _open(fd: int, pattern: str) -> ElfFile:
    try:
        if wrong := native_machine_error(fd):
            raise SymbolError(pattern, wrong)
        elf = open_elf(fd, _LIMITS)
    except ElfError as error:
        raise SymbolError(pattern, error.reason) from error
    assert elf is not None
    return elf


def _rows_named(elf: ElfFile, name: str) -> list[_Row]:
    if name.startswith("cpp:"):
        wanted = name.removeprefix("cpp:")
        rows = [row for row in _all_rows(elf) if qualified_name(row.name) == wanted]
        overloads = sorted({row.name for row in rows})
        if len(overloads) > 1:
            raise SymbolError(name, f"it has {len(overloads)} overloads; give one by its symbol", tuple(overloads[:10]))
        return rows
    if _GLOB.search(name):
        return [row for row in _all_rows(elf) if fnmatch.fnmatchcase(row.name, name)]
    return [row for row in _all_rows(elf, only=name) if row.name == name]


def _functions(elf: ElfFile, rows: list[_Row]) -> list[Symbol]:
    """Those that are defined functions in code; of several names for one place the first."""
    found: dict[int, Symbol] = {}
    size_bytes = os.fstat(elf.fd).st_size
    for row in rows:
        if not row.is_defined or row.kind not in (_STT_NOTYPE, _STT_FUNC) or not elf.is_code(row.value):
            continue
        offset = elf.offset_of(row.value)
        if offset is not None and offset < size_bytes and offset not in found:
            found[offset] = Symbol(row.name, offset, row.size)
    return [found[offset] for offset in sorted(found)]


def _why_not(elf: ElfFile, name: str, rows: list[_Row]) -> SymbolError:
    if any(row.is_defined and row.kind == _STT_GNU_IFUNC for row in rows):
        return SymbolError(
            name, "it is indirect (IFUNC): the symbol is that of the resolver, which runs once", _near(elf, name)
        )
    if any(not row.is_defined for row in rows):
        needed = ", ".join(_needed(elf)) or "one of its libraries"
        return SymbolError(name, f"it is imported here; probe the library that defines it ({needed})")
    if any(row.is_defined for row in rows):
        return SymbolError(name, "it is no function")
    return SymbolError(name, "there is no such function", _near(elf, name))


def _near(elf: ElfFile, name: str) -> tuple[str, ...]:
    names = {row.name for row in _all_rows(elf) if row.is_defined and row.kind == _STT_FUNC}
    plain = name.removeprefix("cpp:")
    return tuple(difflib.get_close_matches(plain, sorted(names)[:50_000], n=3, cutoff=0.7))


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


def _all_rows(elf: ElfFile, only: str | None = None) -> Iterator[_Row]:
    """Every named symbol of ``.dynsym``, then of ``.symtab``; with ``only`` what has that name."""
    wanted = None if only is None else only.encode("utf-8", "surrogateescape") + b"\0"
    sections = [section for _, section in _sections(elf)]
    for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
        for section in sections:
            if section.kind == kind and section.link < len(sections):
                yield from _table(elf, section, sections[section.link], wanted)


def _table(elf: ElfFile, table: _Section, strings: _Section, wanted: bytes | None) -> Iterator[_Row]:
    record = elf.layout.symbol
    data = elf.read(table.offset, table.size)
    text = elf.read(strings.offset, strings.size)
    for name, info, _, section, value, size in record.iter_unpack(data[: len(data) // record.size * record.size]):
        if not name or (wanted is not None and not text.startswith(wanted, name)):
            continue
        end = text.find(b"\0", name, name + 4096)
        if end > 0:
            label = text[name:end].decode("utf-8", "surrogateescape")
            # A version may be part of the name in .symtab: malloc@@GLIBC_2.2.5.
            yield _Row(label.partition("@")[0], info & 15, section != _SHN_UNDEF, value, size)


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


@lru_cache(maxsize=100_000)
def qualified_name(symbol: str) -> str | None:
    """The C++ function that a mangled name stands for, with its namespaces and without arguments; None: it is none.

    Names of plain nesting only (``_ZN2ns1fEi`` is ``ns::f``, ``_Z1fi`` is ``f``): templates and operators have none
    here.

    >>> qualified_name("_ZN2ns1fEi"), qualified_name("_Z4mainv"), qualified_name("printf")
    ('ns::f', 'main', None)
    """
    if not symbol.startswith("_Z"):
        return None
    nested = _NESTED.fullmatch(symbol)
    rest = nested["names"] if nested else symbol[2:]
    parts = []
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        parts.append(rest[match.end() : match.end() + length])
        if len(parts[-1]) != length:
            return None
        rest = rest[match.end() + length :]
        if not nested:
            break
    if not parts or (nested and not rest.startswith("E")):
        return None
    return "::".join(parts)


def open_checked(path: str) -> int:
    """A descriptor of a regular file, to list its functions; the caller closes it.

    Raises:
        SowatchError: it cannot be opened, or is no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise SowatchError(f"cannot open {path}: {error.strerror}. Give the path of a library.") from error
    if not is_regular(fd):
        os.close(fd)
        raise SowatchError(f"{path} is not a regular file. Give the path of a library.")
    return fd
