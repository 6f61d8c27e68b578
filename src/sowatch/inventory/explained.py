"""Explanations of processes, with what of their files is stale: `with_staleness`."""

from __future__ import annotations

from msgspec.structs import replace

from sowatch.explain import ProcessReport
from sowatch.inventory.staleness import Disk, seen_at
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.proc import ProcFs

__all__ = ["with_staleness"]


def with_staleness(report: ProcessReport, proc: ProcFs, hanging: HangingCalls | None = None) -> ProcessReport:
    """The report, with each mapped file compared with the one on disk; see `Disk.staleness`, and `Disk` of hanging."""
    mappings = []
    with Disk(proc, hanging) as disk:
        for one in report.mappings:
            loaded_ns = None if one.seen is None else seen_at(one.seen.cause, one.seen.time_ns)
            answer = disk.staleness(report.process, one.library, one.ranges, loaded_ns=loaded_ns)
            changes = {"stale": answer.stale, "stale_reason": answer.reason, "is_same_build": answer.is_same_build}
            mappings.append(replace(one, **changes))
    return replace(report, mappings=tuple(mappings))
