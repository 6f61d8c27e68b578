"""The ELF auxiliary vector: where exec put the interpreter, of both word sizes, and of a real process."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.linux.auxv import interpreter_base, is_32bit
from sowatch.linux.proc import ProcFs

AT_NULL, AT_PHDR, AT_PAGESZ, AT_BASE = 0, 3, 6, 7


def vector(word: str, **pairs: int) -> bytes:
    keys = {"phdr": AT_PHDR, "page_size": AT_PAGESZ, "base": AT_BASE}
    end = struct.pack(f"=2{word}", AT_NULL, 0)
    return b"".join(struct.pack(f"=2{word}", keys[name], value) for name, value in pairs.items()) + end


@pytest.mark.parametrize(("word", "base"), [("Q", 0x7F12_3456_7000), ("I", 0xF7FC_9000)])
def test_the_base_of_the_interpreter_is_found_in_vectors_of_both_word_sizes(word: str, base: int) -> None:
    assert interpreter_base(vector(word, phdr=0x40, page_size=4096, base=base)) == base


@pytest.mark.parametrize("word", ["Q", "I"])
def test_a_program_without_an_interpreter_has_none(word: str) -> None:
    assert interpreter_base(vector(word, phdr=0x40, page_size=4096, base=0)) == 0
    assert interpreter_base(vector(word, phdr=0x40, page_size=4096)) == 0


def test_a_vector_that_is_cut_off_gives_what_is_whole() -> None:
    whole = vector("Q", page_size=4096, base=0x7F00_0000_0000)
    assert interpreter_base(whole[:35]) == 0x7F00_0000_0000
    assert interpreter_base(whole[:31]) == 0


#: Vectors of words that mean something, and bytes that are none.
WORDS = st.sampled_from([AT_NULL, AT_PAGESZ, AT_BASE, 4096, 2**31]) | st.integers(0, 2**32 - 1)
VECTORS = st.builds(
    lambda words, size, end: b"".join(word.to_bytes(size, sys.byteorder) for word in words) + end,
    st.lists(WORDS, max_size=60),
    st.sampled_from([4, 8]),
    st.binary(max_size=15),
)


@given(VECTORS | st.binary(max_size=600))
def test_of_any_bytes_the_base_is_the_word_after_the_first_key_of_it(data: bytes) -> None:
    size = 4 if is_32bit(data) else 8
    words = [int.from_bytes(data[at : at + size], sys.byteorder) for at in range(0, len(data) - size + 1, size)]
    keys = words[: len(words) // 2 * 2 : 2]
    assert interpreter_base(data) == (words[2 * keys.index(AT_BASE) + 1] if AT_BASE in keys else 0)


def test_the_base_of_our_own_interpreter_is_where_maps_shows_it() -> None:
    rows = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    starts = [int(row[0].partition("-")[0], 16) for row in rows if row[-1].rpartition("/")[2].startswith("ld-")]
    assert starts
    assert ProcFs().interpreter_base(os.getpid()) == min(starts)


def test_a_process_that_is_not_there_has_none() -> None:
    assert ProcFs().interpreter_base(2**22 + 1) == 0
