"""What the registry reports of itself: frozen records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from msgspec import Struct

from sowatch.model.events import Library
from sowatch.model.identity import FileId, ProcessId

__all__ = ["BlockedFile", "FileCallback", "FileState", "RegisteredFile", "RegistryStats"]

FileCallback: TypeAlias = Callable[[Library], object]
FileState: TypeAlias = Literal["held", "attaching", "attached", "detaching"]


class RegisteredFile(Struct, frozen=True):
    """One (rule, file) that some process holds, or that is not yet deactivated.

    ``state`` is ``held`` (counted; its activation did not run yet, or failed), ``attaching``,
    ``attached`` or ``detaching``, since ``since_s`` on the registry's clock, which is
    ``time_ns`` in ns since the epoch.
    """

    rule: str
    library: Library
    state: FileState
    processes: frozenset[ProcessId]
    since_s: float
    time_ns: int


class BlockedFile(Struct, frozen=True):
    """One (rule, file) whose activation failed, and why.

    ``sample_path`` is the path under which it failed. ``since_s`` and ``expires_s`` are on the
    registry's clock, ``time_ns`` is the beginning in ns since the epoch.
    """

    rule: str
    id: FileId
    sample_path: str
    reason: str
    since_s: float
    expires_s: float
    time_ns: int


class RegistryStats(Struct, frozen=True):
    """Counters since the registry was made, and two gauges.

    Attributes:
        registered: activations that succeeded.
        already_registered: processes that came to a file another one (or they) held already.
        hook_failed: activations that failed and blocked their file.
        environment_faults: activations that failed for a reason outside the file; not blocked.
        blocked: activations refused because the file was blocked.
        unregistered: deactivations that ran.
        unregister_errors: releases of a file by a process that did not hold it.
        unregister_failed_cb: deactivate callbacks that raised.
        unregister_path_id_not_found: releases of a file nobody holds.
        total_files: (rule, file) pairs known now.
        total_pids: processes that hold at least one of them now.
    """

    registered: int = 0
    already_registered: int = 0
    hook_failed: int = 0
    environment_faults: int = 0
    blocked: int = 0
    unregistered: int = 0
    unregister_errors: int = 0
    unregister_failed_cb: int = 0
    unregister_path_id_not_found: int = 0
    total_files: int = 0
    total_pids: int = 0
