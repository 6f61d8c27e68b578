"""The note of the package in an ELF file: honest ones, and those of whoever wants to do harm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.package_note import PackageNote, read_package_note
from support.elf_files import Made

OPENSSL = {
    "type": "rpm",
    "os": "fedora",
    "osVersion": "41",
    "name": "openssl",
    "version": "3.2.2-10.fc41",
    "architecture": "x86_64",
    "osCpe": "cpe:/o:fedoraproject:fedora:41",
}


def read(path: Path) -> PackageNote | None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return read_package_note(fd)
    finally:
        os.close(fd)


def with_note(tmp_path: Path, content: bytes, **made: Any) -> Path:
    elf = Made(**made)
    elf.notes_before = elf.note(b"FDO\0", 0xCAFE1A7E, content)
    (tmp_path / "made.so").write_bytes(elf.data())
    return tmp_path / "made.so"


@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (64, ">"), (32, "<"), (32, ">")])
def test_note_names_source_package_and_version(tmp_path: Path, bits: int, order: str) -> None:
    found = read(with_note(tmp_path, json.dumps(OPENSSL).encode() + b"\0", bits=bits, order=order))

    assert found == PackageNote(
        "openssl", "3.2.2-10.fc41", "rpm", "fedora", "41", "x86_64", "cpe:/o:fedoraproject:fedora:41"
    )


def test_note_that_a_section_was_added_with_is_read(tmp_path: Path, make_library: Any) -> None:
    library = make_library("libnoted.so.1", exports=("noted_open",))
    desc = json.dumps(OPENSSL).encode() + b"\0"
    desc += bytes(-len(desc) % 4)
    (tmp_path / "note").write_bytes(
        (4).to_bytes(4, "little")
        + len(desc).to_bytes(4, "little")
        + (0xCAFE1A7E).to_bytes(4, "little")
        + b"FDO\0"
        + desc
    )
    noted = tmp_path / "noted.so"
    objcopy = shutil.which("objcopy") or shutil.which("llvm-objcopy")
    assert objcopy is not None
    section = [f"--add-section=.note.package={tmp_path}/note", "--set-section-flags=.note.package=noload,readonly"]
    subprocess.run([objcopy, *section, library, noted], check=True)

    found = read(noted)

    # GNU objcopy makes the section SHT_NOTE by its name.
    assert found is not None
    assert (found.name, found.version) == ("openssl", "3.2.2-10.fc41")


def test_note_that_the_linker_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("int noted_open(void) { return 1; }\n")
    # The driver splits its argument at commas.
    (tmp_path / "words").write_text("--package-metadata='" + json.dumps(OPENSSL) + "'\n")
    words = ["cc", "-shared", "-fPIC", f"-Wl,@{tmp_path}/words", "-o", tmp_path / "noted.so", tmp_path / "empty.c"]
    subprocess.run(words, check=True)

    found = read(tmp_path / "noted.so")

    assert found is not None
    assert (found.type, found.os, found.name, found.version) == ("rpm", "fedora", "openssl", "3.2.2-10.fc41")


def test_of_several_notes_the_one_of_the_linker_counts(tmp_path: Path) -> None:
    """As the startup file of a C library that has a note itself, and a program that is linked with it."""
    (tmp_path / "empty.c").write_text("int noted_open(void) { return 1; }\n")
    glibc = {**OPENSSL, "type": "deb", "name": "glibc"}
    for place, note in (("start", glibc), ("words", OPENSSL)):
        (tmp_path / place).write_text("--package-metadata='" + json.dumps(note) + "'\n")
    subprocess.run(["cc", "-c", "-fPIC", "-o", tmp_path / "plain.o", tmp_path / "empty.c"], check=True)
    subprocess.run(["ld", "-r", f"@{tmp_path}/start", "-o", tmp_path / "Scrt1.o", tmp_path / "plain.o"], check=True)
    link = ["ld", "-shared", "-o", tmp_path / "noted.so", tmp_path / "Scrt1.o"]
    subprocess.run(link, check=True)
    borrowed = read(tmp_path / "noted.so")
    subprocess.run([*link, f"@{tmp_path}/words"], check=True)

    own = read(tmp_path / "noted.so")

    assert borrowed is not None
    assert borrowed.name == "glibc"
    assert own is not None
    assert own.name == "openssl"


def test_file_without_a_note_has_none(tmp_path: Path) -> None:
    (tmp_path / "plain.so").write_bytes(Made().data())
    (tmp_path / "text").write_text("no ELF")

    assert read(tmp_path / "plain.so") is None
    assert read(tmp_path / "text") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"{",
        b"[" * 4000,
        b'{"a":' * 700,
        b'{"name": 7, "version": "1"}',
        b'{"name": "", "version": "1"}',
        b'{"name": "x"}',
        b'{"name": "/", "version": "1"}',
        b'{"name": "x y", "version": "1"}',
        b'{"name": "x\\u0000y", "version": "1"}',
        b'{"name": "x\\u001b[2J", "version": "1"}',
        b'{"name": "x", "version": "' + b"1" * 300 + b'"}',
        b'{"name": "x", "version": "1", "pad": "' + b"p" * 5000 + b'"}',
        b'{"name": "\xff", "version": "1"}',
    ],
)
def test_note_that_says_nothing_sane_is_none(tmp_path: Path, content: bytes) -> None:
    assert read(with_note(tmp_path, content)) is None


def test_note_that_claims_more_than_the_file_has_is_none(tmp_path: Path) -> None:
    elf = Made()
    elf.notes_before = elf.words(4, 1 << 30, 0xCAFE1A7E) + b"FDO\0" + json.dumps(OPENSSL).encode()
    (tmp_path / "made.so").write_bytes(elf.data())

    assert read(tmp_path / "made.so") is None
