"""elf: files made by a small writer, hostile ones, and every library of the system beside pyelftools."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from elftools.common.exceptions import ELFError as WitnessError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment
from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.linux.elf import ElfFacts, read_facts
from sowatch.linux.elf_file import ElfError, ElfLimits
from sowatch.linux.elf_symbols import read_exports, search_exports, symbol_offsets
from sowatch.linux.proc import ProcFs
from support.elf_files import BASE, CODE, IFUNC, LOCAL, OBJECT, TLS, UNIQUE, WEAK, Made, Sym, gnu_hash, old_hash


@contextmanager
def opened(data: bytes, *, size: int | None = None) -> Iterator[int]:
    """A memfd with this content; a larger ``size`` leaves a hole at its end."""
    fd = os.memfd_create("made")
    try:
        os.write(fd, data)
        if size is not None:
            os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def facts(data: bytes, **options: Any) -> ElfFacts:
    with opened(data) as fd:
        found = read_facts(fd, **options)
    assert found is not None
    return found


def exports(data: bytes, *wanted: str, **options: Any) -> frozenset[str]:
    """What is exported; for wanted names both ways of asking must agree."""
    with opened(data) as fd:
        found = read_exports(fd, **options)
        if wanted:
            assert read_exports(fd, wanted, **options) == found & set(wanted)
        assert read_exports(fd, found, **options) == found
    return found


def offsets(data: bytes, name: str) -> tuple[int, ...]:
    with opened(data) as fd:
        return symbol_offsets(fd, name)


def errno_of(ask: Callable[[], object]) -> int | None:
    """That of the ElfError it ends with; None if the file is at fault, or nobody."""
    try:
        ask()
    except ElfError as error:
        return error.errno
    return None


def bytes_read() -> int:
    """By this process with read and pread so far; the kernel counts (/proc/self/io, rchar)."""
    return int(Path("/proc/self/io").read_text().split()[1])


FLAVOURS = [
    (bits, order, hashes) for bits in (32, 64) for order in "<>" for hashes in (("gnu",), ("old",), ("gnu", "old"))
]
flavours = pytest.mark.parametrize(("bits", "order", "hashes"), FLAVOURS)


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


# -- files that lie --------------------------------------------------------------------------


def spoiled(spoil: Callable[[Made], object], **options: Any) -> bytes:
    made = Made(**options)
    spoil(made)
    return made.data()


HOLE = {"offset": 1 << 30, "vaddr": 1 << 30, "filesz": 1 << 38}
HUGE_NOTE = struct.pack("<III", 4, 2**32 - 1, 3) + b"GNU\0"

#: What is spoiled, and what is left: build id, soname, and whether it is marked as partial.
LIES: dict[str, tuple[Callable[[Made], object], tuple[bool, bool, bool]]] = {
    "too many program headers": (lambda made: setattr(made, "phnum", 0xFFFF), (True, True, True)),
    "program headers of another size": (lambda made: setattr(made, "phentsize", 1), (False, False, True)),
    "notes of a terabyte": (lambda made: made.segments.update({4: {"filesz": 1 << 40}}), (True, True, False)),
    "empty notes of a terabyte": (lambda made: made.segments.update({4: HOLE}), (False, True, True)),
    "notes behind the end": (lambda made: made.segments.update({4: {"offset": 1 << 40}}), (False, True, True)),
    "notes just before 2**64": (lambda made: made.segments.update({4: {"offset": 2**64 - 8}}), (False, True, True)),
    "a build id of four gigabytes": (lambda made: setattr(made, "notes_before", HUGE_NOTE), (False, True, True)),
    "a build id that is too long": (lambda made: setattr(made, "build_id", bytes(65)), (False, True, True)),
    "an endless dynamic section": (lambda made: made.segments.update({2: {"filesz": 1 << 40}}), (True, True, False)),
    "code as dynamic section": (lambda made: made.segments.update({2: {"vaddr": BASE + CODE}}), (True, False, True)),
    "a soname behind its table": (lambda made: made.tags.update({14: 1 << 20}), (True, False, True)),
    "a soname at 2**64": (lambda made: made.tags.update({14: 2**64 - 1}), (True, False, True)),
    "strings nowhere": (lambda made: made.tags.update({5: 1}), (True, False, True)),
    "strings of no size": (lambda made: made.tags.update({10: 0}), (True, False, True)),
    "a soname without end": (lambda made: setattr(made, "soname", b"x" * 5000), (True, False, True)),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_leaves_out_what_it_is_about_and_is_marked(lie: str) -> None:
    spoil, (has_build_id, has_soname, is_partial) = LIES[lie]
    before = bytes_read()
    with opened(spoiled(spoil), size=1 << 40) as fd:
        found = read_facts(fd)
    read = bytes_read() - before

    assert found == ElfFacts(
        is_elf=True,
        elf_class=64,
        is_little_endian=True,
        machine=62,
        elf_type=3,
        build_id=bytes(range(20)).hex() if has_build_id else None,
        soname="libmade.so.1" if has_soname else None,
        is_partial=is_partial,
    )
    assert read < 200_000


HASH_LIES: dict[str, tuple[Callable[[Made], object], str]] = {
    "a chain without end": (lambda made: made.gnu.update(values=[200_000] * 3), "takes more than"),
    "a bucket behind the end": (lambda made: made.gnu.update(values=[290_000] * 3), "hash table ends outside"),
    "a bucket far behind the end": (lambda made: made.gnu.update(values=[2**31] * 3), "hash table ends outside"),
    "too many buckets": (lambda made: made.gnu.update(buckets=2**32 - 1), "takes more than"),
    "too many bloom words": (lambda made: made.gnu.update(bloom=2**32 - 1), "hash table ends outside"),
    "a first symbol far behind the end": (lambda made: made.gnu.update(first=2**32 - 1), "takes more than"),
    "a first symbol behind the buckets": (lambda made: made.gnu.update(first=100_000), "symbol table ends outside"),
    "a hash table nowhere": (lambda made: made.tags.update({0x6FFFFEF5: 5}), "hash table lies outside"),
    "symbols nowhere": (lambda made: made.tags.update({6: 5}), "symbol table lies outside"),
    "strings nowhere": (lambda made: made.tags.update({5: 5}), "string table lies outside"),
    "strings of a terabyte": (lambda made: made.tags.update({10: 1 << 40}), "takes more than"),
    "strings behind the end": (lambda made: made.tags.update({10: 3 << 20}), "string table ends outside"),
    "symbols of another size": (lambda made: made.tags.update({11: 1}), "symbols have 1 bytes each"),
}


@pytest.mark.parametrize("lie", HASH_LIES)
def test_exports_of_a_lying_file_are_an_error_within_the_budget(lie: str) -> None:
    spoil, reason = HASH_LIES[lie]
    size = {"a chain without end": 1 << 40}.get(lie, 1 << 20)
    before = bytes_read()
    with opened(spoiled(spoil), size=size) as fd:
        with pytest.raises(ElfError, match=reason) as caught:
            read_exports(fd)
        assert bytes_read() - before < 9 << 20
        before = bytes_read()
        assert errno_of(lambda: read_exports(fd, ["made_read"])) is None
        assert bytes_read() - before < 9 << 20

    assert caught.value.errno is None


def test_an_old_hash_table_cannot_claim_more_symbols_than_the_file_has() -> None:
    for count, reason in ((1000, "symbol table ends outside"), (2**32 - 1, "takes more than")):
        data = spoiled(lambda made, count=count: made.gnu.update(count=count), hashes=("old",))
        with opened(data) as fd, pytest.raises(ElfError, match=reason):
            read_exports(fd)


def test_a_chain_of_equal_hashes_ends_with_the_budget_when_one_name_is_looked_for() -> None:
    # 100,000 symbols of one bucket, all with the hash of the name but not the name.
    made = Made()
    made.buckets = 1
    made.symbols = [Sym(b"x")] * 100_000
    made.gnu["chain"] = [gnu_hash(b"wanted") & ~1] * 100_000
    before = bytes_read()
    with opened(made.data()) as fd, pytest.raises(ElfError, match="takes more than 8388608 bytes"):
        read_exports(fd, ["wanted"])

    assert bytes_read() - before < 9 << 20


def test_a_symbol_with_a_forged_hash_is_not_taken_for_the_name_that_has_it() -> None:
    made = Made()
    made.buckets = 1
    made.symbols = [Sym(b"wanted_not"), Sym(b"other")]
    made.gnu["chain"] = [gnu_hash(b"wanted") & ~1, gnu_hash(b"wanted") | 1]
    with opened(made.data()) as fd:
        assert read_exports(fd, ["wanted", "wanted_not"]) == frozenset()


def test_names_that_overlap_cannot_blow_up_memory() -> None:
    # 20,000 symbols whose names all end at one far NUL: 20 GB of text in one megabyte of table.
    made = Made()
    made.soname = b"n" * 1_000_000
    record = made.symbol_record(7, Sym(b""))
    made.symbols = [Sym(b"")] * 20_000
    table = b"".join(struct.pack("<I", 2 + number) + record[4:] for number in range(20_000))
    data = made.data()
    at = data.index(made.symbol_record(1_000_002, Sym(b"")))
    with (
        opened(data[:at] + table + data[at + len(table) :]) as fd,
        pytest.raises(ElfError, match="names of its symbols"),
    ):
        read_exports(fd)


def test_a_terabyte_of_zeros_with_an_honest_head_costs_no_more_than_the_head() -> None:
    before = bytes_read()
    with opened(Made().data(), size=1 << 40) as fd:
        found = read_facts(fd)
        names = read_exports(fd)

    assert found == facts(Made().data())
    assert names == {"made_read", "made_write"}
    assert bytes_read() - before < 100_000


def test_a_name_is_found_in_a_table_of_any_size_by_either_hash() -> None:
    made = Made(hashes=("gnu",))
    made.symbols = [Sym(b"f%d" % number) for number in range(310_000)]
    made.buckets = made.old_buckets = 100_003
    last = made.sorted_symbols()[-1].name.decode()  # number 310,000 of the table
    for hashes in (("gnu",), ("old",)):
        made.hashes = hashes
        before = bytes_read()
        with opened(made.data()) as fd:
            assert search_exports(fd, [last, "f1", "f310000"]) == ({last, "f1"}, None)
            assert symbol_offsets(fd, last) == (CODE,)
        assert bytes_read() - before < 50_000


def test_many_names_are_found_within_the_budget_that_grows_with_them() -> None:
    made = Made()
    made.symbols = [Sym(b"f%d" % number) for number in range(40_000)]
    made.buckets = 10_007
    names = frozenset(f"f{number}" for number in range(20_000))
    with opened(made.data()) as fd:
        assert search_exports(fd, names) == (names, None)


@pytest.mark.parametrize("hashes", [("gnu",), ("old",)])
def test_a_chain_that_lies_hides_only_the_names_that_are_in_it(hashes: Sequence[str]) -> None:
    made = Made(hashes=hashes)
    made.buckets = made.old_buckets = 2
    bad, good = (next(f"n{at}" for at in range(99) if _buckets(f"n{at}") == (side, side)) for side in (0, 1))
    made.symbols = [Sym(bad.encode()), Sym(good.encode())]
    made.gnu = {"values": [1 << 30, 2], "old_chain": [0, 1 << 30, 0]}
    other = next(f"m{at}" for at in range(99) if _buckets(f"m{at}") == (0, 0))  # in the bucket that lies
    with opened(made.data()) as fd:
        found, gave_up = search_exports(fd, [other, good])

    assert found == {good}
    assert gave_up is not None
    assert "hash table" in gave_up


def _buckets(name: str) -> tuple[int, int]:
    return gnu_hash(name.encode()) % 2, old_hash(name.encode()) % 2


def test_a_chain_that_goes_in_a_circle_ends_with_the_budget() -> None:
    made = Made(hashes=("old",))
    made.gnu["old_chain"] = [0, 2, 1]
    before = bytes_read()
    with opened(made.data(), size=1 << 20) as fd:
        gave_up = search_exports(fd, ["made_not", "made_read"], limits=ElfLimits(read_bytes=1 << 20)).gave_up

    assert gave_up is not None
    assert "takes more than" in gave_up
    assert bytes_read() - before < 2 << 20


# ---- sections ------------------------------------------------------------------------------------


def with_sections(**fields: Any) -> Made:
    made = Made(bits=fields.pop("bits", 64), order=fields.pop("order", "<"))
    made.sections = {}
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_build_id_that_only_a_section_has_is_found(bits: int, order: str) -> None:
    made = with_sections(bits=bits, order=order, build_id=None, build_id_in_section=b"\xab" * 20)
    made.notes_before = made.note(b"Go\0\0", 4, b"go's own")

    assert facts(made.data()).build_id == "ab" * 20
    assert not facts(made.data()).is_partial


def test_a_build_id_that_only_a_section_has_is_found_without_any_note_in_program_headers() -> None:
    made = with_sections(build_id=None, build_id_in_section=b"\xab" * 20)
    made.segments[4] = {"kind": 0}

    assert (facts(made.data()).build_id, facts(made.data()).is_partial) == ("ab" * 20, False)


def test_sections_that_say_the_same_as_program_headers_change_nothing() -> None:
    assert facts(with_sections().data()) == facts(Made().data())


#: How program headers mislead, and the build id that is left.
MISLEADING: dict[str, tuple[Callable[[Made], object], str | None]] = {
    "another build id": (lambda made: setattr(made, "build_id_in_section", b"\xab" * 20), bytes(range(20)).hex()),
    "notes elsewhere": (lambda made: made.segments.update({4: {"offset": CODE}}), bytes(range(20)).hex()),
    "no dynamic section": (lambda made: made.segments.update({2: {"kind": 0}}), bytes(range(20)).hex()),
    "a dynamic section elsewhere": (
        lambda made: made.segments.update({2: {"vaddr": BASE + 0x10, "offset": 0x10}}),
        bytes(range(20)).hex(),
    ),
    "an empty dynamic section": (lambda made: made.segments.update({2: {"filesz": 0}}), bytes(range(20)).hex()),
    "no program headers": (lambda made: setattr(made, "phnum", 0), bytes(range(20)).hex()),
    "program headers of another size": (lambda made: setattr(made, "phentsize", 1), bytes(range(20)).hex()),
    "a cut build id": (lambda made: made.sections.update({7: {"size": 20}}), None),
}


@pytest.mark.parametrize("lie", MISLEADING)
def test_facts_are_partial_where_program_headers_mislead_and_sections_do_not(lie: str) -> None:
    spoil, build_id = MISLEADING[lie]
    made = with_sections()
    if lie == "a cut build id":
        made.segments[4] = {"kind": 0}
    spoil(made)
    found = facts(made.data())

    assert (found.build_id, found.is_partial) == (build_id, True)


SECTION_LIES: dict[str, Callable[[bytearray], None]] = {
    "a table behind the end": lambda data: struct.pack_into("<Q", data, 40, 1 << 50),
    "a table at 2**64": lambda data: struct.pack_into("<Q", data, 40, 2**64 - 1),
    "entries of another size": lambda data: struct.pack_into("<H", data, 58, 63),
    "none": lambda data: struct.pack_into("<Q", data, 40, 0),
}


@pytest.mark.parametrize("lie", SECTION_LIES)
def test_section_headers_that_lie_take_nothing_from_what_program_headers_say(lie: str) -> None:
    data = bytearray(with_sections().data())
    SECTION_LIES[lie](data)

    assert facts(bytes(data)) == facts(Made().data())


def test_sections_of_a_terabyte_cost_what_the_limits_allow() -> None:
    made = with_sections(build_id=None)
    made.segments[4] = {"kind": 0}
    made.sections = {7: {"size": 1 << 40}}
    data = bytearray(made.data())
    struct.pack_into("<H", data, 60, 0xFFFF)
    before = bytes_read()
    with opened(bytes(data), size=1 << 40) as fd:
        found = read_facts(fd)

    assert found is not None
    assert found.is_partial
    assert bytes_read() - before < 500_000


def test_a_linked_program_whose_build_id_no_program_header_covers_has_it(tmp_path: Path) -> None:
    """As Go 1.24 and later link: the section is there, PT_NOTE is not."""
    program = tmp_path / "program"
    source = tmp_path / "program.c"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", "-Wl,--build-id=0x" + "cd" * 20, "-o", program, source], check=True)
    data = bytearray(program.read_bytes())
    phoff, phnum = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    kinds = [struct.unpack_from("<I", data, phoff + at * 56)[0] for at in range(phnum)]
    assert 4 in kinds
    for at, kind in enumerate(kinds):
        if kind == 4:
            struct.pack_into("<I", data, phoff + at * 56, 0)

    assert (facts(bytes(data)).build_id, facts(bytes(data)).is_partial) == ("cd" * 20, False)


@pytest.mark.parametrize("name", ["program_headers", "dynamic_entries", "note_bytes", "build_id_bytes", "soname_bytes"])
def test_each_limit_of_the_facts_can_be_lowered(name: str) -> None:
    found = facts(Made().data(), limits=ElfLimits(**{name: 1}))

    assert found.is_partial
    assert None in (found.build_id, found.soname)


def test_the_limit_of_the_exports_can_be_lowered() -> None:
    with opened(Made().data()) as fd, pytest.raises(ElfError):
        read_exports(fd, limits=ElfLimits(read_bytes=1))


def ask_everything(data: bytes) -> None:
    """Everything there is to ask; all that may come of it is an ElfError about the file."""
    with opened(data) as fd:
        assert read_facts(fd) is not None
        assert errno_of(lambda: read_exports(fd)) is None
        assert errno_of(lambda: read_exports(fd, ["made_read"])) is None
        assert errno_of(lambda: symbol_offsets(fd, "made_read")) is None


@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (32, ">")])
def test_a_file_cut_off_anywhere_raises_nothing_else(bits: int, order: str) -> None:
    data = Made(bits=bits, order=order, hashes=("gnu", "old")).data()
    for size in range(0, len(data), 7):
        ask_everything(data[:size])
    assert len(data) > 2000


# Positions are drawn where something is read: the code and the padding take most of the file.
places = st.integers(0, 64 + 3 * 56) | st.integers(CODE + 64, CODE + 64 + 500)
values = st.sampled_from([b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, bytes(4), b"\x01\0\0\x80", b"\x7f"]) | st.binary(
    max_size=8
)


@settings(max_examples=300)
@given(st.sampled_from(FLAVOURS), st.lists(st.tuples(places, values), min_size=1, max_size=6))
def test_no_change_to_a_file_raises_anything_but_an_elf_error(
    flavour: tuple[int, str, Sequence[str]], changes: list[tuple[int, bytes]]
) -> None:
    bits, order, hashes = flavour
    data = bytearray(Made(bits=bits, order=order, hashes=hashes).data())
    for at, value in changes:
        data[at : at + len(value)] = value
    ask_everything(bytes(data))


@given(st.binary(max_size=300))
def test_no_bytes_behind_the_magic_raise_anything_but_an_elf_error(data: bytes) -> None:
    ask_everything(b"\x7fELF\x02\x01\x01" + data)


# -- beside others ---------------------------------------------------------------------------


def shared_objects() -> list[Path]:
    """Every file below /usr/lib that is called a library."""
    return sorted(
        path
        for directory, _, names in os.walk("/usr/lib")
        for path in (Path(directory, name) for name in names if ".so" in name)
        if path.is_file() and not path.is_symlink()
    )


def witnessed_facts(elf: ELFFile) -> tuple[str | None, str | None]:
    build_id = soname = None
    for segment in elf.iter_segments():
        if isinstance(segment, NoteSegment):
            ids = [note["n_desc"] for note in segment.iter_notes() if note["n_type"] == "NT_GNU_BUILD_ID"]
            build_id = build_id or (ids[0] if ids else None)
        elif isinstance(segment, DynamicSegment):
            soname = next((tag.soname for tag in segment.iter_tags() if tag.entry.d_tag == "DT_SONAME"), None)
    return build_id, soname


def witnessed_exports(elf: ELFFile) -> set[str]:
    section = elf.get_section_by_name(".dynsym")
    return {
        symbol.name
        for symbol in section.iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF"
        and symbol["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK", "STB_LOOS")
        and symbol["st_other"]["visibility"] in ("STV_DEFAULT", "STV_PROTECTED")
        and (symbol["st_value"] or symbol["st_shndx"] == "SHN_ABS" or symbol["st_info"]["type"] == "STT_TLS")
    }


def test_build_id_and_soname_are_what_pyelftools_says_of_every_library_of_the_system() -> None:
    checked, differences = 0, []
    for path in shared_objects():
        with path.open("rb") as file:
            found = read_facts(file.fileno())
            assert found is not None
            try:
                witness = witnessed_facts(ELFFile(file))
            except WitnessError:
                assert not found.is_elf
                continue
        checked += 1
        if (found.build_id, found.soname) != witness or found.is_partial:
            differences.append((path, found, witness))

    assert differences == []
    assert checked > 20


def test_exports_are_what_pyelftools_says_of_the_libraries_of_the_system() -> None:
    checked, differences = 0, []
    for path in shared_objects():
        with path.open("rb") as file:
            elf = ELFFile(file) if read_facts(file.fileno()).is_elf else None  # type: ignore[union-attr]
            section = elf.get_section_by_name(".dynsym") if elf else None
            # pyelftools takes 20 us a symbol; the largest ones have their own test.
            if elf is None or section is None or section.num_symbols() > 200:
                continue
            found, witness = read_exports(file.fileno()), witnessed_exports(elf)
            one_by_one = read_exports(file.fileno(), [*witness, "no_such_name"])
        checked += 1
        if not found == witness == one_by_one:
            differences.append((path, found ^ witness, one_by_one ^ witness))

    assert differences == []
    assert checked > 20


def test_exports_of_the_largest_libraries_are_what_nm_says() -> None:
    for path in sorted(shared_objects(), key=lambda path: path.stat().st_size)[-8:]:
        done = subprocess.run(
            ["nm", "-D", "--defined-only", "--format=posix", path], capture_output=True, text=True, check=False
        )
        if done.returncode:  # another machine's
            continue
        rows = [line.split(" ") for line in done.stdout.splitlines()]
        # A symbol with "@" is a name and its version; of an absolute one nm shows versions as well.
        names = {row[0].partition("@")[0] for row in rows if row[1] not in "tdrb"}
        with path.open("rb") as file:
            assert read_exports(file.fileno()) == names, path


def test_the_offset_of_a_function_is_where_the_loader_put_it() -> None:
    # The loader maps the file; where it found the function, minus where the file begins, is its offset.
    library = ctypes.CDLL(None)
    rows = ProcFs().executable_maps(os.getpid()) or []
    for name in ("getpid", "fopen", "qsort"):
        address = ctypes.cast(library[name], ctypes.c_void_p).value or 0
        (row,) = [row for row in rows if row.start <= address < row.end]
        with open(row.path, "rb") as file:
            assert address - row.start + row.offset_bytes in symbol_offsets(file.fileno(), name)


def test_a_compiled_library_is_read_through_the_mapping_of_its_deleted_file(make_library: Callable[..., Path]) -> None:
    path = make_library("libmade.so", exports=("first", "second"))
    with path.open("rb") as file:
        before = read_facts(file.fileno())
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC):
            inode = path.stat().st_ino
            path.unlink()
            (row,) = [row for row in ProcFs().executable_maps(os.getpid()) or () if row.inode == inode]
            try:
                link = os.open(f"/proc/self/map_files/{row.start:x}-{row.end:x}", os.O_RDONLY | os.O_NONBLOCK)
            except PermissionError:
                pytest.skip("opening map_files needs CAP_CHECKPOINT_RESTORE")
    try:
        assert read_facts(link) == before
        assert read_exports(link) >= {"first", "second"}
    finally:
        os.close(link)
    assert before is not None
    assert before.soname == "libmade.so"
    assert len(before.build_id or "") == 40
