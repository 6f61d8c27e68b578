"""Which TLS libraries a process has, and what it may have in their place. Reads its files; expects hostile ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, Literal, NamedTuple, TypeAlias

from sowatch.linux.descriptors import close_fd
from sowatch.linux.elf_file import ElfError, ElfLimits, open_elf
from sowatch.linux.elf_symbols import read_exports
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import seen_path
from sowatch.linux.symbols import SymbolError, is_go, resolve

__all__ = ["FAMILIES", "NSS_CIPHERS", "OtherTls", "TlsFile", "TlsLook", "look_for_tls"]

#: What libssl3 of NSS calls for each record that it encrypts or decrypts (pk11pub.h): NSPR's PR_Write and PR_Read serve
#: files and plain sockets, too, and only those that do this meanwhile are TLS.
NSS_CIPHERS: Final = ("PK11_AEADOp", "PK11_AEADRawOp", "PK11_CipherOp", "PK11_Encrypt", "PK11_Decrypt")
#: What a library of each family exports; one of them is enough to be probed. ``crypto`` is where OpenSSL hands over
#: what it has encrypted, ``nspr`` moves what ``nss`` encrypts.
FAMILIES: Final = {
    "openssl": ("SSL_read", "SSL_write"),
    "gnutls": ("gnutls_record_recv", "gnutls_record_send"),
    "crypto": ("BIO_write",),
    "nspr": ("PR_Read", "PR_Write"),
    "nss": NSS_CIPHERS,
}
#: What is not tapped: functions of OpenSSL in the symbol table of the executable, which does not export them; Go's own
#: TLS, rustls, Java's; and what a static executable without symbols may have.
OtherTls: TypeAlias = Literal["not_exported", "go", "rustls", "java", "static"]

_NAMES: Final = frozenset(name for family in FAMILIES.values() for name in family)
#: elf.h
_PT_INTERP: Final = 3
#: As far as an executable is searched for rustls: 0.1 s.
_MAX_SEARCHED: Final = 128 << 20
_PIECE: Final = 1 << 20
_MAX_FILES: Final = 1024
_RUSTLS: Final = b"rustls"


class TlsFile(NamedTuple):
    """A mapped file that exports functions of some of `FAMILIES`, under its path as the process sees it."""

    path: str
    families: tuple[str, ...]

    @property
    def speaks_tls(self) -> bool:
        """Whether it does so by itself; ``crypto`` and ``nspr`` only serve another one."""
        return not {"openssl", "gnutls", "nss"}.isdisjoint(self.families)


class TlsLook(NamedTuple):
    """What a process has mapped. ``others`` are what else may speak TLS in it."""

    files: tuple[TlsFile, ...]
    others: tuple[OtherTls, ...]


def look_for_tls(proc: ProcFs, pid: int) -> TlsLook | Miss:
    """Reads the files that a process has mapped executable; may wait for a file system that hangs.

    Returns:
        Why not, if its mappings cannot be read. A file that cannot be opened is left out.
    """
    rows = proc.executable_maps(pid)
    if isinstance(rows, Miss):
        return rows
    tid = proc.live_thread(pid)
    if isinstance(tid, Miss):
        return TlsLook((), ()) if tid is Miss.ABSENT else tid
    root_dir = proc.root_dir(pid)
    try:
        root = "/" if isinstance(root_dir, Miss) else os.readlink(root_dir)
    except OSError:
        root = "/"
    base = f"{proc.root}/{tid}"
    found: list[TlsFile] = []
    others: list[OtherTls] = []
    seen: dict[tuple[int, int, int], None] = {}
    for row in rows:
        key = (row.major, row.minor, row.inode)
        if not row.inode or key in seen or len(seen) >= _MAX_FILES:
            continue
        seen[key] = None
        path = seen_path(os.fsdecode(row.path), root)
        if os.path.basename(path) == "libjvm.so":
            others.append("java")
        fd = _opened(f"{base}/map_files/{row.start:x}-{row.end:x}", f"{base}/root{path}")
        if fd is None:
            continue
        try:
            exports = read_exports(fd, _NAMES)
        except (ElfError, OSError):
            continue
        finally:
            close_fd(fd)
        families = tuple(name for name, needed in FAMILIES.items() if exports.issuperset(needed))
        if families:
            found.append(TlsFile(path, families))
    executable = _opened(f"{base}/exe")
    if executable is not None:
        try:
            others += _in_executable(executable, is_tls=any(one.speaks_tls for one in found))
        finally:
            close_fd(executable)
    return TlsLook(tuple(found), tuple(dict.fromkeys(others)))


def _opened(*paths: str) -> int | None:
    for path in paths:
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return None


def _in_executable(fd: int, *, is_tls: bool) -> Iterator[OtherTls]:
    """What is linked into a program."""
    try:
        elf = open_elf(fd, ElfLimits())
        if elf is None:
            return
        if is_go(fd):
            yield "go"
            return
        has_loader = any(segment.kind == _PT_INTERP for segment in elf.segments)
    except (ElfError, OSError):
        return
    if not is_tls and _has_function(fd, "SSL_read"):
        yield "not_exported"
    elif _has_bytes(fd, _RUSTLS):
        yield "rustls"
    elif not has_loader and not _has_function(fd, "_start"):
        yield "static"


def _has_function(fd: int, name: str) -> bool:
    try:
        return bool(resolve(fd, name))
    except (SymbolError, ElfError, OSError):
        return False


def _has_bytes(fd: int, wanted: bytes) -> bool:
    for offset in range(0, _MAX_SEARCHED, _PIECE):
        try:
            piece = os.pread(fd, _PIECE + len(wanted), offset)
        except OSError:
            return False
        if wanted in piece:
            return True
        if len(piece) < _PIECE:
            return False
    return False
