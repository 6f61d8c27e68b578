"""An open ELF file: its header, segments, sections and dynamic section, read within a budget.

The files are under the control of containers, so nothing in them is believed: every count and size
has a cap (`ElfLimits`), every byte comes by ``pread`` at a computed offset and counts against a budget, no address is
followed twice. A file that lies gives a partial answer or an `ElfError`, in bounded time and memory.

This is not pyelftools because that believes the file: a PT_NOTE that spans all of a sparse terabyte
keeps it busy for hours, a note of a declared 2 GB makes it allocate them, and the two facts of an honest
libc take it a hundred times as long. The tests compare the answers of both for every library there is.

``pread`` on a file of a hung FUSE or NFS mount waits: never call this where that matters.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from msgspec import Struct

from sowatch.model.errors import SowatchError

__all__ = ["DEFAULT_LIMITS", "ElfError", "ElfFile", "ElfLimits", "Section", "Segment", "is_regular", "open_elf"]


class ElfError(SowatchError):
    """An ELF file that cannot be read to the end: it lies, is cut off, or passes a limit.

    ``errno`` is the kernel's if reading failed, else ``None``: then the file itself is at fault, and
    the same file will fail again.
    """

    def __init__(self, reason: str, errno: int | None = None) -> None:
        self.reason = reason
        self.errno = errno
        super().__init__(f"cannot read the ELF file: {reason}. `readelf -ld FILE` shows its headers.")


class ElfLimits(Struct, frozen=True, kw_only=True):
    """Caps on what a file may declare. The defaults fit every library of a large Debian several times.

    Attributes:
        program_headers: read at most; the kernel itself takes no more than 1,170.
        dynamic_entries: read at most in PT_DYNAMIC; usual are 30.
        note_bytes: read at most in all PT_NOTE together; usual are 100.
        build_id_bytes: of a build id; usual are 20.
        soname_bytes: of a soname; the kernel takes no longer path.
        sections: read at most; usual are 30, and more only where each function has its own.
        read_bytes: read in one call of one function; libLLVM needs 5 MB for all its symbols, a name that is looked
            for less than 4 kB in a library of any size.
    """

    program_headers: int = 1_170
    dynamic_entries: int = 4_096
    note_bytes: int = 1 << 16
    build_id_bytes: int = 64
    soname_bytes: int = 4_096
    sections: int = 4_096
    read_bytes: int = 8 << 20


DEFAULT_LIMITS: Final = ElfLimits()
_HEAD_BYTES: Final = 4096  # has the header, the program headers and the notes of most files
_MIN_CHARGE_BYTES: Final = 512
_HEAD_CHARGE_BYTES: Final = 64
_MAX_OFFSET: Final = 1 << 62  # pread takes no more than a signed 64-bit number

PT_LOAD, PT_DYNAMIC, PT_NOTE = 1, 2, 4
SHT_DYNAMIC, SHT_NOTE = 6, 7
_PF_X: Final = 1


class Layout(NamedTuple):
    """The records of one class and byte order; sizes as in elf(5)."""

    header: struct.Struct  # Elf32_Ehdr, Elf64_Ehdr after e_ident
    segment: struct.Struct  # Elf32_Phdr: 32 bytes, Elf64_Phdr: 56
    section: struct.Struct  # Elf32_Shdr: 40 bytes, Elf64_Shdr: 64
    dynamic: struct.Struct  # Elf32_Dyn: 8 bytes, Elf64_Dyn: 16
    symbol: struct.Struct  # Elf32_Sym: 16 bytes, Elf64_Sym: 24
    order: str


_LAYOUTS: Final = {
    (bits, data): Layout(
        struct.Struct(order + ("HHIQQQIHHHHHH" if bits == 64 else "HHIIIIIHHHHHH")),
        struct.Struct(order + ("IIQQQQQQ" if bits == 64 else "IIIIIIII")),
        struct.Struct(order + ("IIQQQQIIQQ" if bits == 64 else "IIIIIIIIII")),
        struct.Struct(order + ("QQ" if bits == 64 else "II")),
        struct.Struct(order + ("IBBHQQ" if bits == 64 else "IIIBBH")),
        order,
    )
    for bits in (32, 64)
    for data, order in ((1, "<"), (2, ">"))
}


class Segment(NamedTuple):
    """A program header; ``kind`` is p_type."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    filesz: int
    align: int


class Section(NamedTuple):
    """A section header; ``kind`` is sh_type."""

    kind: int
    offset: int
    size: int
    align: int


