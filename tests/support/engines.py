"""An `Engine` with the real table, publisher and reconciler, on a source whose records a test puts there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sowatch.engine.activation import FileRegistry
from sowatch.engine.file_inspector import FileFacts
from sowatch.engine.loop import Engine
from sowatch.engine.publisher import Publisher, Selection
from sowatch.engine.rule_change import RuleChange
from sowatch.engine.subscription import SubscriberQueue
from sowatch.engine.table import MappingTable
from sowatch.linux.wake import Wake
from sowatch.model.config import NO_GUARD, Config
from sowatch.model.rules import Rule, RuleSet
from sowatch.model.stats import Losses
from support.records import PAGE, Proc, scan
from support.tracking import LIBC, SSL

__all__ = ["CURL", "FIRST", "NGINX", "Source", "Watch"]

NGINX, CURL = Proc(10), Proc(11)
RULES = RuleSet([Rule("libssl", name="tls")])


class KnowsAll:
    """An inspector that has read every file."""

    def known(self, _: object) -> FileFacts:
        return FileFacts(True)

    def take_finished(self) -> list[object]:
        return []

    def take_recovered(self) -> set[object]:
        return set()


class Unread(dict[int, float]):
    """Whose mappings cannot be read, and since when."""

    def since_s(self, pid: int) -> float | None:
        return self.get(pid)

    def take_readable(self) -> set[int]:
        return set()


class Source:
    """One process that maps libssl and libc, and whatever a test puts into the ring."""

    strategy, guarantee, hooks = "core", "exact", "syscall"
    limits: tuple[str, ...] = ("32-bit processes are watched by reads",)
    attempts: tuple[object, ...] = ()
    polls: Any = None
    reports = record_limit = answer_clock = None

    def __init__(self) -> None:
        self._ring = Wake()
        self._records: list[Any] = []
        self.unread = Unread()
        self.closes = 0
        self.is_closed = threading.Event()
        self.on_drain: Callable[[], None] = lambda: None
        self.error: BaseException | None = None

    def fileno(self) -> int:
        return self._ring.fd

    def put(self, *records: Any) -> None:
        """Into the ring, of which nobody is told."""
        self._records += records

    def send(self, *records: Any) -> None:
        self.put(*records)
        self._ring()

    def drain(self) -> list[Any]:
        self.on_drain()
        self._ring.clear()
        taken, self._records = self._records, []
        return taken

    def scan_all(self, meanwhile: object = None) -> tuple[list[Any], list[Any]]:
        del meanwhile
        if self.error is not None:
            raise self.error
        return [scan(NGINX, 10, 20, NGINX.map(SSL, t=10), NGINX.map(LIBC, 9 * PAGE, t=10), intro=True)], []

    def scan_process(self, pid: int, meanwhile: object = None) -> None:
        del pid, meanwhile

    def losses(self) -> Losses:
        return Losses()

    def answer(self, keys: object, *, is_wanted: bool) -> None:
        del keys, is_wanted

    def untrack(self, pid: int, start_ns: int, activity: int) -> bool:
        del pid, start_ns, activity
        return False

    def tracked(self, pid: int) -> str:
        return f"entry of {pid}"

    def open_verdicts(self) -> str:
        return "verdicts"

    def close(self) -> None:
        self.closes += 1
        self._ring.close()
        self.is_closed.set()


#: What an engine of `Watch` begins with.
FIRST = RuleChange(RULES, KnowsAll())  # type: ignore[arg-type]


class Watch:
    """An engine, what it drives, and one reader of all its events."""

    def __init__(self, *, silent: bool = False) -> None:
        self.source = Source()
        self.publisher = Publisher(RULES, FileRegistry(is_alive=lambda _: True), Selection(), proc_root="/proc")
        self.reader: SubscriberQueue = self.publisher.subscribers.subscribe(
            control=True, limit=100, limit_bytes=1 << 20
        )
        table = MappingTable(RULES)
        config = Config(max_records_s=NO_GUARD)
        self.engine = Engine(
            self.source,  # type: ignore[arg-type]
            table,
            self.publisher,
            RULES,
            config,
            silent_baseline=silent,
        )

    def events(self) -> list[str]:
        """All events up to the end."""
        return [event.event for event in self.reader]
