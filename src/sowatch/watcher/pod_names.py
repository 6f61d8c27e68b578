"""`PodNames`: names of pods and containers for events, asked of the container runtime off the draining thread.

One thread asks for all containers of this host at once, and only when a process comes from one that is not known:
many that start together cost one question. What the runtime does not answer is counted, and nobody waits for it
again until it does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from sowatch.engine.file_inspector import FileFacts, Inspection
from sowatch.linux.pods import PodCgroup, pod_in
from sowatch.model.errors import SowatchError
from sowatch.model.events import Pod, Process

__all__ = ["PodNames", "PodNamesState"]

LOG = logging.getLogger("sowatch")

#: So long one question takes at most; events of processes in pods that are not known wait for it.
ANSWER_S: Final = 1.0
#: A question that is older hangs in spite of that: nobody waits for it.
HANGS_S: Final = 1.5
#: Between two questions, so that a storm of containers, or of cgroups that only look like some, asks ten times a second
#: at most.
PAUSE_S: Final = 0.1
#: After a failure, and for a container that the runtime does not know: at first, doubled each time, and at most.
FIRST_RETRY_S: Final = 1.0
LAST_RETRY_S: Final = 60.0
#: Containers and pods whose names are kept though they are gone: those that have been gone for longest go first.
MAX_GONE: Final = 4_096
#: Containers that the runtime does not know, kept so that it is not asked for each of their processes.
MAX_MISSING: Final = 4_096


class Runtime(Protocol):
    """A `sowatch.watcher.cri.Cri`."""

    @property
    def socket(self) -> str:
        """Where it is."""

    def pods(self, timeout_s: float) -> dict[str, Pod]:
        """Every pod by the ids of its containers."""

    def close(self) -> None:
        """Ends a question that is under way."""


class PodNamesState(Struct, frozen=True):
    """What was asked so far; ``known`` are containers, ``error`` is of the last question, None: it was answered."""

    socket: str
    lookups: int
    failures: int
    known: int
    error: str | None


class PodNames:
    """What is known of pods. All methods may be called from any thread; none waits, but `close`.

    Args:
        runtime: is asked; closed with this.
        on_done: called on the thread that asks, after each question.
    """

    def __init__(self, runtime: Runtime, on_done: Callable[[], None] = lambda: None) -> None:
        self._runtime = runtime
        self.on_done = on_done
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closing = threading.Event()
        #: By id of a container or sandbox: those that there are, and those that are gone.
        self._present: dict[str, Pod] = {}
        self._gone: OrderedDict[str, Pod] = OrderedDict()
        self._by_uid: dict[str, Pod] = {}
        #: By id: when to ask again, and after how long that was.
        self._missing: OrderedDict[str, tuple[float, float]] = OrderedDict()
        #: What events wait for; None: nothing is asked for.
        self._lookup: Inspection | None = None
        self._finished: deque[Inspection] = deque()
        self._asked_for: set[str] = set()
        self._error: str | None = None
        self._retry_s = 0.0
        self._next_s = 0.0
        self._lookups = 0
        self._failures = 0
        # A daemon: a library that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="sowatch-pods", daemon=True)

    def start(self) -> None:
        """Starts the thread, which asks once right away."""
        self._wanted.set()
        self._thread.start()

    def close(self, timeout_s: float = 1.0) -> None:
        """Ends the thread, waiting that long at most; nobody waits for it any more. Safe to call again."""
        self._closing.set()
        self._wanted.set()
        self._runtime.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def state(self) -> PodNamesState:
        """What was asked so far."""
        return PodNamesState(
            self._runtime.socket, self._lookups, self._failures, len(self._present) + len(self._gone), self._error
        )

    def named(self, process: Process) -> Process:
        """The process with the names of its pod, as far as they are known."""
        pod = process.pod
        if pod is None or pod.container is not None:
            return process
        found = self._find(pod_in(process.cgroup))
        if found is None or (pod.name is not None and found.container is None):
            return process
        return replace(process, pod=Pod(pod.uid, found.name, found.namespace, found.container))

    def look_up(self, process: Process) -> Inspection | None:
        """Has the runtime asked if the names of a process are not known.

        Returns:
            What is over when it has answered. None: they are known, or the runtime does not answer at the moment or
            does not know the container, so there is nothing to wait for.
        """
        place = None if process.pod is None else pod_in(process.cgroup)
        if place is None or (place.container or place.uid) in self._present:
            return None
        now_s = time.monotonic()
        with self._lock:
            key = place.container or place.uid
            # A path may name a container of another pod: the runtime has nothing to add to what it said of that.
            if key in self._present or key in self._gone or self._find(place, now=True) or self._closing.is_set():
                return None
            retry_s, _ = self._missing.get(key, (0.0, 0.0))
            if now_s < retry_s:
                return None
            self._want((key,))
            if self._lookup is None:
                self._lookup = Inspection(now_s)
            lookup = self._lookup
            self._wanted.set()
        # Nobody waits while it does not answer; it is asked all the same, when its time has come.
        return None if self._error is not None or now_s - lookup.asked_s > HANGS_S else lookup

    def take_finished(self) -> list[Inspection]:
        """Lookups that are over since the last call."""
        finished = self._finished
        return [finished.popleft() for _ in range(len(finished))]

    def _find(self, place: PodCgroup | None, *, now: bool = False) -> Pod | None:
        """What is known of a place, of its pod at least; ``now``: only of the container, if it is in one."""
        if place is None:
            return None
        if place.container is None:
            return self._by_uid.get(place.uid)
        found = self._present.get(place.container) or self._gone.get(place.container)
        if found is not None and found.uid == place.uid:
            return found
        return None if now else self._by_uid.get(place.uid)

    def _want(self, keys: Iterable[str]) -> None:
        """Notes who is asked for, as far as there is room: any user can make paths that look like those of pods."""
        self._asked_for.update(islice(keys, max(0, MAX_MISSING - len(self._asked_for))))

    # ---- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self._closing.is_set():
                break
            if self._closing.wait(max(0.0, self._next_s - time.monotonic())):
                break
            self._wanted.clear()
            self._ask()
            self._next_s = time.monotonic() + (self._retry_s or PAUSE_S)
        self._end(self._lookup)

    def _ask(self) -> None:
        # Who comes from now on may ask for a container that this answer does not have yet.
        with self._lock:
            asked_for, self._asked_for = self._asked_for, set()
            lookup, self._lookup = self._lookup, None
        try:
            found = self._runtime.pods(ANSWER_S)
        except SowatchError as error:
            self._note_failure(str(error), asked_for)
        except Exception as error:  # noqa: BLE001 - whatever a library raises: names are not worth the watch
            self._note_failure(f"{type(error).__name__}: {error}", asked_for)
        else:
            self._take(found, asked_for)
        self._end(lookup)

    def _take(self, found: dict[str, Pod], asked_for: set[str]) -> None:
        now_s = time.monotonic()
        with self._lock:
            self._lookups += 1
            if self._error is not None:
                LOG.info("the container runtime on %r answers again", self._runtime.socket)
            self._error, self._retry_s = None, 0.0
            for key, pod in self._present.items():
                if key not in found:
                    self._gone[key] = pod
            while len(self._gone) > MAX_GONE:
                self._gone.popitem(last=False)
            for key in found:
                self._gone.pop(key, None)
                self._missing.pop(key, None)
            self._present = found
            self._by_uid = {
                pod.uid: Pod(pod.uid, pod.name, pod.namespace) for pod in (*self._gone.values(), *found.values())
            }
            for key in asked_for:
                if key not in found and key not in self._by_uid:
                    _, delay_s = self._missing.pop(key, (0.0, 0.0))
                    delay_s = min(2 * delay_s, LAST_RETRY_S) or FIRST_RETRY_S
                    self._missing[key] = now_s + delay_s, delay_s
            while len(self._missing) > MAX_MISSING:
                self._missing.popitem(last=False)

    def _note_failure(self, error: str, asked_for: set[str]) -> None:
        with self._lock:
            self._lookups += 1
            self._failures += 1
            if self._error is None and not self._closing.is_set():
                LOG.warning("pods have no names, as %s", error)
            self._error = error
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S) or FIRST_RETRY_S
            self._want(asked_for)
            # It is asked again, whether somebody comes or not: then the next container need not find out.
            self._wanted.set()

    def _end(self, lookup: Inspection | None) -> None:
        """Those who wait for this question wait no longer, nor do those whose next one need not be asked."""
        ended = [lookup]
        with self._lock:
            if self._error is not None or self._asked_for <= self._present.keys() | self._by_uid.keys():
                ended.append(self._lookup)
                self._lookup = None
                if self._error is None:
                    self._asked_for.clear()
        for one in ended:
            if one is not None:
                one.facts = FileFacts()
                self._finished.append(one)
        self.on_done()