class ElfFile:
    """One file being read: its header and segments, and what is left of the budget."""

    __slots__ = (
        "_tags",
        "bits",
        "data",
        "elf_type",
        "entry",
        "fd",
        "head",
        "is_partial",
        "layout",
        "left",
        "limits",
        "machine",
        "section_table",
        "segments",
    )

    def __init__(self, fd: int, limits: ElfLimits, head: bytes) -> None:
        self.fd = fd
        self.limits = limits
        self.head = head
        self.left = limits.read_bytes - len(head)
        self.is_partial = False
        self._tags: dict[int, int] | None = None
        self.bits = 64 if head[4] == 2 else 32
        self.data = head[5]
        self.layout = _LAYOUTS[self.bits, self.data]
        fields = self.layout.header.unpack_from(head, 16)
        self.elf_type, self.machine = fields[0], fields[1]
        self.entry = fields[3]
        #: Where the section headers are, by the file's word: offset, bytes of each, how many.
        self.section_table = (fields[5], fields[10], fields[11])
        self.segments = self._read_segments(phoff=fields[4], phentsize=fields[8], phnum=fields[9])

    @property
    def size_bytes(self) -> int:
        """As long as the file is now."""
        return _status(self.fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        """What the file has there: less than asked for at its end, nothing behind it."""
        if size <= 0 or not 0 <= offset <= _MAX_OFFSET:
            return b""
        is_in_head = offset + size <= len(self.head)
        # Many tiny reads cost what a few large ones do, and a table may lead in a circle within the head.
        self.left -= _HEAD_CHARGE_BYTES if is_in_head else max(size, _MIN_CHARGE_BYTES)
        if self.left < 0:
            raise ElfError(f"it takes more than {self.limits.read_bytes} bytes to read")
        return self.head[offset : offset + size] if is_in_head else _pread(self.fd, size, offset)

    def scan_all(self, offset: int, size: int, what: str) -> bytes:
        """As `read`, and an error if the file ends before."""
        data = self.read(offset, size)
        if len(data) != size:
            raise ElfError(f"its {what} ends outside the file")
        return data

    def _read_segments(self, *, phoff: int, phentsize: int, phnum: int) -> list[Segment]:
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
            return [Segment(kind, flags, off, va, size, align) for kind, flags, off, va, _, size, _, align in rows]
        return [Segment(kind, flags, off, va, size, align) for kind, off, va, _, size, _, flags, align in rows]

    def offset_of(self, vaddr: int) -> int | None:
        """Where in the file the byte at an address is; the last segment wins, as with MAP_FIXED."""
        for segment in reversed(self.segments):
            if segment.kind == PT_LOAD and 0 <= vaddr - segment.vaddr < segment.filesz:
                return segment.offset + vaddr - segment.vaddr
        return None

    def is_code(self, vaddr: int) -> bool:
        """Whether an address is in an executable segment, and the file has that byte."""
        return any(
            one.kind == PT_LOAD and one.flags & _PF_X and 0 <= vaddr - one.vaddr < one.filesz for one in self.segments
        )

    def dynamic(self) -> dict[int, int]:
        """Tag and value of the entries; the last of a tag counts, as in ld.so."""
        if self._tags is None:
            self._tags = self._read_dynamic()
        return self._tags

    def _read_dynamic(self) -> dict[int, int]:
        segment, offset = self._dynamic_segment(), self.dynamic_offset()
        if segment is None or offset is None:
            return {}
        record = self.layout.dynamic
        data = self.read(offset, min(segment.filesz, self.limits.dynamic_entries * record.size))
        tags: dict[int, int] = {}
        for tag, value in record.iter_unpack(data[: len(data) // record.size * record.size]):
            if tag == 0:
                return tags
            tags[tag] = value
        self.is_partial = True  # no DT_NULL where it may be searched for
        return tags

    def _dynamic_segment(self) -> Segment | None:
        return next((one for one in reversed(self.segments) if one.kind == PT_DYNAMIC and one.filesz), None)

    def dynamic_offset(self) -> int | None:
        """Where in the file the dynamic section is; ``None`` if program headers name none."""
        segment = self._dynamic_segment()
        if segment is None:
            return None
        # ld.so goes by the address; a file may well declare another offset.
        offset = self.offset_of(segment.vaddr)
        return segment.offset if offset is None else offset

    def sections(self) -> Iterator[Section]:
        """Those of notes and of the dynamic section, in the order of the file.

        Nothing checks section headers, and they may be stripped: what the kernel and ld.so go by are segments.
        """
        offset, size, count = self.section_table
        record = self.layout.section
        if offset == 0 or size != record.size:
            return
        if count == 0:  # more than 65,279: the first section has the number
            head = self.read(offset, size)
            count = self._section(record.unpack(head)).size if len(head) == size else 0
        data = self.read(offset, min(count, self.limits.sections) * size)
        self.is_partial |= count > self.limits.sections
        for fields in record.iter_unpack(data[: len(data) // size * size]):
            if fields[1] in (SHT_DYNAMIC, SHT_NOTE):
                yield self._section(fields)

    def _section(self, fields: tuple[int, ...]) -> Section:
        _, kind, _, _, offset, size, _, _, align, _ = fields
        return Section(kind, offset, size, align)

    def place(self, vaddr: int, what: str) -> int:
        """As `offset_of`, and an error if the file has it nowhere."""
        offset = self.offset_of(vaddr)
        if offset is None:
            raise ElfError(f"its {what} lies outside the file")
        return offset


def _pread(fd: int, size: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as error:
        raise ElfError(os.strerror(error.errno or 0), error.errno) from error


def open_elf(fd: int, limits: ElfLimits) -> ElfFile | None:
    """``None`` if it is no ELF file."""
    head = _pread(fd, _HEAD_BYTES, 0)
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    if head[4] == 2 and len(head) < 64:
        return None
    return ElfFile(fd, limits, head)


def is_regular(fd: int) -> bool:
    """Whether it is a regular file, which a memfd is, too."""
    return stat.S_ISREG(_status(fd).st_mode)


def _status(fd: int) -> os.stat_result:
    try:
        return os.fstat(fd)
    except OSError as error:
        raise ElfError(os.strerror(error.errno or 0), error.errno) from error
