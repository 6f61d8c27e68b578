"""Figures of a watch, and what it has in its mapping table: values for users."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from sowatch.model.events import Library, Process
from sowatch.model.literals import LoadCause

__all__ = ["Losses", "Mapped", "Stats"]


class Losses(NamedTuple):
    """What the kernel side could not send or track, counted since the source was opened."""

    ring: int = 0
    processes: int = 0
    pending: int = 0
    scratch: int = 0
    #: Dropped because one process reported more than ``Config.max_records_s`` of them in a second.
    throttled: int = 0
    #: Runs of a program that the kernel left out, as another was under way on that CPU.
    skipped: int = 0
    #: Mappings whose file could not be found out any more (strategy ``prebuilt``).
    unresolved: int = 0
    #: Drains and full scans that failed as descriptors or memory were lacking; each may have cost records.
    unread: int = 0


class Mapped(Struct, frozen=True, gc=False):
    """One library in one process, as the map has it. ``ranges`` are executable address ranges.

    Where ``range_count`` is not None there are that many at the least, see `sowatch.LibraryEvent`.
    ``cause`` and ``time_ns`` (wall clock, ns since the epoch) are those of the load that was reported, so
    what was there before the watch has the time at which that found it, and the cause ``snapshot``.
    """

    process: Process
    library: Library
    rule: str
    ranges: tuple[tuple[int, int], ...]
    cause: LoadCause | None = None
    time_ns: int = 0
    range_count: int | None = None


class Stats(Struct, frozen=True, gc=False):
    """Figures of a watch so far. ``lost_kernel`` counts facts, ``lost_queue`` events of slow readers.

    ``lost_throttled`` of the records were dropped because one process reported more than
    ``Config.max_records_s`` of them in a second.

    ``rereads`` are single processes whose mappings were read because other threads might have
    interfered; ``callback_errors`` are exceptions that user callbacks raised. ``records`` are what
    the kernel side sent, ``losses`` says where ``lost_kernel`` was lost. ``audits`` ran to their
    end, and the last one found ``audit_differences``. ``poll_interval_s`` is the time between two polls
    at ``/proc`` as it is now, None with a strategy that does not poll. ``partial`` are loads of files that contradict
    themselves or pass a limit of work, so that facts or exports may be missing. ``unread`` are processes whose mappings
    cannot be read now; see `Watcher.unread`. ``pod_lookups`` are questions to the container runtime for names of
    pods, ``pod_lookup_failures`` those that it did not answer.
    """

    processes: int
    libraries: int
    mappings: int
    events: int
    loads: int
    unloads: int
    lost_kernel: int
    lost_throttled: int
    lost_queue: int
    repairs: int
    rereads: int
    unresolved: int
    callback_errors: int
    records: int
    losses: Losses
    audits: int
    audit_differences: int
    poll_interval_s: float | None = None
    partial: int = 0
    unread: int = 0
    pod_lookups: int = 0
    pod_lookup_failures: int = 0
