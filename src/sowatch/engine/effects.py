"""`Effects`: what an input of the mapping table asks of its owner; `Causes`: what the findings of a scan are called."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Self

from sowatch.engine.address_space import Change
from sowatch.model.literals import LoadCause, UnloadCause

__all__ = ["LIVE", "Causes", "Effects"]


class Causes(NamedTuple):
    """What a scan's findings are called: a mapping it found, and one it did not find."""

    load: LoadCause
    unload: UnloadCause


#: What was not seen as it happened, but is not the repair of a loss either.
LIVE = Causes("mmap", "munmap")


class Effects:
    """What one input of `sowatch.engine.table.MappingTable` results in; the owner carries it out.

    Attributes:
        changes: loads and unloads to publish, in order.
        verdicts: keys that the source asked about or reports in vain, whether they are wanted, and the place that the
            record had, in order.
        rescans: processes that have to be scanned because of this input, and what the findings are called.
            They are in `MappingTable.needs_rescan` too, until the owner begins the scan.
        untrack: (tgid, start_ns, activity) of processes the source tracks although nothing of theirs is
            wanted, as far as that activity generation goes.
        throttled: tgids whose changes the kernel dropped, being too many: scans make up for that loss.
        with_untracked_sharers: processes that may share their address space with one that nobody knows: tgid and
            start_ns.
        executed: who has executed another program, tgid and start_ns: they share nobody's address space any more.
    """

    __slots__ = ("changes", "executed", "rescans", "throttled", "untrack", "verdicts", "with_untracked_sharers")

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.verdicts: list[tuple[Hashable, bool, int]] = []
        self.rescans: dict[int, Causes] = {}
        self.untrack: list[tuple[int, int, int]] = []
        self.throttled: set[int] = set()
        self.with_untracked_sharers: dict[int, int] = {}
        self.executed: dict[int, int] = {}

    def __iadd__(self, later: Effects) -> Self:
        """These and then others."""
        self.changes += later.changes
        self.verdicts += later.verdicts
        self.rescans.update(later.rescans)
        self.untrack += later.untrack
        self.throttled |= later.throttled
        self.with_untracked_sharers |= later.with_untracked_sharers
        self.executed |= later.executed
        return self

    def answers(self) -> tuple[dict[Hashable, int], dict[Hashable, int]]:
        """Keys to answer with yes, and with no, each with the place that the answer is about."""
        # Renamed meanwhile, a file may have been asked about under a wanted name and under one that is not.
        wanted = {key: place for key, is_wanted, place in self.verdicts if is_wanted}
        ignored = {key: place for key, is_wanted, place in self.verdicts if not is_wanted and key not in wanted}
        return wanted, ignored
