"""What the tests of the mapping table share: files, a table whose effects are kept, and what came of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from sowatch.bpf.records import Record
from sowatch.engine.address_space import Change, ProcessState
from sowatch.engine.effects import Causes, Effects
from sowatch.engine.merge import merge
from sowatch.engine.table import MappingTable
from sowatch.sources.base import ProcessScan
from support.records import File

__all__ = [
    "BASE",
    "CRYPTO",
    "LIBC",
    "LIVE",
    "REPAIR",
    "SNAPSHOT",
    "SSL",
    "KeptEffects",
    "feed",
    "reported",
    "story",
    "the_map",
]

LIVE = Causes("mmap", "munmap")
REPAIR = Causes("repair", "repair")
SNAPSHOT = Causes("snapshot", "repair")

SSL = File("/usr/lib/libssl.so.3", 100)
CRYPTO = File("/usr/lib/libcrypto.so.3", 101)
LIBC = File("/usr/lib/libc.so.6", 102)
BASE = 0x7F0000000000


class KeptEffects(MappingTable):
    """A table that keeps its effects until a test takes them.

    Each input goes to a second table, too, whose effects have to be the same: equal inputs have equal effects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = Effects()
        self._twin = MappingTable(*args, **kwargs)

    def keep(self, effects: Effects, twins: Effects) -> Effects:
        assert story(effects) == story(twins)
        assert dict(self.needs_rescan) == dict(self._twin.needs_rescan)
        self.kept += effects
        return effects

    def apply(self, *records: Record) -> Effects:
        before = [tuple(record) for record in records]
        effects = self.keep(super().apply(*records), self._twin.apply(*records))
        assert [tuple(record) for record in records] == before
        return effects

    def merge(self, scans: Sequence[ProcessScan], records: Sequence[Record], *args: Any, **kwargs: Any) -> set[int]:
        """The tgids to scan again."""
        scans = list(scans)
        effects = merge(self, scans, records, *args, **kwargs)
        self.keep(effects, merge(self._twin, scans, records, *args, **kwargs))
        return set(effects.rescans)

    def untracked(self, pid: int, start_ns: int) -> Effects:
        return self.keep(super().untracked(pid, start_ns), self._twin.untracked(pid, start_ns))

    def forget(self, process: ProcessState, cause: str, t_ns: int) -> Effects:
        return self.keep(super().forget(process, cause, t_ns), self._twin.forget(process, cause, t_ns))

    def forget_pid(self, pid: int, cause: str, t_ns: int) -> Effects:
        return self.keep(super().forget_pid(pid, cause, t_ns), self._twin.forget_pid(pid, cause, t_ns))

    def set_rules(self, *args: Any) -> None:
        super().set_rules(*args)
        self._twin.set_rules(*args)

    def await_rescan(self, *args: Any, **kwargs: Any) -> None:
        super().await_rescan(*args, **kwargs)
        self._twin.await_rescan(*args, **kwargs)

    def begin_rescans(self, pids: Any) -> None:
        pids = list(pids)
        super().begin_rescans(pids)
        self._twin.begin_rescans(pids)

    def take_changes(self) -> list[Change]:
        taken, self.kept.changes = self.kept.changes, []
        return taken

    def take_answers(self) -> tuple[list[Hashable], list[Hashable]]:
        (wanted, ignored), self.kept.verdicts = self.kept.answers(), []
        return list(wanted), list(ignored)

    def take_idle(self) -> list[tuple[int, int, int]]:
        """Those to untrack that still have nothing that is wanted."""
        taken, self.kept.untrack = self.kept.untrack, []
        return [one for one in dict.fromkeys(taken) if self.is_idle(one[0])]


def story(effects: Effects) -> list[Any]:
    """All of them as values."""
    changes = [
        (one.is_load, one.cause, one.t_ns, one.process, one.kind, one.name.path, one.name.file_id, *one[6:])
        for one in effects.changes
    ]
    flags = sorted(effects.throttled), sorted(effects.with_untracked_sharers)
    return [changes, effects.verdicts, list(effects.rescans.items()), effects.untrack, flags]


def reported(table: KeptEffects) -> list[str]:
    """What came (+) and went (-) since the last call."""
    return [
        f"{'+' if one.is_load else '-'}{one.process.pid} {one.name.path.rsplit('/', 1)[-1]} {one.cause}"
        for one in table.take_changes()
    ]


def the_map(table: MappingTable) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The ranges of each (pid, inode)."""
    return {
        (process.id.pid, mapping.name.file_id.inode): sorted(mapping.ranges) for process, mapping in table.mappings()
    }


def feed(table: KeptEffects, *records: Record) -> list[str]:
    """What these records changed, as `reported` puts it."""
    for record in records:
        table.apply(record)
    return reported(table)
