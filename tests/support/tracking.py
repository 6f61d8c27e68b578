"""What the tests of the tracker share: files, and what a tracker said of them."""

from __future__ import annotations

from sowatch.bpf.records import Record
from sowatch.engine.table import Causes, MappingTable
from support.records import File

__all__ = ["BASE", "CRYPTO", "LIBC", "LIVE", "REPAIR", "SNAPSHOT", "SSL", "feed", "reported", "the_map"]

LIVE = Causes("mmap", "munmap")
REPAIR = Causes("repair", "repair")
SNAPSHOT = Causes("snapshot", "repair")

SSL = File("/usr/lib/libssl.so.3", 100)
CRYPTO = File("/usr/lib/libcrypto.so.3", 101)
LIBC = File("/usr/lib/libc.so.6", 102)
BASE = 0x7F0000000000


def reported(table: MappingTable) -> list[str]:
    """What came (+) and went (-) since the last look."""
    return [
        f"{'+' if one.is_load else '-'}{one.process.pid} {one.name.path.rsplit('/', 1)[-1]} {one.cause}"
        for one in table.take_changes()
    ]


def the_map(table: MappingTable) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The ranges of each (pid, inode)."""
    return {
        (process.id.pid, mapping.name.file_id.inode): sorted(mapping.ranges) for process, mapping in table.mappings()
    }


def feed(table: MappingTable, *records: Record) -> list[str]:
    """What these records told, as `reported` says it."""
    for record in records:
        table.apply(record)
    return reported(table)
