"""Which strategy is used, and why not another. May import ``errors``, ``config``, ``sources`` and ``polling``.

This version has two rungs: ``core``, CO-RE programs on syscall tracepoints, and ``procfs``, looks at
``/proc``. The others are named in the contract and refused with a reason until they are built.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from sowatch.config import Config
from sowatch.errors import BpfError, LibbpfMissing, LoadAttempt, LoadError, NotPermitted, SowatchError
from sowatch.polling import ProcfsSource
from sowatch.sources import BpfSource, EventSource

__all__ = ["Plan", "missing_capabilities", "open_source", "plan"]

#: What `core` needs, by bit number (include/uapi/linux/capability.h). CAP_SYS_ADMIN implies the
#: first two (bpf(2), perf_event_open(2)); it is needed itself to open tracefs where it is not mounted.
NEEDED = {"CAP_PERFMON": 38, "CAP_BPF": 39}
CAP_SYS_ADMIN = 21
CAP_SYS_PTRACE = 19

_UNBUILT = {
    "runtime": "not part of this version",
    "prebuilt": "not part of this version",
}
_REMEDY_ROOT = (
    "Run it as root: sudo sowatch ..., or give it the capabilities CAP_BPF and CAP_PERFMON and a readable tracefs."
)
_REMEDY = "See `sowatch doctor` for what this kernel can do."


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be used: ``strategy`` is None if nothing works; ``remedy`` then says what to do."""

    strategy: str | None
    hooks: str | None
    guarantee: str | None
    attempts: tuple[LoadAttempt, ...]
    remedy: str
    is_only_permission: bool = False


def missing_capabilities() -> tuple[str, ...]:
    """Capabilities this process would need and has not."""
    effective = 0
    with open("/proc/thread-self/status", "rb") as status:
        for line in status:
            if line.startswith(b"CapEff:"):
                effective = int(line.split()[1], 16)
    if effective >> CAP_SYS_ADMIN & 1:
        return ()
    return tuple(name for name, bit in NEEDED.items() if not effective >> bit & 1)


def open_source(config: Config) -> EventSource:
    """The best source that works.

    Raises:
        NotPermitted: a capability is missing.
        LibbpfMissing: libbpf is.
        LoadError: nothing works; ``attempts`` has each rung that was tried.
    """
    if config.strategy in _UNBUILT:
        raise LoadError(
            [LoadAttempt(config.strategy, False, _UNBUILT[config.strategy])], "Use --strategy core, procfs or auto."
        )
    if config.strategy == "procfs":
        return ProcfsSource(config)
    try:
        return _open_core(config)
    except SowatchError as error:
        if config.strategy != "auto" or not config.allow_procfs_fallback:
            raise
        source = ProcfsSource(config)
        source.attempts = (*_attempts_of(error), *source.attempts)
        return source


def _attempts_of(error: SowatchError) -> tuple[LoadAttempt, ...]:
    if isinstance(error, LoadError):
        return error.attempts
    return (LoadAttempt("core", False, error.missing if isinstance(error, NotPermitted) else str(error)),)


def _open_core(config: Config) -> EventSource:
    if not config.enable_core:
        raise LoadError([LoadAttempt("core", False, "switched off by enable_core")], "Set enable_core.")
    missing = missing_capabilities()
    try:
        return BpfSource(config)
    except LibbpfMissing:
        raise
    except BpfError as error:
        if missing:
            raise NotPermitted("cannot load BPF programs", f"missing {' and '.join(missing)}", _REMEDY_ROOT) from error
        raise LoadError([LoadAttempt("core", False, _explain(error))], _REMEDY) from error


def _explain(error: BpfError) -> str:
    """The reason in one clause, with what is behind the usual error numbers."""
    reason = str(error).removesuffix(" See `sowatch doctor` for what this kernel can do.").rstrip(".")
    if error.errno == errno.ENOSYS:
        return "this kernel was built without bpf(2)"
    lockdown = _lockdown()
    if error.errno == errno.EPERM and lockdown == "confidentiality":
        return f"{reason} (the kernel is locked down: {lockdown})"
    if not os.path.exists("/sys/kernel/btf/vmlinux"):
        return f"{reason} (the kernel has no BTF)"
    return reason


def _lockdown() -> str | None:
    """The mode in brackets in the lockdown file, None where it cannot be read."""
    try:
        with open("/sys/kernel/security/lockdown") as file:
            return file.read().partition("[")[2].partition("]")[0] or None
    except OSError:
        return None


def plan(config: Config) -> Plan:
    """Tries what `open_source` would do, and takes it down again."""
    try:
        source = open_source(config)
    except NotPermitted as error:
        return Plan(None, None, None, (LoadAttempt("core", False, str(error)),), error.remedy, True)
    except LoadError as error:
        return Plan(None, None, None, error.attempts, error.remedy)
    except SowatchError as error:
        return Plan(None, None, None, (LoadAttempt("core", False, str(error)),), str(error))
    remedy = _REMEDY_ROOT if source.strategy == "procfs" and missing_capabilities() else ""
    with_source = Plan(source.strategy, source.hooks, source.guarantee, source.attempts, remedy)
    source.close()
    return with_source
