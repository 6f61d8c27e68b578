"""Which TLS libraries a process has, by real mappings and real programs; files that lie, and files that do not open."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.tls_libraries import NSS_CIPHERS, TlsFile, TlsLook, look_for_tls
from support.elf_files import Made, Sym

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot and map_files need root")

WAIT = '#include <unistd.h>\nint main(void) {{ char c; return write(1, "", 1) + read(0, &c, 1) < 0; }}\n{more}\n'


def library(path: Path, *exports: str, spoil: dict[int, int] | None = None) -> Path:
    made = Made()
    made.symbols = [Sym(name.encode()) for name in exports]
    made.tags |= spoil or {}
    path.write_bytes(made.data())
    return path


@contextmanager
def mapped(*paths: Path) -> Iterator[None]:
    with ExitStack() as stack:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            stack.enter_context(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
            os.close(fd)
        yield


def found_below(place: Path) -> tuple[TlsFile, ...]:
    look = look_for_tls(ProcFs(), os.getpid())
    assert isinstance(look, TlsLook)
    return tuple(one for one in look.files if one.path.startswith(f"{place}/"))


def look_at_program(spawn: Any, program: Path | list[str]) -> TlsLook:
    command = [str(program)] if isinstance(program, Path) else program
    child = spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.read(1) == b"\0"
    look = look_for_tls(ProcFs(), child.pid)
    assert isinstance(look, TlsLook)
    return look


def compiled(place: Path, *flags: str, more: str = "") -> Path:
    source = place / "wait.c"
    source.write_text(WAIT.format(more=more), encoding="utf-8")
    program = place / "wait"
    subprocess.run(["cc", "-o", program, source, *flags], check=True)
    return program


@pytest.mark.parametrize(
    ("exports", "families", "speaks_tls"),
    [
        (("SSL_read", "SSL_write"), ("openssl",), True),
        (("gnutls_record_recv", "gnutls_record_send"), ("gnutls",), True),
        (NSS_CIPHERS, ("nss",), True),
        (("BIO_write",), ("crypto",), False),
        (("PR_Read", "PR_Write"), ("nspr",), False),
        (("SSL_read", "SSL_write", "BIO_write"), ("openssl", "crypto"), True),
    ],
)
def test_a_library_is_told_by_what_it_exports(
    exports: tuple[str, ...], families: tuple[str, ...], speaks_tls: bool, tmp_path: Path
) -> None:
    path = library(tmp_path / "of-any-name.so", *exports)
    with mapped(path):
        (found,) = found_below(tmp_path)
    assert found == TlsFile(str(path), families)
    assert found.speaks_tls is speaks_tls


@pytest.mark.parametrize("exports", [("SSL_read",), ("gnutls_record_send",), NSS_CIPHERS[:2], ("SSL_reads", "SSL_w")])
def test_a_library_with_a_part_of_a_family_is_none(exports: tuple[str, ...], tmp_path: Path) -> None:
    with mapped(library(tmp_path / "libssl.so.3", *exports)):
        assert found_below(tmp_path) == ()


def test_nss_and_the_nspr_that_serves_it_are_two_files_and_only_one_speaks_tls(tmp_path: Path) -> None:
    with mapped(
        library(tmp_path / "libnss3.so", *NSS_CIPHERS), library(tmp_path / "libnspr4.so", "PR_Read", "PR_Write")
    ):
        found = found_below(tmp_path)
    assert {os.path.basename(one.path): one.speaks_tls for one in found} == {"libnss3.so": True, "libnspr4.so": False}


@pytest.mark.parametrize(
    "spoil",
    [{5: 1 << 62}, {6: 1 << 62}, {10: 1 << 62}, {0x6FFFFEF5: 1 << 62}, {11: 0}],
    ids=["strings", "symbols", "string size", "hash", "entry size"],
)
def test_a_file_that_lies_hides_no_other(spoil: dict[int, int], tmp_path: Path) -> None:
    lying = library(tmp_path / "lying.so", "SSL_read", "SSL_write", spoil=spoil)
    junk = tmp_path / "junk.so"
    junk.write_bytes(b"\x7fELF\x02\x01\x01" + b"\xff" * 9000)
    short = tmp_path / "short.so"
    short.write_bytes(b"\x7fELF")
    good = library(tmp_path / "good.so", "SSL_read", "SSL_write")
    with mapped(lying, junk, short, good):
        paths = {one.path for one in found_below(tmp_path)}
    assert str(good) in paths
    assert paths <= {str(good), str(lying)}


@needs_root
def test_a_library_that_was_deleted_or_replaced_is_still_the_one_that_is_mapped(tmp_path: Path) -> None:
    gone = library(tmp_path / "gone.so", "SSL_read", "SSL_write")
    with mapped(gone):
        gone.unlink()
        assert [one.families for one in found_below(tmp_path)] == [("openssl",)]
        library(gone, "other")
        assert found_below(tmp_path) == (TlsFile(str(gone), ("openssl",)),)


NOBODY = """
import mmap, os, sys
from sowatch.linux.proc import ProcFs
from sowatch.linux.tls_libraries import look_for_tls
kept = []
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDONLY)
    kept.append(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC))
