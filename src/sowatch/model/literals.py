"""The words that values are made of: each set once, for types, messages and the schema of events alike."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Final, Literal, TypeAlias, get_args

__all__ = [
    "EVENT_KINDS",
    "HOOKS",
    "KINDS",
    "ONE_SCAN",
    "STRATEGIES",
    "STREAM_KINDS",
    "Cause",
    "DeactivateCause",
    "EventKind",
    "EventKinds",
    "Hooks",
    "HooksSetting",
    "HttpProtocol",
    "HttpSide",
    "Kind",
    "LoadCause",
    "LossPlace",
    "ProcessCause",
    "ProcessKind",
    "RenewedCause",
    "Staleness",
    "Strategy",
    "StrategySetting",
    "StreamKind",
    "StreamKinds",
    "UnloadCause",
]

#: What a mapped file can be to a process.
Kind: TypeAlias = Literal["library", "executable", "interpreter", "other"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

#: The events about libraries; control events are always sent beside them.
EventKind: TypeAlias = Literal["load", "unload", "activate", "deactivate"]
EVENT_KINDS: Final[tuple[EventKind, ...]] = get_args(EventKind)

#: What readers of the agent's streams can choose among; flows come where the agent is configured for them, ``stale``
#: and ``renewed`` from its comparison with the disk.
StreamKind: TypeAlias = Literal[EventKind, "http", "stale", "renewed"]
STREAM_KINDS: Final[tuple[StreamKind, ...]] = (*EVENT_KINDS, "http", "stale", "renewed")

#: Several of them, as a parameter takes them. Tuples are named apart: mypy takes ("load",) for a tuple of str where a
#: Collection of literals is wanted.
EventKinds: TypeAlias = Collection[EventKind] | tuple[EventKind, ...]
StreamKinds: TypeAlias = Collection[StreamKind] | tuple[StreamKind, ...]

#: Of an HTTP flow.
HttpSide: TypeAlias = Literal["client", "server"]
HttpProtocol: TypeAlias = Literal["HTTP/1.0", "HTTP/1.1", "HTTP/2"]

#: Why a load was emitted. ``exec`` maps the executable and the interpreter.
LoadCause: TypeAlias = Literal["mmap", "snapshot", "fork", "exec", "repair"]
#: Why an unload was emitted. ``rules``: no rule matches the file any more.
UnloadCause: TypeAlias = Literal["munmap", "exec", "exit", "repair", "rules"]
#: Why a deactivate was emitted, where that is given: ``stop`` when the watch ends.
DeactivateCause: TypeAlias = Literal["munmap", "exec", "exit", "repair", "rules", "stop"]
Cause: TypeAlias = Literal[LoadCause, UnloadCause]

#: How the kernel is watched, strongest guarantee first.
Strategy: TypeAlias = Literal["core", "runtime", "prebuilt", "procfs"]
#: The same as a setting; ``auto`` takes the best that works.
StrategySetting: TypeAlias = Literal["auto", "core", "runtime", "prebuilt", "procfs"]
STRATEGIES: Final[tuple[StrategySetting, ...]] = get_args(StrategySetting)

#: The guarantee of a source without hooks: each process was read at one moment, and what changed later is not seen.
ONE_SCAN: Final = "one scan"

#: Sets of hooks of the BPF strategies.
Hooks: TypeAlias = Literal["trampoline", "syscall"]
HooksSetting: TypeAlias = Literal["auto", "trampoline", "syscall"]
HOOKS: Final[tuple[HooksSetting, ...]] = get_args(HooksSetting)

#: Where records or events were lost: in the kernel's ring, or in the queue of a slow reader.
LossPlace: TypeAlias = Literal["kernel", "queue"]


class Staleness(StrEnum):
    """Why the file on disk is not the one in memory; ``unknown``: whether it is cannot be determined.

    ``modified``: it is the same file, written to after the process had started.
    """

    DELETED = "deleted"
    REPLACED = "replaced"
    MODIFIED = "modified"
    UNKNOWN = "unknown"


#: Why a process has no stale file any more: it unmapped the file or ended, or no rule wants the file any
#: more; or the file is back under its name.
RenewedCause: TypeAlias = Literal["unmapped", "restored"]

#: What happened to a process, and how that was found out.
ProcessKind: TypeAlias = Literal["exec", "fork", "exit"]
ProcessCause: TypeAlias = Literal["event", "scan", "repair"]
