"""A line of ``list``: one process and one file that it has mapped, with what is known of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sowatch.cli._options import MappedLike
from sowatch.inventory.mapping_lines import mapping_line
from sowatch.inventory.restarts import RestartTarget, StaleFile, restart_target
from sowatch.inventory.staleness import FRESH, StaleAnswer, seen_at
from sowatch.linux.cgroups import Unit, unit_of
from sowatch.model import wire

if TYPE_CHECKING:
    from sowatch.cli._agent_scan import AgentDisk
    from sowatch.inventory.staleness import Disk
    from sowatch.model.events import Library, Process

__all__ = ["ListEntry", "entries_of", "with_packages"]


class ListEntry(Struct, frozen=True):
    """One process and file; the package is looked up for ``--stale`` only."""

    mapped: MappedLike
    answer: StaleAnswer
    package: str | None = None

    @property
    def process(self) -> Process:
        """Who has it mapped."""
        return self.mapped.process

    @property
    def library(self) -> Library:
        """What is mapped."""
        return self.mapped.library

    @property
    def path(self) -> str:
        """The name under which the file is stale, or else its own."""
        return self.answer.path or self.library.path

    @property
    def unit(self) -> Unit | None:
        """The systemd unit of the process; of a container one inside it."""
        return unit_of(self.process.cgroup)

    @property
    def target(self) -> RestartTarget:
        """What is restarted for the sake of the process."""
        return restart_target(self.process.cgroup)

    @property
    def stale_file(self) -> StaleFile:
        """For `sowatch.inventory.restarts`."""
        return StaleFile(self.process, self.library, self.answer, self.package)

    def line(self, seq: int, *, with_owner: bool) -> wire.Mapping:
        """As JSON has it; ``with_owner``: with package, unit and how that is restarted."""
        return mapping_line(self.mapped, self.answer, self.package, seq, with_owner=with_owner)


def entries_of(mapped: Iterable[MappedLike], disk: Disk | AgentDisk | None) -> list[ListEntry]:
    """An entry for each; without a disk nothing is compared."""
    return [
        ListEntry(
            one,
            FRESH
            if disk is None
            else disk.staleness(one.process, one.library, one.ranges, loaded_ns=seen_at(one.cause, one.time_ns)),
        )
        for one in mapped
    ]


def with_packages(entries: Sequence[ListEntry], disk: Disk | AgentDisk) -> list[ListEntry]:
    """The entries with the packages that own their files."""
    owners = disk.owners((entry.process.pid, entry.path) for entry in entries)
    return [replace(entry, package=owners[entry.process.pid, entry.path]) for entry in entries]
