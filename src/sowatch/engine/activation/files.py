"""FileRegistry: which process holds which file, activation once, deactivation once.

It knows nothing of the kernel or of probes: what "active" means is up to the callbacks. They run outside every lock,
in the thread that found them due; each (rule, file) goes held -> attaching -> attached -> detaching -> held and never
through two of these at once.

Who waits for whom:

* `FileRegistry.acquire` and `FileRegistry.release` never wait.
* `FileRegistry.activate` of a file that another thread is attaching or detaching waits for the outcome. It never runs
  its callback a second time.
* `FileRegistry.deactivate` never waits: if the file is being attached, the thread that does so deactivates it right
  after. A slow activation thus holds up nobody's exit.
* A callback may call the registry, but is refused (`RegistryError`) where it would have to wait
  for another callback: two of them could wait for each other for ever.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from sowatch.engine.activation.blocklist import Blocklist
from sowatch.engine.activation.holdings import Entry, Holder, Holdings, Key
from sowatch.engine.activation.records import BlockedFile, FileCallback, RegisteredFile, RegistryStats
from sowatch.linux.liveness import process_is_alive
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import (
    EnvironmentFault,
    ProcessGone,
    RegistryError,
    RegistryStopped,
)
from sowatch.model.events import Library
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.plural import counted

__all__ = ["FileRegistry"]

_log = logging.getLogger("sowatch.registry")

#: Failures that say nothing of the file: the next try may well succeed, so they do not block.
#: ENOENT and ESRCH mean that the process or its root went away under the callback.
_TRANSIENT_ERRNOS: Final = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOENT,
        errno.ENOMEM,
        errno.ESRCH,
    }
)


class FileRegistry:
    """Who has which file, with a callback once when a file becomes active and once when it ends.

    `acquire` and `release` only count, in constant time and without calling anybody; `activate` and `deactivate` only
    run callbacks. So one thread may count and another one call back, in the order in which the first two returned True.

    Processes are counted, not mappings: a process that maps a file twice has it once, and `ProcessId` values of one
    process from the kernel (ns) and from ``/proc`` (ticks) are one process. All methods may be called from any thread.

    Args:
        config: ``max_blocked``, ``block_ttl_s`` and ``proc_root`` are used.
        clock: seconds, monotonic; for expiry and for ``since_s``.
        is_alive: whether a process still exists. Default: `process_is_alive` below ``proc_root``.

    Raises:
        ProcRootError: ``proc_root`` is none, and ``is_alive`` was not given.

    >>> from sowatch.model.events import Library
    >>> registry = FileRegistry(is_alive=lambda process: True)
    >>> file = Library("/usr/lib/libz.so.1", FileId(8, 1, 42))
    >>> if registry.acquire("zlib", file, ProcessId(1, 0)):
    ...     registry.activate("zlib", file, lambda f: print("attach", f.path))
    attach /usr/lib/libz.so.1
    True
    >>> registry.stats.registered, registry.processes()
    (1, frozenset({ProcessId(pid=1, start_ns=0)}))
    """

    def __init__(
        self,
        config: Config = Config(),  # noqa: B008 - frozen
        *,
        clock: Callable[[], float] = time.monotonic,
        is_alive: Callable[[ProcessId], bool] | None = None,
    ) -> None:
        self._clock = clock
        self._is_alive = is_alive or functools.partial(process_is_alive, proc=ProcFs(config.proc_root))
        # One lock for the maps; no user code, no I/O and no waiting for either below it.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._holdings = Holdings(clock)
        self._blocklist = Blocklist(config.max_blocked, config.block_ttl_s, clock)
        self._counts: Counter[str] = Counter()
        self._stopped = False
        self._clear_errors: list[Exception] = []
        self._here = threading.local()

    # Counting only.

    def acquire(self, rule: str, file: Library, process: ProcessId) -> bool:
        """Counts ``process`` among those that have the file, for the rule. Constant time; calls nobody.

        Returns:
            Whether it is the first one, so that `activate` is due.

        Raises:
            RegistryStopped: after `clear`.
        """
        with self._lock:
            if self._stopped:
                raise RegistryStopped
            entry, newcomer = self._holdings.hold(Key(rule, file.id), file, process)
            if newcomer is not None and len(entry.holders) == 1:
                return True
            self._counts["already_registered"] += 1
            return False

    def release(self, rule: str, file_id: FileId, process: ProcessId) -> bool:
        """Takes ``process`` from those that have the file, for the rule. Constant time; calls nobody.

        Returns:
            Whether it was the last one, so that `deactivate` is due. False also if it did not
            have the file, which is counted (see `RegistryStats`), and after `clear`.
        """
        with self._lock:
            found = self._find(Key(rule, file_id), process)
            return found is not None and self._holdings.let_go(*found)

    # Callbacks only.

    def activate(
        self,
        rule: str,
        file: Library,
        callback: FileCallback,
        *,
        deactivate: FileCallback | None = None,
        process: ProcessId | None = None,
    ) -> bool:
        """Runs ``callback(file)`` in this thread, unless (rule, file) is active or blocked.

        What the callback raises is logged and counted, not raised here. ``deactivate`` is then called once to clean up,
        and the file is blocked, unless the surroundings are at fault: `EnvironmentFault`, `ProcessGone`, an ``OSError``
        like EMFILE that says nothing of the file, or a process that ended meanwhile. Waits if another thread works on
        the same file.

        Args:
            rule: the name activation is counted under.
            file: what is handed to the callbacks.
            callback: activates.
            deactivate: cleans up once if ``callback`` raises, and ends what is still active on
                `clear`. `deactivate` brings its own.
            process: the one the file was met in; if it is gone when the callback has failed,
                the file is not blocked. Default: the first that had it.

        Returns:
            Whether the callback ran and did not raise.

        Raises:
            RegistryError: called from a callback while the file is being attached or detached.
        """
        key = Key(rule, file.id)
        with self._changed:
            while True:
                entry = self._holdings.entries.get(key)
                if self._stopped or (entry is not None and entry.state == "attached"):
                    return False
                if self._blocklist.refusal(*key) is not None:
                    self._counts["blocked"] += 1
                    return False
                if entry is None or entry.state == "held":
                    break
                self._wait(file)
            entry = entry or self._holdings.entry(key, file)
            entry.library = file
            entry.deactivate = deactivate
            entry.off_asked = False
            entry.enter("attaching", self._clock())
            process = process or entry.first
        error = self._attach(entry, callback, process)
        if error is None:
            return True
        if not isinstance(error, Exception):
            raise error
        return False

    def deactivate(self, rule: str, file_id: FileId, callback: FileCallback) -> bool:
        """Runs ``callback`` in this thread, with the `Library` of the activation.

        If another thread is attaching the file at this moment, that thread runs it right after.
        What the callback raises is counted and logged; the file is inactive nevertheless.

        Returns:
            Whether there was something to deactivate. False for a file that is blocked, whose
            activation failed, or that is inactive already.
        """
        with self._changed:
            entry = self._holdings.entries.get(Key(rule, file_id))
            if entry is None or entry.state in ("held", "detaching") or entry.off_asked:
                return False
            entry.deactivate = callback
            if entry.state == "attaching":
                entry.off_asked = True
                return True
            self._begin_detaching(entry)
        self._detach_all([entry])
        return True

    # The end.

    def clear(self, *, timeout_s: float | None = None) -> tuple[Exception, ...]:
        """Deactivates everything and stops the registry for ever. May be called again.

        All files are tried. Waits until callbacks that run in other threads have ended too,
        except when called from a callback; what those were attaching they deactivate.

        Args:
            timeout_s: how long to wait for other threads; None: as long as it takes.

        Returns:
            What deactivate callbacks raised, and a `RegistryError` if the time was up.
        """
        with self._changed:
            self._stopped = True
            self._holdings.let_all_go()
            due = [entry for entry in self._holdings.entries.values() if self._begin_detaching(entry)]
            self._changed.notify_all()
        self._detach_all(due)
        with self._changed:
            if not self._is_in_callback():
                self._changed.wait_for(lambda: not self._holdings.entries, timeout_s)
            errors = tuple(self._clear_errors)
            if self._holdings.entries:
                errors += (
                    RegistryError(
                        f"{counted(len(self._holdings.entries), 'file')} still busy in callbacks: "
                        "each is deactivated as soon as its callback returns."
                    ),
                )
            return errors

    # What is there.

    def processes(self) -> frozenset[ProcessId]:
        """The processes that hold at least one file."""
        with self._changed:
            return frozenset(holder.process for holder in self._holdings.holders.values())

    def files(self) -> tuple[RegisteredFile, ...]:
        """Every (rule, file) that is held or not yet deactivated, oldest first."""
        with self._changed:
            return tuple(entry.record() for entry in self._holdings.entries.values())

    def blocked(self) -> tuple[BlockedFile, ...]:
        """The blocklist, least recently used first. Reading it changes nothing."""
        with self._changed:
            return self._blocklist.entries()

    def clear_blocked(self, rule: str | None = None) -> int:
        """Empties the blocklist, or takes the files of one rule from it, and says how many they were."""
        with self._changed:
            return self._blocklist.clear(rule)

    @property
    def stats(self) -> RegistryStats:
        """All counters, and the gauges as they are now."""
        with self._changed:
            return RegistryStats(
                **self._counts, total_files=len(self._holdings.entries), total_pids=len(self._holdings.holders)
            )

    # Below here: with the lock held.

    def _find(self, key: Key, process: ProcessId) -> tuple[Entry, Holder] | None:
        """The entry and the process, if it holds it; counts why not."""
        if self._stopped:
            return None
        entry = self._holdings.entries.get(key)
        if entry is None:
            self._counts["unregister_path_id_not_found"] += 1
            return None
        holder = self._holdings.holder(process)
        if holder is None or holder not in entry.holders:
            self._counts["unregister_errors"] += 1
            return None
        return entry, holder

    def _begin_detaching(self, entry: Entry) -> bool:
        if entry.state != "attached":
            return False
        entry.enter("detaching", self._clock())
        return True

    def _wait(self, file: Library) -> None:
        if self._is_in_callback():
            raise RegistryError(
                f"{_describe(file)} is being attached or detached, and a callback must not wait for that. "
                "Activate it after the callback has returned."
            )
        self._changed.wait()

    def _is_in_callback(self) -> bool:
        return getattr(self._here, "depth", 0) > 0

    # Below here: without the lock, the entry being ours by its state.

    def _attach(self, entry: Entry, callback: FileCallback, process: ProcessId | None) -> BaseException | None:
        """Runs the callback and enters the next state; the error if it failed."""
        error = self._call(callback, entry.library)
        if error is not None:
            return self._give_up(entry, error, process)
        with self._changed:
            self._counts["registered"] += 1
            is_wanted = not (self._stopped or entry.off_asked)
            entry.enter("attached" if is_wanted else "detaching", self._clock())
            self._changed.notify_all()
        if not is_wanted:
            self._detach_all([entry])
        return None

    def _give_up(self, entry: Entry, error: BaseException, process: ProcessId | None) -> BaseException:
        """Cleans up after a failed activation, blocks the file if it is to blame."""
        cleanup_error = self._call(entry.deactivate, entry.library)
        if cleanup_error is not None:
            _log.error("cannot clean up %s", entry, exc_info=cleanup_error)
        is_gone = process is not None and not self._may_be_alive(process)
        is_to_blame = not is_gone and _blames_file(error)
        reason = str(error) or type(error).__name__
        with self._changed:
            if cleanup_error is not None:
                self._counts["unregister_failed_cb"] += 1
            self._counts["hook_failed" if is_to_blame else "environment_faults"] += 1
            if is_to_blame:
                self._blocklist.add(entry.key.rule, entry.library, reason)
            entry.enter("held", self._clock())
            self._holdings.drop_if_unused(entry)
            self._changed.notify_all()
        outcome = "blocked" if is_to_blame else "not blocked"
        _log.warning("cannot activate %s: %r; %s", entry, reason, outcome)
        return error if cleanup_error is None or isinstance(cleanup_error, Exception) else cleanup_error

    def _may_be_alive(self, process: ProcessId) -> bool:
        """Like ``is_alive``, but an error of that must not leave an entry in the middle of its change."""
        try:
            return self._is_alive(process)
        except Exception:  # noqa: BLE001 - an injected function may raise anything
            _log.exception("cannot determine whether process %d is alive", process.pid)
            return True

    def _detach_all(self, entries: list[Entry]) -> None:
        """Deactivates each, whatever happens to the others; only then lets an interrupt through."""
        interrupt = None
        for entry in entries:
            error = self._call(entry.deactivate, entry.library)
            if error is not None:
                _log.error("cannot deactivate %s", entry, exc_info=error)
            with self._changed:
                self._counts["unregistered"] += 1
                if error is not None:
                    self._counts["unregister_failed_cb"] += 1
                if isinstance(error, Exception):
                    if self._stopped:
                        self._clear_errors.append(error)
                else:
                    interrupt = interrupt or error
                entry.deactivate = None
                entry.off_asked = False
                entry.enter("held", self._clock())
                self._holdings.drop_if_unused(entry)
                self._changed.notify_all()
        if interrupt is not None:
            raise interrupt

    def _call(self, callback: FileCallback | None, library: Library) -> BaseException | None:
        if callback is None:
            return None
        self._here.depth = getattr(self._here, "depth", 0) + 1
        try:
            callback(library)
        except BaseException as error:  # noqa: BLE001 - every caller counts it or raises it
            return error
        finally:
            self._here.depth -= 1
        return None


def _blames_file(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, EnvironmentFault | ProcessGone | MemoryError):
        return False
    return getattr(error, "errno", None) not in _TRANSIENT_ERRNOS


def _describe(file: Library) -> str:
    return f"{file.path} ({file.id})"
