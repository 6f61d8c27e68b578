"""What others ask about the mapping table: values, taken on the engine's thread and read on any other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Self, TypeAlias

from sowatch.engine.address_space import MappedFile, kind_of
from sowatch.engine.address_space import Mapping as FileMapping
from sowatch.model.events import Load, Process
from sowatch.model.identity import FileId
from sowatch.model.literals import Kind
from sowatch.sources.base import TrackedEntry

__all__ = ["Known", "KnownFile", "KnownProcess"]

Range: TypeAlias = tuple[int, int]


class KnownFile(NamedTuple):
    """One file in one process, by the mapping table. ``load`` is None if it was not reported.

    ``ranges`` and ``range_count`` are as in `sowatch.engine.address_space.Mapping`.
    """

    name: MappedFile
    kind: Kind
    ranges: tuple[Range, ...]
    load: Load | None
    range_count: int | None = None


class KnownProcess(NamedTuple):
    """One process of the mapping table, known since ``since_ns`` (CLOCK_MONOTONIC).

    ``is_announced``: its files are reported; not yet those of a transient vfork child, which are its parent's.
    ``is_selected``: its files are to be reported if a rule wants them.
    """

    process: Process
    since_ns: int
    is_announced: bool
    is_selected: bool
    awaits_rescan: bool
    is_compat: bool
    files: tuple[KnownFile, ...] = ()

    def with_files(
        self,
        exe_id: FileId | None,
        mappings: Mapping[FileId, FileMapping],
        loads: Mapping[FileId, Load],
        wants: Callable[[MappedFile], bool],
    ) -> Self:
        """The same with those of its mappings that are wanted; ``exe_id`` is its executable."""
        return self._replace(
            files=tuple(
                KnownFile(one.name, kind_of(one, exe_id), one.ranges, loads.get(file_id), one.range_count)
                for file_id, one in mappings.items()
                if wants(one.name)
            )
        )


class Known(NamedTuple):
    """The mapping table as it was at one moment. It never changes.

    ``processes`` are by pid. ``tracked`` is the kernel's entry of the process that was asked for. ``own_view_id`` is
    the root of the agent as `sowatch.engine.address_space.MappedFile.view` has it.
    """

    processes: Mapping[int, KnownProcess]
    tracked: TrackedEntry | None
    own_view_id: Hashable
    is_waiting_for_facts: bool
    is_silent_start: bool
    #: The mappings of the process that was asked for cannot be read since then (CLOCK_MONOTONIC).
    unread_since_s: float | None = None
