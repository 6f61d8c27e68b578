"""elf: sections give what program headers leave out, and take nothing away."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.linux.elf import read_facts
from support.elf_files import BASE, CODE, Made
from support.elf_reads import bytes_read, facts, opened


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
