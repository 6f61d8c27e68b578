"""FileRegistry: which process holds which file, activation once, deactivation once.

It knows nothing of the kernel or of probes: what "active" means is up to the callbacks. They run outside every lock,
in the thread that found them due; each (rule, file) goes held -> attaching -> attached -> detaching -> held and never
through two of these at once.

Who waits for whom:

* A `FileRegistry.register` of a file that another thread is attaching or detaching waits for the
  outcome, because it has to tell its caller one. It never runs ``activate`` a second time.
* Everything that takes away (`unregister`, `unregister_file`, `deactivate`) never waits: if the
  file is being attached, the thread that does so deactivates it right after. A slow activation
  thus holds up nobody's exit.
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
    AlreadyRegistered,
    CallbackMissing,
    EnvironmentFault,
    FileBlocked,
    ProcessGone,
    RegistryError,
    RegistryStopped,
)
from sowatch.model.events import Library
from sowatch.model.identity import FileId, ProcessId

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

    There are two ways to use it; take one per rule name:

    * `register`, `unregister`, `unregister_file`: counting and callbacks in one call.
    * `acquire` and `release` only count, in constant time and without calling anybody;
      `activate` and `deactivate` only run callbacks. This is for a caller that counts in one
      thread and calls back in another, in the order the first two returned True.

    Holders are processes, not mappings: a process that maps a file twice holds it once, and
    `ProcessId` values of one process from the kernel (ns) and from ``/proc`` (ticks) are one
    holder. All methods may be called from any thread.

    Args:
        config: ``max_blocked``, ``block_ttl_s`` and ``proc_root`` are used.
        clock: seconds, monotonic; for expiry and for ``since_s``.
        is_alive: whether a process still exists. Default: `process_is_alive` below ``proc_root``.

    Raises:
        ProcRootError: ``proc_root`` is none, and ``is_alive`` was not given.

    >>> from sowatch.model.events import Library
    >>> registry = FileRegistry(is_alive=lambda process: True)
    >>> file = Library("/usr/lib/libz.so.1", FileId(8, 1, 42))
    >>> registry.register(file, ProcessId(1, 0), activate=lambda f: None, deactivate=lambda f: None)
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
        self._changed = threading.Condition(threading.Lock())
        self._holdings = Holdings(clock)
        self._blocklist = Blocklist(config.max_blocked, config.block_ttl_s, clock)
        self._counts: Counter[str] = Counter()
        self._stopped = False
        self._clear_errors: list[Exception] = []
        self._here = threading.local()

    # Counting and callbacks in one call.

    def register(
        self,
        file: Library,
        process: ProcessId,
        *,
        rule: str = "default",
        activate: FileCallback | None,
        deactivate: FileCallback | None,
        already_registered: FileCallback | None = None,
    ) -> None:
        """Makes ``process`` a holder of ``file``, and activates the file if it is the first.

        While another thread attaches or detaches the file, waits for its outcome. If ``activate``
        raises, ``deactivate`` is called once to clean up, the process is no holder, and the file
        is blocked, unless the surroundings are at fault: `EnvironmentFault`, `ProcessGone`, an
        ``OSError`` like EMFILE that says nothing of the file, or a process that died meanwhile.

        Args:
            file: what is handed to the callbacks; its ``id`` is what counts.
            process: who holds it.
            rule: the name activation is counted under.
            activate: called if the file becomes active. May take its time.
            deactivate: called when the last holder is gone, with the same `Library`.
            already_registered: called if the file is active already, just before that is raised.

        Raises:
            CallbackMissing: ``activate`` or ``deactivate`` is None.
            ProcessGone: the process does not exist any more; it holds nothing now.
            RegistryStopped: after `clear`.
            FileBlocked: an earlier activation failed.
            AlreadyRegistered: the file is active; the process is one of its holders now.
            RegistryError: called from a callback while the file is being attached or detached.
            Exception: what ``activate`` raised.
        """
        if activate is None or deactivate is None:
            raise CallbackMissing
        if not self._is_alive(process):
            raise ProcessGone(process.pid)
        key = Key(rule, file.id)
        due = self._hold_when_settled(key, file, process, deactivate)
        if due is not None:
            entry, newcomer = due
            error = self._attach(entry, activate, process, newcomer)
            if error is not None:
                raise error
            if self._stopped:
                raise RegistryStopped
        # An exit that was handled before we became a holder will not come again.
        if not self._is_alive(process):
            self.unregister(process)
            raise ProcessGone(process.pid)
        if due is None:
            self._refuse_active(file, already_registered)

    def unregister(self, process: ProcessId) -> int:
        """Releases every file of a process, and deactivates those it was the last holder of.

        All of them are tried; a deactivate callback that raises is counted and logged. Does not
        wait for a file that another thread is attaching: that thread deactivates it. Does
        nothing for a process that holds nothing, so it can be called for every exit.

        Returns:
            How many files the process held.
        """
        with self._changed:
            holder = self._holdings.holder(process)
            if holder is None:
                return 0
            held = list(holder.entries)
            due = [entry for entry in held if self._holdings.let_go(entry, holder) and self._begin_detaching(entry)]
        self._detach_all(due)
        return len(held)

    def unregister_file(self, rule: str, file_id: FileId, process: ProcessId) -> bool:
        """Releases one file of a process, and deactivates it if that was the last holder.

        Returns:
            Whether the process held it. If not, that is counted (see `RegistryStats`).
        """
        with self._changed:
            found = self._find(Key(rule, file_id), process)
            if found is None:
                return False
            due = [found[0]] if self._holdings.let_go(*found) and self._begin_detaching(found[0]) else []
        self._detach_all(due)
        return True

    # Counting only.

    def acquire(self, rule: str, file: Library, process: ProcessId) -> bool:
        """Makes ``process`` a holder of (rule, file). Constant time; calls nobody.

        Returns:
            Whether it is the first one, so that `activate` is due.

        Raises:
            RegistryStopped: after `clear`.
        """
        with self._changed:
            if self._stopped:
                raise RegistryStopped
            entry, newcomer = self._holdings.hold(Key(rule, file.id), file, process)
            if newcomer is not None and len(entry.holders) == 1:
                return True
            self._counts["already_registered"] += 1
            return False

    def release(self, rule: str, file_id: FileId, process: ProcessId) -> bool:
        """Takes ``process`` from the holders of (rule, file). Constant time; calls nobody.

        Returns:
            Whether it was the last one, so that `deactivate` is due. False also if it held
            nothing, which is counted, and after `clear`.
        """
        with self._changed:
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

        What the callback raises is logged, counted and blocks the file by the rules of
        `register`; it is not raised here. Waits if another thread works on the same file.

        Args:
            rule: the name activation is counted under.
            file: what is handed to the callbacks.
            callback: activates.
            deactivate: cleans up once if ``callback`` raises, and ends what is still active on
                `clear`. `deactivate` brings its own.
            process: the one the file was met in; if it is gone when the callback has failed,
                the file is not blocked. Default: the first holder that is known.

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
            self._begin_attaching(entry, file, deactivate, counted=False)
            process = process or entry.first
        error = self._attach(entry, callback, process, None)
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
                        f"{len(self._holdings.entries)} files are still busy in callbacks. "
                        "Each is deactivated as soon as its callback returns."
                    ),
                )
            return errors

    # What is there.

    @property
    def is_stopped(self) -> bool:
        """Whether `clear` was called."""
        return self._stopped

    def processes(self) -> frozenset[ProcessId]:
        """The processes that hold at least one file."""
        with self._changed:
            return frozenset(holder.process for holder in self._holdings.holders.values())

    def files(self) -> tuple[RegisteredFile, ...]:
        """Every (rule, file) that is held or not yet deactivated, oldest first."""
        with self._changed:
            return tuple(entry.record() for entry in self._holdings.entries.values())

    def blocked(self) -> tuple[BlockedFile, ...]:
        """The blocklist, least recently used first. Looking at it changes nothing."""
        with self._changed:
            return self._blocklist.entries()

    def clear_blocked(self) -> int:
        """Empties the blocklist, and says how many files were on it."""
        with self._changed:
            return self._blocklist.clear()

    @property
    def stats(self) -> RegistryStats:
        """All counters, and the gauges as they are now."""
        with self._changed:
            return RegistryStats(
                **self._counts, total_files=len(self._holdings.entries), total_pids=len(self._holdings.holders)
            )

    # Below here: with the lock held.

    def _hold_when_settled(
        self, key: Key, file: Library, process: ProcessId, deactivate: FileCallback
    ) -> tuple[Entry, Holder | None] | None:
        """None if the file is active; else the entry, which the caller now has to attach."""
        newcomer = None
        with self._changed:
            while True:
                # The holder may go while we wait (clear, a failed activation for the same process),
                # so each turn makes sure of it again.
                if self._stopped:
                    raise RegistryStopped
                block = self._blocklist.refusal(*key)
                if block is not None:
                    self._counts["blocked"] += 1
                    self._take_back(key, newcomer)
                    raise FileBlocked(_describe(file), block.reason)
                entry, added = self._holdings.hold(key, file, process)
                newcomer = added or newcomer
                if entry.state == "attached":
                    self._counts["already_registered"] += 1
                    return None
                if entry.state == "held":
                    self._begin_attaching(entry, file, deactivate, counted=True)
                    return entry, newcomer
                try:
                    self._wait(file)
                except RegistryError:
                    self._take_back(key, newcomer)
                    raise

    def _take_back(self, key: Key, newcomer: Holder | None) -> None:
        entry = self._holdings.entries.get(key)
        if entry is not None and newcomer is not None:
            self._holdings.let_go(entry, newcomer)

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

    def _begin_attaching(self, entry: Entry, file: Library, deactivate: FileCallback | None, *, counted: bool) -> None:
        entry.library = file
        entry.deactivate = deactivate
        entry.counted = counted
        entry.off_asked = False
        entry.enter("attaching", self._clock())

    def _begin_detaching(self, entry: Entry) -> bool:
        if entry.state != "attached":
            return False
        entry.enter("detaching", self._clock())
        return True

    def _wait(self, file: Library) -> None:
        if self._is_in_callback():
            raise RegistryError(
                f"{_describe(file)} is being attached or detached, and a callback must not wait for that. "
                "Register it after the callback has returned."
            )
        self._changed.wait()

    def _is_in_callback(self) -> bool:
        return getattr(self._here, "depth", 0) > 0

    # Below here: without the lock, the entry being ours by its state.

    def _attach(
        self, entry: Entry, callback: FileCallback, process: ProcessId | None, newcomer: Holder | None
    ) -> BaseException | None:
        """Runs the callback and settles the entry; the error to raise if it failed."""
        error = self._call(callback, entry.library)
        if error is not None:
            return self._give_up(entry, error, process, newcomer)
        with self._changed:
            self._counts["registered"] += 1
            is_wanted = not (self._stopped or entry.off_asked or (entry.counted and not entry.holders))
            entry.enter("attached" if is_wanted else "detaching", self._clock())
            self._changed.notify_all()
        if not is_wanted:
            self._detach_all([entry])
        return None

    def _give_up(
        self, entry: Entry, error: BaseException, process: ProcessId | None, newcomer: Holder | None
    ) -> BaseException:
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
            if newcomer is not None:
                self._holdings.let_go(entry, newcomer)
            self._holdings.drop_if_unused(entry)
            self._changed.notify_all()
        outcome = "blocked" if is_to_blame else "not blocked"
        _log.warning("cannot activate %s: %r; %s", entry, reason, outcome)
        if cleanup_error is not None and not isinstance(cleanup_error, Exception):
            return cleanup_error
        if is_gone and process is not None and isinstance(error, Exception) and not isinstance(error, ProcessGone):
            gone = ProcessGone(process.pid)
            gone.__cause__ = error
            return gone
        return error

    def _may_be_alive(self, process: ProcessId) -> bool:
        """Like ``is_alive``, but an error of that must not leave an entry in the middle of its change."""
        try:
            return self._is_alive(process)
        except Exception:  # noqa: BLE001 - an injected function may raise anything
            _log.exception("cannot tell whether process %d is alive", process.pid)
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

    def _refuse_active(self, file: Library, already_registered: FileCallback | None) -> None:
        error = self._call(already_registered, file)
        if error is not None and not isinstance(error, Exception):
            raise error
        raise AlreadyRegistered(_describe(file)) from error

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
