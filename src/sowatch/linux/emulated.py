"""Instructions that the kernel emulates below a uprobe, near the entry and the returns of a function.

Any other instruction below a probe is executed out of line and single-stepped: a second exception for each call, which
on a virtual machine leaves to the host (KVM intercepts #DB): 30 µs instead of 0.7 where it was measured.
Functions of OpenSSL begin with ``sub $0x18,%rsp``; a jump that follows serves as well, as long as the arguments are
still where they were. On AArch64 nothing is gained, and nothing is found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from sowatch.linux.instructions import CodeError, return_offsets

if TYPE_CHECKING:
    from iced_x86 import Instruction

__all__ = ["EmulatedPlace", "emulated_entry", "emulated_returns"]

#: arch/x86/kernel/uprobes.c, branch_setup_xol_ops and push_setup_xol_ops (4.20): short jumps, pushes, nop, call, jmp.
_EMULATED: Final = frozenset({*range(0x50, 0x58), *range(0x70, 0x80), 0x90, 0xE8, 0xE9, 0xEB})
_STACK_GUARD: Final = 0x28  # of the thread's block at fs, where gcc and clang have it on x86-64


class EmulatedPlace(NamedTuple):
    """An instruction by its ``offset`` in a function; the return address is ``stack_bytes`` above the stack pointer."""

    offset: int
    stack_bytes: int


def emulated_entry(code: bytes) -> EmulatedPlace | None:
    """The first emulated instruction that every call executes once, with all arguments still in their registers.

    Args:
        code: all of a function, x86-64.

    Returns:
        None if there is none: something else comes before, or a jump may come back to it.

    >>> emulated_entry(bytes.fromhex("4883ec0885d278054883c408c3c3"))
    EmulatedPlace(offset=6, stack_bytes=8)
    """
    if is_emulated(code):
        return EmulatedPlace(0, 0)
    try:
        instructions, targets = _decoded(code)
    except CodeError:
        return None
    stack_bytes = 0
    for instruction in instructions:
        here = int(instruction.ip)
        if here in targets:
            return None
        if is_emulated(code[here:]):
            return EmulatedPlace(here, stack_bytes)
        moved = _stack_moved(instruction)
        if moved is None or not _goes_on(instruction) or _written(instruction) & _arguments():
            return None
        stack_bytes -= moved
    return None


def emulated_returns(code: bytes) -> list[EmulatedPlace] | None:
    """For each return of a function the emulated instruction that is executed just before it and nowhere else.

    That is the jump of the stack protector, which is taken only by a call that never returns: the result is in its
    register by then.

    Args:
        code: all of a function, x86-64.

    Returns:
        None if some return has no such instruction, or the function may be left in another way.
    """
    try:
        returns = return_offsets(code, "x86_64")
        instructions, targets = _decoded(code)
    except CodeError:
        return None
    index = {int(instruction.ip): number for number, instruction in enumerate(instructions)}
    found = [_before(instructions, index[offset], targets, code) for offset in returns]
    places = [place for place in found if place is not None]
    return places if len(places) == len(found) else None


def is_emulated(code: bytes) -> bool:
    """Whether the kernel emulates the instruction that these bytes begin with.

    >>> is_emulated(bytes.fromhex("4154")), is_emulated(bytes.fromhex("4883ec18"))
    (True, False)
    """
    first, second = code[:1], code[1:2]
    if not first:
        return False
    if first == b"\x41":  # REX.B: push of r8 to r15
        return b"\x50" <= second <= b"\x57"
    return first[0] in _EMULATED or (first == b"\x0f" and b"\x80" <= second <= b"\x8f")


def _decoded(code: bytes) -> tuple[list[Instruction], set[int]]:
    """The instructions of a function and where its own jumps lead.

    Raises:
        CodeError: it cannot be decoded, or a jump of it may lead anywhere.
    """
    from iced_x86 import Decoder, FlowControl

    instructions, targets = list(Decoder(64, code)), set()
    for instruction in instructions:
        if instruction.is_invalid:
            raise CodeError(f"what stands at +{instruction.ip:#x} is no instruction")
        flow = int(instruction.flow_control)
        if flow == int(FlowControl.INDIRECT_BRANCH):
            raise CodeError(f"the jump at +{instruction.ip:#x} may lead anywhere")
        if flow in (int(FlowControl.CONDITIONAL_BRANCH), int(FlowControl.UNCONDITIONAL_BRANCH), int(FlowControl.CALL)):
            targets.add(int(instruction.near_branch_target))
    return instructions, targets


def _before(instructions: list[Instruction], at: int, targets: set[int], code: bytes) -> EmulatedPlace | None:
    """The jump of the stack protector before the return that is instruction ``at``."""
    from iced_x86 import Mnemonic, Register

    stack_bytes = 0
    while at:
        if int(instructions[at].ip) in targets:
            return None
        at -= 1
        instruction = instructions[at]
        if int(instruction.mnemonic) == int(Mnemonic.JNE):
            is_guard = _checks_guard(instructions[max(0, at - 2) : at]) and is_emulated(code[int(instruction.ip) :])
            return EmulatedPlace(int(instruction.ip), stack_bytes) if is_guard else None
        moved = _stack_moved(instruction)
        if moved is None or not _goes_on(instruction) or int(Register.RAX) in _written(instruction):
            return None
        stack_bytes += moved
    return None


def _checks_guard(before: list[Instruction]) -> bool:
    """Whether a jump after these compares the stack guard: ``sub``, ``xor`` or ``cmp`` with it, or with its copy."""
    from iced_x86 import Mnemonic

    if not before:
        return False
    last = int(before[-1].mnemonic)
    if last in (int(Mnemonic.SUB), int(Mnemonic.XOR), int(Mnemonic.CMP)) and _reads_guard(before[-1]):
        return True
    return last == int(Mnemonic.CMP) and int(before[0].mnemonic) == int(Mnemonic.MOV) and _reads_guard(before[0])


def _reads_guard(instruction: Instruction) -> bool:
    from iced_x86 import Register

    return (
        int(instruction.segment_prefix) == int(Register.FS)
        and int(instruction.memory_base) == int(Register.NONE)
        and instruction.memory_displacement == _STACK_GUARD
    )


def _goes_on(instruction: Instruction) -> bool:
    from iced_x86 import FlowControl

    return int(instruction.flow_control) == int(FlowControl.NEXT)


def _stack_moved(instruction: Instruction) -> int | None:
    """By how many bytes an instruction moves the stack pointer up; None: it cannot be determined."""
    from iced_x86 import Mnemonic, OpKind, Register

    mnemonic = int(instruction.mnemonic)
    if mnemonic in (int(Mnemonic.PUSH), int(Mnemonic.POP)) and int(instruction.op0_register) != int(Register.RSP):
        return int(instruction.stack_pointer_increment)
    if int(Register.RSP) not in _written(instruction):
        return 0
    is_immediate = instruction.op_count == 2 and int(instruction.op1_kind) not in (
        int(OpKind.REGISTER),
        int(OpKind.MEMORY),
    )
    if int(instruction.op0_register) != int(Register.RSP) or not is_immediate:
        return None
    value = int(instruction.immediate(1))
    value = value - (1 << 64) if value >> 63 else value
    if mnemonic == int(Mnemonic.ADD):
        return value
    return -value if mnemonic == int(Mnemonic.SUB) else None


def _written(instruction: Instruction) -> set[int]:
    """The whole registers that an instruction may change."""
    from iced_x86 import InstructionInfoFactory, OpAccess, RegisterExt

    reads = (int(OpAccess.NONE), int(OpAccess.READ), int(OpAccess.COND_READ), int(OpAccess.NO_MEM_ACCESS))
    used = InstructionInfoFactory().info(instruction).used_registers()
    return {int(RegisterExt.full_register(one.register)) for one in used if int(one.access) not in reads}


def _arguments() -> set[int]:
    """The registers of a function's arguments (System V)."""
    from iced_x86 import Register

    return {int(one) for one in (Register.RDI, Register.RSI, Register.RDX, Register.RCX, Register.R8, Register.R9)}
