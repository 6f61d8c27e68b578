"""`CallRecords`: calls with their arguments and results, one by one, from the ring of a `CallCounter`."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from sowatch.model.identity import ProcessId
from sowatch.uprobes.call_format import MAX_ARGUMENTS, RECORD_BYTES, CallFormat
from sowatch.uprobes.records import Site

__all__ = ["Call", "CallRecords"]

#: struct call_record of probe_calls.h, 112 bytes: probe, start of the process, entry, time spent (ns); tgid, tid, kind,
#: unused; registers; lengths of texts.
HEAD: Final = struct.Struct(f"=4Q4I{MAX_ARGUMENTS}Q8h")
assert HEAD.size == RECORD_BYTES
_RETURN, _AGAIN = 1, 2
#: Calls that are under way: their returns are waited for. Those that are left by longjmp have none.
_MAX_OPEN: Final = 16_384


class Call(NamedTuple):
    """One call. ``t_ns`` is CLOCK_MONOTONIC of its entry.

    ``arguments`` and ``result`` have values as of `sowatch.uprobes.call_format.ValueType.value`; ``arguments`` is None
    if the record of the entry was lost. ``spent_ns`` is None where no return was waited for, or came.
    """

    site: Site
    process: ProcessId
    tid: int
    t_ns: int
    arguments: tuple[Any, ...] | None
    result: Any = None
    spent_ns: int | None = None

    @property
    def has_returned(self) -> bool:
        """Whether ``result`` is one."""
        return self.spent_ns is not None


class CallRecords:
    """Puts records of entries and returns together. One thread at a time may use it.

    Args:
        call_format: as the kernel has it.
    """

    def __init__(self, call_format: CallFormat) -> None:
        self.format = call_format
        self._open: OrderedDict[tuple[int, int, int], Call] = OrderedDict()

    def take(self, records: Iterable[bytes], sites: Mapping[int, Site]) -> list[Call]:
        """The calls that have ended with these records, in the order of the records."""
        found: list[Call] = []
        is_paired = self.format.return_bytes > 0
        for record in records:
            probe, start_ns, since_ns, spent_ns, tgid, tid, kind, _, *rest = HEAD.unpack_from(record)
            site = sites.get(probe)
            if site is None:
                continue
            registers, lengths = rest[:MAX_ARGUMENTS], rest[MAX_ARGUMENTS:]
            texts = record[RECORD_BYTES:]
            key = (probe, tid, since_ns)
            if kind == _RETURN:
                begun = self._open.pop(key, None)
                result = self.format.result
                value = None if result is None else result.value(registers[0], lengths[0], texts)
                arguments = () if self.format.entry_bytes == 0 else begun and begun.arguments
                found.append(Call(site, ProcessId(tgid, start_ns), tid, since_ns, arguments, value, spent_ns))
                continue
            call = Call(site, ProcessId(tgid, start_ns), tid, since_ns, self.format.values(registers, lengths, texts))
            if kind == _AGAIN and key not in self._open:
                continue  # the record of the entry was lost, or was given up
            if not is_paired:
                found.append(call)
                continue
            self._open[key] = call
            if len(self._open) > _MAX_OPEN:
                found.append(self._open.popitem(last=False)[1])
        return found

    def finish(self, is_gone: Callable[[ProcessId], bool] = lambda _: True) -> list[Call]:
        """The calls that have not returned, of processes that are gone; those are forgotten."""
        keys = [key for key, call in self._open.items() if is_gone(call.process)]
        return [self._open.pop(key) for key in keys]
