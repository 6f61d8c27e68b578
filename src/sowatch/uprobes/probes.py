"""`Probe`: which program goes on which functions, and how an object's programs say so themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from sowatch.bpf.probe_object import ProgramSpec
from sowatch.model.errors import UsageError

__all__ = ["Probe", "all_of", "best_effort", "probes_of"]

#: Sections as libbpf has them: `uprobe/SSL_write`, `uretprobe/SSL_write`, `uprobe.multi/SSL_*`, `uprobe//bin/x:f+0x10`.
_SECTION: Final = re.compile(r"u(?P<ret>ret)?probe(?:\.s|\.multi(?:\.s)?)?/(?:.*:)?(?P<symbol>[^:/]+)")
#: Names as in Datadog's agent: `uprobe__SSL_write`, `uretprobe__SSL_write`, and `uprobe__SSL_write__return` for the
#: return instructions.
_NAME: Final = re.compile(r"u(?P<ret>ret)?probe__(?P<symbol>\w+?)(?P<suffix>__return)?")


@dataclass(frozen=True, slots=True)
class Probe:
    """One program on the functions of one pattern.

    Attributes:
        symbol: a name (``SSL_write``), a glob (``SSL_*``), either with an offset in bytes (``f+0x10``), or a C++
            function without its arguments (``cpp:ns::f``).
        program: name of the program in the object.
        is_return: on the return of the function instead of its entry; None: as the section of the program says.
        is_optional: a file without this function is attached all the same.
        is_manual: a return is seen by probes on the return instructions, not by the kernel's return probe. Programs in
            Go, whose stacks move, bear only these. There the stack pointer still is what it was at the entry.
        is_movable: it may stand near the entry (or the return) on an instruction that the kernel emulates instead of
            stepping over it (`sowatch.linux.emulated`): arguments (the result) are the same there, and the program
            computes the stack pointer as `sowatch.uprobes.records.Site` says. Without cookies nothing is moved. An
            entry whose returns have no place is left out.

    Raises:
        UsageError: an empty symbol or program, or a return probe with an offset.
    """

    symbol: str
    program: str
    is_return: bool | None = None
    is_optional: bool = False
    is_manual: bool = False
    is_movable: bool = False

    def __repr__(self) -> str:
        """As it would be written, without what is left at its default."""
        options = [
            f", {one.name}={value!r}" for one in fields(self)[2:] if (value := getattr(self, one.name)) != one.default
        ]
        return f"Probe({self.symbol!r}, {self.program!r}{''.join(options)})"

    def __post_init__(self) -> None:
        if not self.symbol or not self.program:
            raise UsageError("a probe needs a symbol and a program. Write Probe('SSL_write', 'on_write').")
        if self.is_manual and self.is_return is None:
            object.__setattr__(self, "is_return", True)
        if self.is_manual and not self.is_return:
            raise UsageError(f"{self.symbol!r}: only returns have instructions to be chosen. Leave out is_manual.")
        if self.is_return and "+" in self.symbol:
            raise UsageError(f"{self.symbol!r}: a return has no offset. Leave out the offset, or probe the entry.")


def probes_of(
    programs: Sequence[ProgramSpec], wanted: Mapping[str, str] | Iterable[Probe] | None, source: str | os.PathLike[str]
) -> tuple[Probe, ...]:
    """What goes where: as the caller says, else as the programs' sections or names say.

    Args:
        programs: of the object.
        wanted: by symbol the name of a program (a section that begins with ``uretprobe`` probes the return); or
            probes; or None: `Probe` s from sections (``uprobe/SSL_write``) and names (``uprobe__SSL_write``).
        source: of the object, for messages.

    Raises:
        UsageError: a program that the object does not have, or no program says where it goes.
    """
    sections = {program.name: program.section for program in programs}
    if wanted is None:
        found = tuple(probe for program in programs if (probe := _own(program)) is not None)
        if not found:
            raise UsageError(
                f'no program of {os.fspath(source)} says where it goes. Name its section like SEC("uprobe/SSL_write"), '
                "or pass the probes: {'SSL_write': 'program'}."
            )
        return found
    found = tuple(
        probe
        if probe.is_return is not None
        else replace(probe, is_return=sections.get(probe.program, "").startswith("uretprobe"))
        for probe in (_listed(wanted) if isinstance(wanted, Mapping) else wanted)
    )
    for probe in found:
        if probe.program not in sections:
            raise UsageError(
                f"{os.fspath(source)} has no program {probe.program!r}. "
                f"It has: {', '.join(sorted(sections)) or 'none'}."
            )
    if not found:
        raise UsageError("no probes are given. Pass at least one: {'SSL_write': 'program'}.")
    return found


def all_of(probes: Mapping[str, str] | Iterable[Probe]) -> tuple[Probe, ...]:
    """Probes that a file must have a place for, all of them; else it is not attached at all. Add it to others by ``+``.

    >>> all_of({"SSL_write": "on_write"}) + best_effort({"SSL_write_ex": "on_write"})
    (Probe('SSL_write', 'on_write'), Probe('SSL_write_ex', 'on_write', is_optional=True))
    """
    return tuple(replace(probe, is_optional=False) for probe in _listed(probes))


def best_effort(probes: Mapping[str, str] | Iterable[Probe]) -> tuple[Probe, ...]:
    """Probes of which each is on its own: a file is attached with those that it has a place for, one at least."""
    return tuple(replace(probe, is_optional=True) for probe in _listed(probes))


def _listed(probes: Mapping[str, str] | Iterable[Probe]) -> list[Probe]:
    if isinstance(probes, Mapping):
        return [Probe(symbol, program) for symbol, program in probes.items()]
    return list(probes)


def _own(program: ProgramSpec) -> Probe | None:
    """What a program says of itself. By its section, which is compiled for one of both, a return is a return probe."""
    match = _SECTION.fullmatch(program.section)
    if match:
        return Probe(match["symbol"], program.name, is_return=bool(match["ret"]))
    match = _NAME.fullmatch(program.name)
    if match:
        is_return, is_manual = bool(match["ret"] or match["suffix"]), bool(match["suffix"])
        return Probe(match["symbol"], program.name, is_return=is_return, is_manual=is_manual)
    return None
