"""What an ELF file says of itself: build id and soname.

Both are found the way the kernel and the dynamic loader find them, through program headers and the dynamic section.
Section headers may be stripped and nothing checks them, so they decide only what program headers leave open: Go 1.24
and later put the GNU build id into a section that no PT_NOTE covers. Where the two disagree the facts are partial.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from sowatch.linux.elf_file import (
    DEFAULT_LIMITS,
    PT_NOTE,
    SHT_DYNAMIC,
    SHT_NOTE,
    ElfError,
    ElfFile,
    ElfLimits,
    Section,
    is_regular,
    open_elf,
)

__all__ = ["ElfFacts", "notes_of", "read_facts"]

_NT_GNU_BUILD_ID: Final = 3
#: Of the owner of a note so much is looked at.
_MAX_OWNER_BYTES: Final = 16
_DT_STRTAB, _DT_STRSZ, _DT_SONAME = 5, 10, 14
_DT_NEEDED, _DT_FLAGS_1, _DF_1_PIE, _PT_INTERP = 1, 0x6FFFFFFB, 0x08000000, 3
_ET_EXEC, _ET_DYN = 2, 3


class ElfFacts(Struct, frozen=True):
    """What an ELF file says of itself.

    ``machine`` is e_machine (62 for x86-64), ``elf_type`` e_type (2 executable, 3 shared object or
    position-independent executable); all of it is 0 if ``is_elf`` is false. ``build_id`` is in
    hexadecimal. Bytes of the soname that are not UTF-8 stand as surrogate escapes. ``is_partial``:
    something contradicts itself, lies outside the file or passes a limit, and was left out; or program headers and
    section headers disagree about where the notes and the dynamic section are.

    ``image_kinds`` is what the kernel can start a process with it as. ``executable``: by its type, its flags or an
    interpreter of its own, or because it is an ``interpreter``: it has an entry point, and needs neither interpreter
    nor library. Any other file is a library, whatever a process says of itself.
    """

    is_elf: bool
    elf_class: int = 0
    is_little_endian: bool = False
    machine: int = 0
    elf_type: int = 0
    build_id: str | None = None
    soname: str | None = None
    is_partial: bool = False
    image_kinds: frozenset[str] = frozenset()


def read_facts(fd: int, *, limits: ElfLimits = DEFAULT_LIMITS) -> ElfFacts | None:
    """What an open file says of itself: four or five small reads for an honest library.

    Args:
        fd: stays the caller's, and so does its file position. Open with O_NONBLOCK.
        limits: caps on what is believed.

    Returns:
        ``None`` if it is not a regular file (a memfd is one); facts with ``is_elf`` false if it is
        something else than ELF.

    Raises:
        ElfError: the kernel could not read the file; ``errno`` says why.
    """
    if not is_regular(fd):
        return None
    try:
        elf = open_elf(fd, limits)
    except ElfError as error:
        if error.errno is not None:
            raise
        return ElfFacts(is_elf=True, is_partial=True)
    if elf is None:
        return ElfFacts(is_elf=False)
    build_id = soname = None
    try:
        build_id = _build_id(elf)
        soname = _soname(elf)
        sections = list(elf.sections())
        build_id = _check_notes(elf, build_id, [one for one in sections if one.kind == SHT_NOTE])
        _check_dynamic(elf, [one for one in sections if one.kind == SHT_DYNAMIC])
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
        image_kinds=_image_kinds(elf),
    )


def _image_kinds(elf: ElfFile) -> frozenset[str]:
    has_interpreter = any(segment.kind == _PT_INTERP for segment in elf.segments)
    try:
        tags = elf.dynamic()
    except ElfError as error:
        if error.errno is not None:
            raise
        tags = {_DT_NEEDED: 0}
    if not has_interpreter and _DT_NEEDED not in tags and elf.is_code(elf.entry):
        return frozenset(("executable", "interpreter"))
    is_program = has_interpreter or elf.elf_type == _ET_EXEC or tags.get(_DT_FLAGS_1, 0) & _DF_1_PIE
    return frozenset(("executable",)) if is_program else frozenset()


def _build_id(elf: ElfFile) -> str | None:
    """The first one of the program headers, as the kernel and elfutils take it."""
    left = elf.limits.note_bytes
    for segment in elf.segments:
        if segment.kind != PT_NOTE:
            continue
        data = elf.read(segment.offset, min(segment.filesz, left))
        left -= len(data)
        found = _build_id_in(elf, data, segment.align)
        if found:
            return found
        elf.is_partial |= len(data) < segment.filesz
    return None


def _check_notes(elf: ElfFile, build_id: str | None, sections: list[Section]) -> str | None:
    """The build id with what sections add: the first one outside all PT_NOTE counts if these have none."""
    covered = [(one.offset, one.offset + one.filesz) for one in elf.segments if one.kind == PT_NOTE and one.filesz]
    if sections and any(not any(start <= one.offset < end for one in sections) for start, end in covered):
        elf.is_partial = True  # what the program headers call notes is none by the sections
    if not elf.segments and elf.elf_type in (_ET_EXEC, _ET_DYN):
        elf.is_partial = True  # nothing could load it
    left = elf.limits.note_bytes
    for section in sections:
        if any(start <= section.offset and section.offset + section.size <= end for start, end in covered):
            continue
        data = elf.read(section.offset, min(section.size, left))
        left -= len(data)
        found = _build_id_in(elf, data, section.align)
        if found:
            elf.is_partial |= build_id not in (None, found)
            return build_id or found
        elf.is_partial |= build_id is None and len(data) < section.size
    return build_id


def _build_id_in(elf: ElfFile, data: bytes, align: int) -> str | None:
    for owner, kind, start, size in _notes_in(elf, data, align):
        if kind == _NT_GNU_BUILD_ID and owner == b"GNU\0" and size:
            if size <= elf.limits.build_id_bytes and start + size <= len(data):
                return data[start : start + size].hex()
            elf.is_partial = True
    return None


def _notes_in(elf: ElfFile, data: bytes, align: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Owner and kind of each note, and where in ``data`` its content begins by its word, and its size."""
    align = 8 if align == 8 else 4
    header = struct.Struct(elf.layout.order + "III")
    at = 0
    while at + header.size <= len(data):
        name_size, size, kind = header.unpack_from(data, at)
        start = _aligned(at + header.size + name_size, align)
        yield data[at + header.size : at + header.size + min(name_size, _MAX_OWNER_BYTES)], kind, start, size
        at = _aligned(start + size, align)


