"""Which strategy is used, and why not another: strategy selection.

`candidates_to_try` is the policy, `CANDIDATES` what there is to try. A candidate that fails has
taken everything down again before the next is tried. What only one candidate needs is imported when it is tried.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from msgspec import Struct

from sowatch.linux.capabilities import missing_capabilities
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import (
    BpfError,
    CompileError,
    LibbpfMissing,
    LoadAttempt,
    LoadError,
    NotPermitted,
    PidNamespaceError,
    SowatchError,
    TracefsNotMounted,
    UsageError,
)
from sowatch.model.literals import Hooks, Strategy
from sowatch.sources.base import EventSource
from sowatch.sources.core import OBJECTS, BpfSource

__all__ = ["CANDIDATES", "Candidate", "Opening", "Plan", "candidates_to_try", "open_scan", "open_source", "plan"]

LOG = logging.getLogger("sowatch")


_REMEDY_ROOT = (
    "Run it as root: sudo sowatch ..., or give it the capabilities CAP_BPF and CAP_PERFMON and a readable tracefs."
)
_REMEDY = "See `sowatch doctor` for what this kernel can do."
#: While a source is opened beside other work.
_SWITCH_INTERVAL_S: Final = 0.0005


class Candidate(NamedTuple):
    """One strategy. ``open`` raises a `SowatchError` if it does not work here, and leaves nothing behind."""

    open: Callable[[Config], EventSource]
    needs_bpf: bool
    #: It reads by kernel iterators, which scan the processes of our own pid namespace only.
    iterates: bool = False


def _open_core(config: Config) -> EventSource:
    try:
        return BpfSource(config)
    except BpfError as error:
        return _open_for_old_kernel(config, error)


def _open_runtime(config: Config) -> EventSource:
    from sowatch.bpf.compile import compile_programs
    from sowatch.sources.legacy import OLD_OBJECT

    with compile_programs(config, [name.replace(".o", ".c") for name in OBJECTS]) as paths:
        try:
            return BpfSource(config, strategy="runtime", objects=paths)
        except BpfError as error:
            refusal = error
    with compile_programs(config, [OLD_OBJECT.replace(".o", ".c")]) as paths:
        return _open_for_old_kernel(config, refusal, strategy="runtime", objects=paths)


def _open_for_old_kernel(config: Config, refusal: BpfError, **options: Any) -> EventSource:
    """Where the programs of today were refused, those for kernels before 5.17.

    Raises:
        BpfError: the first refusal, if that does not work either: it is about what most kernels run.
    """
    if missing_capabilities():
        raise refusal
    from sowatch.sources.legacy import OLD_OBJECT, OldKernelSource

    try:
        return OldKernelSource(config, **options)
    except BpfError as error:
        LOG.debug("%s: %s", OLD_OBJECT, error)
        raise refusal from error


def _open_prebuilt(config: Config) -> EventSource:
    from sowatch.sources.prebuilt import PrebuiltSource

    return PrebuiltSource(config)


def _open_procfs(config: Config) -> EventSource:
    from sowatch.sources.polling import ProcfsSource

    return ProcfsSource(config)


#: Every candidate by its strategy. What comes after what is given by `candidates_to_try`.
CANDIDATES: Final[Mapping[str, Candidate]] = {
    "core": Candidate(_open_core, needs_bpf=True, iterates=True),
    "runtime": Candidate(_open_runtime, needs_bpf=True, iterates=True),
    "prebuilt": Candidate(_open_prebuilt, needs_bpf=True),
    "procfs": Candidate(_open_procfs, needs_bpf=False),
}


def candidates_to_try(config: Config) -> Iterator[str]:
    """The strategies in the order in which they are tried: the next one is asked for if the last failed.

    As in the origin, but for ``procfs``: with nothing enabled, ``prebuilt`` is what is left; a strategy
    that failed is followed by another only if a flag allows it.

    >>> list(candidates_to_try(Config(allow_runtime_compiled_fallback=False)))
    ['core', 'prebuilt', 'procfs']
    """
    if config.strategy != "auto":
        yield config.strategy
        return
    goes_on = True
    if config.enable_core:
        yield "core"
        goes_on = config.allow_runtime_compiled_fallback or config.allow_prebuilt_fallback
    if goes_on and (config.enable_runtime_compiler or (config.enable_core and config.allow_runtime_compiled_fallback)):
        yield "runtime"
        goes_on = config.allow_prebuilt_fallback
    if goes_on:
        yield "prebuilt"
    if config.allow_procfs_fallback:
        yield "procfs"


class Plan(Struct, frozen=True):
    """What would be used: ``strategy`` is None if nothing works; ``remedy`` then says what to do."""

    strategy: Strategy | None
    hooks: Hooks | None
    guarantee: str | None
    attempts: tuple[LoadAttempt, ...]
    remedy: str
    is_only_permission: bool = False
    limits: tuple[str, ...] = ()


def open_source(config: Config) -> EventSource:
    """The best source that works; its ``attempts`` say what was tried before it.

    Raises:
        NotPermitted: a capability is missing.
        LibbpfMissing: libbpf is, and nothing else may be tried.
        LoadError: nothing works; ``attempts`` has each candidate that was tried.
    """
    source, attempts, error = _select_source(config)
    if error is not None:
        raise error
    assert source is not None
    source.attempts = attempts
    return source


def open_scan(config: Config) -> EventSource:
    """A source for one scan: strategy ``core`` without hooks, which loads one program and attaches nothing.

    Where that does not work, or other programs are asked for, what `open_source` gives, and raises.
    """
    strategy = next(candidates_to_try(config), None)
    if strategy == "core" and config.hooks == "auto":
        try:
            _check_pid_namespace(config, needs_own=True)
            return BpfSource(config, has_hooks=False)
        except SowatchError as error:
            LOG.debug("one scan without hooks: %s", error)
    return open_source(config)


class Opening:
    """A source that is opened on a thread of its own, while the caller does something else: imports what it needs then.

    A `Watcher` takes it in the place of `open_source`, and closes it.

    Args:
        open_source: `open_source` or `open_scan`.
        config: what it is called with.
    """

    def __init__(self, open_source: Callable[[Config], EventSource], config: Config) -> None:
        self._open_source = open_source
        self._config = config
        self._lock = threading.Lock()
        self._source: EventSource | None = None
        self._error: BaseException | None = None
        self._is_closed = False
        # It comes back from the kernel some fifty times, and would wait each time while others compute.
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread = threading.Thread(target=self._open, name="sowatch-open", daemon=True)
        self._thread.start()

    def __call__(self, config: Config) -> EventSource:
        """The source, which belongs to the caller then; once.

        Raises:
            SowatchError: what opening it has raised.
            UsageError: it has another configuration, or was taken or closed before.
        """
        if config != self._config:
            raise UsageError("a source was opened with another configuration than the Watcher has. Give both the same.")
        self._thread.join()
        source = self._take()
        if self._error is not None:
            raise self._error
        if source is None:
            raise UsageError("a source that is opened beside other work is for one Watcher. Open another one.")
        return source

    def close(self) -> None:
        """Closes the source if nobody has taken it; one that is still being opened once it is. Safe to call again."""
        self._is_closed = True
        source = self._take()
        if source is not None:
            source.close()

    def _take(self) -> EventSource | None:
        with self._lock:
            source, self._source = self._source, None
        return source

    def _open(self) -> None:
        try:
            self._source = self._open_source(self._config)
        except BaseException as error:  # noqa: BLE001 - it goes to the caller
            self._error = error
        finally:
            sys.setswitchinterval(self._switch_interval_s)
        if self._is_closed:
            self.close()


def _select_source(config: Config) -> tuple[EventSource | None, tuple[LoadAttempt, ...], SowatchError | None]:
    """The source or the error, and what was tried. Candidates that need what was found missing are not."""
    attempts: list[LoadAttempt] = []
    first: SowatchError | None = None
    no_bpf: SowatchError | None = None
    for strategy in candidates_to_try(config):
        candidate = CANDIDATES[strategy]
        if candidate.needs_bpf and no_bpf is not None:
            continue
        try:
            if candidate.needs_bpf:
                _check_pid_namespace(config, needs_own=candidate.iterates)
            source = candidate.open(config)
        except SowatchError as error:
            found = _translate(error) if candidate.needs_bpf else error
            attempts.append(LoadAttempt(strategy, False, _reason(found)))
            LOG.info("strategy %s does not work here: %s", strategy, attempts[-1].error)
            first = first or found
            if isinstance(found, NotPermitted | LibbpfMissing):
                no_bpf = found
        else:
            return source, (*attempts, LoadAttempt(strategy, True, None)), None
    assert first is not None
    if isinstance(no_bpf, NotPermitted) or (len(attempts) == 1 and isinstance(first, LibbpfMissing)):
        return None, tuple(attempts), no_bpf
    is_clear = isinstance(first, PidNamespaceError) or (len(attempts) == 1 and isinstance(first, CompileError))
    failure = LoadError(attempts, first.remedy if is_clear else _REMEDY)  # type: ignore[attr-defined]
    failure.__cause__ = first
    return None, tuple(attempts), failure


def _check_pid_namespace(config: Config, *, needs_own: bool) -> None:
    reason = why_not_whole_host(ProcFs(config.proc_root), needs_own=needs_own)
    if reason is not None:
        raise PidNamespaceError(reason)


def _translate(error: SowatchError) -> SowatchError:
    """A kernel's refusal is a missing capability's if one is missing, or of what root has to mount."""
    missing = missing_capabilities() if isinstance(error, BpfError) else ()
    if isinstance(error, TracefsNotMounted) and not missing:
        found = NotPermitted("cannot load BPF programs", error.reason, error.remedy)
        found.__cause__ = error
        return found
    if not missing:
        return error
    found = NotPermitted("cannot load BPF programs", f"missing {' and '.join(missing)}", _REMEDY_ROOT)
    found.__cause__ = error
    return found


def _reason(error: SowatchError) -> str:
    """The reason in one clause, with what is behind the usual error numbers."""
    if isinstance(error, NotPermitted):
        return error.missing
    if isinstance(error, CompileError | PidNamespaceError):
        return error.reason
    reason = str(error).removesuffix(" See `sowatch doctor` for what this kernel can do.").rstrip(".")
    if not isinstance(error, BpfError):
        return reason
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
    source, attempts, error = _select_source(config)
    if source is None:
        is_only_permission = isinstance(error, NotPermitted)
        remedy = error.remedy if isinstance(error, NotPermitted | LoadError) else str(error)
        return Plan(None, None, None, attempts, remedy, is_only_permission)
    remedy = ""
    if not CANDIDATES[source.strategy].needs_bpf:
        if why_not_whole_host(ProcFs(config.proc_root)) is not None:
            remedy = PidNamespaceError.remedy
        elif missing_capabilities():
            remedy = _REMEDY_ROOT
        elif any(attempt.error == TracefsNotMounted.reason for attempt in attempts):
            remedy = TracefsNotMounted.remedy
    found = Plan(source.strategy, source.hooks, source.guarantee, attempts, remedy, limits=source.limits)
    source.close()
    return found
