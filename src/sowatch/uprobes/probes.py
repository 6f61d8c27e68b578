"""`Probe`: which program goes on which functions, and how an object's programs say so themselves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sowatch.bpf.probe_object import ProgramSpec
from sowatch.model.errors import UsageError

__all__ = ["Probe", "probes_of"]

#: Sections as libbpf has them: `uprobe/SSL_write`, `uretprobe/SSL_write`, `uprobe.multi/SSL_*`, `uprobe//bin/x:f+0x10`.
_SECTION: Final = re.compile(r"u(?P<ret>ret)?probe(?:\.s|\.multi(?:\.s)?)?/(?:.*:)?(?P<symbol>[^:/]+)")
#: Names as in Datadog's agent: `uprobe__SSL_write`, `uretprobe__SSL_write`, `uprobe__SSL_write__return`.
_NAME: Final = re.compile(r"u(?P<ret>ret)?probe__(?P<symbol>\w+?)(?P<suffix>__return)?")


@dataclass(frozen=True, slots=True)
class Probe:
    """One program on the functions of one pattern.

    Attributes:
        symbol: a name (``SSL_write``), a glob (``SSL_*``), either with an offset in bytes (``f+0x10``), or a C++
            function without its arguments (``cpp:ns::f``).
        program: name of the program in the object.
        is_return: on the return of the function instead of its entry.
        is_optional: a file without this function is attached all the same.

    Raises:
        UsageError: an empty symbol or program, or a return probe with an offset.
    """

    symbol: str
    program: str
    is_return: bool = False
    is_optional: bool = False

    def __post_init__(self) -> None:
        if not self.symbol or not self.program:
            raise UsageError("a probe needs a symbol and a program. Write Probe('SSL_write', 'on_write').")
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
    if isinstance(wanted, Mapping):
        wanted = [
            Probe(symbol, program, is_return=sections.get(program, "").startswith("uretprobe"))
            for symbol, program in wanted.items()
        ]
    found = tuple(wanted)
    for probe in found:
        if probe.program not in sections:
            raise UsageError(
                f"{os.fspath(source)} has no program {probe.program!r}. "
                f"It has: {', '.join(sorted(sections)) or 'none'}."
            )
    if not found:
        raise UsageError("no probes are given. Pass at least one: {'SSL_write': 'program'}.")
    return found


def _own(program: ProgramSpec) -> Probe | None:
    match = _SECTION.fullmatch(program.section)
    if match:
        return Probe(match["symbol"], program.name, is_return=bool(match["ret"]))
    match = _NAME.fullmatch(program.name)
    if match:
        return Probe(match["symbol"], program.name, is_return=bool(match["ret"] or match["suffix"]))
    return None
