"""What `sowatch trace` does: parses targets, watches their libraries, and gives the counts of each process.

A `Trace` keeps figures by (function, library, process) until their process is gone and they were taken once more.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Final, NamedTuple, Self

from sowatch.engine.workers import ActiveFile
from sowatch.model.config import Config
from sowatch.model.errors import UsageError
from sowatch.model.events import Library, LibraryEvent, Process, Ready
from sowatch.model.identity import ProcessId
from sowatch.model.rules import Rule
from sowatch.uprobes.calls import CallCounter, Calls
from sowatch.uprobes.records import Failure
from sowatch.watcher.watcher import Watcher

__all__ = ["Target", "Trace", "TracedCalls", "parse_target"]

_BUILD_ID: Final = re.compile(r"[0-9a-f]{8,64}")
#: libz, libssl.so, libpython3.11: letters that no regular expression needs, beginning as libraries do.
_STEM: Final = re.compile(r"lib[\w.+-]*?(?:\.so(?:\.[\w.]+)?)?")


class Target(NamedTuple):
    """One LIB:SYMBOL. ``pattern`` is searched in paths; ``build_id`` is a prefix of a build id instead."""

    library: str
    symbol: str
    pattern: str | None
    build_id: str | None = None


class TracedCalls(NamedTuple):
    """The figures of one function in one process. ``process`` has what is known; only its ids if nothing is."""

    calls: Calls
    process: Process
    is_final: bool


def parse_target(text: str) -> Target:
    r"""What a LIB:SYMBOL of the command line asks for.

    LIB is a path, the stem of a soname (``libz`` also finds libz.so.1 and libz-3e69114b.so.1.2, as wheels name it), a
    prefix of a build id (8 or more hexadecimal digits) or a regular expression for the path.

    Raises:
        UsageError: no symbol, or no library.

    >>> parse_target("libz:deflate").pattern
    '(?:^|/)libz(?:-[0-9a-f]{8,})?(?:\\.so(?:\\.|$)|-\\d[^/]*\\.so$)'
    >>> parse_target("/usr/lib/libz.so.1:deflate*").pattern
    '^/usr/lib/libz\\.so\\.1$'
    """
    # cpp:ns::f has colons of its own.
    library, colon, symbol = text.partition(":")
    if not colon or not library or not symbol:
        raise UsageError(f"{text!r} is no LIB:SYMBOL. Write the library, a colon, and the function: libz:deflate.")
    if library.startswith("/"):
        return Target(library, symbol, f"^{re.escape(library)}$")
    if _BUILD_ID.fullmatch(library):
        return Target(library, symbol, None, library)
    if _STEM.fullmatch(library):
        if ".so" in library:
            return Target(library, symbol, rf"(?:^|/){re.escape(library)}(?:\.|$)")
        stem = re.escape(library)
        return Target(library, symbol, rf"(?:^|/){stem}(?:-[0-9a-f]{{8,}})?(?:\.so(?:\.|$)|-\d[^/]*\.so$)")
    return Target(library, symbol, library)


class Trace:
    """Counts the calls of some functions, wherever their libraries are or will be loaded; a context manager.

    Args:
        targets: what to count.
        config: of the watch.
        pids: count these processes only.
        container: count processes only whose container's id begins with this.
        is_timed: time the calls, too.
        linger_s: how long a file stays attached after its last process; as long as figures are taken, at least.
        kinds: what the file has to be to a process.

    Raises:
        UsageError: a pattern that is none.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        *,
        config: Config = Config(),  # noqa: B008 - frozen
        pids: Collection[int] = (),
        container: str | None = None,
        is_timed: bool = True,
        linger_s: float = 5.0,
        kinds: Iterable[str] = ("library", "executable"),
    ) -> None:
        by_library: dict[Target, list[str]] = defaultdict(list)
        for target in dict.fromkeys(targets):
            by_library[target._replace(symbol="")].append(target.symbol)
        is_filtered = bool(pids) or container is not None
        self._counters: list[CallCounter] = []
        rules = []
        for number, (target, symbols) in enumerate(by_library.items()):
            counter = CallCounter(symbols, is_timed=is_timed, linger_s=linger_s, is_filtered=is_filtered)
            self._counters.append(counter)
            rules.append(
                Rule(
                    target.pattern,
                    name=f"trace-{number}",
                    kind=tuple(kinds),
                    on_activate=_only(target, counter.attach),
                    on_deactivate=counter.detach,
                    on_load=self._note,
                    on_unload=self._note,
                )
            )
        self._is_filtered = is_filtered
        self._processes: dict[tuple[int, int], Process] = {}
        self._gone: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self.watcher = Watcher(*rules, config=config, pids=frozenset(pids), container=container)

    def start(self) -> Ready:
        """Loads the programs and starts the watch; what is mapped already is attached soon after it returns."""
        try:
            for counter in self._counters:
                counter.start()
            return self.watcher.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the watch and detaches everything. Safe to call again."""
        self.watcher.stop()
        for counter in self._counters:
            counter.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def attached(self) -> int:
        """Functions that are attached now."""
        return sum(counter.stats.attached for counter in self._counters)

    @property
    def expected(self) -> int:
        """Functions that should be attached now."""
        return sum(counter.stats.expected for counter in self._counters)

    @property
    def lost(self) -> int:
        """Calls that are in no count."""
        return sum(counter.lost for counter in self._counters)

    def failures(self) -> list[Failure]:
        """What matched and could not be attached, each once: functions of attached files, and whole files."""
        found = [one for counter in self._counters for one in counter.failures]
        for blocked in self.watcher.registry.blocked():
            library = Library(blocked.sample_path, blocked.id)
            found.append(Failure(library, "*", blocked.reason, is_permanent=True))
        return list(dict.fromkeys(found))

    def take(self, *, is_last: bool = False) -> list[TracedCalls]:
        """The figures as they are, cumulative; those of a process that is gone once more, as final."""
        taken = []
        with self._lock:
            gone, processes = set(self._gone), dict(self._processes)
        for counter in self._counters:
            for calls in counter.calls():
                key = calls.process.pid, calls.process.start_ns
                is_final = is_last or key in gone
                taken.append(TracedCalls(calls, _process_of(calls.process, processes), is_final))
                if is_final and not is_last:
                    counter.forget(calls)
        with self._lock:
            for key in gone:
                self._gone.discard(key)
                self._processes.pop(key, None)
        return taken

    def _note(self, event: LibraryEvent) -> None:
        """A process has a library, or has it no more; on the thread of a rule."""
        process = event.process
        if process is None:
            return
        key = process.pid, process.start_ns
        with self._lock:
            if event.event == "load":
                self._processes[key] = process
                self._gone.discard(key)
            elif event.cause in ("exit", "exec"):
                self._gone.add(key)
        if self._is_filtered:
            for counter in self._counters:
                (counter.want if event.event == "load" else counter.unwant)(process.pid)


def _only(target: Target, attach: Callable[[ActiveFile], None]) -> Callable[[ActiveFile], None]:
    if target.build_id is None:
        return attach
    prefix = target.build_id

    def attach_if_it_is(file: ActiveFile) -> None:
        if (file.library.build_id or "").startswith(prefix):
            attach(file)

    return attach_if_it_is


def _process_of(process: ProcessId, known: Mapping[tuple[int, int], Process]) -> Process:
    found = known.get((process.pid, process.start_ns))
    return found or Process(pid=process.pid, start_ns=process.start_ns)
