"""Where a function returns, and where its instructions begin: what probes inside of functions have to know.

The bytes are hostile, as everywhere here. On x86-64 iced-x86 decodes them (Rust, memory-safe); on AArch64 every
instruction is a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["MAX_CODE_BYTES", "CodeError", "begins_instruction", "return_offsets", "why_not_probed"]

#: Longer functions are not looked through.
MAX_CODE_BYTES: Final = 256 << 10
#: The kernel probes no instruction with one of these prefixes (arch/x86/kernel/uprobes.c, is_prefix_bad).
_BAD_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\xf0")
#: Other prefixes: operand and address size, fs, gs, repeat; after them the one of REX.
_PREFIXES: Final = _BAD_PREFIXES | frozenset(b"\x64\x65\x66\x67\xf2\xf3")


class CodeError(Exception):
    """Why the bytes of a function cannot be used; ``reason`` is one clause."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class _Exit(NamedTuple):
    """One instruction that ends a straight run: ``kind`` is ``return``, ``jump`` (to ``target``) or ``indirect``."""

    offset: int
    kind: str
    target: int = 0


def return_offsets(code: bytes, machine: str = "") -> list[int]:
    """Where a function's return instructions are, in bytes from its beginning.

    Args:
        code: all of the function.
        machine: as ``os.uname().machine`` has it, which is the default.

    Raises:
        CodeError: it can be left in another way than by those: by a jump to another function, or perhaps by an
            indirect one; it never returns; its first instruction returns, where the entry is; or it cannot be decoded.

    >>> return_offsets(bytes.fromhex("5589e531c05dc3"), "x86_64")
    [6]
    """
    found = []
    for step in _exits(code, machine or os.uname().machine):
        if step.kind == "return":
            found.append(step.offset)
        elif step.kind == "indirect":
            raise CodeError(f"it may be left by the indirect jump at +{step.offset:#x}")
        elif not 0 <= step.target < len(code):
            raise CodeError(f"it is left by a jump to another function at +{step.offset:#x}")
    if not found:
        raise CodeError("it has no return instruction")
    if found[0] == 0:
        raise CodeError("its first instruction returns, so that entry and return are one place")
    return found


def begins_instruction(code: bytes, offset: int, machine: str = "") -> bool:
    r"""Whether an instruction of a function begins there; a breakpoint elsewhere breaks the program.

    >>> begins_instruction(bytes.fromhex("5589e5c3"), 2, "x86_64"), begins_instruction(b"\0" * 8, 4, "aarch64")
    (False, True)
    """
    machine = machine or os.uname().machine
    if machine == "aarch64":
        return offset % 4 == 0
    from iced_x86 import Decoder

    for instruction in Decoder(64, code):
        if instruction.ip >= offset or instruction.is_invalid:
            return bool(instruction.ip == offset and not instruction.is_invalid)
    return False


def why_not_probed(code: bytes, machine: str = "") -> str | None:
    """Why the kernel probes no instruction that begins like this, which it does not say until a process maps it.

    >>> why_not_probed(bytes.fromhex("f00fb10f"), "x86_64")
    'the kernel does not probe an instruction with prefix 0xf0'
    """
    if (machine or os.uname().machine) == "x86_64":
        for byte in code[:14]:
            if byte in _BAD_PREFIXES:
                return f"the kernel does not probe an instruction with prefix {byte:#x}"
            if byte not in _PREFIXES:
                return None
    return None


def _exits(code: bytes, machine: str) -> Iterator[_Exit]:
    if len(code) > MAX_CODE_BYTES:
        raise CodeError(f"it has more than {MAX_CODE_BYTES} bytes")
    if machine == "x86_64":
        return _exits_x86(code)
    if machine == "aarch64":
        return _exits_arm(code)
    raise CodeError(f"instructions of {machine} are not known")


def _exits_x86(code: bytes) -> Iterator[_Exit]:
    from iced_x86 import Decoder, FlowControl, Register

    #: How many instructions ago a value was loaded from a table (an index times 4 or 8).
    since_table = 99
    for instruction in Decoder(64, code):
        if instruction.is_invalid:
            raise CodeError(f"what stands at +{instruction.ip:#x} is no instruction")
        # The stubs call these constants types of their own.
        flow, here = int(instruction.flow_control), int(instruction.ip)
        has_index = int(instruction.memory_index) != int(Register.NONE) and instruction.memory_index_scale >= 4
        since_table = 0 if has_index else since_table + 1
        if flow == int(FlowControl.RETURN):
            yield _Exit(here, "return")
        elif flow == int(FlowControl.INDIRECT_BRANCH):
            # The jump of a switch: compilers mark it as needing no landing pad, or load it from a table just before.
            if int(instruction.segment_prefix) != int(Register.DS) and since_table > 4:
                yield _Exit(here, "indirect")
        elif flow in (int(FlowControl.UNCONDITIONAL_BRANCH), int(FlowControl.CONDITIONAL_BRANCH)):
            yield _Exit(here, "jump", _signed(instruction.near_branch_target))


def _exits_arm(code: bytes) -> Iterator[_Exit]:
    for here in range(0, len(code) - 3, 4):
        word = int.from_bytes(code[here : here + 4], "little")
        if word & 0xFFFFFC1F == 0xD65F0000 or word in (0xD65F0BFF, 0xD65F0FFF):  # RET, RETAA, RETAB
            yield _Exit(here, "return")
        elif word & 0xFFFFFC1F == 0xD61F0000:  # BR
            yield _Exit(here, "indirect")
        elif word & 0xFC000000 == 0x14000000:  # B
            yield _Exit(here, "jump", here + 4 * _field(word, 0, 26))
        elif word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:  # B.cond, CBZ, CBNZ
            yield _Exit(here, "jump", here + 4 * _field(word, 5, 19))
        elif word & 0x7E000000 == 0x36000000:  # TBZ, TBNZ
            yield _Exit(here, "jump", here + 4 * _field(word, 5, 14))


def _field(word: int, shift: int, bits: int) -> int:
    """A signed bit field."""
    value = word >> shift & ((1 << bits) - 1)
    return value - (1 << bits) if value >> (bits - 1) else value


def _signed(address: int) -> int:
    return address - (1 << 64) if address >> 63 else address
