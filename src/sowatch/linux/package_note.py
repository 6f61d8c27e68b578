"""What an ELF file says of the package that it was built as: the note ``.note.package``.

The note is part of the file, so it can be read from one that was deleted or replaced, and where there is no package
database at all. It is JSON of whatever author: nothing in it is believed but that it says so.
https://uapi-group.org/specifications/specs/package_metadata_for_executable_files/
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from msgspec import Struct

from sowatch.linux.elf import notes_of
from sowatch.linux.elf_file import DEFAULT_LIMITS, ElfError, is_regular, open_elf

__all__ = ["PackageNote", "read_package_note"]

_OWNER: Final = b"FDO\0"
_NT_PACKAGE: Final = 0xCAFE1A7E
#: A usual one has 150 bytes. No depth of nesting in so few exhausts the decoder, which counts it, too.
_MOST_BYTES: Final = 4096
_MOST_CHARACTERS: Final = 256
#: As deb, rpm and apk have them: no other name can be part of a package URL, nor is meant as one.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
_PRINTABLE: Final = re.compile(r"[!-~][ -~]*")


class PackageNote(Struct, frozen=True, rename="camel"):
    """The fields of the note that are used; ``name`` and ``version`` are those of the source package.

    ``type`` is that of the package (``rpm``, ``deb``), ``os`` and ``os_version`` as in os-release.
    """

    name: str
    version: str
    type: str = ""
    os: str = ""
    os_version: str = ""
    architecture: str = ""
    os_cpe: str = ""


def read_package_note(fd: int) -> PackageNote | None:
    """The note of an open file; None if it has none, or one that names no package.

    Of several it is the last one: a linker puts that of its own options behind what the objects have brought, as the
    startup files of the C library do (``Scrt1.o`` on Ubuntu).

    Args:
        fd: stays the caller's, and so does its file position. Open with O_NONBLOCK.

    Raises:
        ElfError: the kernel could not read the file.
    """
    if not is_regular(fd):
        return None
    try:
        elf = open_elf(fd, DEFAULT_LIMITS)
        last: bytes | None = None
        for owner, kind, content in () if elf is None else notes_of(elf):
            if owner == _OWNER and kind == _NT_PACKAGE:
                last = content
    except ElfError as error:
        if error.errno is not None:
            raise
        return None
    return None if last is None else _decoded(last)


def _decoded(content: bytes) -> PackageNote | None:
    text = content.rstrip(b"\0")
    if len(text) > _MOST_BYTES:
        return None
    try:
        note = msgspec.json.decode(text, type=PackageNote)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    values = (note.name, note.version, note.type, note.os, note.os_version, note.architecture, note.os_cpe)
    if any(value and (len(value) > _MOST_CHARACTERS or not _PRINTABLE.fullmatch(value)) for value in values):
        return None
    return note if _NAME.fullmatch(note.name) and note.version.strip("/ ") else None
