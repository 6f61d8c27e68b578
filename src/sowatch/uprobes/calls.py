"""`CallCounter`: counts and times the calls of functions, by process, wherever their library is or will be loaded."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

from sowatch.bpf.binding import PROGRAMS
from sowatch.bpf.probe_object import ProbeObject, Ring, set_probe_constants
from sowatch.engine.workers import ActiveFile
from sowatch.model.events import Library
from sowatch.model.identity import ProcessId
from sowatch.model.rules import Rule
from sowatch.uprobes.attacher import Attacher
from sowatch.uprobes.call_format import CallFormat
from sowatch.uprobes.call_records import Call, CallRecords
from sowatch.uprobes.probes import Probe
from sowatch.uprobes.records import AttachedFile, AttacherStats, Failure, Site

__all__ = ["BUCKETS", "CallCounter", "Calls", "Stack", "percentile_ns"]

#: struct calls_key of probe_calls.h, 24 bytes: probe, start of the process in ns, tgid.
KEY: Final = struct.Struct("=QQII")
#: struct calls, 528 bytes: entries, the time of those that have returned in ns, and BUCKETS counts of them.
BUCKETS: Final = 64
VALUE: Final = struct.Struct(f"=QQ{BUCKETS}Q")
#: struct stacks_key of probe_calls.h, 40 bytes: probe, start of the process, caller, tgid, number of the stack, unused.
STACKS_KEY: Final = struct.Struct("=QQQIiQ")
STACK_DEPTH: Final = 64
_ADDRESSES: Final = struct.Struct(f"={STACK_DEPTH}Q")
#: enum probe_counter
_LOST, _UNTIMED, _RECORDS_LOST, _STACKS_LOST = range(4)
#: The least that a ring may have, with any page size up to 64 KiB.
_SMALLEST_RING: Final = 1 << 16


class Calls(NamedTuple):
    """What one process has called of one function since it was attached; figures only grow.

    ``latency`` has for bucket N the calls that took at least 2**N ns and less than 2**(N+1); all 0 without timing.
    ``timed`` calls have returned; those that were left by longjmp or an exception never do.
    """

    site: Site
    process: ProcessId
    calls: int
    timed: int
    sum_ns: int
    latency: tuple[int, ...]


class Stack(NamedTuple):
    """How often one process has called a function from one place, by the addresses of its callers, innermost first.

    They are what calls return to, as far as frame pointers lead; the first is right without them.
    """

    site: Site
    process: ProcessId
    addresses: tuple[int, ...]
    calls: int
    key: bytes


def percentile_ns(latency: Sequence[int], share: float) -> int | None:
    """The upper bound of the bucket that has the given share (0 to 1) of the calls at or below it; None without calls.

    >>> percentile_ns([0, 0, 3, 1], 0.5), percentile_ns([0], 0.5)
    (8, None)
    """
    total = sum(latency)
    seen = 0
    for bucket, number in enumerate(latency):
        seen += number
        if number and seen >= share * total:
            return 1 << (bucket + 1)
    return None


class CallCounter:
    r"""The built-in program on functions of a rule's files; a context manager, as `Attacher`.

    Args:
        symbols: names or patterns; see `sowatch.uprobes.probes.Probe`. A file needs one of them at least.
        is_timed: return probes, too, for the time that calls take.
        linger_s: see `sowatch.uprobes.attacher.Attacher`.
        is_filtered: count only in the processes of `want`.
        links, prearm, returns: see `sowatch.uprobes.attacher.Attacher`.
        call_format: records each call, for `take_calls`; one with a result is timed anyway.
        has_stacks: counts who calls, for `stacks`.

    The kernel keeps 16,384 counts (function and process); more are counted as ``lost``. So many stacks, and 4 MiB of
    records until they are taken.

    >>> counter = CallCounter(["deflate"])  # doctest: +SKIP
    >>> with counter, Watcher(counter.rule(r"libz\.so")) as watcher:  # doctest: +SKIP
    ...     watcher.wait(10)
    ...     print(counter.calls())
    """

    def __init__(
        self,
        symbols: Iterable[str],
        *,
        is_timed: bool = True,
        linger_s: float = 0.0,
        is_filtered: bool = False,
        links: Literal["auto", "multi", "perf_event"] = "auto",
        call_format: CallFormat | None = None,
        has_stacks: bool = False,
        prearm: Iterable[str | Library] = (),
        returns: Literal["auto", "probe", "instructions"] = "auto",
    ) -> None:
        is_timed = is_timed or (call_format is not None and call_format.result is not None)
        self.call_format = call_format
        self.has_stacks = has_stacks
        self._records = None if call_format is None else CallRecords(call_format)
        self._rings: dict[ProbeObject, Ring] = {}
        self.is_timed = is_timed
        self.is_filtered = is_filtered
        #: Where the kernel has no cookies, each function has an object, which may be loaded later than `want`.
        self._wanted: set[int] = set()
        self._filters: list[ProbeObject] = []
        self._filter_lock = threading.Lock()
        probes = [Probe(symbol, "calls_entered", is_return=False, is_optional=True) for symbol in symbols]
        if is_timed:
            # A place inside a function has no return.
            probes += [
                Probe(one.symbol, "calls_returned", is_return=True, is_optional=True)
                for one in probes
                if "+" not in one.symbol
            ]
        self.attacher = Attacher(
            str(PROGRAMS / "probe_calls.bpf.o"),
            probes,
            linger_s=linger_s,
            prepare=self._set_constants,
            after_load=self._add_filter if is_filtered else None,
            links=links,
            prearm=prearm,
            returns=returns,
            is_split=True,
            pairs_returns=True,
        )

    def _set_constants(self, loaded: ProbeObject, cookie: int) -> None:
        set_probe_constants(loaded, is_filtered=self.is_filtered)
        loaded.set_constant("is_timed", bytes([self.is_timed]))
        loaded.set_constant("only_probe", cookie.to_bytes(8, "little"))
        loaded.set_constant("sees_instructions", bytes([self.attacher.returns == "instructions"]))
        loaded.set_constant("has_stacks", bytes([self.has_stacks]))
        if not self.has_stacks:
            loaded.set_max_entries("stacks", 1)
            loaded.set_max_entries("stack_counts", 1)
        if self.call_format is None or self.call_format.result is None:
            loaded.set_max_entries("unread", 1)
        if self.call_format is None:
            loaded.set_max_entries("records", _SMALLEST_RING)
            return
        loaded.set_constant("format", self.call_format.pack())
        loaded.set_constant("entry_bytes", self.call_format.entry_bytes.to_bytes(8, "little"))
        loaded.set_constant("return_bytes", self.call_format.return_bytes.to_bytes(8, "little"))

    def start(self) -> Self:
        """Loads the program. Safe to call again."""
        self.attacher.start()
        return self

    def close(self) -> None:
        """Detaches everything. Safe to call again."""
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()
        self.attacher.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def rule(self, pattern: str, *, name: str = "calls") -> Rule:
        """A rule whose activation attaches the counter."""
        return self.attacher.rule(pattern, name=name)

    def attach(self, file: ActiveFile) -> None:
        """For a rule of your own: see `Attacher.attach`."""
        self.attacher.attach(file)

    def detach(self, file: ActiveFile) -> None:
        """For a rule of your own: see `Attacher.detach`."""
        self.attacher.detach(file)

    @property
    def failures(self) -> list[Failure]:
        """See `Attacher.failures`."""
        return self.attacher.failures

    @property
    def stats(self) -> AttacherStats:
        """See `Attacher.stats`."""
        return self.attacher.stats

    def files(self) -> list[AttachedFile]:
        """See `Attacher.files`."""
        return self.attacher.files()

    @property
    def lost(self) -> int:
        """Calls that are in no count, because the kernel's table was full."""
        return self._counter(_LOST)

    @property
    def untimed(self) -> int:
        """Calls that were counted and not timed, because one thread had too many under way."""
        return self._counter(_UNTIMED)

    @property
    def records_lost(self) -> int:
        """Calls, or their results, that are counted and were not recorded, as they came faster than they were taken."""
        return self._counter(_RECORDS_LOST)

    @property
    def stacks_lost(self) -> int:
        """Calls whose callers could not be found, or for which a further stack could not be kept."""
        return self._counter(_STACKS_LOST)

    def take_calls(self, is_gone: Callable[[ProcessId], bool] = lambda _: False) -> list[Call]:
        """The calls that were recorded since the last time, and those under way in processes that are gone.

        A call with a result comes when it returns. One thread at a time.
        """
        if self._records is None:
            return []
        found: list[Call] = []
        sites = self.attacher.sites
        for loaded in self.attacher.objects():
            if loaded not in self._rings:
                self._rings[loaded] = loaded.ring("records")
            found += self._records.take(self._rings[loaded].take(), sites)
        return found + self._records.finish(is_gone)

    def stacks(self) -> list[Stack]:
        """Who has called the functions, by process; of files that are detached there is nothing any more."""
        if not self.has_stacks:
            return []
        sites = self.attacher.sites
        found = []
        for loaded in self.attacher.objects():
            counts, stacks = loaded.map("stack_counts"), loaded.map("stacks")
            for key in counts.all_keys():
                probe_id, start_ns, caller, tgid, number, _ = STACKS_KEY.unpack(key)
                site, value = sites.get(probe_id), counts.lookup(key)
                if site is None or value is None:
                    continue
                data = stacks.lookup(number.to_bytes(4, "little")) if number >= 0 else None
                # The kernel's walk begins with the function itself; at its first instruction there is no frame yet, so
                # what follows may be the caller or the caller's caller.
                walked = [one for one in _ADDRESSES.unpack(data) if one][1:] if data else []
                if caller and walked[:1] != [caller]:
                    walked.insert(0, caller)
                calls = int.from_bytes(value, "little")
                found.append(Stack(site, ProcessId(tgid, start_ns), tuple(walked), calls, key))
        return found

    def forget_stack(self, stack: Stack) -> None:
        """Removes a count, of a process that is gone."""
        for loaded in self.attacher.objects():
            loaded.map("stack_counts").delete(stack.key)

    def calls(self) -> list[Calls]:
        """The figures by function and process; of files that are detached there are none any more."""
        return sorted(self.calls_at(self.attacher.sites), key=lambda one: (one.site.cookie, one.process))

    def calls_at(self, sites: Mapping[int, Site]) -> Iterator[Calls]:
        """The figures of these sites, by cookie; those of sites that are detached stay until `forget`.

        Not so where the kernel has no cookies: there they go with the site's program.
        """
        for table in [loaded.map("calls") for loaded in self.attacher.objects()]:
            for key in table.all_keys():
                probe_id, start_ns, tgid, _ = KEY.unpack(key)
                site = sites.get(probe_id)
                value = table.lookup(key)
                if site is None or value is None:
                    continue
                calls, sum_ns, *latency = VALUE.unpack(value)
                yield Calls(site, ProcessId(tgid, start_ns), calls, sum(latency), sum_ns, tuple(latency))

    def want(self, pid: int) -> None:
        """Counts in this process from now on; its pid in the initial pid namespace."""
        with self._filter_lock:
            for loaded in self._open_filters():
                loaded.map("wanted").update(pid.to_bytes(4, "little"), b"\1")
            self._wanted.add(pid)

    def unwant(self, pid: int) -> None:
        """Counts in this process no more."""
        with self._filter_lock:
            self._wanted.discard(pid)
            for loaded in self._open_filters():
                loaded.map("wanted").delete(pid.to_bytes(4, "little"))

    def _add_filter(self, loaded: ProbeObject) -> None:
        with self._filter_lock:
            for pid in self._wanted:
                loaded.map("wanted").update(pid.to_bytes(4, "little"), b"\1")
            self._filters = [*self._open_filters(), loaded]

    def _open_filters(self) -> list[ProbeObject]:
        return [one for one in self._filters if one.is_open]

    def forget(self, calls: Calls) -> None:
        """Removes a count, of a process that is gone, so that its place is free."""
        key = KEY.pack(calls.site.cookie, calls.process.start_ns, calls.process.pid, 0)
        for loaded in self.attacher.objects():
            loaded.map("calls").delete(key)

    def _counter(self, index: int) -> int:
        return sum(loaded.per_cpu_sum("counters", index) for loaded in self.attacher.objects())
