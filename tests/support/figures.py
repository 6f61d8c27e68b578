"""A watcher and a monitor whose figures a test writes, for what reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from sowatch.engine.activation import FileRegistry
from sowatch.model.histogram import RuleTimings
from sowatch.model.process_events import ProcessMonitorStats
from sowatch.model.stats import Losses, Stats

__all__ = ["Figures", "Monitor", "changed", "timings"]

#: A watcher that has seen nothing.
NO_STATS = Stats(**{name: Losses() if name == "losses" else 0 for name in Stats.__struct_fields__})


@dataclass
class Figures:
    """What `Sampler.follow_watcher` reads."""

    stats: Stats = NO_STATS
    ready: Any = None
    is_repaired: bool = True
    timings: dict[str, RuleTimings] = field(default_factory=dict)
    registry: Any = field(default_factory=lambda: FileRegistry(is_alive=lambda process: True))


@dataclass
class Monitor:
    """What `Sampler.follow_process_monitor` reads."""

    stats: ProcessMonitorStats


def changed(**changes: Any) -> Stats:
    """The figures of a watcher that has seen just this."""
    return replace(NO_STATS, **changes)


def timings() -> RuleTimings:
    """A rule that attached once, in 50 ms."""
    made = RuleTimings()
    made.attach.observe(0.05)
    return made
