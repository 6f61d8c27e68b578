"""Resident memory of sowatch with a thousand processes that have forty matched libraries each.

Once found by the start-up snapshot, once seen live, one load after the other. Some seconds after the last of them: what
a repair takes is given back by then.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.common import Command, Figure, crowd, main, make_libraries

#: The repairs of a burst are over then.
SETTLED_S = 5.0


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    processes, libraries = (20, 40) if is_quick else (1000, 40)
    made = make_libraries(directory, libraries)
    pattern = f"^{directory}/lib"
    with Command(directory, "watch", "--json", pattern) as sowatch:
        sowatch.wait_ready()
        empty, _ = sowatch.memory_mb()
        with crowd(directory, processes, made):
            wait_for_loads(sowatch, processes * libraries)
            time.sleep(SETTLED_S)
            live, live_peak = sowatch.memory_mb()
    with crowd(directory, processes, made), Command(directory, "watch", "--json", pattern) as sowatch:
        wait_for_loads(sowatch, processes * libraries, are_in_snapshot=True)
        time.sleep(SETTLED_S)
        snapshot, snapshot_peak = sowatch.memory_mb()
    held = f"{processes} processes x {libraries} libraries"
    return [
        Figure("resident memory, nothing matched", empty, "MB"),
        Figure(f"resident memory, {held}, seen live", live, "MB", f"peak {live_peak:.3g}", aim=70),
        Figure(f"resident memory, {held}, by snapshot", snapshot, "MB", f"peak {snapshot_peak:.3g}", aim=70),
    ]


def wait_for_loads(sowatch: Command, count: int, *, are_in_snapshot: bool = False) -> None:
    """Wait for the last of ``count`` loads, and for the `ready` that follows them in a snapshot."""
    loads = 0

    def is_last(event: dict[str, object]) -> bool:
        nonlocal loads
        loads += event["event"] == "load"
        return event["event"] == "ready" if are_in_snapshot else loads == count

    sowatch.wait_for(is_last, 120)
    if loads != count:
        raise RuntimeError(f"{loads} loads were reported, not {count}")


if __name__ == "__main__":
    main("memory", measure)
