"""Ending a watch: by signal, by the clock, or because nobody reads.

A signal handler may only do what is safe between any two instructions, and stopping a watcher is
not. So the handler writes one byte into a pipe, and a thread that waits there does the work.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Final, Self

from sowatch.cli._last_resort import LastResort

__all__ = ["SIGNALS", "Stopper", "hold_signals", "obey_interrupts"]

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: A second signal ends the process at once, but only after this: one Ctrl-C may reach us twice,
#: from the terminal and from the script that started us.
_INSISTING_S: Final = 1.0
_LONGEST_WAIT_S: Final = 3600.0
#: A command that answers once has ended so long after SIGINT.
_OBEYED_S: Final = 0.6


def hold_signals() -> None:
    """From now on `SIGNALS` wait for a `Stopper`: what ends by them as it should has not begun yet."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextmanager
def obey_interrupts(end: Callable[[], None]) -> Iterator[None]:
    """Calls ``end`` on another thread if the main thread is still inside a while after SIGINT.

    That signal is an exception only once the main thread is back from the kernel or from a library; in a callback of
    the interpreter it is shown and forgotten.
    """
    show = sys.unraisablehook

    def show_others(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            show(unraisable)

    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write_fd, False)
    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    is_over = threading.Event()

    def wait() -> None:
        while not is_over.is_set():
            if signal.SIGINT in os.read(read_fd, 64) and not is_over.wait(_OBEYED_S):
                end()

    thread = threading.Thread(target=wait, name="sowatch-interrupt", daemon=True)
    thread.start()
    sys.unraisablehook = show_others
    try:
        yield
    finally:
        sys.unraisablehook = show
        is_over.set()
        signal.set_wakeup_fd(before)
        with suppress(BlockingIOError):
            os.write(write_fd, b"\0")
        thread.join()
        os.close(read_fd)
        os.close(write_fd)


class Stopper:
    """Calls ``stop`` once, on its own thread: on SIGINT, SIGTERM, SIGHUP, or after a time.

    A context manager for the main thread; leaving it restores the signal handlers, joins the
    thread and raises what ``stop`` raised. SIGINT is taken even where it was ignored (a shell's
    background job), because a watch ends on it by contract; SIGHUP not, because that is what nohup is for.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._last_resort = LastResort()
        self._before: dict[signal.Signals, object] = {}
        self._first_signal_s: float | None = None
        self._end_s: float | None = None
        self._error: Exception | None = None
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._wait, name="sowatch-stop", daemon=True)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._emit(b"q")
        self._thread.join()
        self._last_resort.call_off()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._read_fd)
        os.close(self._write_fd)
        if self._error is not None and error is None:
            raise self._error

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._first_signal_s is not None

    def stop_after(self, seconds: float) -> None:
        """Stop that many seconds from now."""
        self._end_s = time.monotonic() + seconds
        self._emit(b"t")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal_s is None:
            self._first_signal_s = now
            self._emit(b"s")
        elif now - self._first_signal_s > _INSISTING_S:
            os._exit(128 + number)  # the kernel cleans up: nothing is pinned

    def _emit(self, byte: bytes) -> None:
        with suppress(BlockingIOError):  # full of earlier bytes, which the thread has yet to see
            os.write(self._write_fd, byte)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        while True:
            left_s = _LONGEST_WAIT_S if self._end_s is None else self._end_s - time.monotonic()
            if left_s <= 0:
                break
            poll.poll(min(left_s, _LONGEST_WAIT_S) * 1000)
            try:
                received = os.read(self._read_fd, 64)
            except BlockingIOError:
                continue
            if b"q" in received:
                return
            if b"s" in received:
                self._last_resort.arm()
                break
        try:
            self._stop()
        except Exception as error:  # noqa: BLE001  (raised again by the main thread)
            self._error = error
