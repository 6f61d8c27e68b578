"""How long after the kernel's mmap a Python callback, and a `for` loop, hear of a load.

One process maps and unmaps a matched library at a slow pace on an otherwise idle machine. The time
is from the event's own kernel time to the first line of the callback, both CLOCK_MONOTONIC.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from benchmarks.common import Figure, Mapper, build, main, make_libraries, quantile

from sowatch import LibraryEvent, Rule, Watcher

PAUSE_US = 2000


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    count = 100 if is_quick else 2000
    mapper_program = build("mapper", directory)
    (library,) = make_libraries(directory, 1)
    by_callback = through_callback(mapper_program, library, count)
    by_loop = through_loop(mapper_program, library, count)
    return [
        Figure("load to Python callback, p50", quantile(by_callback, 0.5), "µs", f"n={len(by_callback)}", aim=150),
        Figure("load to Python callback, p99", quantile(by_callback, 0.99), "µs", f"n={len(by_callback)}", aim=1000),
        Figure("... the slowest", max(by_callback), "µs"),
        Figure("load to a for loop, p50", quantile(by_loop, 0.5), "µs", f"n={len(by_loop)}"),
        Figure("load to a for loop, p99", quantile(by_loop, 0.99), "µs", f"n={len(by_loop)}"),
    ]


def through_callback(mapper_program: Path, library: Path, count: int) -> list[float]:
    taken_us: list[float] = []
    done = threading.Event()

    def on_load(event: LibraryEvent) -> None:
        now = time.monotonic_ns()
        assert event.t_ns is not None
        taken_us.append((now - event.t_ns) / 1000)
        if len(taken_us) == count:
            done.set()

    rule = Rule(library.name, on_load=on_load)
    with Watcher(rule), Mapper(mapper_program, library.parent) as mapper:
        mapper.emit("loop", library, count, PAUSE_US)
        if not done.wait(20):
            raise RuntimeError(f"{len(taken_us)} of {count} loads were reported")
    return taken_us


def through_loop(mapper_program: Path, library: Path, count: int) -> list[float]:
    taken_us: list[float] = []
    watcher = Watcher(Rule(library.name))
    events = watcher.subscribe(events=["load"], control=False)
    with watcher, Mapper(mapper_program, library.parent) as mapper:
        mapper.send("loop", library, count, PAUSE_US)
        while len(taken_us) < count:
            event = events.get(20)
            now = time.monotonic_ns()
            if not isinstance(event, LibraryEvent) or event.t_ns is None:
                raise RuntimeError(f"{len(taken_us)} of {count} loads were reported, then {event}")
            taken_us.append((now - event.t_ns) / 1000)
    return taken_us


if __name__ == "__main__":
    main("latency", measure)
