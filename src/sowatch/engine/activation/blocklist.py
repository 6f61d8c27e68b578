"""The files whose activation failed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from sowatch.engine.activation.records import BlockedFile
from sowatch.model.events import Library
from sowatch.model.identity import FileId

__all__ = ["Blocklist"]

#: A verifier log may be megabytes; 2,000 of them would not do.
_REASON_CHARS: Final = 1_000


class Blocklist:
    """At most ``limit`` files, each for ``ttl_s``; the least recently refused go first.

    Not cachetools.TTLCache: there, listing the entries makes each the most recently used one.
    Not safe for several threads: the registry calls it with its lock held.
    """

    __slots__ = ("_blocked", "_clock", "_limit", "_ttl_s")

    def __init__(self, limit: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._clock = clock
        self._blocked: OrderedDict[tuple[str, FileId], BlockedFile] = OrderedDict()

    def add(self, rule: str, file: Library, reason: str) -> None:
        """Blocks a file from now on, whatever was known of it before."""
        now_s = self._clock()
        key = (rule, file.id)
        self._blocked.pop(key, None)
        if len(self._blocked) >= self._limit:
            # What expired goes before what is merely old.
            self._blocked = OrderedDict((one, block) for one, block in self._blocked.items() if block.expires_s > now_s)
        while len(self._blocked) >= self._limit:
            self._blocked.popitem(last=False)
        self._blocked[key] = BlockedFile(
            rule=rule,
            id=file.id,
            sample_path=file.path,
            reason=reason[:_REASON_CHARS],
            since_s=now_s,
            expires_s=now_s + self._ttl_s,
            time_ns=time.time_ns(),
        )

    def refusal(self, rule: str, file_id: FileId) -> BlockedFile | None:
        """Why the file must not be activated now. Being refused makes it the most recently used."""
        key = (rule, file_id)
        block = self._blocked.get(key)
        if block is None:
            return None
        if block.expires_s <= self._clock():
            del self._blocked[key]
            return None
        self._blocked.move_to_end(key)
        return block

    def entries(self) -> tuple[BlockedFile, ...]:
        """What is blocked now, least recently used first. Changes nothing."""
        now_s = self._clock()
        return tuple(block for block in self._blocked.values() if block.expires_s > now_s)

    def clear(self, rule: str | None = None) -> int:
        """Forgets all, or all of one rule; how many were blocked."""
        count = sum(rule in (None, block.rule) for block in self.entries())
        for key in [key for key in self._blocked if rule in (None, key[0])]:
            del self._blocked[key]
        return count
