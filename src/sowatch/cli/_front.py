"""Ends a command that is done although a thread of it waits in the kernel.

A thread that asked a file system (FUSE, say) which took the request and does not answer cannot be ended, not even by
SIGKILL, and its process has not ended as long as it is there: the caller of the command would wait for the file
system, too. So the process that was started only waits, and another one does the work and reports its exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Final, NoReturn

__all__ = ["end_now", "front_pid", "leave_front", "run_behind_front"]

#: siginfo_t.si_code of a signal from the terminal, which reaches the worker by itself (asm-generic/siginfo.h).
_SI_KERNEL: Final = 0x80
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_WAITED_FOR: Final = (*_ENDING, signal.SIGCHLD)
#: A worker that has reported, or is to end, ends within this time unless it hangs.
_REAPED_S: Final = 1.0
_OBEYED_S: Final = 10.0

_front: int | None = None
_write_fd = -1


def front_pid() -> int | None:
    """The process that waits for this one; None if there is none. It is ours, and nobody wants to see it in a list."""
    return _front


def end_now(code: int) -> NoReturn:
    """Ends this process with an exit code, whatever its threads are at, even if one of them hangs in the kernel."""
    if _front is not None:
        _report(_front, _write_fd, bytes([code]))
    os._exit(code)


def leave_front() -> None:
    """For a child of this process that is not to report: only the worker has the pipe to the front then."""
    global _front, _write_fd
    if _front is not None:
        os.close(_write_fd)
        _front, _write_fd = None, -1


def run_behind_front(run: Callable[[], int], *, is_patient: bool = False) -> int:
    """What ``run`` returns, in a process of its own. Call it before there are threads.

    Signals that end a process are passed on, and it ends by the signal that ended the worker.

    Args:
        run: returns an exit code.
        is_patient: a signal need not end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored no end of a child is reported
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    front = os.getpid()
    lasts_read_fd, lasts_write_fd = os.pipe2(os.O_CLOEXEC)
    worker = os.fork()
    if not worker:
        os.close(read_fd)
        os.close(lasts_write_fd)
        _work(run, front, write_fd, lasts_read_fd, before)
    os.close(write_fd)
    os.close(lasts_read_fd)
    try:
        return _wait(worker, read_fd, is_patient=is_patient)
    finally:
        os.close(read_fd)
        os.close(lasts_write_fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(run: Callable[[], int], front: int, write_fd: int, lasts_fd: int, mask: Collection[int]) -> NoReturn:
    global _front, _write_fd
    _front, _write_fd = front, write_fd
    threading.Thread(target=_end_with_front, args=(lasts_fd,), name="sowatch-front", daemon=True).start()
    for number in _ENDING:
        # Not SIG_IGN, as nohup sets it, nor SIGINT, which Python turns into an exception.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, partial(_end_by_signal, front, write_fd))
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    code = 1
    try:
        code = run()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        _report(front, write_fd, bytes([code & 0xFF]))
        os._exit(code)


def _end_by_signal(front: int, write_fd: int, number: int, _: object) -> None:
    """What the default action does, which alone would leave the output open and the front without an answer."""
    _report(front, write_fd, bytes([0, number]))
    _end_by(signal.Signals(number))


def _report(front: int, write_fd: int, answer: bytes) -> None:
    """Answers the front: with an exit code, or with 0 and the signal that ends this process."""
    _let_go_of_output()
    with suppress(OSError):
        os.write(write_fd, answer)
        os.kill(front, signal.SIGCHLD)


def _end_with_front(lasts_fd: int) -> None:
    os.read(lasts_fd, 1)  # nothing is written: it ends once that process has ended, by whatever
    _let_go_of_output()
    os.kill(os.getpid(), signal.SIGKILL)


def _let_go_of_output() -> None:
    """A reader of the output must see its end, though a thread that hangs keeps the descriptors open."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)


def _wait(worker: int, read_fd: int, *, is_patient: bool) -> int:
    deadline_s: float | None = None
    last = signal.SIGTERM
    while True:
        left_s = 3600.0 if deadline_s is None else deadline_s - time.monotonic()
        info = signal.sigtimedwait(_WAITED_FOR, max(0.0, left_s))
        if info is None:
            if deadline_s is not None:
                _end_by(last)  # the worker hangs
            continue
        if info.si_signo == signal.SIGCHLD:
            code = _code_of(worker, read_fd)
            if code is not None:
                return code
        else:
            # One that is ignored, as SIGINT is by the background jobs of a script, may mean something to the worker.
            if not is_patient and signal.getsignal(info.si_signo) is not signal.SIG_IGN:
                last = signal.Signals(info.si_signo)
                deadline_s = deadline_s or time.monotonic() + _OBEYED_S
            if info.si_code != _SI_KERNEL:
                with suppress(ProcessLookupError):
                    os.kill(worker, info.si_signo)


def _code_of(worker: int, read_fd: int) -> int | None:
    """The exit code of a worker that has reported it or ended; None if it goes on. Ends by the signal that ended it."""
    # In this order: what it has reported before its end can be read then. That nothing can be is no sign that it goes
    # on, as a child of its own may have the other end of the pipe.
    ended, status = os.waitpid(worker, os.WNOHANG)
    try:
        reported = os.read(read_fd, 2)
    except BlockingIOError:
        reported = b""
    if reported:
        end_s = time.monotonic() + _REAPED_S
        while not ended and (left_s := end_s - time.monotonic()) > 0:
            signal.sigtimedwait([signal.SIGCHLD], left_s)
            ended, _ = os.waitpid(worker, os.WNOHANG)
        if len(reported) == 2:
            _end_by(signal.Signals(reported[1]))
        return reported[0]
    if not ended:
        return None  # it was stopped, or goes on
    if os.WIFSIGNALED(status):
        _end_by(signal.Signals(os.WTERMSIG(status)))
    return os.waitstatus_to_exitcode(status)


def _end_by(number: signal.Signals) -> NoReturn:
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(128 + number)
