"""What one search for packages may cost: bytes, lines and time. Files of containers decide how much there would be.

A search that was given up goes on, on its thread, until this ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from sowatch.model.errors import SowatchError

__all__ = ["BudgetError", "LookBudget", "spend", "within"]

MAX_BYTES: Final = 1 << 30
MAX_CONTENT_BYTES: Final = 8 << 30
MAX_LINES: Final = 8_000_000


class BudgetError(SowatchError):
    """A search would cost more than any that honest files need."""

    def __init__(self) -> None:
        super().__init__(
            "the databases of a root are larger, or slower, than any honest ones. Its files are of no package"
        )


class LookBudget:
    """What is left of one search. One thread uses it.

    Args:
        timeout_s: until it has to be done.
        size_bytes: of databases and metadata.
        content_bytes: of files that are compared with their hashes.
        lines: of databases.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        size_bytes: int = MAX_BYTES,
        content_bytes: int = MAX_CONTENT_BYTES,
        lines: int = MAX_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._end_s = clock() + timeout_s
        self._bytes = size_bytes
        self._content_bytes = content_bytes
        self._lines = lines

    def spend(self, *, size_bytes: int = 0, content_bytes: int = 0, lines: int = 0) -> None:
        """Takes that away.

        Raises:
            BudgetError: nothing is left, or it is too late.
        """
        self._bytes -= size_bytes
        self._content_bytes -= content_bytes
        self._lines -= lines
        if min(self._bytes, self._content_bytes, self._lines) < 0 or self._clock() >= self._end_s:
            raise BudgetError


_CURRENT: ContextVar[LookBudget | None] = ContextVar("sowatch_look_budget", default=None)


@contextmanager
def within(budget: LookBudget) -> Iterator[None]:
    """What this thread spends meanwhile is taken from that."""
    token = _CURRENT.set(budget)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def spend(*, size_bytes: int = 0, content_bytes: int = 0, lines: int = 0) -> None:
    """Takes it from the budget of the search that runs on this thread, if there is one.

    Raises:
        BudgetError: as `LookBudget.spend`.
    """
    budget = _CURRENT.get()
    if budget is not None:
        budget.spend(size_bytes=size_bytes, content_bytes=content_bytes, lines=lines)