def notes_of(elf: ElfFile) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, kind and content of each note: those of the program headers first, then those that only sections have.

    Raises:
        ElfError: the file cannot be read to the end.
    """
    left = elf.limits.note_bytes
    covered: list[tuple[int, int]] = []
    segments = ((one.offset, one.filesz, one.align) for one in elf.segments if one.kind == PT_NOTE)
    sections = ((one.offset, one.size, one.align) for one in elf.sections() if one.kind == SHT_NOTE)
    for offset, size, align in itertools.chain(segments, sections):
        if any(start <= offset and offset + size <= end for start, end in covered):
            continue
        covered.append((offset, offset + size))
        data = elf.read(offset, min(size, left))
        left -= len(data)
        for owner, kind, start, length in _notes_in(elf, data, align):
            if start + length <= len(data):
                yield owner, kind, data[start : start + length]


def _aligned(value: int, align: int) -> int:
    return (value + align - 1) & -align


def _soname(elf: ElfFile) -> str | None:
    tags = elf.dynamic()
    at = tags.get(_DT_SONAME)
    if at is None:
        return None
    table = elf.offset_of(tags.get(_DT_STRTAB, -1))
    room = min(tags.get(_DT_STRSZ, 0) - at, elf.limits.soname_bytes + 1)
    name, end, _ = (b"" if table is None else elf.read(table + at, room)).partition(b"\0")
    if not end:
        elf.is_partial = True
        return None
    return name.decode("utf-8", "surrogateescape") or None


def _check_dynamic(elf: ElfFile, sections: list[Section]) -> None:
    """Partial if a section is called the dynamic one and program headers have none there."""
    if sections and all(elf.dynamic_offset() != one.offset for one in sections if one.size):
        elf.is_partial = True
