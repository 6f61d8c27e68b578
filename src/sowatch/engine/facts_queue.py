"""`FactsQueue`: changes that wait for the facts of their files, in order for each process.

A change waits for the facts of its own file and for earlier changes of its process. An unload also waits for earlier
loads of its file by other processes: a server's parent that exits must not seem to be the last user while the load of
its child still waits. So a file system that does not answer delays the events of the processes that map its files, up
to `FACTS_TIMEOUT_S`, and those of no other process.

Pure: no I/O, no threads, no clock; the engine's thread uses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from sowatch.engine.address_space import Change
from sowatch.engine.file_inspector import FileFacts, Inspection
from sowatch.model.identity import FileId

__all__ = ["FACTS_TIMEOUT_S", "FactsQueue"]

#: How long the events behind a file wait for its facts; a file that cannot be read in that time
#: (a dead network file system, a hostile FUSE mount) is reported without them.
FACTS_TIMEOUT_S: Final = 2.0
#: What has waited too long is searched for this often.
EXPIRY_S: Final = 0.1
#: Beyond the limit, so much of it is emptied at once, so that not each change has to search for the longest queue.
SPARE: Final = 1 / 8

#: Publishes a change; the facts are None if they did not come in time. The flag is that of `FactsQueue.put`.
Publish = Callable[[Change, FileFacts | None, bool], None]


class _Fence:
    """What is to be done once the changes that were put before it are published: ``open`` counts those."""

    __slots__ = ("action", "holds", "open")

    def __init__(self) -> None:
        self.open = 0
        self.action: Callable[[], None] | None = None
        self.holds = False


class _Waiting:
    """One change that waits.

    An unload comes ``after`` a load of its file; a load has as ``followers`` the processes whose first change comes
    after it.
    """

    __slots__ = (
        "after",
        "change",
        "deadline_s",
        "fence",
        "followers",
        "inspection",
        "is_only_held",
        "is_published",
        "lookup",
        "size_bytes",
    )

    def __init__(
        self,
        change: Change,
        inspection: Inspection,
        fence: _Fence,
        *,
        is_only_held: bool,
        lookup: Inspection | None = None,
    ) -> None:
        self.change = change
        self.inspection = inspection
        self.lookup = lookup
        asked_s = inspection.asked_s if lookup is None else max(inspection.asked_s, lookup.asked_s)
        self.deadline_s = asked_s + FACTS_TIMEOUT_S
        self.fence = fence
        self.is_only_held = is_only_held
        self.size_bytes = bytes_of(change)
        self.after: _Waiting | None = None
        self.followers: dict[int, None] | None = None
        self.is_published = False

    @property
    def awaited(self) -> Inspection:
        """What it waits for next."""
        return self.inspection if self.lookup is None or self.lookup.facts is not None else self.lookup


class _ProcessQueue:
    """The changes of one process that wait, in order."""

    __slots__ = ("items", "size_bytes")

    def __init__(self) -> None:
        self.items: deque[_Waiting] = deque()
        self.size_bytes = 0


class FactsQueue:
    """Changes that wait, and what waits for all of them.

    Args:
        publish: called with each change when its turn comes.
        limit_bytes: what may wait; beyond it those wait no longer that have the most.

    Attributes:
        waiting_bytes: what waits takes, each change counted as if it shared nothing with another one.
    """

    def __init__(self, publish: Publish, *, limit_bytes: int) -> None:
        self._publish = publish
        self._limit_bytes = limit_bytes
        #: By pid, not by ProcessId: a process that reuses a pid comes after the one that had it.
        self._queues: dict[int, _ProcessQueue] = {}
        #: The processes whose first change waits for an inspection.
        self._heads: dict[Inspection, list[int]] = {}
        #: The newest load of each file that waits.
        self._loads: dict[FileId, _Waiting] = {}
        #: Processes whose first change came after a load that is published now.
        self._ready: deque[int] = deque()
        self._fences: deque[_Fence] = deque()
        self._next_fence = _Fence()
        #: What came while a fence holds everything; None while none does.
        self._held: list[_Waiting] | None = None
        self._looked_s = 0.0
        self.waiting_bytes = 0

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._queues or self._fences)

    def holds_back(self, change: Change) -> bool:
        """Whether a change has to wait, whatever is known of its file."""
        if self._held is not None or change.process.pid in self._queues:
            return True
        return not change.is_load and change.name.file_id in self._loads

    def put(
        self, change: Change, inspection: Inspection, *, is_only_held: bool = False, lookup: Inspection | None = None
    ) -> None:
        """Takes a change of a process.

        Args:
            change: what happened.
            inspection: of its file; its facts are None until it is over.
            is_only_held: handed on when it is published.
            lookup: of names of its process, which it waits for as well.
        """
        waiting = _Waiting(change, inspection, self._next_fence, is_only_held=is_only_held, lookup=lookup)
        waiting.fence.open += 1
        self.waiting_bytes += waiting.size_bytes
        if change.is_load:
            self._loads[change.name.file_id] = waiting
        else:
            waiting.after = self._loads.get(change.name.file_id)
        if self._held is not None:
            self._held.append(waiting)
        else:
            self._admit(waiting)
        if self.waiting_bytes > self._limit_bytes:
            self._shed()

    def after_all(self, action: Callable[[], None], *, holds: bool = False) -> None:
        """Does something once every change that was put before is published; at once if none waits.

        Args:
            action: is not to block. Actions keep their order.
            holds: what is put from now on waits until then, of whatever process. One action at a time may.
        """
        if not self:
            action()
            return
        fence, self._next_fence = self._next_fence, _Fence()
        fence.action = action
        fence.holds = holds
        if holds:
            assert self._held is None, "one action at a time may hold everything"
            self._held = []
        self._fences.append(fence)
        self._pass_fences()

    def advance(self, done: Iterable[Inspection], now_s: float) -> None:
        """Publishes what waited for these inspections, and what has waited too long.

        Args:
            done: those that are over.
            now_s: CLOCK_MONOTONIC in seconds; infinity: nothing waits any longer.
        """
        for inspection in done:
            for pid in self._heads.pop(inspection, ()):
                self._run(pid, now_s)
        if now_s - self._looked_s >= EXPIRY_S:
            self._looked_s = 0.0 if now_s == float("inf") else now_s
            # Actions may put further changes.
            while late := [
                inspection
                for inspection, pids in self._heads.items()
                if any(self._queues[pid].items[0].deadline_s <= now_s for pid in pids)
            ]:
                for inspection in late:
                    for pid in self._heads.pop(inspection, ()):
                        self._run(pid, now_s)

    def ask_again(self, inspect: Callable[[Change], Inspection]) -> None:
        """Lets each change wait for another inspection of its file, no longer than it would have waited."""
        for queue in self._queues.values():
            for waiting in queue.items:
                waiting.inspection = inspect(waiting.change)
                waiting.followers = None
        for waiting in self._held or ():
            waiting.inspection = inspect(waiting.change)
        self._heads.clear()
        for pid in list(self._queues):
            self._run(pid, 0.0)

    # ---- one process ---------------------------------------------------------------------------

    def _admit(self, waiting: _Waiting) -> None:
        pid = waiting.change.process.pid
        queue = self._queues.get(pid)
        is_first = queue is None
        if queue is None:
            queue = self._queues[pid] = _ProcessQueue()
        queue.items.append(waiting)
        queue.size_bytes += waiting.size_bytes
        if is_first:
            self._run(pid, 0.0)

    def _run(self, pid: int, now_s: float) -> None:
        """Publishes a process's changes up to the first one that has to wait, and then what came after them."""
        self._publish_of(pid, now_s)
        while self._ready:
            self._publish_of(self._ready.popleft(), now_s)
        self._pass_fences()

    def _publish_of(self, pid: int, now_s: float) -> None:
        queue = self._queues[pid]
        while queue.items:
            first = queue.items[0]
            if first.after is not None and not first.after.is_published:
                if first.after.followers is None:
                    first.after.followers = {}
                first.after.followers[pid] = None
                return
            if (awaited := first.awaited).facts is None and now_s < first.deadline_s:
                self._heads.setdefault(awaited, []).append(pid)
                return
            self._release(queue)
        del self._queues[pid]

    def _release(self, queue: _ProcessQueue) -> None:
        first = queue.items.popleft()
        queue.size_bytes -= first.size_bytes
        self.waiting_bytes -= first.size_bytes
        self._publish(first.change, first.inspection.facts, first.is_only_held)
        first.fence.open -= 1
        first.is_published = True
        if self._loads.get(first.change.name.file_id) is first:
            del self._loads[first.change.name.file_id]
        self._ready.extend(first.followers or ())

    def _pass_fences(self) -> None:
        while self._fences and not self._fences[0].open:
            fence = self._fences.popleft()
            assert fence.action is not None
            fence.action()
            if fence.holds:
                held, self._held = self._held, None
                for waiting in held or ():
                    self._admit(waiting)

    def _shed(self) -> None:
        """Too much waits: the processes that have the most do not wait any longer."""
        enough = self._limit_bytes * (1 - SPARE)
        for pid, queue in sorted(self._queues.items(), key=lambda one: one[1].size_bytes, reverse=True):
            if not queue.items:  # it came after what was published meanwhile
                continue
            first = queue.items[0]
            if first.after is not None and not first.after.is_published:
                assert first.after.followers is not None
                del first.after.followers[pid]
            else:
                # Facts may have come that nobody was given yet: it waits where it was put.
                asked = (first.lookup, first.inspection)
                (awaited,) = (one for one in asked if one is not None and pid in self._heads.get(one, ()))
                self._heads[awaited].remove(pid)
                if not self._heads[awaited]:
                    del self._heads[awaited]
            while queue.items and self.waiting_bytes > enough:
                self._release(queue)
            self._run(pid, 0.0)
            if self.waiting_bytes <= enough:
                return


def bytes_of(change: Change) -> int:
    """About what `sowatch.model.events.size_of` has for the event that it becomes."""
    return 200 + 128 * len(change.ranges) + len(change.name.path)
