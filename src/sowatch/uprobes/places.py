"""Where in a file the probes of an attacher go: functions, places inside of them, and their returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

from sowatch.bpf.probe_object import has_attach_cookie, may_return_probe_kill
from sowatch.linux.emulated import emulated_entry, emulated_returns
from sowatch.linux.host import release_number
from sowatch.linux.instructions import MAX_CODE_BYTES, CodeError, begins_instruction, return_offsets, why_not_probed
from sowatch.linux.symbols import Symbol, SymbolError, is_go, native_machine_error, resolve
from sowatch.model.errors import SowatchError
from sowatch.model.events import Library
from sowatch.uprobes.attached import PlannedSite
from sowatch.uprobes.probes import Probe
from sowatch.uprobes.records import Attachment, Site

__all__ = ["Place", "Plan", "Returns", "places_of", "plan_of", "safe_returns"]

#: How returns are seen: by the kernel's return probes, or by probes on the return instructions.
Returns = Literal["probe", "instructions"]
#: No instruction of x86-64 is longer.
_LONGEST_INSTRUCTION: Final = 15
_ADDRESS_BYTES: Final = 8


class Place(NamedTuple):
    """One place in a file: ``offset`` in bytes, ``function`` that of the entry of its function.

    ``is_return_probe``: the kernel's return probe of that function, not a probe on the instruction there.
    """

    symbol: str
    function: int
    offset: int
    is_return_probe: bool = False
    stack_bytes: int = 0


class Plan(NamedTuple):
    """What is to be attached to a file, and the probes that it has no place for."""

    sites: list[PlannedSite]
    missing: list[Attachment]


def safe_returns() -> Returns:
    """How returns can be seen on this kernel without harm."""
    kills = may_return_probe_kill()
    if kills is None:
        # Below a filter of our own it cannot be tried; 6.14 is the first release that is right whatever its build.
        release = release_number(os.uname().release)
        kills = os.uname().machine == "x86_64" and (release is None or (6, 11) <= release < (6, 14))
    return "instructions" if kills else "probe"


def plan_of(
    fd: int, library: Library, probes: Iterable[Probe], cookies: Iterator[int], returns: Returns, *, pairs_returns: bool
) -> Plan:
    """Where the probes go in a file.

    Args:
        fd: of the file.
        library: the same, for messages and sites.
        probes: what goes where; entries before returns.
        cookies: each gives a site its number.
        returns: how returns are seen, where a probe does not say.
        pairs_returns: entry and returns of one function have one cookie.

    Raises:
        SowatchError: the file cannot be probed, or has no place for a probe that is required.
    """
    if wrong := native_machine_error(fd):
        raise SowatchError(f"cannot probe {library.path}: {wrong}. Only files of this machine's kind can be probed.")
    plan = Plan([], [])
    probes = list(probes)
    returning = {probe.symbol for probe in probes if probe.is_return}
    #: The cookie of each function's entry.
    entries: dict[int, int] = {}
    for probe in probes:
        try:
            found = list(places_of(fd, probe, returns, returns_too=probe.symbol in returning))
        except SymbolError as error:
            found = [error]
        for one in found:
            if isinstance(one, Place):
                pair = entries.get(one.function) if probe.is_return and pairs_returns else None
                cookie = next(cookies) if pair is None else pair
                if not probe.is_return and (probe.is_movable or one.offset == one.function):
                    entries.setdefault(one.function, cookie)
                site = Site(cookie, library, one.symbol, one.offset, probe.program, bool(probe.is_return))
                if probe.is_movable:
                    site = site._replace(stack_bytes=one.stack_bytes)
                plan.sites.append(PlannedSite(site, one.is_return_probe, probe.is_optional))
                continue
            # Of a pattern, each function is on its own.
            if not probe.is_optional and not any(isinstance(other, Place) for other in found):
                raise SowatchError(f"cannot probe {library.path}: {one}") from one
            near = f" (near: {', '.join(one.near)})" if one.near else ""
            plan.missing.append(
                Attachment(one.symbol, probe.program, bool(probe.is_return), "failed", one.reason + near)
            )
    if not plan.sites:
        reasons = "; ".join(dict.fromkeys(f"{one.symbol}: {one.reason}" for one in plan.missing))
        raise SowatchError(f"nothing to probe: {reasons}. `sowatch trace --list LIB` shows what it has.")
    return plan


def places_of(fd: int, probe: Probe, returns: Returns, *, returns_too: bool = False) -> Iterator[Place | SymbolError]:
    """Every place of a probe; an error for each function of a pattern that has none.

    Args:
        fd: of the file.
        probe: what goes where.
        returns: how returns are seen, where the probe does not say.
        returns_too: other probes are on the returns of the same functions: both are moved, or none is.

    Raises:
        SymbolError: there is no such function, or returns of this file must not be probed.
    """
    is_manual = probe.is_manual or returns == "instructions"
    if probe.is_return and not probe.is_manual and is_go(fd):
        raise SymbolError(
            probe.symbol, "a return probe breaks programs written in Go (is_manual probes the return instructions)"
        )
    found = resolve(fd, probe.symbol)
    starts = resolve(fd, probe.symbol.rpartition("+")[0]) if any("+" in one.name for one in found) else found
    for symbol, start in zip(found, starts, strict=True):
        try:
            if moved := _moved(fd, probe, symbol, returns_too=returns_too):
                yield from moved
            elif probe.is_return and is_manual:
                yield from _return_instructions(fd, symbol)
            else:
                if probe.is_movable and returns_too and is_manual:
                    # A program that waits for a return which nobody sees would wait for the rest of the thread's life.
                    list(_return_instructions(fd, symbol))
                yield _entry(fd, symbol, start, is_return=bool(probe.is_return))
        except CodeError as error:
            hint = "" if probe.is_manual or not probe.is_return else _HINT
            yield SymbolError(symbol.name, error.reason + hint)


_HINT = "; a return probe could end processes below seccomp filters on this kernel (returns='probe' takes it anyway)"


def _entry(fd: int, symbol: Symbol, start: Symbol, *, is_return: bool) -> Place:
    inside = symbol.offset - start.offset
    if inside:
        if not start.size:
            raise CodeError(f"the file does not say how long {start.name} is, so +{inside:#x} may split an instruction")
        if not begins_instruction(_code(fd, start), inside):
            raise CodeError(f"no instruction begins at +{inside:#x}; a probe there would break the program")
    wrong = why_not_probed(_pread(fd, _LONGEST_INSTRUCTION, symbol.offset))
    if wrong is not None:
        raise CodeError(wrong)
    # x86 has popped the return address when a return probe runs.
    popped = is_return and os.uname().machine == "x86_64"
    return Place(symbol.name, start.offset, symbol.offset, is_return, -_ADDRESS_BYTES if popped else 0)


def _moved(fd: int, probe: Probe, symbol: Symbol, *, returns_too: bool) -> list[Place]:
    """Places that cost less than entry and return; none: those are taken.

    A return probe needs the entry itself, so the two are moved together. Where the entry is emulated nothing is gained.
    """
    if not probe.is_movable or not symbol.size or os.uname().machine != "x86_64":
        return []
    code = _code(fd, symbol)
    entry = emulated_entry(code)
    if entry is None or not entry.offset:
        return []
    found = [entry]
    if returns_too:
        left = emulated_returns(code)
        if left is None:
            return []
        found = left if probe.is_return else found
    if has_attach_cookie() is False or any(why_not_probed(code[one.offset :]) for one in found):
        return []
    return [Place(symbol.name, symbol.offset, symbol.offset + one.offset, stack_bytes=one.stack_bytes) for one in found]


def _return_instructions(fd: int, symbol: Symbol) -> Iterator[Place]:
    if not symbol.size:
        raise CodeError("the file does not say how long it is")
    code = _code(fd, symbol)
    for offset in return_offsets(code):
        wrong = why_not_probed(code[offset:])
        if wrong is not None:
            raise CodeError(wrong)
        yield Place(symbol.name, symbol.offset, symbol.offset + offset)


def _code(fd: int, symbol: Symbol) -> bytes:
    return _pread(fd, min(symbol.size, MAX_CODE_BYTES + 1), symbol.offset)


def _pread(fd: int, size_bytes: int, offset: int) -> bytes:
    try:
        return os.pread(fd, size_bytes, offset)
    except OSError as error:
        raise CodeError(f"its code cannot be read: {error.strerror}") from error
