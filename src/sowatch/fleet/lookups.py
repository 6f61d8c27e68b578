"""`Lookups`: what only reading files answers, as a bounded queue of questions. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from sowatch.fleet.groups import Identity
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId

__all__ = ["MAX_QUESTIONS", "Lookups", "Question"]

#: Questions that wait to be taken.
MAX_QUESTIONS: Final = 16_384
#: Those that are over are looked for so often, if there is no room.
_SWEEP_S: Final = 1.0


class Question(NamedTuple):
    """What only reading files answers: the package of a group; without an ``identity`` the hash of a file."""

    process: Process
    library: Library
    identity: Identity | None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Where it is mapped is not known."""
        return ()


class Lookups:
    """Questions that wait, each with whether it is still wanted."""

    def __init__(self, limit: int = MAX_QUESTIONS) -> None:
        self._limit = limit
        self._waiting: deque[tuple[Question, Callable[[], bool]]] = deque()
        self._hashes: set[tuple[FileId, int]] = set()
        self._swept_s = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_hashing(self) -> bool:
        """Whether hashes were asked for and not answered."""
        return bool(self._hashes)

    def ask(self, question: Question, is_wanted: Callable[[], bool], now_s: float) -> bool:
        """False: as many wait as may, and it is not asked."""
        key = _hash_of(question)
        if key in self._hashes:
            return True
        if len(self._waiting) >= self._limit and now_s >= self._swept_s + _SWEEP_S:
            self._swept_s = now_s
            waiting, self._waiting = self._waiting, deque()
            self._waiting.extend(one for one in waiting if self._keep(*one))
        if len(self._waiting) >= self._limit:
            return False
        if key is not None:
            self._hashes.add(key)
        self._waiting.append((question, is_wanted))
        return True

    def take(self, limit: int) -> list[Question]:
        """The next ones that are still wanted; each is to be answered."""
        found: list[Question] = []
        while self._waiting and len(found) < limit:
            question, is_wanted = self._waiting.popleft()
            if self._keep(question, is_wanted):
                found.append(question)
        return found

    def answered(self, library: Library) -> None:
        """The hash of a file is known, or cannot be."""
        self._hashes.discard((library.id, library.changed_ns))

    def _keep(self, question: Question, is_wanted: Callable[[], bool]) -> bool:
        """Another mapping of a file asks again, if it waits for its hash."""
        if is_wanted():
            return True
        key = _hash_of(question)
        if key is not None:
            self._hashes.discard(key)
        return False


def _hash_of(question: Question) -> tuple[FileId, int] | None:
    return None if question.identity is not None else (question.library.id, question.library.changed_ns)
