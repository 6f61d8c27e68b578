"""Failures of callbacks in the log: one of each kind a minute with its traceback, the others as a number."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["EVERY_S", "FailureLog"]

#: Between two lines about failures of the same kind.
EVERY_S: Final = 60.0
#: Kinds that are remembered: a callback may raise types that it makes as it goes.
_MAX_KINDS: Final = 256


class FailureLog:
    """Logs what callbacks raised; any thread.

    Args:
        logger: takes the lines.
        clock: seconds, monotonic.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        #: By kind and type of the error when it was logged last, and how many came since.
        self._logged: dict[tuple[str, type[BaseException]], tuple[float, int]] = {}

    def note(self, what: str, error: BaseException) -> None:
        """Logs an error with its type and traceback, unless one of its type was logged for the same within a minute."""
        now_s, key = self._clock(), (what, type(error))
        with self._lock:
            last_s, missed = self._logged.get(key, (float("-inf"), 0))
            if now_s - last_s < EVERY_S:
                self._logged[key] = last_s, missed + 1
                return
            if key not in self._logged and len(self._logged) >= _MAX_KINDS:
                del self._logged[min(self._logged, key=lambda one: self._logged[one][0])]
            self._logged[key] = now_s, 0
        more = f" ({missed} more since the last such line)" if missed else ""
        self._logger.error("%s raised %s: %s%s", what, type(error).__name__, error, more, exc_info=error)
