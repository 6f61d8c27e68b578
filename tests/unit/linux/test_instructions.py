"""Return instructions are found, and a function that can be left in another way is refused with the reason."""

from __future__ import annotations

import doctest
import struct

import pytest

from sowatch.linux import instructions
from sowatch.linux.instructions import CodeError, begins_instruction, return_offsets, why_not_probed

PUSH_POP = "55 48 89 e5 5d"  # push %rbp; mov %rsp,%rbp; pop %rbp


def code(text: str) -> bytes:
    return bytes.fromhex(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{PUSH_POP} c3", [5]),
        (f"{PUSH_POP} f3 c3", [5]),  # repz ret
        (f"{PUSH_POP} c2 08 00", [5]),  # ret $8
        ("85 ff 74 03 31 c0 c3 ff c0 c3", [6, 9]),  # two ways out, a jump within
        ("48 63 04 bb 48 01 d8 ff e0 c3", [9]),  # a table of offsets: movslq (%rbx,%rdi,4),%rax; add; jmp *%rax
        ("90 ff 24 c5 00 10 00 00 c3", [8]),  # a table of addresses: jmp *0x1000(,%rax,8)
        ("90 3e ff e0 c3", [4]),  # notrack jmp *%rax
        ("ff d0 c3", [2]),  # call *%rax comes back
        ("48 c7 c0 c3 c3 c3 c3 c3", [7]),  # mov $0xc3c3c3c3,%rax: bytes that look like it are none
    ],
)
def test_returns_of_x86_are_found(text: str, expected: list[int]) -> None:
    assert return_offsets(code(text), "x86_64") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("90 e9 00 10 00 00", "it is left by a jump to another function at +0x1"),
        ("90 e9 f0 ff ff ff", "it is left by a jump to another function at +0x1"),
        ("90 0f 84 00 10 00 00 c3", "it is left by a jump to another function at +0x1"),
        ("90 ff e0", "it may be left by the indirect jump at +0x1"),
        ("90 ff 25 00 10 00 00", "it may be left by the indirect jump at +0x1"),  # through the PLT
        ("90 0f 0b", "it has no return instruction"),
        ("c3", "its first instruction returns, so that entry and return are one place"),
        ("90 06 c3", "what stands at +0x1 is no instruction"),
        ("", "it has no return instruction"),
    ],
)
def test_what_is_left_in_another_way_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CodeError) as caught:
        return_offsets(code(text), "x86_64")
    assert caught.value.reason == reason


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


NOP, RET, BR_X16 = 0xD503201F, 0xD65F03C0, 0xD61F0200


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (words(NOP, RET), [4]),
        (words(NOP, 0xD65F0BFF, NOP, 0xD65F0FFF), [4, 12]),  # RETAA, RETAB
        (words(NOP, 0x34000040, RET, RET), [8, 12]),  # cbz w0, +8
        (words(NOP, 0x17FFFFFF, RET), [8]),  # b -4
    ],
)
def test_returns_of_aarch64_are_found(data: bytes, expected: list[int]) -> None:
    assert return_offsets(data, "aarch64") == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (words(NOP, 0x14000400), "it is left by a jump to another function at +0x4"),
        (words(NOP, 0x54001000, RET), "it is left by a jump to another function at +0x4"),  # b.eq
        (words(NOP, 0x36001000, RET), "it is left by a jump to another function at +0x4"),  # tbz
        (words(NOP, BR_X16), "it may be left by the indirect jump at +0x4"),
    ],
)
def test_what_aarch64_leaves_in_another_way_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CodeError) as caught:
        return_offsets(data, "aarch64")
    assert caught.value.reason == reason


def test_a_function_that_is_too_long_and_a_machine_that_is_unknown_are_refused() -> None:
    with pytest.raises(CodeError, match="more than 262144 bytes"):
        return_offsets(bytes((1 << 20) + 1), "x86_64")
    with pytest.raises(CodeError, match="instructions of riscv64 are not known"):
        return_offsets(b"\0\0\0\0", "riscv64")


@pytest.mark.parametrize(("offset", "expected"), [(0, True), (1, True), (2, False), (4, True), (5, True), (6, False)])
def test_only_the_first_byte_of_an_instruction_begins_one(offset: int, *, expected: bool) -> None:
    assert begins_instruction(code(f"{PUSH_POP} c3"), offset, "x86_64") is expected


@pytest.mark.parametrize(
    ("text", "is_probed"), [("f0 0f b1 0f", False), ("66 3e 90", False), ("f3 0f 1e fa", True), ("c3", True)]
)
def test_what_the_kernel_does_not_probe_is_known(text: str, *, is_probed: bool) -> None:
    assert (why_not_probed(code(text), "x86_64") is None) is is_probed


def test_the_examples_of_docstrings_are_right() -> None:
    assert doctest.testmod(instructions).failed == 0
