"""Places near entry and returns that the kernel emulates below a probe are found, and only where they are as good."""

from __future__ import annotations

import doctest

import pytest

from sowatch.linux import emulated
from sowatch.linux.emulated import EmulatedPlace, emulated_entry, emulated_returns

#: SSL_read of Debian 12's OpenSSL 3.0.
SSL_READ = bytes.fromhex(
    "4883ec18 64488b042528000000 4889442408 31c0 85d2 782f 4889e1 4863d2 e83dfeffff 85c0 7e03 8b0424 488b542408"
    "64482b142528000000 7544 4883c418 31d2 31c9 31f6 31ff c3"
    "e8449ffeff 488d1505d50400 be4c070000 488d3d62cc0400 e85ca6feff 31c0 31d2 be0f010000 bf14000000 e8f7a3feff"
    "b8ffffffff ebac e83db1feff"
)
GUARD = "64482b142528000000"  # sub %fs:0x28,%rdx
COPY = "64488b142528000000 4839542408"  # mov %fs:0x28,%rdx; cmp %rdx,8(%rsp)


def code(text: str) -> bytes:
    return bytes.fromhex(text)


def test_openssl_is_probed_at_the_jump_after_the_prologue_and_at_the_one_of_the_stack_protector() -> None:
    assert emulated_entry(SSL_READ) == EmulatedPlace(22, 24)
    assert emulated_returns(SSL_READ) == [EmulatedPlace(56, 24)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("55 c3", EmulatedPlace(0, 0)),  # push %rbp
        ("41 57 c3", EmulatedPlace(0, 0)),  # push %r15
        ("4885ff 0f8400010000 c3", EmulatedPlace(3, 0)),  # test %rdi,%rdi; je
        ("4883ec08 e800000000 c3", EmulatedPlace(4, 8)),  # sub $8,%rsp; call
        ("f30f1efa 4881ec00010000 85ff 7401 c3", EmulatedPlace(13, 256)),  # endbr64; sub $256,%rsp; test; je
        ("4889fe 85ff 7401 c3", None),  # mov %rdi,%rsi: an argument is gone
        ("31c9 85ff 7401 c3", None),  # xor %ecx,%ecx: so is the fourth
        ("4989e0 4883e4f0 7401 c3", None),  # and $-16,%rsp: nobody knows where the stack is
        ("85ff ffc8 75fc c3", None),  # a loop comes back to what precedes the jump
        ("85ff ffe0 c3", None),  # jmp *%rax
        ("c3", None),
        ("85ff 06", None),  # no instruction
        ("", None),
    ],
)
def test_an_entry_is_an_emulated_instruction_that_each_call_passes_once(
    text: str, expected: EmulatedPlace | None
) -> None:
    assert emulated_entry(code(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{GUARD} 7506 4883c408 5b c3 e800000000", [EmulatedPlace(9, 16)]),  # jne; add $8,%rsp; pop %rbx; ret
        (f"{COPY} 7501 c3 e800000000", [EmulatedPlace(14, 0)]),  # as clang has it
        ("85c0 7501 c3 e800000000", None),  # a jump like any other
        (f"{GUARD} 7507 4883c408 31c0 c3 e800000000", None),  # the result comes later
        (f"{GUARD} 7505 4883c408 c3 ebf9 e800000000", None),  # a jump leads behind it
        (f"{GUARD} 7502 c9 c3 e800000000", None),  # leave: nobody knows where the stack is
        (f"{GUARD} 7501 c3 5b c3", None),  # another return has none
        ("31c0 c3", None),
        ("31c0 e900010000", None),  # left by a jump
    ],
)
def test_a_return_is_seen_at_the_stack_protectors_jump_where_each_return_has_one(
    text: str, expected: list[EmulatedPlace] | None
) -> None:
    assert emulated_returns(code(text)) == expected


def test_docs() -> None:
    failed, tried = doctest.testmod(emulated)
    assert tried
    assert not failed
