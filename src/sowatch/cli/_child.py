"""A command in a process that waits for a word before its exec, and what it ends with."""

from __future__ import annotations

import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, NoReturn, Self

from sowatch.cli._front import leave_front
from sowatch.model.errors import SowatchError

__all__ = ["CommandError", "HeldCommand"]

#: siginfo_t.si_code of a signal from the terminal, which reaches the command by itself (asm-generic/siginfo.h).
_SI_KERNEL: Final = 0x80
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: Python ignores these.
_RESTORED: Final = (signal.SIGPIPE, signal.SIGXFSZ)
#: As shells have it.
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126
_BY_SIGNAL: Final = 128


class HeldCommand:
    """Forks the process of a command, which waits for `release`; a context manager for the main thread.

    Inside, signals that would end this process are passed on to the command instead. Other threads have to have them
    and SIGCHLD blocked. If this process ends or leaves the context first, a command that was not released never runs.

    Args:
        words: the command and its arguments; found by PATH.

    Attributes:
        pid: of its process, in our pid namespace.

    Raises:
        SowatchError: no process can be made.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, signal.SIGCHLD))
        hold_fd, self._release_fd = os.pipe2(os.O_CLOEXEC)
        self._failed_fd, failed_fd = os.pipe2(os.O_CLOEXEC)
        try:
            with warnings.catch_warnings():
                # The other thread only waits for a pipe, and the child does nothing but exec.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
        except OSError as error:
            raise SowatchError(f"cannot start a process: {error.strerror}. End some others first.") from error
        if not self.pid:
            self._become(hold_fd, failed_fd)
        os.close(hold_fd)
        os.close(failed_fd)
        self._status: int | None = None
        self._has_ended = threading.Event()
        self._on_end: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_held:
            os.kill(self.pid, signal.SIGKILL)  # it is not to run
        self.release()
        os.close(self._failed_fd)

    def begin(self, on_end: Callable[[], None]) -> None:
        """From now on signals are passed on, and ``on_end`` is called once the command has ended, on another thread."""
        self._on_end = on_end
        threading.Thread(target=self._attend, name="sowatch-command", daemon=True).start()

    @property
    def is_held(self) -> bool:
        """Whether it still waits for `release`."""
        return self._release_fd >= 0 and not self._has_ended.is_set()

    def release(self) -> None:
        """Lets it run. Safe to call again."""
        fd, self._release_fd = self._release_fd, -1
        if fd >= 0:
            with suppress(BrokenPipeError):  # somebody has ended it
                os.write(fd, b"x")
            os.close(fd)

    def wait(self) -> int:
        """Waits for its end; its exit status, as a shell has it.

        Raises:
            CommandError: it could not be run.
        """
        self._has_ended.wait()
        failed = os.read(self._failed_fd, 16)
        if failed:
            number = int(failed)
            code = _NOT_FOUND if number in (errno.ENOENT, errno.ENOTDIR) else _NOT_EXECUTABLE
            raise CommandError(self._words[0], number, code)
        assert self._status is not None
        if os.WIFSIGNALED(self._status):
            return _BY_SIGNAL + os.WTERMSIG(self._status)
        return os.WEXITSTATUS(self._status)

    def _attend(self) -> None:
        while not self._has_ended.is_set():
            info = signal.sigwaitinfo((*_PASSED_ON, signal.SIGCHLD))
            if info.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    self._status = status
                    self._has_ended.set()
            elif info.si_code != _SI_KERNEL:
                os.kill(self.pid, info.si_signo)  # not reaped yet, so nobody else's
        self._on_end()

    def _become(self, hold_fd: int, failed_fd: int) -> NoReturn:
        """The child's part."""
        try:
            for number in _PASSED_ON:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
                    signal.signal(number, signal.SIG_DFL)
            for number in _RESTORED:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            os.close(self._release_fd)
            leave_front()
            if os.read(hold_fd, 1):
                os.execvp(self._words[0], self._words)  # noqa: S606 - the user's words
        except OSError as error:
            os.write(failed_fd, str(error.errno).encode())
        finally:
            os._exit(_NOT_FOUND)


class CommandError(SowatchError):
    """A command cannot be run; ``exit_code`` is what a shell ends with then."""

    def __init__(self, word: str, number: int, code: int) -> None:
        super().__init__(f"cannot run {word!r}: {os.strerror(number)}. Give a program that PATH has, or a path.")
        self.exit_code = code
