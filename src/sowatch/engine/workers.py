"""Callbacks of rules: what ``on_activate`` gets, and the thread that runs those of one rule.

A slow callback delays only its own rule.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sowatch.engine.activation import FileRegistry
from sowatch.engine.failure_log import FailureLog
from sowatch.engine.file_inspector import open_mapped
from sowatch.engine.subscribers import Subscribers
from sowatch.engine.subscription import SubscriberQueue
from sowatch.linux.descriptors import close_fd
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import EnvironmentFault, FileRefused, ProcessGone, SowatchError
from sowatch.model.events import Activate, Deactivate, Event, Library, Load, Unload
from sowatch.model.histogram import CALLBACKS, RuleTimings
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule

__all__ = ["ActiveFile", "RuleWorker", "open_active"]

LOG = logging.getLogger("sowatch")

T = TypeVar("T")
E = TypeVar("E", Load, Unload)


class ActiveFile:
    """What ``on_activate`` gets: the library, and an open descriptor of that very file.

    The descriptor is the watcher's and is closed when ``on_activate`` has returned; ``os.dup`` it
    to keep it. ``path`` opens the same inode, whatever has become of its name.
    """

    __slots__ = ("_fd", "library")

    def __init__(self, library: Library, fd: int) -> None:
        self.library = library
        self._fd = fd

    def __repr__(self) -> str:
        return f"<ActiveFile {self.library.path!r} {f'fd {self._fd}' if self.is_open else 'closed'}>"

    @property
    def is_open(self) -> bool:
        """Whether the descriptor can be used."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor.

        Raises:
            SowatchError: it was closed.
        """
        if self._fd < 0:
            raise SowatchError(
                "the file was closed when on_activate returned. Use os.dup(file.fileno()) in on_activate to keep it."
            )
        return self._fd

    @property
    def path(self) -> str:
        """``/proc/self/fd/N``: attach through this, never through a name that may change."""
        return f"/proc/self/fd/{self.fileno()}"

    def close(self) -> None:
        """Closes the descriptor. Safe to call again."""
        fd, self._fd = self._fd, -1
        close_fd(fd)


def open_active(proc: ProcFs, pid: int, library: Library, ranges: tuple[tuple[int, int], ...]) -> ActiveFile | None:
    """The very file that a process has mapped in these ranges, which the caller closes; None: it has it no more."""
    fd = open_mapped(
        proc,
        pid,
        library.id,
        library.path,
        ranges,
        is_own_view=library.host_path == library.path,
        is_deleted=library.deleted,
        changed_ns=library.changed_ns,
    )
    return None if fd is None else ActiveFile(library, fd)


class RuleWorker:
    """Runs the callbacks of one rule, in the order things happened, from `begin` on.

    Args:
        rule: whose callbacks.
        subscription: of the rule's events, not yet added; the worker ends when it ends.
        registry: activates.
        proc: the host's.
        after: the worker of a rule of the same name that this one replaces; it has to end first.
    """

    def __init__(
        self,
        rule: Rule,
        subscription: SubscriberQueue,
        registry: FileRegistry,
        proc: ProcFs,
        after: RuleWorker | None = None,
    ) -> None:
        self._rule = rule
        self._after = after
        self._subscription = subscription
        self._registry = registry
        self._proc = proc
        self._active: dict[FileId, ActiveFile] = {}
        #: The files whose next activate event may be a retry: one of each waits at most.
        self._retried: set[FileId] = set()
        #: Callbacks that raised, of every kind.
        self.errors = 0
        self._failure: BaseException | None = None
        self._failures = FailureLog(LOG)
        self.timings = RuleTimings([name for name in CALLBACKS if getattr(rule, name) is not None])
        #: CLOCK_MONOTONIC; what the snapshot found has waited for the watch, not for its callback.
        self.live_since_ns = sys.maxsize
        self._thread = threading.Thread(target=self._run, name=f"sowatch-rule-{rule.name}"[:60], daemon=True)

    def begin(self, subscribers: Subscribers) -> None:
        """Takes events from the next one on. On the engine's thread, or before that runs."""
        subscribers.add(self._subscription)
        self._thread.start()

    @property
    def rule(self) -> Rule:
        """Whose callbacks it runs."""
        return self._rule

    @property
    def has_ended(self) -> bool:
        """Whether it has run its last callback."""
        return not self._thread.is_alive()

    def retire(self) -> None:
        """Its rule is gone: it ends after what it was offered so far. On the engine's thread."""
        self._subscription.finish()

    def retry(self, load: Load) -> None:
        """Activates the file of a load once more, as its activation has failed. On the engine's thread."""
        file = load.library.id
        if file in self._retried:
            return
        self._retried.add(file)  # first, as the worker takes it out
        where = (load.ranges, load.range_count)
        again = Activate(load.rule, load.library, load.process, None, load.t_ns, time.time_ns(), *where)
        if not self._subscription.offer_again(again):
            self._retried.discard(file)

    def join(self, timeout_s: float) -> None:
        """Waits for the last callback, and says so if it takes longer than that."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                LOG.warning("a callback of rule %r is still running after %.1f s", self._rule.name, timeout_s)

    def _run(self) -> None:
        if self._after is not None:
            self._after.join_at_last()
            self._after = None
        # What an earlier rule of this name could not activate, this one may be able to.
        self._registry.clear_blocked(self._rule.name)
        for event in self._subscription:
            try:
                self._take(event)
            except BaseException as error:  # noqa: BLE001 - a SystemExit would end the thread in silence
                if error is not self._failure:
                    self._note_failure("a callback", error)

    def _take(self, event: Event) -> None:
        match event:
            case Activate():
                self._activate(event)
            case Deactivate():
                self._deactivate(event)
            case Load():
                self._call("on_load", self._rule.on_load, event)
            case Unload():
                self._call("on_unload", self._rule.on_unload, event)

    def join_at_last(self) -> None:
        """Waits for the last callback, however long it takes."""
        self._thread.join()

    def _activate(self, event: Activate) -> None:
        self._retried.discard(event.library.id)
        rule = self._rule
        if rule.on_activate is None and rule.on_deactivate is None:
            return
        self._registry.activate(
            rule.name,
            event.library,
            lambda library: self._open_and_call(event, library),
            deactivate=self._call_deactivate,
            process=event.process.id,
        )

    def _open_and_call(self, event: Activate, library: Library) -> None:
        begun_s = time.monotonic()
        try:
            self._attach(event, library)
        finally:
            self.timings.attach.observe(time.monotonic() - begun_s)

    def _attach(self, event: Activate, library: Library) -> None:
        file = open_active(self._proc, event.process.pid, library, event.ranges)
        if file is None:
            raise ProcessGone(event.process.pid)
        self._active[library.id] = file
        try:
            if self._rule.on_activate is not None:
                self._note_delay("on_activate", event)
                self._timed("on_activate", self._rule.on_activate, file)
        finally:
            file.close()

    def _deactivate(self, event: Deactivate) -> None:
        self._registry.deactivate(self._rule.name, event.library.id, self._call_deactivate)

    def _call_deactivate(self, library: Library) -> None:
        file = self._active.pop(library.id, None)
        if self._rule.on_deactivate is not None:
            self._timed("on_deactivate", self._rule.on_deactivate, file or ActiveFile(library, -1))

    def _timed(self, name: str, callback: Callable[[T], Any], argument: T) -> None:
        begun_s = time.monotonic()
        try:
            callback(argument)
        except (EnvironmentFault, FileRefused):  # no failure of the callback
            raise
        except BaseException as error:
            self._note_failure(name, error)
            raise
        finally:
            self.timings.callbacks[name].observe(time.monotonic() - begun_s)

    def _note_failure(self, name: str, error: BaseException) -> None:
        self._failure = error
        self.errors += 1
        self._failures.note(f"{name} of rule {self._rule.name!r}", error)

    def _note_delay(self, name: str, event: Load | Activate) -> None:
        if event.t_ns is not None and event.t_ns > self.live_since_ns and event.cause != "repair":
            self.timings.delays[name].observe((time.monotonic_ns() - event.t_ns) / 1e9)

    def _call(self, name: str, callback: Callable[[E], Any] | None, event: E) -> None:
        if callback is None:
            return
        if isinstance(event, Load):
            self._note_delay(name, event)
        self._timed(name, callback, event)
