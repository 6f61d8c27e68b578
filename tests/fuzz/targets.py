"""What is fuzzed: the readers of what containers write. Each target takes bytes and raises only if there is a fault.

Used by ``fuzz`` (new inputs, with atheris) and by ``test_corpus`` (those that are kept, on every run of the suite).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from sowatch.linux.cgroups import parse_cgroup
from sowatch.linux.elf import read_facts
from sowatch.linux.elf_file import ElfError, ElfLimits
from sowatch.linux.elf_symbols import read_exports, symbol_offsets
from sowatch.linux.proc_parse import executable_maps, parse_maps, parse_stat, parse_status
from sowatch.model.escape import visible

__all__ = ["TARGETS", "elf", "maps"]

#: Low, so that an input that makes us read and read is a fault and not a slow input.
LIMITS: Final = ElfLimits(read_bytes=1 << 20)
#: What may be allocated or returned of an input at most, whatever it claims.
MAX_NAMES: Final = 20_000


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


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {"elf": elf, "maps": maps}
