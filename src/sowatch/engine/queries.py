"""What others ask about the mapping table: values, taken on the engine's thread and read on any other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeAlias

from sowatch.engine.address_space import MappedFile
from sowatch.model.events import Load, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import Kind
from sowatch.sources.base import TrackedEntry, Verdicts

__all__ = ["Held", "Known", "KnownFile", "KnownProcess", "View"]

Range: TypeAlias = tuple[int, int]


class Held(NamedTuple):
    """One file in one process, by the mapping table; ``ranges`` as in `sowatch.engine.address_space.Mapping`."""

    file_id: FileId
    path: str
    ranges: tuple[tuple[int, int], ...]
    range_count: int | None = None


#: The mapping table, by pid; a transient vfork child has None.
View = Mapping[int, tuple[ProcessId, list[Held]] | None]


class KnownFile(NamedTuple):
    """One file in one process, by the mapping table. ``load`` is None if it was not reported."""

    name: MappedFile
    kind: Kind
    ranges: tuple[Range, ...]
    is_selected: bool
    load: Load | None
    range_count: int | None = None


class KnownProcess(NamedTuple):
    """One process of the mapping table, known since ``since_ns`` (CLOCK_MONOTONIC)."""

    process: Process
    since_ns: int
    is_announced: bool
    awaits_rescan: bool
    is_compat: bool
    files: tuple[KnownFile, ...]


class Known(NamedTuple):
    """What map and kernel side know, by pid. The caller closes ``verdicts``.

    ``tracked`` is the kernel's entry of the process that was asked for. ``own_view_id`` is the root of
    the agent as `sowatch.engine.address_space.MappedFile.view` has it.
    """

    processes: Mapping[int, KnownProcess]
    tracked: TrackedEntry | None
    verdicts: Verdicts
    own_view_id: Hashable
    is_waiting_for_facts: bool
    is_silent_start: bool
    #: The mappings of the process that was asked for cannot be read since then (CLOCK_MONOTONIC).
    unread_since_s: float | None = None
