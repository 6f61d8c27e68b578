"""ProcessMonitor: reports every exec, fork and exit on the host."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError
from sowatch.model.literals import ProcessKind
from sowatch.model.process_events import ProcessCallback, ProcessFeed, ProcessMonitorStats, Unsubscribe
from sowatch.sources.process_feeds import KernelProcessFeed, PolledProcessFeed
from sowatch.watcher.delivery import Counts, Subscribers, Subscription
from sowatch.watcher.run import Run

__all__ = ["ProcessMonitor", "process_monitor"]

LOG = logging.getLogger("sowatch")


class ProcessMonitor:
    """Reports every exec, fork and exit, and makes good what was lost.

    Callbacks run in one thread of their own, in the order things happened. One that raises is
    counted and logged, and the others still run; one that is slow fills the queue
    (``config.queue_events``). What finds it full, and what the feed could not collect, is counted,
    and then ``/proc`` is compared with what was reported: subscribers get the difference with cause
    ``repair``. A process that came and went in between is only in the counts.

    Users are counted: each `start` needs one `stop`, and the last one stops it. Subscriptions
    outlive a stop; they end when they are ended.

    Args:
        feed: where facts come from. Opened by the first `start`, closed after the last `stop`.
        config: ``queue_events`` and ``proc_root`` are used.
        scan: give exec subscribers each process that exists already, with cause ``scan``: at the
            start, or when they subscribe later. Without it that is only taken note of.
        stop_timeout_s: how long `stop` waits for callbacks.
    """

    def __init__(
        self,
        feed: ProcessFeed,
        *,
        config: Config = Config(),  # noqa: B008 - frozen
        scan: bool = True,
        stop_timeout_s: float = 1.0,
    ) -> None:
        self._feed = feed
        self._config = config
        self._scan = scan
        self._stop_timeout_s = stop_timeout_s
        self._counts = Counts()
        self._users_lock = threading.Lock()
        self._users = 0
        # The one that runs, or the last one that did.
        self._run: Run | None = None
        self._subscribers = Subscribers()

    @classmethod
    def shared(cls, make_feed: Callable[[], ProcessFeed], *, config: Config | None = None) -> ProcessMonitor:
        """The process-wide default monitor, started; each call needs one `stop`.

        It is made by the first call, with the feed that ``make_feed`` gives, and again by the
        first one after it was stopped. This is the only default; code that takes a monitor as an
        argument can be given another one.

        Raises:
            SowatchError: the feed cannot be opened; there is no default then.
        """
        with _default.lock:
            monitor = _default.monitor
            if monitor is None or not monitor.start_if_running():
                monitor = cls(make_feed(), config=config or Config())
                monitor.start()
                _default.monitor = monitor
            return monitor

    def start(self) -> None:
        """Begins, or counts one more user. What happens after it has returned is reported.

        Raises:
            ProcRootError: ``config.proc_root`` is none.
            SowatchError: the feed cannot be opened.
        """
        with self._users_lock:
            if self._users == 0:
                if self._run is not None and not self._run.join():
                    raise SowatchError(
                        "the process monitor has not stopped yet: its feed does not come back. Try again later."
                    )
                proc = ProcFs(self._config.proc_root)
                run = Run(self._feed, proc, self._config, self._subscribers, self._counts, scan=self._scan)
                # Before it starts, so that a subscriber finds either the run or its scan.
                self._run = run
                try:
                    run.start()
                except BaseException:
                    self._run = None
                    raise
            self._users += 1

    def start_if_running(self) -> bool:
        """Counts one more user if there is one already; whether that is so."""
        with self._users_lock:
            if self._users == 0:
                return False
            self._users += 1
            return True

    def stop(self) -> None:
        """Counts one user less; the last one stops everything. Too many calls do no harm.

        Events that wait are delivered for up to ``stop_timeout_s``, the rest are counted as lost.
        Returns after that time at the latest, even if a callback blocks. May be called from a
        callback.
        """
        with self._users_lock:
            if self._users == 0:
                return
            self._users -= 1
            if self._users or self._run is None:
                return
            run = self._run
            run.ask_to_stop(self._stop_timeout_s)
        run.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def on_exec(self, callback: ProcessCallback) -> Unsubscribe:
        """Calls ``callback`` with each exec, and with the processes that exist (see ``scan``).

        Returns:
            A function that ends the subscription. It may be called from anywhere, callbacks
            included, and again; a call that is under way in the other thread is not waited for.
        """
        return self._subscribe("exec", callback)

    def on_fork(self, callback: ProcessCallback) -> Unsubscribe:
        """Calls ``callback`` with each new process. Otherwise like `on_exec`, without the scan."""
        return self._subscribe("fork", callback)

    def on_exit(self, callback: ProcessCallback) -> Unsubscribe:
        """Calls ``callback`` when the last thread of a process ends. Otherwise like `on_fork`."""
        return self._subscribe("exit", callback)

    @property
    def is_running(self) -> bool:
        """Whether somebody uses it now."""
        return self._users > 0

    @property
    def stats(self) -> ProcessMonitorStats:
        """The counters since the monitor was made."""
        run = self._run
        return ProcessMonitorStats(**self._counts.read(), processes=len(run.known) if run and self._users else 0)

    def _subscribe(self, kind: ProcessKind, callback: ProcessCallback) -> Unsubscribe:
        subscription = Subscription(kind, callback)
        with self._subscribers.lock:
            self._subscribers.add(subscription)
            if kind == "exec" and self._run is not None:
                self._run.catch_up(subscription)

        def unsubscribe() -> None:
            with self._subscribers.lock:
                self._subscribers.remove(subscription)

        return unsubscribe


class _Default:
    """The default monitor of this process; see `ProcessMonitor.shared`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.monitor: ProcessMonitor | None = None


_default: Final = _Default()


def process_monitor(config: Config | None = None) -> ProcessMonitor:
    """The one `ProcessMonitor` of this Python process, started; each call needs one ``stop``.

    Where BPF programs cannot be loaded it polls ``/proc``, says so in the log, and sees less: see
    `PolledProcessFeed`. So with ``strategy="procfs"``; not with another one, nor without
    ``allow_procfs_fallback``.

    Raises:
        NotPermitted: this user may not load BPF programs, and ``config`` does not allow polling.

    >>> monitor = process_monitor()  # doctest: +SKIP
    >>> unsubscribe = monitor.on_exec(lambda event: print(event.process.pid, event.process.exe))  # doctest: +SKIP
    """
    chosen = config or Config()
    if chosen.strategy == "procfs":
        return ProcessMonitor.shared(lambda: PolledProcessFeed(chosen), config=config)
    try:
        return ProcessMonitor.shared(lambda: KernelProcessFeed(chosen), config=config)
    except SowatchError as error:
        if chosen.strategy != "auto" or not chosen.allow_procfs_fallback:
            raise
        LOG.warning("processes are found by polling %s every %g s: %s", chosen.proc_root, chosen.poll_interval_s, error)
        return ProcessMonitor.shared(lambda: PolledProcessFeed(chosen), config=config)
