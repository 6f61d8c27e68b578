"""ELF facts of an open file: build id, soname, exported symbols, file offsets of functions.

The files are under the control of whoever runs in a container, so nothing in them is believed: every count and size
has a cap (`ElfLimits`), every byte comes by ``pread`` at a computed offset and counts against a budget, no address is
followed twice. A file that lies gives a partial answer or an `ElfError`, in bounded time and memory.

Everything is found the way the dynamic loader finds it, through program headers and the dynamic
section, never through section headers: those may be stripped, and nothing checks them.

This is not pyelftools because that believes the file: a PT_NOTE that claims all of a sparse terabyte
keeps it busy for hours, a note that claims 2 GB makes it allocate them, and the two facts of an honest
libc take it a hundred times as long. The tests compare the answers of both for every library there is.

``pread`` on a file of a hung FUSE or NFS mount waits: never call this where that matters.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from sowatch.model.errors import SowatchError

__all__ = ["ElfError", "ElfFacts", "ElfLimits", "read_exports", "read_facts", "symbol_offsets"]


class ElfError(SowatchError):
    """An ELF file that cannot be read to the end: it lies, is cut off, or passes a limit.

    ``errno`` is the kernel's if reading failed, else ``None``: then the file itself is at fault, and
    the same file will fail again.
    """

    def __init__(self, reason: str, errno: int | None = None) -> None:
        self.reason = reason
        self.errno = errno
        super().__init__(f"cannot read the ELF file: {reason}. `readelf -ld FILE` shows what it claims.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ElfLimits:
    """Caps on what a file may claim. The defaults fit every library of a large Debian several times.

    Attributes:
        program_headers: looked at; the kernel itself takes no more than 1,170.
        dynamic_entries: looked at in PT_DYNAMIC; usual are 30.
        note_bytes: looked at in all PT_NOTE together; usual are 100.
        build_id_bytes: of a build id; usual are 20.
        soname_bytes: of a soname; the kernel takes no longer path.
        symbols: in the dynamic symbol table; libLLVM has 46,000.
        read_bytes: read in one call of one function; libLLVM needs 5 MB for its symbols.
    """

    program_headers: int = 1_170
    dynamic_entries: int = 4_096
    note_bytes: int = 1 << 16
    build_id_bytes: int = 64
    soname_bytes: int = 4_096
    symbols: int = 300_000
    read_bytes: int = 8 << 20


@dataclass(frozen=True, slots=True)
class ElfFacts:
    """What an ELF file says of itself.

    ``machine`` is e_machine (62 for x86-64), ``elf_type`` e_type (2 executable, 3 shared object or
    position-independent executable); all of it is 0 if ``is_elf`` is false. ``build_id`` is in
    hexadecimal. Bytes of the soname that are not UTF-8 stand as surrogate escapes. ``is_partial``:
    something contradicts itself, lies outside the file or passes a limit, and was left out.
    """

    is_elf: bool
    elf_class: int = 0
    is_little_endian: bool = False
    machine: int = 0
    elf_type: int = 0
    build_id: str | None = None
    soname: str | None = None
    is_partial: bool = False


_DEFAULT_LIMITS: Final = ElfLimits()
_HEAD_BYTES: Final = 4096  # has the header, the program headers and the notes of most files
_MIN_CHARGE_BYTES: Final = 512
_MAX_OFFSET: Final = 1 << 62  # pread takes no more than a signed 64-bit number

_PT_LOAD, _PT_DYNAMIC, _PT_NOTE = 1, 2, 4
_PF_X: Final = 1
_NT_GNU_BUILD_ID: Final = 3
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 4, 5, 6, 10, 11, 14
_DT_GNU_HASH: Final = 0x6FFFFEF5
_EM_S390, _EM_ARM, _EM_ALPHA = 22, 40, 0x9026
_STB_EXPORTED: Final = frozenset((1, 2, 10))  # GLOBAL, WEAK, GNU_UNIQUE
_STT_NOTYPE, _STT_FUNC, _STT_TLS = 0, 2, 6
_STT_EXPORTED: Final = frozenset((0, 1, 2, 5, 6, 10))  # NOTYPE, OBJECT, FUNC, COMMON, TLS, GNU_IFUNC
_STV_EXPORTED: Final = frozenset((0, 3))  # DEFAULT, PROTECTED
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1


class _Layout(NamedTuple):
    """The records of one class and byte order; sizes as in elf(5)."""

    header: struct.Struct  # Elf32_Ehdr, Elf64_Ehdr after e_ident
    segment: struct.Struct  # Elf32_Phdr: 32 bytes, Elf64_Phdr: 56
    dynamic: struct.Struct  # Elf32_Dyn: 8 bytes, Elf64_Dyn: 16
    symbol: struct.Struct  # Elf32_Sym: 16 bytes, Elf64_Sym: 24
    order: str


_LAYOUTS: Final = {
    (bits, data): _Layout(
        struct.Struct(order + ("HHIQQQIHHHHHH" if bits == 64 else "HHIIIIIHHHHHH")),
        struct.Struct(order + ("IIQQQQQQ" if bits == 64 else "IIIIIIII")),
        struct.Struct(order + ("QQ" if bits == 64 else "II")),
        struct.Struct(order + ("IBBHQQ" if bits == 64 else "IIIBBH")),
        order,
    )
    for bits in (32, 64)
    for data, order in ((1, "<"), (2, ">"))
}


class _Segment(NamedTuple):
    kind: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    align: int


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


class _Elf:
    """One file being read: its header and segments, and what is left of the budget."""

    __slots__ = (
        "bits",
        "data",
        "elf_type",
        "fd",
        "head",
        "is_partial",
        "layout",
        "left",
        "limits",
        "machine",
        "segments",
        "whole",
    )

    def __init__(self, fd: int, limits: ElfLimits, head: bytes) -> None:
        self.fd = fd
        self.limits = limits
        self.head = head
        self.left = limits.read_bytes - len(head)
        self.is_partial = False
        self.whole: tuple[bytes, list[_Symbol]] | None = None
        self.bits = 64 if head[4] == 2 else 32
        self.data = head[5]
        self.layout = _LAYOUTS[self.bits, self.data]
        fields = self.layout.header.unpack_from(head, 16)
        self.elf_type, self.machine = fields[0], fields[1]
        self.segments = self._read_segments(phoff=fields[4], phentsize=fields[8], phnum=fields[9])

    def read(self, offset: int, size: int) -> bytes:
        """What the file has there: less than asked for at its end, nothing behind it."""
        if size <= 0 or not 0 <= offset <= _MAX_OFFSET:
            return b""
        if offset + size <= len(self.head):
            return self.head[offset : offset + size]
        # Many tiny reads cost what a few large ones do.
        self.left -= max(size, _MIN_CHARGE_BYTES)
        if self.left < 0:
            raise ElfError(f"it takes more than {self.limits.read_bytes} bytes to read")
        return _pread(self.fd, size, offset)

    def read_all(self, offset: int, size: int, what: str) -> bytes:
        data = self.read(offset, size)
        if len(data) != size:
            raise ElfError(f"its {what} ends outside the file")
        return data

    def _read_segments(self, *, phoff: int, phentsize: int, phnum: int) -> list[_Segment]:
        record = self.layout.segment
        if phnum == 0 or phoff == 0:
            return []
        if phentsize != record.size:  # the kernel and ld.so refuse these as well
            self.is_partial = True
            return []
        wanted = min(phnum, self.limits.program_headers)
        data = self.read(phoff, wanted * record.size)
        count = len(data) // record.size
        self.is_partial |= count < phnum
        rows = record.iter_unpack(data[: count * record.size])
        if self.bits == 64:
            return [_Segment(kind, flags, off, va, size, align) for kind, flags, off, va, _, size, _, align in rows]
        return [_Segment(kind, flags, off, va, size, align) for kind, off, va, _, size, _, flags, align in rows]

    def offset_of(self, vaddr: int) -> int | None:
        """Where in the file the byte at an address is; the last segment wins, as with MAP_FIXED."""
        for segment in reversed(self.segments):
            if segment.kind == _PT_LOAD and 0 <= vaddr - segment.vaddr < segment.filesz:
                return segment.offset + vaddr - segment.vaddr
        return None

    def is_code(self, vaddr: int) -> bool:
        return any(
            one.kind == _PT_LOAD and one.flags & _PF_X and 0 <= vaddr - one.vaddr < one.filesz for one in self.segments
        )

    def build_id(self) -> str | None:
        """The first one there is, as the kernel and elfutils take it."""
        left = self.limits.note_bytes
        for segment in self.segments:
            if segment.kind != _PT_NOTE:
                continue
            data = self.read(segment.offset, min(segment.filesz, left))
            left -= len(data)
            found = self._build_id_in(data, 8 if segment.align == 8 else 4)
            if found:
                return found.hex()
            self.is_partial |= len(data) < segment.filesz
        return None

    def _build_id_in(self, data: bytes, align: int) -> bytes | None:
        header = struct.Struct(self.layout.order + "III")
        at = 0
        while at + header.size <= len(data):
            name_size, size, kind = header.unpack_from(data, at)
            start = _aligned(at + header.size + name_size, align)
            if kind == _NT_GNU_BUILD_ID and name_size == 4 and data[at + 12 : at + 16] == b"GNU\0" and size:
                if size <= self.limits.build_id_bytes and start + size <= len(data):
                    return data[start : start + size]
                self.is_partial = True
            at = _aligned(start + size, align)
        return None

    def dynamic(self) -> dict[int, int]:
        """Tag and value of the entries; the last of a tag counts, as in ld.so."""
        found = [one for one in self.segments if one.kind == _PT_DYNAMIC and one.filesz]
        if not found:
            return {}
        # ld.so goes by the address; a file may well claim another offset.
        offset = self.offset_of(found[-1].vaddr)
        record = self.layout.dynamic
        size = min(found[-1].filesz, self.limits.dynamic_entries * record.size)
        data = self.read(found[-1].offset if offset is None else offset, size)
        tags: dict[int, int] = {}
        for tag, value in record.iter_unpack(data[: len(data) // record.size * record.size]):
            if tag == 0:
                return tags
            tags[tag] = value
        self.is_partial = True  # no DT_NULL where it may be looked for
        return tags

    def soname(self) -> str | None:
        tags = self.dynamic()
        at = tags.get(_DT_SONAME)
        if at is None:
            return None
        table = self.offset_of(tags.get(_DT_STRTAB, -1))
        room = min(tags.get(_DT_STRSZ, 0) - at, self.limits.soname_bytes + 1)
        name, end, _ = (b"" if table is None else self.read(table + at, room)).partition(b"\0")
        if not end:
            self.is_partial = True
            return None
        return name.decode("utf-8", "surrogateescape") or None

    def symbols(self) -> tuple[bytes, Iterator[_Symbol]]:
        """The string table, and the symbols that another file can bind to."""
        tags = self.dynamic()
        if _DT_SYMTAB not in tags or not (_DT_GNU_HASH in tags or _DT_HASH in tags):
            return b"", iter(())
        count = self._gnu_hash_count(tags[_DT_GNU_HASH]) if _DT_GNU_HASH in tags else self._hash_count(tags[_DT_HASH])
        self._check_symbols(count)
        record = self.layout.symbol
        if tags.get(_DT_SYMENT, record.size) != record.size:
            raise ElfError(f"its symbols have {tags[_DT_SYMENT]} bytes each instead of {record.size}")
        table = self.read_all(self._place(tags[_DT_SYMTAB], "symbol table"), count * record.size, "symbol table")
        strings = self._place(tags.get(_DT_STRTAB, -1), "string table")
        return self.read_all(strings, tags.get(_DT_STRSZ, 0), "string table"), self._exported(table)

    def _exported(self, table: bytes) -> Iterator[_Symbol]:
        rows = self.layout.symbol.iter_unpack(table)
        if self.bits == 32:
            rows = ((name, info, other, section, value, size) for name, value, size, info, other, section in rows)
        for name, info, other, section, value, size in rows:
            if section == _SHN_UNDEF or info >> 4 not in _STB_EXPORTED or other & 3 not in _STV_EXPORTED:
                continue
            # What ld.so's do_lookup_x passes over.
            kind = info & 15
            if kind in _STT_EXPORTED and (value or section == _SHN_ABS or kind == _STT_TLS):
                yield _Symbol(name, info, other, section, value, size)

    def _place(self, vaddr: int, what: str) -> int:
        offset = self.offset_of(vaddr)
        if offset is None:
            raise ElfError(f"its {what} lies outside the file")
        return offset

    def _check_symbols(self, count: int) -> None:
        if count > self.limits.symbols:
            raise ElfError(f"it claims {count} dynamic symbols; the limit is {self.limits.symbols}")

    def _hash_count(self, vaddr: int) -> int:
        """DT_HASH: nbucket, nchain; the latter is the number of symbols. Words are 64-bit on two machines."""
        word = "Q" if self.bits == 64 and self.machine in (_EM_S390, _EM_ALPHA) else "I"
        record = struct.Struct(self.layout.order + 2 * word)
        count: int = record.unpack(self.read_all(self._place(vaddr, "hash table"), record.size, "hash table"))[1]
        return count

    def _gnu_hash(self, vaddr: int) -> _GnuHash:
        place = self._place(vaddr, "hash table")
        header = struct.Struct(self.layout.order + "IIII")
        buckets, first, bloom_words, _ = header.unpack(self.read_all(place, header.size, "hash table"))
        self._check_symbols(max(buckets, bloom_words, first))
        place += header.size + bloom_words * self.bits // 8
        return _GnuHash(buckets, place, first, place + buckets * 4)

    def _words(self, place: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"{self.layout.order}{count}I", self.read_all(place, count * 4, "hash table"))

    def _chain(self, table: _GnuHash, index: int, step: int) -> Iterator[int]:
        """The hashes of the symbols from ``index`` to the end of their bucket, read ``step`` at a time."""
        while True:
            self._check_symbols(index)
            data = self.read(table.chains + (index - table.first) * 4, step * 4)
            count = len(data) // 4
            for word in struct.unpack(f"{self.layout.order}{count}I", data[: count * 4]):
                yield word
                if word & 1:
                    return
            if count < step:
                raise ElfError("its hash table ends outside the file")
            index += step

    def _gnu_hash_count(self, vaddr: int) -> int:
        """DT_GNU_HASH has no count: it is where the chain of the highest bucket ends."""
        table = self._gnu_hash(vaddr)
        last = max(self._words(table.place, table.buckets), default=0)
        if last < table.first:  # every bucket is empty: it exports nothing
            return table.first
        return last + sum(1 for _ in self._chain(table, last, 1024))

    def find(self, name: str) -> list[_Symbol]:
        """The exported symbols of that name, one for each version; found as ld.so finds them.

        That takes a few small reads however large the tables are. Files with DT_HASH only, which
        distributions have not built for years, are read whole.
        """
        text = name.encode("utf-8", "surrogateescape") + b"\0"
        tags = self.dynamic()
        if len(text) == 1 or b"\0" in text[:-1] or _DT_SYMTAB not in tags:
            return []
        if _DT_GNU_HASH not in tags:
            if self.whole is None:
                strings, symbols = self.symbols()
                self.whole = strings, list(symbols)
            strings, listed = self.whole
            return [one for one in listed if strings.startswith(text, one.name)]
        table = self._gnu_hash(tags[_DT_GNU_HASH])
        wanted = 5381
        for byte in text[:-1]:
            wanted = (wanted * 33 + byte) & 0xFFFFFFFF
        if not table.buckets:
            return []
        (index,) = self._words(table.place + wanted % table.buckets * 4, 1)
        if index < max(table.first, 1):
            return []
        strings_at = self._place(tags.get(_DT_STRTAB, -1), "string table")
        symbols_at = self._place(tags[_DT_SYMTAB], "symbol table")
        record, found = self.layout.symbol, []
        for at, word in enumerate(self._chain(table, index, 32), index):
            if word | 1 == wanted | 1:
                data = self.read_all(symbols_at + at * record.size, record.size, "symbol table")
                found += [one for one in self._exported(data) if self.read(strings_at + one.name, len(text)) == text]
        return found


def _aligned(value: int, align: int) -> int:
    return (value + align - 1) & -align


def _pread(fd: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise ElfError(os.strerror(error.errno or 0), error.errno) from error


def _open(fd: int, limits: ElfLimits) -> _Elf | None:
    """``None`` if it is no ELF file."""
    head = _pread(fd, _HEAD_BYTES, 0)
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    if head[4] == 2 and len(head) < 64:
        return None
    return _Elf(fd, limits, head)


def _is_regular(fd: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError as error:
        raise ElfError(os.strerror(error.errno or 0), error.errno) from error


def read_facts(fd: int, *, limits: ElfLimits = _DEFAULT_LIMITS) -> ElfFacts | None:
    """What an open file says of itself: three or four small reads for an honest library.

    Args:
        fd: stays the caller's, and so does its file position. Open with O_NONBLOCK.
        limits: caps on what is believed.

    Returns:
        ``None`` if it is not a regular file (a memfd is one); facts with ``is_elf`` false if it is
        something else than ELF.

    Raises:
        ElfError: the kernel could not read the file; ``errno`` says why.
    """
    if not _is_regular(fd):
        return None
    try:
        elf = _open(fd, limits)
    except ElfError as error:
        if error.errno is not None:
            raise
        return ElfFacts(is_elf=True, is_partial=True)
    if elf is None:
        return ElfFacts(is_elf=False)
    build_id = soname = None
    try:
        build_id = elf.build_id()
        soname = elf.soname()
    except ElfError as error:
        if error.errno is not None:
            raise
        elf.is_partial = True
    return ElfFacts(
        is_elf=True,
        elf_class=elf.bits,
        is_little_endian=elf.data == 1,
        machine=elf.machine,
        elf_type=elf.elf_type,
        build_id=build_id,
        soname=soname,
        is_partial=elf.is_partial,
    )


def read_exports(
    fd: int, wanted: Collection[str] | None = None, *, limits: ElfLimits = _DEFAULT_LIMITS
) -> frozenset[str]:
    """The names a file exports: defined dynamic symbols that others can bind to, without versions.

    Args:
        fd: as in `read_facts`.
        wanted: look for these only: cheap for a few names, and no library is too large for it.
        limits: caps on what is believed.

    Returns:
        The names, or those of ``wanted`` that are there. Empty if it is not ELF, or is static.

    Raises:
        ElfError: it cannot be told, because the file lies, is cut off, passes a limit or is not a
            regular file.
    """
    elf = _open_regular(fd, limits)
    if elf is None:
        return frozenset()
    if wanted is not None:
        return frozenset(name for name in wanted if elf.find(name))
    strings, symbols = elf.symbols()
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


def symbol_offsets(fd: int, name: str, *, limits: ElfLimits = _DEFAULT_LIMITS) -> tuple[int, ...]:
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
    for one in elf.find(name):
        if one.info & 15 in (_STT_NOTYPE, _STT_FUNC):
            address = one.value & ~1 if elf.machine == _EM_ARM else one.value  # the lowest bit says Thumb
            offset = elf.offset_of(address)
            if offset is not None and elf.is_code(address):
                found.add(offset)
    return tuple(sorted(found))


def _open_regular(fd: int, limits: ElfLimits) -> _Elf | None:
    if not _is_regular(fd):
        raise ElfError("it is not a regular file")
    return _open(fd, limits)
