"""elf: honest files made by a small writer, and what is no ELF file."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from sowatch.linux.elf import ElfFacts, read_facts
from sowatch.linux.elf_file import ElfError
from sowatch.linux.elf_symbols import read_exports, symbol_offsets
from support.elf_files import BASE, CODE, IFUNC, LOCAL, OBJECT, TLS, UNIQUE, WEAK, Made, Sym
from support.elf_reads import bytes_read, exports, facts, flavours, offsets, opened

# -- honest files ----------------------------------------------------------------------------


@flavours
def test_facts_of_every_class_and_byte_order(bits: int, order: str, hashes: Sequence[str]) -> None:
    assert facts(Made(bits=bits, order=order, hashes=hashes).data()) == ElfFacts(
        is_elf=True,
        elf_class=bits,
        is_little_endian=order == "<",
        machine=62,
        elf_type=3,
        build_id=bytes(range(20)).hex(),
        soname="libmade.so.1",
        is_partial=False,
    )


@flavours
def test_exports_and_offsets_of_every_class_and_byte_order(bits: int, order: str, hashes: Sequence[str]) -> None:
    made = Made(bits=bits, order=order, hashes=hashes)
    made.symbols += [Sym(b"f%d" % number, BASE + CODE + number) for number in range(50)]
    data = made.data()

    assert exports(data, "f7", "f50", "made_read") == {"made_read", "made_write", *(f"f{n}" for n in range(50))}
    assert offsets(data, "made_write") == (CODE + 16,)
    assert offsets(data, "made_writ") == ()


def test_the_old_hash_table_of_s390x_has_64_bit_words() -> None:
    assert exports(Made(order=">", hashes=("old",), machine=22).data()) == {"made_read", "made_write"}


def test_a_file_without_soname_or_build_id_has_none_and_is_not_partial() -> None:
    made = Made()
    made.soname = made.build_id = None
    found = facts(made.data())

    assert (found.soname, found.build_id, found.is_partial) == (None, None, False)


@pytest.mark.parametrize("align", [4, 8])
def test_the_build_id_is_found_behind_other_notes(align: int) -> None:
    made = Made()
    made.note_align = align
    made.notes_before = made.note(b"GNU\0", 5, bytes(12)) + made.note(b"stapsdt\0", 3, b"odd") + made.note(b"", 3, b"")

    assert facts(made.data()).build_id == bytes(range(20)).hex()


@pytest.mark.parametrize("size", [1, 8, 16, 20, 64])
def test_build_ids_of_other_lengths_are_whole(size: int) -> None:
    made = Made()
    made.build_id = b"\xab" * size

    assert facts(made.data()).build_id == "ab" * size


def test_names_that_are_not_utf_8_stand_as_surrogate_escapes() -> None:
    made = Made()
    made.soname = b"lib\xff.so"
    made.symbols = [Sym(b"\xfe\n")]

    assert facts(made.data()).soname == "lib\udcff.so"
    assert exports(made.data(), "\udcfe\n") == {"\udcfe\n"}


def test_only_symbols_that_others_can_bind_to_are_exports() -> None:
    made = Made()
    made.symbols = [
        Sym(b"function"),
        Sym(b"weak", bind=WEAK),
        Sym(b"unique", bind=UNIQUE, kind=OBJECT),
        Sym(b"data", kind=OBJECT),
        Sym(b"thread_local", value=0, kind=TLS),
        Sym(b"absolute", value=0, section=0xFFF1, kind=OBJECT),
        Sym(b"protected", visibility=3),
        Sym(b"indirect", kind=IFUNC),
        Sym(b"imported", value=0, section=0),
        Sym(b"local", bind=LOCAL),
        Sym(b"hidden", visibility=2),
        Sym(b"internal", visibility=1),
        Sym(b"nowhere", value=0),
        Sym(b"a_file", kind=4),
        Sym(b""),
    ]
    names = {"function", "weak", "unique", "data", "thread_local", "absolute", "protected", "indirect"}

    assert exports(made.data(), *(one.name.decode() for one in made.symbols)) == names


def test_a_function_in_several_versions_has_several_offsets_and_one_name() -> None:
    made = Made()
    made.symbols = [Sym(b"copy", BASE + CODE + 32), Sym(b"copy", BASE + CODE), Sym(b"copy", BASE + CODE)]

    assert exports(made.data()) == {"copy"}
    assert offsets(made.data(), "copy") == (CODE, CODE + 32)


def test_what_is_no_function_has_no_offset() -> None:
    made = Made()
    made.symbols = [Sym(b"data", kind=OBJECT), Sym(b"indirect", kind=IFUNC), Sym(b"outside", BASE + 2**30)]

    assert [offsets(made.data(), name) for name in ("data", "indirect", "outside", "", "a\0b")] == [()] * 5
    made.segments[1] = {"flags": 4}
    made.symbols = [Sym(b"in_no_code")]
    assert offsets(made.data(), "in_no_code") == ()


def test_a_thumb_function_begins_at_an_even_offset() -> None:
    made = Made(bits=32, machine=40)
    made.symbols = [Sym(b"thumb", BASE + CODE + 1)]

    assert offsets(made.data(), "thumb") == (CODE,)


def test_a_name_that_is_the_end_of_another_one_is_not_exported_by_it() -> None:
    made = Made(hashes=("old",))
    made.symbols = [Sym(b"SSL_read_ex")]

    assert exports(made.data(), "read_ex", "SSL_read", "SSL_read_ex") == {"SSL_read_ex"}


def test_of_segments_that_overlap_the_last_counts_as_for_the_loader() -> None:
    made = Made()
    decoy = {"kind": 1, "flags": 5, "offset": 0x10, "vaddr": BASE, "filesz": 0x8000, "align": 4096}
    made.segments_before = [decoy]
    made.segments_behind = [{**decoy, "vaddr": BASE - 0x1000, "filesz": 0x1000}]  # ends where the real one begins

    assert facts(made.data()) == facts(Made().data())
    assert offsets(made.data(), "made_read") == (CODE,)


def test_the_facts_of_a_small_library_cost_one_read() -> None:
    data = Made().data()
    before = bytes_read()
    with opened(data, size=100_000) as fd:
        read_facts(fd)

    assert len(data) < 4096
    assert bytes_read() - before < 4096 + 300  # /proc/self/io is read as well


def test_of_tags_that_come_twice_the_last_counts_as_for_the_loader() -> None:
    made = Made()
    made.first_tags = [(14, 9999), (5, 1)]

    assert facts(made.data()) == facts(Made().data())


# -- what is no ELF file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF", b"#!/bin/sh\n" + bytes(100), b"\x7fELF" + bytes(60), b"\x7fELF\x03\x01" + bytes(60),
     b"\x7fELF\x02\x03" + bytes(60), b"\x7fELF\x02\x01" + bytes(50), b"/* GNU ld script */"],
)  # fmt: skip
def test_other_files_are_no_elf_and_export_nothing(data: bytes) -> None:
    assert facts(data) == ElfFacts(is_elf=False)
    assert exports(data, "x") == frozenset()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, "/dev/zero"):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert read_facts(fd) is None
            with pytest.raises(ElfError, match="it is not a regular file"):
                read_exports(fd)
        finally:
            os.close(fd)


def test_an_error_of_the_kernel_is_told_apart_from_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(Made().data())
    fd = os.open(path, os.O_WRONLY)
    for ask in (read_facts, read_exports, lambda fd: symbol_offsets(fd, "x")):
        with pytest.raises(ElfError, match="Bad file descriptor") as caught:
            ask(fd)
        assert caught.value.errno == errno.EBADF
    os.close(fd)
    with pytest.raises(ElfError) as caught:
        read_facts(fd)
    assert caught.value.errno == errno.EBADF


def test_the_position_of_the_descriptor_stays_where_it_was() -> None:
    with opened(Made().data()) as fd:
        os.lseek(fd, 7, os.SEEK_SET)
        read_facts(fd)
        read_exports(fd)

        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
