"""Which process has which shared library mapped, on a whole Linux host, live.

The product in two functions: `watch` gives events one after the other, `awatch` does so for
asyncio. `Watcher` with `Rule` s runs your callbacks and knows the whole map.

The packages, lowest first; each imports only what stands before it:

model      values: what everything else speaks of
linux      everything that reads Linux: /proc, ELF files, descriptors, capabilities, containers
bpf        the kernel side: programs, libbpf binding, records, features
sources    producers of records: BPF programs and /proc as equals
engine     the mapping table, and what keeps it right
explain    audit, and why something is or is not covered
watcher    the public API: Watcher, watch, awatch, ProcessMonitor
inventory  what is mapped, for people; staleness and owners
telemetry  metrics, exporters, sinks for events
uprobes    probes by library: attach, verify, repair; calls counted, timed and shown
http       HTTP as it passes TLS libraries
web        HTTP served: sockets, bounds of clients; log lines, systemd
fleet      many hosts: what is reported of them, and asked
agent      `sowatch serve`, with the inventory page
cli        the command, one file a subcommand

Importing this module loads none of them: names are fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sowatch.model.version import VERSION

if TYPE_CHECKING:
    from sowatch.engine.activation import FileRegistry
    from sowatch.explain import PathReport, ProcessReport
    from sowatch.explain.audit import AuditReport, Difference
    from sowatch.inventory.facts import MappedFacts, facts_of
    from sowatch.model.config import Config
    from sowatch.model.errors import EnvironmentFault, LoadAttempt, SowatchError
    from sowatch.model.events import (
        Activate,
        Deactivate,
        Event,
        Library,
        LibraryEvent,
        Load,
        Lost,
        Process,
        Ready,
        Renewed,
        Repaired,
        Stale,
        Stopped,
        Unload,
    )
    from sowatch.model.identity import FileId, ProcessId
    from sowatch.model.lines import decode, to_json
    from sowatch.model.literals import Staleness
    from sowatch.model.rules import Rule
    from sowatch.model.stats import Mapped, Stats
    from sowatch.watcher.monitor import ProcessMonitor, process_monitor
    from sowatch.watcher.streams import awatch, watch
    from sowatch.watcher.subscription import Subscription
    from sowatch.watcher.watcher import ActiveFile, Watcher

__version__ = VERSION

__all__ = [
    "Activate",
    "ActiveFile",
    "AuditReport",
    "Config",
    "Deactivate",
    "Difference",
    "EnvironmentFault",
    "Event",
    "FileId",
    "FileRegistry",
    "Library",
    "LibraryEvent",
    "Load",
    "LoadAttempt",
    "Lost",
    "Mapped",
    "MappedFacts",
    "PathReport",
    "Process",
    "ProcessId",
    "ProcessMonitor",
    "ProcessReport",
    "Ready",
    "Renewed",
    "Repaired",
    "Rule",
    "SowatchError",
    "Stale",
    "Staleness",
    "Stats",
    "Stopped",
    "Subscription",
    "Unload",
    "Watcher",
    "awatch",
    "decode",
    "facts_of",
    "process_monitor",
    "to_json",
    "watch",
]

_MODULES = {
    "engine.activation": ("FileRegistry",),
    "explain": ("PathReport", "ProcessReport"),
    "explain.audit": ("AuditReport", "Difference"),
    "model.config": ("Config",),
    "model.errors": ("EnvironmentFault", "LoadAttempt", "SowatchError"),
    "model.events": (
        "Activate",
        "Deactivate",
        "Event",
        "Library",
        "LibraryEvent",
        "Load",
        "Lost",
        "Process",
        "Ready",
        "Renewed",
        "Repaired",
        "Stale",
        "Stopped",
        "Unload",
    ),
    "inventory.facts": ("MappedFacts", "facts_of"),
    "model.identity": ("FileId", "ProcessId"),
    "model.lines": ("decode", "to_json"),
    "model.literals": ("Staleness",),
    "model.rules": ("Rule",),
    "watcher.monitor": ("ProcessMonitor", "process_monitor"),
    "watcher.streams": ("awatch", "watch"),
    "watcher.subscription": ("Subscription",),
    "model.stats": ("Mapped", "Stats"),
    "watcher.watcher": ("ActiveFile", "Watcher"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'sowatch' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"sowatch.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
