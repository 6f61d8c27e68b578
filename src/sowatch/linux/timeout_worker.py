"""`TimeoutWorker`: runs calls that the kernel may never answer, and goes on without them.

A thread that waits in the kernel cannot be ended, only left behind: for a lock of an address space whose page
fault is not answered, for a file system that hangs. A caller must not free what the call uses
before it has returned.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["MAX_ABANDONED", "CallTimeout", "TimeoutWorker"]

T = TypeVar("T")

#: Threads that one worker leaves behind at most; beyond that each call is refused until one has returned.
MAX_ABANDONED: Final = 64
#: A thread that is ready to run does not hang: it gets this many times its time.
STARVED: Final = 10


class CallTimeout(Exception):
    """A call did not return in time, or was refused because too many have not. ``is_refused`` says which."""

    def __init__(self, *, is_refused: bool) -> None:
        super().__init__("refused: too many calls hang" if is_refused else "the call has not returned")
        self.is_refused = is_refused


class _Job(Generic[T]):
    """One call, on its way to a thread and back."""

    __slots__ = ("call", "done", "error", "is_abandoned", "lock", "on_return", "result")

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.done = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None
        self.lock = threading.Lock()
        self.is_abandoned = False
        self.on_return: Callable[[], None] | None = None

    def run(self) -> bool:
        """On the thread; whether somebody still waited."""
        try:
            self.result = self.call()
        except BaseException as error:  # noqa: BLE001 - it goes to the caller
            self.error = error
        with self.lock:
            self.done.set()
            on_return = self.on_return
            was_abandoned = self.is_abandoned
        if on_return is not None:
            on_return()
        return not was_abandoned


class TimeoutWorker:
    """One thread for calls that may hang; a new one takes its place when it does.

    Any thread may use it; calls of several come one after the other. The threads are daemons: none keeps
    the process alive.

    Args:
        name: of the threads.
        max_abandoned: threads left behind at most.
    """

    def __init__(self, name: str, *, max_abandoned: int = MAX_ABANDONED) -> None:
        self._name = name
        self._max_abandoned = max_abandoned
        self._lock = threading.Lock()
        self._count_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job[object] | None] | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = 0

    @property
    def abandoned(self) -> int:
        """Calls that were given up and have not returned yet."""
        return self._abandoned

    def start(self) -> None:
        """Starts the thread now rather than with the first call."""
        with self._lock:
            self._start()

    def _start(self) -> queue.SimpleQueue[_Job[object] | None]:
        """The jobs of the thread, which is there then."""
        jobs = self._jobs
        if jobs is None:
            jobs = queue.SimpleQueue()
            thread = threading.Thread(target=_work, args=(jobs,), name=self._name, daemon=True)
            thread.start()
            self._jobs, self._thread = jobs, thread
        return jobs

    def run(
        self,
        call: Callable[[], T],
        timeout_s: float,
        *,
        progress: Callable[[], int] | None = None,
        meanwhile: Callable[[], object] | None = None,
        turn_s: float = 0.05,
        on_return: Callable[[], None] | None = None,
    ) -> T:
        """What the call returns or raises.

        Args:
            call: runs on the helper thread.
            timeout_s: how long it may take, or how long without ``progress``.
            progress: a number that changes as long as the call gets on.
            meanwhile: what the caller does every ``turn_s`` while it waits.
            turn_s: see there.
            on_return: runs on the helper thread if the call returns after it was given up.

        Raises:
            CallTimeout: it took longer; its thread is left behind. Or there may be no further thread.
        """
        with self._lock:
            if self._abandoned >= self._max_abandoned:
                raise CallTimeout(is_refused=True)
            job: _Job[T] = _Job(call)
            try:
                jobs = self._start()
            except RuntimeError as error:  # no more threads: a limit of the service or of the host
                raise CallTimeout(is_refused=True) from error
            jobs.put(job)  # type: ignore[arg-type]
            if not self._wait(job, timeout_s, progress, meanwhile, turn_s):
                self._abandon(job, on_return)
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]

    def _wait(
        self,
        job: _Job[T],
        timeout_s: float,
        progress: Callable[[], int] | None,
        meanwhile: Callable[[], object] | None,
        turn_s: float,
    ) -> bool:
        """Whether the call has returned in time."""
        since_s = time.monotonic()
        seen = progress() if progress is not None else 0
        while True:
            left_s = since_s + timeout_s - time.monotonic()
            if job.done.wait(max(0.001, min(turn_s, left_s) if meanwhile or progress else left_s)):
                return True
            if meanwhile is not None:
                meanwhile()
            now_s = time.monotonic()
            if progress is not None and (now := progress()) != seen:
                seen, since_s = now, now_s
            waited_s = now_s - since_s
            # On a busy machine a thread may wait for a CPU; it has not been stopped by what it reads.
            if waited_s >= timeout_s and (waited_s >= STARVED * timeout_s or not self._is_ready_to_run()):
                return job.done.is_set()

    def _is_ready_to_run(self) -> bool:
        thread = self._thread
        try:
            with open(f"/proc/self/task/{thread.native_id if thread else 0}/stat", "rb", buffering=0) as file:
                return file.read(512).rpartition(b")")[2].split()[0] == b"R"
        except (OSError, IndexError):
            return False

    def _abandon(self, job: _Job[T], on_return: Callable[[], None] | None) -> None:
        """Leaves the thread behind, unless it has returned in this very moment."""

        def returned() -> None:
            with self._count_lock:
                self._abandoned -= 1
            if on_return is not None:
                on_return()

        with job.lock:
            if job.done.is_set():
                return
            job.is_abandoned = True
            job.on_return = returned
            with self._count_lock:
                self._abandoned += 1
        jobs, self._jobs, self._thread = self._jobs, None, None
        if jobs is not None:
            jobs.put(None)  # it ends as soon as it can
        raise CallTimeout(is_refused=False)

    def close(self) -> None:
        """Ends the thread that is not left behind; safe to call again, and a later `run` starts another."""
        with self._lock:
            jobs, self._jobs = self._jobs, None
            thread, self._thread = self._thread, None
            if jobs is not None:
                jobs.put(None)
            if thread is not None and thread is not threading.current_thread():
                thread.join()


def _work(jobs: queue.SimpleQueue[_Job[object] | None]) -> None:
    while (job := jobs.get()) is not None and job.run():
        pass
