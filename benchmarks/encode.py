"""What an event costs: to make it, to write it as a line of JSON, and to read it back.

Each beside what it is instead of: a frozen dataclass with slots of as many fields, and `json.dumps` of the same
object. Taken in turn within each round, the best of 20 batches of 500.
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Figure, main, median, spread
from msgspec.structs import replace

from sowatch.model.events import Library, Load, Process
from sowatch.model.identity import FileId
from sowatch.model.lines import decode, to_dict, to_json
from sowatch.model.literals import LoadCause

PROCESS = Process(
    pid=812,
    start_ns=5_544_830_000_000,
    ns_pid=7,
    ppid=1,
    comm="nginx",
    exe="/usr/sbin/nginx",
    uid=33,
    container="4f2a" * 16,
    cgroup="/docker/" + "4f2a" * 16,
)
LIBRARY = Library(
    path="/usr/lib/x86_64-linux-gnu/libssl.so.3",
    id=FileId(254, 0, 4711, 99),
    host_path="/proc/812/root/usr/lib/x86_64-linux-gnu/libssl.so.3",
    build_id="c0b995" * 6,
    soname="libssl.so.3",
)
FACTS: Final[tuple[str, Library, Process, LoadCause, int, int, tuple[tuple[int, int], ...]]] = (
    "tls",
    LIBRARY,
    PROCESS,
    "mmap",
    12_345,
    1_700_000_000_123_456_789,
    ((0x7F91AC0AC000, 0x7F91AC0BF000),),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """A load as a dataclass."""

    rule: str
    library: Library
    process: Process
    cause: str
    t_ns: int | None
    time_ns: int
    ranges: tuple[tuple[int, int], ...] = ()
    range_count: int | None = None


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    del directory
    load = Load(*FACTS)
    odd = replace(load, library=replace(LIBRARY, path="/usr/lib/lib\udcff.so"))
    line, fields = to_json(load, 1), to_dict(load, 1)
    steps: dict[str, Callable[[], Any]] = {
        "make a load": lambda: Load(*FACTS),
        "... as a dataclass": lambda: Compared(*FACTS),
        "write it": lambda: to_json(load, 1),
        "... if a name is not UTF-8": lambda: to_json(odd, 1),
        "json.dumps of the same object": lambda: json.dumps(fields, separators=(",", ":")),
        "read it": lambda: decode(line),
        "json.loads of the same line": lambda: json.loads(line),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2 if is_quick else 15):
        for name, step in steps.items():
            taken[name].append(min(timeit.repeat(step, number=500, repeat=20)) / 500 * 1e6)
    figures = [Figure(name, median(values), "µs", spread(values)) for name, values in taken.items()]
    for what, less, more in (
        ("make: struct to dataclass", "make a load", "... as a dataclass"),
        ("write: to_json to json.dumps", "write it", "json.dumps of the same object"),
        ("read: decode to json.loads", "read it", "json.loads of the same line"),
    ):
        ratios = [one / other for one, other in zip(taken[less], taken[more], strict=True)]
        figures.append(Figure(what, median(ratios), "x", spread(ratios)))
    return figures


if __name__ == "__main__":
    main("encode", measure)
