"""Whose a watch is. The threads of a process do not live in a child of fork(2): there a call would wait for ever."""

from __future__ import annotations

import os

from sowatch.model.errors import UsageError

__all__ = ["Owner"]

#: How many forks lie between the first process of this program and this one.
_forks = 0


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - a fact of the process
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class Owner:
    """The process that made this."""

    __slots__ = ("_forks", "pid")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._forks = _forks

    @property
    def is_this_process(self) -> bool:
        """Whether the caller's process made this. Takes no system call."""
        return self._forks == _forks

    def check(self) -> None:
        """Refuses a call in a child.

        Raises:
            UsageError: the caller's process is a child of the owner.
        """
        if self._forks != _forks:
            raise UsageError(
                f"this watch belongs to process {self.pid}, of which this one is a fork. Make a Watcher here, or "
                "start the child by another program (multiprocessing: the spawn method)."
            )
