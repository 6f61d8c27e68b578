"""Which process has which shared library mapped, on a whole Linux host, live.

The product in two functions: `watch` gives events one after the other, `awatch` does so for
asyncio. `Watcher` with `Rule` s runs your callbacks and knows the whole map.

Where things are, from the ground up:

errors      every error, with its facts and the next step
identity    FileId and ProcessId
escape      names that others chose, made safe to show
latency     how long things took, counted by bucket
events      what is told: LibraryEvent, Process, Library, and the wire form
rules       Rule and RuleSet
procfs      /proc: bytes in, records out
packages    who owns a file on disk, and whether it was replaced
elf         build id, soname, exported symbols, on files nobody trusts
config      limits and policy
registry    activation once, deactivation once, blocklist
processes   ProcessMonitor: exec, fork, exit; container labels
bpf         the kernel side: programs, libbpf binding, records, probes
sources     where records and readings come from
pacing      when to look at /proc again, and at whom
polling     the map from looks at /proc, without BPF
readings    /proc in the form of the kernel's iterator
old_kernels kernels that can load these programs but lack what they read with
prebuilt    strategy prebuilt: the kernel says where and when, /proc which file
ladder      which strategy is used, and why not another
feeds       the kernel's process events, for ProcessMonitor
tracker     the map itself
audit       is the map right? /proc, compared with it
inspector   opens mapped files safely, reads their facts
explain     why a process or file is, or is not, in the map
subscriptions  a reader's bounded queue, which knows how to catch up
publisher   from changes of the map to events
keeper      keeps the map true: drains, reads again, repairs
engine      the thread that the keeper works on
workers     callbacks of rules
watcher     puts it together
streams     watch and awatch
inventory   what is mapped, put together for people who look
telemetry   metrics, exporters, sinks for events
page        the inventory page, and the feed behind it
agent       sowatch serve: configuration, HTTP, debugger
cli         the command, one file a subcommand

Importing this module loads none of them: names are fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sowatch.audit import AuditReport, Difference
    from sowatch.config import Config
    from sowatch.errors import EnvironmentFault, LoadAttempt, SowatchError
    from sowatch.events import Library, LibraryEvent, Lost, Process, Ready, Repaired, Stopped
    from sowatch.explain import PathReport, ProcessReport
    from sowatch.feeds import process_monitor
    from sowatch.identity import FileId, ProcessId
    from sowatch.processes import ProcessMonitor
    from sowatch.registry import FileRegistry
    from sowatch.rules import Rule
    from sowatch.streams import awatch, watch
    from sowatch.watcher import ActiveFile, Mapped, Stats, Watcher

__version__ = "0.1.0"

__all__ = [
    "ActiveFile",
    "AuditReport",
    "Config",
    "Difference",
    "EnvironmentFault",
    "FileId",
    "FileRegistry",
    "Library",
    "LibraryEvent",
    "LoadAttempt",
    "Lost",
    "Mapped",
    "PathReport",
    "Process",
    "ProcessId",
    "ProcessMonitor",
    "ProcessReport",
    "Ready",
    "Repaired",
    "Rule",
    "SowatchError",
    "Stats",
    "Stopped",
    "Watcher",
    "awatch",
    "process_monitor",
    "watch",
]

_ROOMS = {
    "audit": ("AuditReport", "Difference"),
    "config": ("Config",),
    "errors": ("EnvironmentFault", "LoadAttempt", "SowatchError"),
    "events": ("Library", "LibraryEvent", "Lost", "Process", "Ready", "Repaired", "Stopped"),
    "explain": ("PathReport", "ProcessReport"),
    "feeds": ("process_monitor",),
    "identity": ("FileId", "ProcessId"),
    "processes": ("ProcessMonitor",),
    "registry": ("FileRegistry",),
    "rules": ("Rule",),
    "streams": ("awatch", "watch"),
    "watcher": ("ActiveFile", "Mapped", "Stats", "Watcher"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'sowatch' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"sowatch.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
