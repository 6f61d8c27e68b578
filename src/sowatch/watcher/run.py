"""One run of a process monitor, from a start to its stop: drains the feed, reports, repairs.

The thread here is never held up by user code: what finds the queue full is counted and found again by comparing with
``/proc``.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import Counter
from typing import Final

from sowatch.linux.proc import ProcFs
from sowatch.linux.wake import Wake
from sowatch.model.config import Config
from sowatch.model.errors import SowatchError
from sowatch.model.process_events import ProcessEvent, ProcessFeed
from sowatch.watcher.delivery import Counts, Delivery, Subscribers, Subscription
from sowatch.watcher.known import KnownProcesses, Seen, describe, look

__all__ = ["Run"]

_log = logging.getLogger("sowatch.processes")

#: A full ring wakes nobody, so the feed is asked for its losses at least this often.
_LOST_POLL_S: Final = 1.0
#: Between two repairs, or two tries to open a feed again; doubled while it does not get better.
_FIRST_BACKOFF_S: Final = 0.05
_LAST_BACKOFF_S: Final = 2.0

_BROKEN: Final = select.POLLERR | select.POLLNVAL


class Run:
    """See the module. ``subscribers.lock`` guards ``known`` and the order in which things are queued."""

    def __init__(
        self,
        feed: ProcessFeed,
        proc: ProcFs,
        config: Config,
        subscribers: Subscribers,
        counts: Counts,
        *,
        scan: bool,
    ) -> None:
        self.known = KnownProcesses()
        self._feed = feed
        self._proc = proc
        self._subscribers = subscribers
        self._counts = counts
        self._scan = scan
        self._wake = Wake()
        self._delivery = Delivery(config.queue_events, config.queue_bytes, counts, on_room=self._wake)
        self._stopping = threading.Event()
        self._deadline_s = 0.0
        self._thread = threading.Thread(target=self._main, name="sowatch-process-drain", daemon=True)
        # The rest belongs to that thread.
        self._is_open = False
        self._has_baseline = False
        self._lost = 0
        self._is_repair_due = False
        self._next_look_s = 0.0
        self._backoff_s = _FIRST_BACKOFF_S
        self._opened_s = 0.0
        self._reopen_delay_s = 0.0

    def start(self) -> None:
        """Opens the feed and starts the threads; on an error nothing is left."""
        try:
            self._feed.open()
            self._is_open = True
            self._opened_s = time.monotonic()
            self._delivery.start()
            self._thread.start()
        except BaseException:
            self._delivery.finish(0.0)
            self._close()
            raise

    def ask_to_stop(self, timeout_s: float) -> None:
        """Returns at once. What the feed has now is still reported."""
        self._deadline_s = time.monotonic() + timeout_s
        self._stopping.set()
        self._wake()

    def join(self) -> bool:
        """Waits for the end, as long as `ask_to_stop` gave; whether the feed is free again."""
        self._thread.join(max(0.0, self._deadline_s - time.monotonic()))
        # If the drain is stuck it cannot say that nothing more comes.
        self._delivery.finish(self._deadline_s)
        if not self._delivery.join():
            _log.warning("a process callback still runs; it was not waited for any longer")
        return not self._thread.is_alive()

    def catch_up(self, subscription: Subscription) -> None:
        """Gives a late subscriber what is known; what the baseline adds it gets with the others. Under the lock."""
        if self._scan and not self._stopping.is_set():
            self._delivery.put_scan(self.known.scan(), (subscription,))

    def _main(self) -> None:
        try:
            while not self._stopping.is_set():
                self._cycle()
            if self._is_open:
                self._drain()
        except Exception:  # noqa: BLE001 - counted; there is nobody to raise it to
            self._counts.add("feed_errors")
            _log.exception("the last events of the process feed could not be read")
        finally:
            try:
                self._close()
            except Exception:  # noqa: BLE001 - as above
                self._counts.add("feed_errors")
                _log.exception("the process feed could not be closed")
            self._delivery.finish(self._deadline_s)

    def _close(self) -> None:
        self._wake.close()
        if self._is_open:
            self._is_open = False
            self._feed.close()

    def _cycle(self) -> None:
        try:
            self._look_if_due()
            self._wait()
            self._drain()
        except SowatchError as error:
            self._reopen(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, monitoring must not end in silence
            self._reopen(error)

    def _wait(self) -> None:
        """Until there is something to drain or to repair, or it is time to ask for losses."""
        timeout_s = _LOST_POLL_S
        if self._is_look_due():
            timeout_s = min(timeout_s, max(0.0, self._next_look_s - time.monotonic()))
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        fd = self._feed.fileno()
        poll.register(fd, select.POLLIN)
        # Rounded up: a poll that returns too early would come round again and again.
        found = dict(poll.poll(int(timeout_s * 1000) + 1))
        if self._wake.fd in found:
            self._wake.clear()
        events = found.get(fd, 0)
        if events & _BROKEN or events == select.POLLHUP:
            raise SowatchError("the descriptor of the process feed broke. It is opened again.")

    def _drain(self) -> None:
        events = self._feed.drain()
        kinds = Counter[str](event.kind for event in events)
        for kind, count in kinds.items():
            self._counts.add(kind, count)
        self._counts.add("events", len(events))
        for event in events:
            self._pass_on(event)
        lost = self._feed.lost()
        if lost > self._lost:
            self._counts.add("lost_kernel", lost - self._lost)
            self._lost = lost
            self._is_repair_due = True

    def _pass_on(self, event: ProcessEvent) -> None:
        with self._subscribers.lock:
            for one in self.known.news(event):
                if not self._emit(one):
                    self._counts.add("lost_queue")
                    self._is_repair_due = True
                    return

    def _emit(self, event: ProcessEvent, seen: Seen | None = None) -> bool:
        """Queues an event and takes note of it. The lock is held by the caller."""
        if not self._delivery.put(event, self._subscribers.of(event.kind)):
            self.known.untold(event)
            return False
        self.known.reported(event, seen)
        return True

    # Scans of /proc: the baseline once, and repairs.

    def _is_look_due(self) -> bool:
        # Without space a repair would get nowhere; the delivery wakes us when there is some.
        return not self._has_baseline or (self._is_repair_due and self._delivery.has_room)

    def _look_if_due(self) -> None:
        now_s = time.monotonic()
        if not self._is_look_due() or now_s < self._next_look_s:
            return
        if now_s > self._next_look_s + _LAST_BACKOFF_S:
            self._backoff_s = _FIRST_BACKOFF_S
        try:
            if not self._has_baseline:
                self._take_baseline()
                return  # no backoff: the first repair may follow at once
            # It drains, and what it loses then is due again.
            self._is_repair_due = False
            if not self._repair():
                self._is_repair_due = True
        except SowatchError as error:
            self._is_repair_due = True
            self._counts.add("scan_failed")
            _log.warning("cannot compare with %s: %s", self._proc.root, error)
        self._next_look_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _LAST_BACKOFF_S)

    def _take_baseline(self) -> None:
        found = []
        for seen in look(self._proc).values():
            if self._stopping.is_set():
                return
            process = describe(self._proc, seen)
            if process is not None:
                found.append((process, seen))
        with self._subscribers.lock:
            added = {process.pid for process, seen in found if self.known.add(process, seen, is_reported=self._scan)}
            if self._scan:
                self._delivery.put_scan(self.known.scan(added), self._subscribers.of("exec"))
            self._has_baseline = True

    def _repair(self) -> bool:
        """Reports the difference between ``/proc`` and what was reported; False if the queue was too full for it."""
        began_ns = time.monotonic_ns()
        looked = look(self._proc)
        if self._is_open:
            # What happened before the scan is reported as the event it is, in its order.
            self._drain()
        with self._subscribers.lock:
            exits, new, changed = self.known.compare(looked, began_ns)
            if not all(self._emit(event) for event in exits):
                return False
        is_complete = all(self._emit_seen(seen, is_new=True) for seen in new) and all(
            self._emit_seen(seen, is_new=False) for seen in changed
        )
        if is_complete:
            self._counts.add("repairs")
            found = len(exits) + len(new) + len(changed)
            _log.warning(
                "process events were lost; %s showed %d changes that were not reported", self._proc.root, found
            )
        return is_complete

    def _emit_seen(self, seen: Seen, *, is_new: bool) -> bool:
        if self._stopping.is_set():
            return False
        process = describe(self._proc, seen)
        if process is None:
            return True  # gone since; the feed reports it, or loses that too
        with self._subscribers.lock:
            parent = self.known.parent_of(seen.ppid)
            if is_new and not self._emit(ProcessEvent("fork", process, parent, seen.t_ns, "repair"), seen):
                return False
            if seen.is_kernel_thread:
                return True
            return self._emit(ProcessEvent("exec", process, parent, seen.t_ns, "repair"), seen)

    def _reopen(self, error: Exception) -> None:
        """Gets a broken feed going again. Meanwhile ``/proc`` is compared, so nothing stays unreported."""
        _log.warning("the process feed failed and is opened again: %s", error, exc_info=error)
        if time.monotonic() > self._opened_s + _LAST_BACKOFF_S:
            self._reopen_delay_s = 0.0
        while not self._stopping.wait(self._reopen_delay_s):
            self._reopen_delay_s = min(max(2 * self._reopen_delay_s, _FIRST_BACKOFF_S), _LAST_BACKOFF_S)
            self._counts.add("feed_errors")
            self._is_repair_due = True
            try:
                if self._is_open:
                    self._is_open = False
                    self._feed.close()
                self._feed.open()
            except Exception as again:  # noqa: BLE001 - as above
                _log.warning("the process feed cannot be opened: %s", again)
                self._look_if_due()
            else:
                self._is_open = True
                self._opened_s = time.monotonic()
                self._lost = 0
                return
