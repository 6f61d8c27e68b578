"""elf: files that lie cost no more than the limits allow, and give what is true of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.linux.elf import ElfFacts, read_facts
from sowatch.linux.elf_file import ElfError, ElfLimits
from sowatch.linux.elf_symbols import read_exports, search_exports, symbol_offsets
from support.elf_files import BASE, CODE, Made, Sym, gnu_hash, old_hash
from support.elf_reads import FLAVOURS, bytes_read, errno_of, facts, opened

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


# -- limits and any bytes ---------------------------------------------------------------------


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
