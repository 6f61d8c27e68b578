"""Exported symbols of an ELF file: which names it has, and where in the file its functions begin.

A name is found the way ld.so finds it, through the hash table, so it costs a few small reads in a library of any size.
What is limited is the work (`ElfLimits.read_bytes`), never how many symbols there are.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

from sowatch.linux.elf_file import DEFAULT_LIMITS, ElfError, ElfFile, ElfLimits, is_regular, open_elf

__all__ = [
    "ExportSearch",
    "dynamic_symbols",
    "exported_functions",
    "read_exports",
    "search_exports",
    "symbol_offsets",
]

#: Added to the budget for each name that is searched for: some sixty small reads, an honest one needs five to twenty.
_BYTES_PER_NAME: Final = 32 << 10

_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT = 4, 5, 6, 10, 11
_DT_GNU_HASH: Final = 0x6FFFFEF5
_EM_S390, _EM_ARM, _EM_ALPHA = 22, 40, 0x9026
_STB_EXPORTED: Final = frozenset((1, 2, 10))  # GLOBAL, WEAK, GNU_UNIQUE
_STT_NOTYPE, _STT_FUNC, _STT_TLS = 0, 2, 6
_STT_EXPORTED: Final = frozenset((0, 1, 2, 5, 6, 10))  # NOTYPE, OBJECT, FUNC, COMMON, TLS, GNU_IFUNC
_STV_EXPORTED: Final = frozenset((0, 3))  # DEFAULT, PROTECTED
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1


class ExportSearch(NamedTuple):
    """The names that were found, and why the search for some other one was given up (``None``: it was not)."""

    found: frozenset[str]
    gave_up: str | None


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


class _GnuHash(NamedTuple):
    buckets: int
    place: int  # of the first bucket in the file
    first: int  # symbol that is in it; those before are not exported
    chains: int  # where in the file the hash of that symbol is


class _OldHash(NamedTuple):
    buckets: int
    symbols: int
    place: int  # of the first bucket in the file; the chains follow the buckets
    word: str  # "I"; "Q" on two machines


class _Symbols:
    """The dynamic symbol table of one file."""

    def __init__(self, elf: ElfFile) -> None:
        self._elf = elf
        self._tags = elf.dynamic()
        self._gnu: _GnuHash | None = None
        self._old: _OldHash | None = None

    def all(self) -> tuple[bytes, Iterator[_Symbol]]:
        """The string table, and the symbols that another file can bind to."""
        elf, tags = self._elf, self._tags
        if _DT_SYMTAB not in tags or not (_DT_GNU_HASH in tags or _DT_HASH in tags):
            return b"", iter(())
        count = self._gnu_hash_count() if _DT_GNU_HASH in tags else self._old_hash().symbols
        record = elf.layout.symbol
        if tags.get(_DT_SYMENT, record.size) != record.size:
            raise ElfError(f"its symbols have {tags[_DT_SYMENT]} bytes each instead of {record.size}")
        table = elf.scan_all(elf.place(tags[_DT_SYMTAB], "symbol table"), count * record.size, "symbol table")
        strings = elf.place(tags.get(_DT_STRTAB, -1), "string table")
        return elf.scan_all(strings, tags.get(_DT_STRSZ, 0), "string table"), self._exported(table)

    def whole(self) -> tuple[bytes, bytes]:
        """The symbol table and its strings, as the file has them; both empty if it has none."""
        elf, tags = self._elf, self._tags
        if _DT_SYMTAB not in tags or not (_DT_GNU_HASH in tags or _DT_HASH in tags):
            return b"", b""
        count = self._gnu_hash_count() if _DT_GNU_HASH in tags else self._old_hash().symbols
        record = elf.layout.symbol
        strings = elf.place(tags.get(_DT_STRTAB, -1), "string table")
        return (
            elf.read(elf.place(tags[_DT_SYMTAB], "symbol table"), count * record.size),
            elf.read(strings, tags.get(_DT_STRSZ, 0)),
        )

    def find(self, name: str) -> list[_Symbol]:
        """The exported symbols of that name, one for each version."""
        text = name.encode("utf-8", "surrogateescape") + b"\0"
        elf, tags = self._elf, self._tags
        if len(text) == 1 or b"\0" in text[:-1] or _DT_SYMTAB not in tags:
            return []
        if _DT_GNU_HASH in tags:
            places = self._in_gnu_hash(text[:-1])
        elif _DT_HASH in tags:
            places = self._in_old_hash(text[:-1])
        else:
            return []
        found: list[_Symbol] = []
        record = elf.layout.symbol
        for at in places:
            symbols = elf.place(tags[_DT_SYMTAB], "symbol table")
            strings = elf.place(tags.get(_DT_STRTAB, -1), "string table")
            data = elf.scan_all(symbols + at * record.size, record.size, "symbol table")
            found += [one for one in self._exported(data) if elf.read(strings + one.name, len(text)) == text]
        return found

    def _exported(self, table: bytes) -> Iterator[_Symbol]:
        rows = self._elf.layout.symbol.iter_unpack(table)
        if self._elf.bits == 32:
            rows = ((name, info, other, section, value, size) for name, value, size, info, other, section in rows)
        for name, info, other, section, value, size in rows:
            if section == _SHN_UNDEF or info >> 4 not in _STB_EXPORTED or other & 3 not in _STV_EXPORTED:
                continue
            # What ld.so's do_lookup_x passes over.
            kind = info & 15
            if kind in _STT_EXPORTED and (value or section == _SHN_ABS or kind == _STT_TLS):
                yield _Symbol(name, info, other, section, value, size)

    # ---- DT_GNU_HASH ------------------------------------------------------------------------------

    def _gnu_hash(self) -> _GnuHash:
        if self._gnu is None:
            elf = self._elf
            place = elf.place(self._tags[_DT_GNU_HASH], "hash table")
            header = struct.Struct(elf.layout.order + "IIII")
            buckets, first, bloom_words, _ = header.unpack(elf.scan_all(place, header.size, "hash table"))
            place += header.size + bloom_words * elf.bits // 8
            self._gnu = _GnuHash(buckets, place, first, place + buckets * 4)
        return self._gnu

    def _words(self, place: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"{self._elf.layout.order}{count}I", self._elf.scan_all(place, count * 4, "hash table"))

    def _chain(self, table: _GnuHash, index: int, step: int) -> Iterator[int]:
        """The hashes of the symbols from ``index`` to the end of their bucket, read ``step`` at a time."""
        while True:
            data = self._elf.read(table.chains + (index - table.first) * 4, step * 4)
            count = len(data) // 4
            for word in struct.unpack(f"{self._elf.layout.order}{count}I", data[: count * 4]):
                yield word
                if word & 1:
                    return
            if count < step:
                raise ElfError("its hash table ends outside the file")
            index += step

    def _gnu_hash_count(self) -> int:
        """DT_GNU_HASH has no count: it is where the chain of the highest bucket ends."""
        table = self._gnu_hash()
        last = max(self._words(table.place, table.buckets), default=0)
        if last < table.first:  # every bucket is empty: it exports nothing
            return table.first
        return last + sum(1 for _ in self._chain(table, last, 1024))

    def _in_gnu_hash(self, name: bytes) -> Iterator[int]:
        """The places of the symbols whose names have the same hash, as far as it shows."""
        table = self._gnu_hash()
        wanted = 5381
        for byte in name:
            wanted = (wanted * 33 + byte) & 0xFFFFFFFF
        if not table.buckets:
            return
        (index,) = self._words(table.place + wanted % table.buckets * 4, 1)
        if index < max(table.first, 1):
            return
        for at, word in enumerate(self._chain(table, index, 32), index):
            if word | 1 == wanted | 1:
                yield at

    # ---- DT_HASH ----------------------------------------------------------------------------------

    def _old_hash(self) -> _OldHash:
        """``nbucket`` and ``nchain``; the latter is the number of symbols."""
        if self._old is None:
            elf = self._elf
            word = "Q" if elf.bits == 64 and elf.machine in (_EM_S390, _EM_ALPHA) else "I"
            record = struct.Struct(elf.layout.order + 2 * word)
            place = elf.place(self._tags[_DT_HASH], "hash table")
            buckets, symbols = record.unpack(elf.scan_all(place, record.size, "hash table"))
            self._old = _OldHash(buckets, symbols, place + record.size, word)
        return self._old

    def _in_old_hash(self, name: bytes) -> Iterator[int]:
        """The places of the symbols in the bucket of a name. A chain that goes in a circle ends with the budget."""
        table = self._old_hash()
        record = struct.Struct(self._elf.layout.order + table.word)
        value = 0
        for byte in name:
            value = (value << 4) + byte
            value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
        if not table.buckets:
            return

        def word(at: int) -> int:
            found: int = record.unpack(self._elf.scan_all(table.place + at * record.size, record.size, "hash table"))[0]
            return found

        at = word(value % table.buckets)
        while at:
            if at >= table.symbols:
                raise ElfError("its hash table leads outside the symbol table")
            yield at
            at = word(table.buckets + at)


def search_exports(fd: int, wanted: Collection[str], *, limits: ElfLimits = DEFAULT_LIMITS) -> ExportSearch:
    """Which of some names a file exports, and whether the search for any was given up.

    Args:
        fd: as in `sowatch.linux.elf.read_facts`.
        wanted: names of defined dynamic symbols that others can bind to, without versions.
        limits: caps on what is believed; each name adds 32 kB to ``read_bytes``.

    Raises:
        ElfError: the kernel could not read the file; ``errno`` says why. Or it is not a regular file.
    """
    elf = _open_regular(fd, limits)
    if elf is None:
        return ExportSearch(frozenset(), None)
    elf.left += _BYTES_PER_NAME * len(wanted)
    found: set[str] = set()
    gave_up = None
    try:
        symbols = _Symbols(elf)
        for name in sorted(wanted):
            try:
                if symbols.find(name):
                    found.add(name)
            except ElfError as error:
                if error.errno is not None:
                    raise
                # A chain that lies hides only the names that would be in it.
                gave_up = gave_up or error.reason
    except ElfError as error:
        if error.errno is not None:
            raise
        gave_up = error.reason
    return ExportSearch(frozenset(found), gave_up)


def read_exports(
    fd: int, wanted: Collection[str] | None = None, *, limits: ElfLimits = DEFAULT_LIMITS
) -> frozenset[str]:
    """The names a file exports: defined dynamic symbols that others can bind to, without versions.

    Args:
        fd: as in `sowatch.linux.elf.read_facts`.
        wanted: search for these only: cheap for a few names, and no library is too large for it.
        limits: caps on what is believed.

    Returns:
        The names, or those of ``wanted`` that are there. Empty if it is not ELF, or is static.

    Raises:
        ElfError: it cannot be determined, because the file lies, is cut off, passes a limit or is not a
            regular file.
    """
    if wanted is not None:
        search = search_exports(fd, wanted, limits=limits)
        if search.gave_up is not None:
            raise ElfError(search.gave_up)
        return search.found
    elf = _open_regular(fd, limits)
    if elf is None:
        return frozenset()
    strings, symbols = _Symbols(elf).all()
    found: set[str] = set()
    room = limits.read_bytes  # names may overlap, so that a small table holds any amount of text
    for start in {one.name for one in symbols}:
        end = strings.find(b"\0", start, start + room)
        if end < 0:
            raise ElfError("the names of its symbols are too long or end outside the file")
        room -= end - start
        found.add(strings[start:end].decode("utf-8", "surrogateescape"))
    found.discard("")
    return frozenset(found)


def dynamic_symbols(elf: ElfFile) -> list[tuple[bytes, bytes]]:
    """The dynamic symbol table and its strings, found as ld.so does, without sections; none if there is none.

    Raises:
        ElfError: as in `read_exports`.
    """
    symbols, strings = _Symbols(elf).whole()
    return [(symbols, strings)] if symbols else []


def exported_functions(elf: ElfFile, name: str) -> list[tuple[int, int]]:
    """Offset and size of the exported functions of that name, by offset, found by the hash table; none if it lies."""
    found = {}
    try:
        for one in _Symbols(elf).find(name):
            offset = elf.offset_of(one.value)
            if one.info & 15 in (_STT_NOTYPE, _STT_FUNC) and offset is not None and elf.is_code(one.value):
                found[offset] = one.size
    except ElfError as error:
        if error.errno is not None:
            raise
    return sorted(found.items())


def symbol_offsets(fd: int, name: str, *, limits: ElfLimits = DEFAULT_LIMITS) -> tuple[int, ...]:
    """Where in the file an exported function begins, in bytes: what a uprobe wants.

    Several if the file has it in several versions, ascending; none if it exports no such function.
    An indirect function (GNU_IFUNC) is none: its symbol is that of the resolver.

    Raises:
        ElfError: as in `read_exports`.
    """
    elf = _open_regular(fd, limits)
    if elf is None:
        return ()
    found = set()
    for one in _Symbols(elf).find(name):
        if one.info & 15 in (_STT_NOTYPE, _STT_FUNC):
            address = one.value & ~1 if elf.machine == _EM_ARM else one.value  # the lowest bit says Thumb
            offset = elf.offset_of(address)
            if offset is not None and elf.is_code(address):
                found.add(offset)
    return tuple(sorted(found))


def _open_regular(fd: int, limits: ElfLimits) -> ElfFile | None:
    if not is_regular(fd):
        raise ElfError("it is not a regular file")
    return open_elf(fd, limits)
