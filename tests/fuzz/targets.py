"""What is fuzzed: the readers of what containers and their peers write. Each target raises only if there is a fault.

Used by ``fuzz`` (new inputs, with atheris) and by ``test_corpus`` (those that are kept, on every run of the suite).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sowatch.http.flows import Chunk, ConnectionKey, Direction, Flow, FlowTable
from sowatch.linux.cgroups import parse_cgroup
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError, ElfLimits
from sowatch.linux.elf_symbols import read_exports, symbol_offsets
from sowatch.linux.proc_parse import executable_maps, parse_maps, parse_stat, parse_status
from sowatch.model.escape import visible
from sowatch.model.identity import ProcessId

__all__ = ["TARGETS", "elf", "http", "maps"]

#: Low, so that an input that makes us read and read is a fault and not a slow input.
LIMITS: Final = ElfLimits(read_bytes=1 << 20)
#: What may be allocated or returned of an input at most, whatever it claims.
MAX_NAMES: Final = 20_000
#: Of connections.
MAX_HELD_BYTES: Final = 1 << 20


class _Memory:
    """One memfd for all inputs: making one for each takes longer than reading it."""

    fd = -1

    @classmethod
    def of(cls, data: bytes) -> int:
        if cls.fd < 0:
            cls.fd = os.memfd_create("input", os.MFD_CLOEXEC)
        os.truncate(cls.fd, 0)
        # The first byte says how much of nothing follows: up to a sparse terabyte.
        os.pwrite(cls.fd, data[1:], 0)
        if data and data[0] & 0x80:
            os.truncate(cls.fd, max(len(data), 1 << (data[0] & 0x7F) % 41))
        return cls.fd


def _expect_no_errno(error: ElfError) -> None:
    assert error.errno is None, "a file in memory can always be read"


def elf(data: bytes) -> None:
    """An ELF file: facts in bounds, exports that agree with each other, or an `ElfError`."""
    fd = _Memory.of(data)
    facts = read_facts(fd, limits=LIMITS)
    assert facts is not None
    assert facts.build_id is None or len(facts.build_id) <= 2 * LIMITS.build_id_bytes
    assert facts.soname is None or len(facts.soname) <= LIMITS.soname_bytes
    try:
        exports = read_exports(fd, limits=LIMITS)
    except ElfError as error:
        _expect_no_errno(error)
        exports = frozenset()
    assert len(exports) <= MAX_NAMES
    for name in sorted(exports)[:3] or ["SSL_read"]:
        try:
            # A forged hash table may hide a name from the look-up by hash, but not invent one.
            assert read_exports(fd, [name], limits=LIMITS) <= {name}
            symbol_offsets(fd, name, limits=LIMITS)
        except ElfError as error:
            _expect_no_errno(error)


def maps(data: bytes) -> None:
    """The text files of a process: rows that stand in the text, and names that can be shown."""
    rows = parse_maps(data)
    lines = data.count(b"\n")
    assert len(rows) <= lines
    executable = executable_maps(data)
    assert set(executable) <= {row for row in rows if "x" in row.perms}
    # The kernel writes an anonymous row with 00:00 0; that one and no other is left out.
    assert set(executable) >= {row for row in rows if "x" in row.perms and (row.inode or row.major or row.minor)}
    for row in rows:
        assert row.start >= 0
        assert row.path.replace(b"\n", b"") in data.replace(b"\\012", b"")
        assert visible(row.path.decode("utf-8", "surrogateescape")).isprintable()
    parse_stat(data)
    parse_status(data)
    parse_cgroup(data)


def _calls(data: bytes) -> list[tuple[int, bytes]]:
    """Calls as an input has them: a byte of bits (1: a write, 2: lost, 4: not captured), a length, so many bytes."""
    calls, at = [], 0
    while at + 3 <= len(data):
        length = int.from_bytes(data[at + 1 : at + 3], "big")
        calls.append((data[at], data[at + 3 : at + 3 + length]))
        at += 3 + length
    return calls


def _flows(calls: list[tuple[int, bytes]], cut_bytes: int) -> list[Flow]:
    """The flows of calls that are cut into pieces of at most so many bytes."""
    flows: list[Flow] = []
    table = FlowTable(flows.append, max_connections=2, max_bytes=MAX_HELD_BYTES)
    key, offsets, taken = ConnectionKey(ProcessId(1, 1), 1), [0, 0], 0
    for now, (bits, whole) in enumerate(calls):
        direction: Direction = "write" if bits & 1 else "read"
        for start in range(0, len(whole), cut_bytes):
            piece = whole[start : start + cut_bytes]
            offset = offsets[bits & 1]
            offsets[bits & 1] += len(piece)
            if bits & 2:
                continue
            taken += 1
            spared = table.take(Chunk(key, direction, b"" if bits & 4 else piece, len(piece), 0, offset, now))
            assert spared == 0 or spared > offset
    table.close(len(calls))
    assert len(table) == 0
    assert table.stats.calls == taken
    assert table.stats.flows == len(flows)
    assert table.stats.incomplete == sum(not flow.is_complete for flow in flows)
    return flows


def http(data: bytes) -> None:
    """What passes a TLS library: nothing is raised, sizes are in bounds, and counters agree."""
    calls = _calls(data)
    flows = _flows(calls, 1 << 16)
    assert len(flows) <= len(data)
    if len(data) < 2048:
        _flows(calls, 1)
    for flow in flows:
        assert flow.response_bytes <= len(data)
        assert flow.request_bytes <= len(data)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"elf": elf, "http": http, "maps": maps}