os.unlink(sys.argv[1]); os.unlink(sys.argv[2]); os.mkdir(sys.argv[2]); os.unlink(sys.argv[3]); os.mkfifo(sys.argv[3])
os.chmod(sys.argv[4], 0)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(*(one.path for one in look_for_tls(ProcFs(), os.getpid()).files if one.path in sys.argv), sep="\\n")
"""


@needs_root
def test_files_that_cannot_be_opened_are_left_out() -> None:
    """Whoever is not root has only their names: of nothing, of a directory, of a FIFO, and of what may not be read."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        names = ("absent", "directory", "fifo", "shut", "good")
        paths = [str(library(Path(place, name), "SSL_read", "SSL_write")) for name in names]
        done = subprocess.run(
            [sys.executable, "-c", NOBODY, *paths], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.splitlines() == [paths[-1]]


def test_a_process_that_is_gone_is_a_miss() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert look_for_tls(ProcFs(), child.pid) is Miss.GONE


@needs_root
def test_a_process_below_another_root_has_its_paths_as_it_sees_them(spawn: Any, tmp_path: Path) -> None:
    """By those, explanations tell its files."""
    compiled(tmp_path, "-static", "-Wl,--export-dynamic", more="int SSL_read, BIO_write;")
    ours = library(tmp_path / "lib.so", "SSL_read", "SSL_write")
    program = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "kept = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)\n"
        "os.chroot(sys.argv[2])\nos.write(1, b'\\0')\nos.read(0, 1)\n"
    )
    look = look_at_program(spawn, [sys.executable, "-c", program, str(ours), str(tmp_path)])
    assert TlsFile("/lib.so", ("openssl",)) in look.files


def test_a_process_whose_first_thread_has_ended_is_read_by_another(spawn: Any, tmp_path: Path) -> None:
    path = library(tmp_path / "lib.so", "SSL_read", "SSL_write")
    program = (
        "import ctypes, mmap, os, sys, threading\nfd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "kept = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)\n"
        "def go():\n"
        "    while open(f'/proc/{os.getpid()}/stat').read().rpartition(')')[2].split()[0] != 'Z': pass\n"
        "    os.write(1, b'\\0'); os.read(0, 1)\n"
        "threading.Thread(target=go).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    look = look_at_program(spawn, [sys.executable, "-c", program, str(path)])
    assert TlsFile(str(path), ("openssl",)) in look.files


@pytest.mark.parametrize(
    ("flags", "more", "others"),
    [
        ((), "", ()),
        ((), "int SSL_read(void) { return 1; }", ("not_exported",)),
        (("-static",), "int SSL_read(void) { return 1; }", ("not_exported",)),
        (("-s",), "int SSL_read(void) { return 1; }", ()),
        (("-static", "-s"), "", ("static",)),
        (("-static",), "", ()),
        ((), '__attribute__((used)) const char mark[] = "/registry/rustls-0.23.5/src/conn.rs";', ("rustls",)),
        (("-static", "-s"), '__attribute__((used)) const char mark[] = "rustls";', ("rustls",)),
        (
            (),
            (
                '__attribute__((used, section(".note.go.buildid"), aligned(4)))\n'
                'static const struct { int n, d, t; char name[4], id[4]; } go = {4, 4, 4, "Go", "abc"};'
            ),
            ("go",),
        ),
    ],
    ids=[
        "none",
        "symtab",
        "static symtab",
        "stripped",
        "static",
        "static with symbols",
        "rustls",
        "rustls static",
        "go",
    ],
)
def test_what_is_linked_into_a_program_is_told(
    flags: tuple[str, ...], more: str, others: tuple[str, ...], spawn: Any, tmp_path: Path
) -> None:
    look = look_at_program(spawn, compiled(tmp_path, *flags, more=more))
    assert look == TlsLook((), others)


def test_a_program_that_exports_what_it_links_is_a_library_like_any(spawn: Any, tmp_path: Path) -> None:
    """Debian's node does."""
    program = compiled(tmp_path, "-rdynamic", more="int SSL_read(void) { return 1; } int SSL_write(void) { return 1; }")
    assert look_at_program(spawn, program) == TlsLook((TlsFile(str(program), ("openssl",)),), ())


def test_rustls_is_found_across_the_pieces_that_are_read(spawn: Any, tmp_path: Path) -> None:
    program = compiled(tmp_path)
    size = program.stat().st_size
    with program.open("ab") as file:
        file.write(b"\0" * ((1 << 20) - 3 - size) + b"rustls")
    assert look_at_program(spawn, program).others == ("rustls",)


def test_a_java_machine_is_told_by_its_library(tmp_path: Path) -> None:
    with mapped(library(tmp_path / "libjvm.so", "JNI_CreateJavaVM")):
        look = look_for_tls(ProcFs(), os.getpid())
    assert isinstance(look, TlsLook)
    assert "java" in look.others
