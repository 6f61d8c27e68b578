"""What `sowatch trace` does: parses targets, watches their libraries, and gives the counts of each process.

A `Trace` keeps figures by (function, library, process) until their process is gone and they were taken once more.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Final, NamedTuple, Self

from sowatch.engine.workers import ActiveFile
from sowatch.linux.descriptors import close_fd
from sowatch.linux.mapped_file import open_mapped
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.errors import EnvironmentFault, FileRefused, PatternError, SowatchError, UsageError
from sowatch.model.events import Library, Load, Process, Ready, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import Kind
from sowatch.model.rules import Rule, compile_pattern
from sowatch.uprobes.address_book import AddressBook, Frame, process_key
from sowatch.uprobes.call_format import CallFormat, parse_function
from sowatch.uprobes.call_records import Call
from sowatch.uprobes.calls import CallCounter, Calls
from sowatch.uprobes.records import Failure
from sowatch.watcher.watcher import Watcher

__all__ = ["Target", "Trace", "TracedCall", "TracedCalls", "TracedStack", "library_matcher", "parse_target"]

_BUILD_ID: Final = re.compile(r"[0-9a-f]{8,64}")
#: libz, libssl.so, libpython3.11: letters that no regular expression needs, beginning as libraries do.
_STEM: Final = re.compile(r"lib[\w.+-]*?(?:\.so(?:\.[\w.]+)?)?")
#: What a function looks like, as far as it distinguishes one from the rest of a path or a regular expression.
_FUNCTION: Final = re.compile(r"(?:cpp:)?[^\s/()|]+(?:\(.*)?(?:\s*->.*)?", re.DOTALL)
#: Different callers whose calls are distinguished; the others count as one.
_MAX_STACKS: Final = 10_000
#: Processes that are gone and whose names are still known.
_MAX_PAST: Final = 4_096


class Target(NamedTuple):
    """One LIB:FUNCTION. ``pattern`` is searched in paths; ``build_id`` is a prefix of a build id instead."""

    library: str
    symbol: str
    pattern: str | None
    build_id: str | None = None
    call_format: CallFormat | None = None

    def matches(self, library: Library) -> bool:
        """Whether a file is what LIB asks for."""
        if self.pattern is None:
            return (library.build_id or "").startswith(self.build_id or "")
        return re.search(self.pattern, library.path) is not None


class TracedCalls(NamedTuple):
    """The figures of one function in one process. ``process`` has what is known; only its ids if nothing is."""

    calls: Calls
    process: Process
    is_final: bool


class TracedCall(NamedTuple):
    """One call with its arguments and result, and what is known of its process."""

    call: Call
    process: Process
    call_format: CallFormat


class TracedStack(NamedTuple):
    """How often a function of a library was called from one place, by all processes."""

    symbol: str
    library: Library
    frames: tuple[Frame, ...]
    calls: int


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
    library, function = _parted(text)
    if not library or not function:
        raise UsageError(f"{text!r} is no LIB:SYMBOL. Write the library, a colon, and the function: libz:deflate.")
    symbol, call_format = parse_function(function)
    return library_matcher(library)._replace(symbol=symbol, call_format=call_format)


def library_matcher(library: str) -> Target:
    """What LIB asks for, without a function."""
    if library.startswith("/"):
        return Target(library, "", f"^{re.escape(library)}$")
    if _BUILD_ID.fullmatch(library):
        return Target(library, "", None, library)
    if _STEM.fullmatch(library):
        if ".so" in library:
            return Target(library, "", rf"(?:^|/){re.escape(library)}(?:\.|$)")
        stem = re.escape(library)
        return Target(library, "", rf"(?:^|/){stem}(?:-[0-9a-f]{{8,}})?(?:\.so(?:\.|$)|-\d[^/]*\.so$)")
    return Target(library, "", library)


def _parted(text: str) -> tuple[str, str]:
    """LIB and FUNCTION: both may have colons of their own, as lib(?:ssl|crypto):SSL_read and libx:cpp:ns::f."""
    first = text.find(":")
    at = first
    while at > 0:
        library, function = text[:at], text[at + 1 :]
        if _FUNCTION.fullmatch(function) and (library.startswith("/") or _is_expression(library)):
            return library, function
        at = text.find(":", at + 1)
    return (text[:first], text[first + 1 :]) if first >= 0 else (text, "")


def _is_expression(text: str) -> bool:
    try:
        compile_pattern(text)
    except PatternError:
        return False
    return True


class _Group(NamedTuple):
    """The functions of one library that are recorded alike: one counter."""

    target: Target
    symbols: tuple[str, ...]
    counter: CallCounter


class Trace:
    """Counts the calls of some functions, wherever their libraries are or will be loaded; a context manager.

    Args:
        targets: what to count.
        config: of the watch.
        pids: count these processes only.
        container: count processes only whose container's id begins with this.
        is_timed: time the calls, too; those whose result is asked for are timed anyway.
        has_stacks: count who calls. Every file of the host is kept account of then.
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
        has_stacks: bool = False,
        linger_s: float = 5.0,
        kinds: Iterable[Kind] = ("library", "executable"),
    ) -> None:
        by_counter: dict[Target, list[str]] = defaultdict(list)
        for target in dict.fromkeys(targets):
            by_counter[target._replace(symbol="")].append(target.symbol)
        self._is_filtered = bool(pids) or container is not None
        self._groups = [
            _Group(
                target,
                tuple(symbols),
                CallCounter(
                    symbols,
                    is_timed=is_timed,
                    linger_s=linger_s,
                    is_filtered=self._is_filtered,
                    call_format=target.call_format,
                    has_stacks=has_stacks,
                ),
            )
            for target, symbols in by_counter.items()
        ]
        self._proc = ProcFs(config.proc_root)
        self._processes: dict[tuple[int, int], Process] = {}
        #: Those that are gone, for what is taken late.
        self._past: OrderedDict[tuple[int, int], Process] = OrderedDict()
        self._gone: set[tuple[int, int]] = set()
        #: How many traced files each process has.
        self._held: Counter[tuple[int, int]] = Counter()
        self._attached: dict[FileId, list[_Group]] = {}
        self._matched: set[str] = set()
        self._lock = threading.Lock()
        self._book = AddressBook() if has_stacks else None
        self._stacks: Counter[tuple[str, Library, tuple[Frame, ...]]] = Counter()
        self._stacks_before: dict[bytes, int] = {}
        self.watcher = Watcher(
            *self._rules([target for target, *_ in self._groups], kinds),
            config=config,
            pids=frozenset(pids),
            container=container,
        )

    def _rules(self, targets: Collection[Target], kinds: Iterable[Kind]) -> list[Rule]:
        """One rule for all targets: of several rules only the first that matches a file hears of it."""
        patterns = [target.pattern for target in targets]
        for pattern in patterns:
            Rule(pattern)  # a bad one is named by itself
        whole = None if None in patterns else "|".join(f"(?:{pattern})" for pattern in dict.fromkeys(patterns))
        rules = [
            Rule(
                whole,
                name="trace",
                kind=tuple(kinds),
                on_activate=self._activate,
                on_deactivate=self._deactivate,
                on_load=self._note,
                on_unload=self._note,
            )
        ]
        if self._book is not None:
            book = self._book
            rules.append(
                Rule(
                    None,
                    name="trace-callers",
                    kind=("library", "executable", "interpreter"),
                    on_activate=book.hold,
                    on_load=book.note,
                    on_unload=book.note,
                )
            )
        return rules

    def start(self) -> Ready:
        """Loads the programs and starts the watch; what is mapped already is attached soon after it returns."""
        try:
            for *_, counter in self._groups:
                counter.start()
            return self.watcher.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the watch and detaches everything. Safe to call again."""
        self.watcher.stop()
        for *_, counter in self._groups:
            counter.close()
        if self._book is not None:
            self._book.close()

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
        return sum(counter.stats.attached for *_, counter in self._groups)

    @property
    def expected(self) -> int:
        """Functions that should be attached now."""
        return sum(counter.stats.expected for *_, counter in self._groups)

    @property
    def lost(self) -> int:
        """Calls that are in no count."""
        return sum(counter.lost for *_, counter in self._groups)

    @property
    def records_lost(self) -> int:
        """Calls, or their results, that are counted and not shown one by one."""
        return sum(counter.records_lost for *_, counter in self._groups)

    @property
    def stacks_lost(self) -> int:
        """Calls whose callers are not known."""
        return sum(counter.stacks_lost for *_, counter in self._groups)

    def unmatched(self) -> list[str]:
        """The LIBs that no process has had so far."""
        with self._lock:
            matched = set(self._matched)
        return list(dict.fromkeys(target.library for target, *_ in self._groups if target.library not in matched))

    def failures(self) -> list[Failure]:
        """What matched and could not be attached, each once: functions of attached files, and whole files."""
        found = [one for *_, counter in self._groups for one in counter.failures]
        for group in self._groups:
            for file in group.counter.files():
                if file.state == "failed":
                    symbols = ", ".join(group.symbols)
                    found.append(Failure(file.library, symbols, file.reason or "", is_permanent=True))
        known = {one.library.id for one in found}
        for blocked in self.watcher.registry.blocked():
            if blocked.id not in known and blocked.rule == "trace":
                library = Library(blocked.sample_path, blocked.id)
                found.append(Failure(library, "*", blocked.reason, is_permanent=True))
        return list(dict.fromkeys(found))

    def take(self, *, is_last: bool = False) -> list[TracedCalls]:
        """The figures as they are, cumulative; those of a process that is gone once more, as final."""
        taken = []
        with self._lock:
            gone = set(self._gone)
        self._take_stacks(gone)
        for *_, counter in self._groups:
            for calls in counter.calls():
                is_final = is_last or process_key(calls.process) in gone
                taken.append(TracedCalls(calls, self._process(calls.process), is_final))
                if is_final and not is_last:
                    counter.forget(calls)
        with self._lock:
            for key in gone & self._gone:
                self._gone.discard(key)
                if (process := self._processes.pop(key, None)) is not None:
                    self._past[key] = process
                    if len(self._past) > _MAX_PAST:
                        self._past.popitem(last=False)
        return taken

    def take_calls(self, *, is_last: bool = False) -> list[TracedCall]:
        """The calls that were recorded since the last time; to be taken some times a second.

        What has a result comes when it returns, or when its process is gone, or at last.
        """
        with self._lock:
            gone = set(self._gone)
        return [
            TracedCall(call, self._process(call.process), counter.call_format)
            for *_, counter in self._groups
            if counter.call_format is not None
            for call in counter.take_calls(lambda process: is_last or process_key(process) in gone)
        ]

    def stacks(self, number: int) -> list[TracedStack]:
        """The most frequent callers of each function, at most so many of each, as of the last `take`."""
        left: Counter[tuple[str, Library]] = Counter()
        found = []
        for (symbol, library, frames), calls in self._stacks.most_common():
            left[symbol, library] += 1
            if left[symbol, library] <= number:
                found.append(TracedStack(symbol, library, frames, calls))
        return found

    def _take_stacks(self, gone: Collection[tuple[int, int]]) -> None:
        """Adds what is new, with the names that the addresses have now."""
        if self._book is None:
            return
        before, self._stacks_before = self._stacks_before, {}
        for *_, counter in self._groups:
            for stack in counter.stacks():
                new = stack.calls - before.get(stack.key, 0)
                if new > 0:
                    frames = self._book.frames(stack.process, stack.addresses)
                    # Addresses differ from process to process where names do not.
                    alike = tuple(one if one.place is None else one._replace(address=0) for one in frames)
                    key = stack.site.symbol, stack.site.library, alike
                    if key not in self._stacks and len(self._stacks) >= _MAX_STACKS:
                        key = stack.site.symbol, stack.site.library, ()
                    self._stacks[key] += new
                if process_key(stack.process) in gone:
                    counter.forget_stack(stack)
                else:
                    self._stacks_before[stack.key] = stack.calls

    def _process(self, process: ProcessId) -> Process:
        with self._lock:
            key = process_key(process)
            found = self._processes.get(key) or self._past.get(key)
        return found or Process(pid=process.pid, start_ns=process.start_ns)

    # ---- callbacks of the rule, on its thread ---------------------------------------------------

    def _activate(self, file: ActiveFile) -> None:
        """Attaches what asks for this file. It is blocked if nothing of that can be, else the rest is reported.

        Raises:
            SowatchError: as `sowatch.uprobes.attacher.Attacher.attach`.
        """
        if self._book is not None:
            self._book.hold(file)
        groups = [group for group in self._groups if group.target.matches(file.library)]
        attached: list[_Group] = []
        refusal: SowatchError | None = None
        with self._lock:
            self._matched.update(group.target.library for group in groups)
        for group in groups:
            try:
                group.counter.attach(file)
                attached.append(group)
            except EnvironmentFault:
                for one in attached:
                    one.counter.detach(file)
                raise
            except SowatchError as error:
                refusal = error  # the counter says so
        if refusal is not None and not attached:
            raise FileRefused(str(refusal)) from refusal
        with self._lock:
            self._attached[file.library.id] = attached

    def _deactivate(self, file: ActiveFile) -> None:
        with self._lock:
            attached = self._attached.pop(file.library.id, [])
        for group in attached:
            group.counter.detach(file)

    def _attach_by_other_path(self, event: Load | Unload) -> None:
        """A file that is active already, under a path that further targets ask for."""
        library, process = event.library, event.process
        with self._lock:
            attached = self._attached.get(library.id)
        if attached is None or process is None:
            return
        missing = [one for one in self._groups if one not in attached and one.target.matches(library)]
        if not missing:
            return
        fd = open_mapped(
            self._proc,
            process.pid,
            library.id,
            library.path,
            event.ranges,
            is_own_view=False,
            is_deleted=library.deleted,
            changed_ns=library.changed_ns,
        )
        if fd is None:
            return  # that process is gone
        try:
            for group in missing:
                with suppress(SowatchError):  # the counter says so
                    group.counter.attach(ActiveFile(library, fd))
                    attached.append(group)
        finally:
            close_fd(fd)

    def _note(self, event: Load | Unload) -> None:
        """A process has a library, or has it no more; on the thread of a rule."""
        process = event.process
        key = process_key(process.id)
        if self._book is not None:
            self._book.note(event)
        is_load = event.event == "load"
        with self._lock:
            held = self._held[key] = self._held[key] + (1 if is_load else -1)
            if is_load:
                self._processes[key] = process
                self._gone.discard(key)
            elif held <= 0:
                del self._held[key]
                if event.cause != "munmap":
                    self._gone.add(key)
        if self._is_filtered and (is_load or held <= 0):
            for *_, counter in self._groups:
                (counter.want if is_load else counter.unwant)(process.pid)
        if is_load:
            self._attach_by_other_path(event)
