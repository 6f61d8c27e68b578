"""`PublishedMap`: the load event in force of every (process, file) that was published.

The engine's thread writes; any thread may copy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeAlias

from sowatch.engine.address_space import Mapping as Ranges
from sowatch.model.events import Load, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.stats import Mapped

__all__ = ["Counts", "Loads", "PublishedMap", "mapped_by"]

#: Load events by process and file.
Loads: TypeAlias = dict[ProcessId, dict[FileId, Load]]


class Counts(NamedTuple):
    """How many processes, files and mappings a published map has."""

    processes: int
    libraries: int
    mappings: int


class PublishedMap:
    """Which load event is in force for each file of each process."""

    def __init__(self) -> None:
        self._loads: Loads = {}
        #: The starts of processes with something in the map, by pid: two while one pid is being reused.
        self._by_pid: dict[int, list[ProcessId]] = {}

    def get(self, process: ProcessId, file: FileId) -> Load | None:
        """The load event of a file in a process."""
        files = self._loads.get(process)
        return None if files is None else files.get(file)

    def of(self, process: ProcessId) -> dict[FileId, Load]:
        """The load events of a process, by file; a copy."""
        return dict(self._loads.get(process, ()))

    def put(self, process: ProcessId, file: FileId, load: Load) -> None:
        """From now on this load event is in force."""
        files = self._loads.get(process)
        if files is None:
            files = self._loads[process] = {}
            self._by_pid.setdefault(process.pid, []).append(process)
        files[file] = load

    def pop(self, process: ProcessId, file: FileId) -> Load | None:
        """Takes the load event out of a file that has gone; None if there was none."""
        files = self._loads.get(process)
        load = files.pop(file, None) if files is not None else None
        if load is not None and not files:
            del self._loads[process]
            same_pid = self._by_pid[process.pid]
            same_pid.remove(process)
            if not same_pid:
                del self._by_pid[process.pid]
        return load

    def of_pid(self, pid: int) -> list[Load]:
        """The load events of the process that has this pid; on the engine's thread."""
        return [load for process in self._by_pid.get(pid, ()) for load in self._loads[process].values()]

    def where(self, is_meant: Callable[[Load], bool]) -> list[Load]:
        """The load events that are meant, in order of publication within a process; on the engine's thread."""
        return [load for files in self._loads.values() for load in files.values() if is_meant(load)]

    def copy(self) -> Loads:
        """A copy of all of it; from any thread."""
        return {process: dict(files) for process, files in list(self._loads.items())}

    def counts(self) -> Counts:
        """How much it holds; from any thread."""
        loads = list(self._loads.values())
        return Counts(len(loads), len({file for files in loads for file in list(files)}), sum(map(len, loads)))


def mapped_by(
    loads: Loads,
    now: Mapping[ProcessId, Mapping[FileId, Ranges]],
    named: Callable[[Process], Process],
    hidden: Collection[str],
) -> list[Mapped]:
    """What load events say is mapped, each with its ranges of now, where they are known, or else the load's.

    Args:
        loads: a copy of a published map.
        now: ranges.
        named: the process with the names that are known of it.
        hidden: names of rules whose load events are left out.
    """
    nothing: Mapping[FileId, Ranges] = {}
    return [
        Mapped(
            named(load.process),
            load.library,
            load.rule,
            where.ranges,
            load.cause,
            load.time_ns,
            where.range_count,
        )
        for process, files in loads.items()
        for file, load in files.items()
        if load.rule not in hidden
        for where in [now.get(process, nothing).get(file, load)]
    ]
