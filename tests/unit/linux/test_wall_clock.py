"""The start of a process by the wall clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sowatch.linux import wall_clock
from sowatch.linux.file_times import file_times
from sowatch.linux.proc import ProcFs


def test_a_process_that_starts_now_has_started_now(spawn) -> None:
    before_ns = time.time_ns()
    process = spawn(["sleep", "600"])
    after_ns = time.time_ns()
    about = ProcFs().stat(process.pid)

    assert about
    # Rounded down to a tick of 10 ms, and two clocks.
    assert before_ns - 12 * 10**6 <= wall_clock.started_ns(about.start_ns) <= after_ns + 2 * 10**6


def test_one_start_is_one_time_until_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({wall_clock.started_ns(1) for _ in range(1000)}) == 1
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 3600 * 10**9)
    monkeypatch.setattr(wall_clock, "_booted_ns", wall_clock._booted_ns)

    assert wall_clock.started_ns(1) - wall_clock._booted_ns == 1
    assert abs(wall_clock.started_ns(0) - now_ns() - 3600 * 10**9 + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < 10**9


def test_a_thread_that_loses_its_cpu_between_the_two_clocks_reads_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known_ns = wall_clock.started_ns(0)
    now_ns = time.time_ns
    reads: list[int] = []

    def late() -> int:
        if not reads:
            time.sleep(0.003)
        reads.append(now_ns())
        return reads[-1]

    monkeypatch.setattr(time, "time_ns", late)
    monkeypatch.setattr(wall_clock, "_booted_ns", wall_clock._booted_ns)
    assert wall_clock.started_ns(0) == known_ns
    assert len(reads) > 1


def test_a_file_has_its_birth_and_the_last_write(tmp_path: Path) -> None:
    before_ns = time.time_ns()
    path = tmp_path / "file"
    path.write_bytes(b"x")
    os.utime(path, ns=(1, 2))
    fd = os.open(path, os.O_PATH)
    try:
        born_ns, written_ns = file_times(fd)
    finally:
        os.close(fd)

    assert written_ns == 2
    # The clock of file systems lags behind by a tick. Not every file system keeps the birth.
    assert born_ns is None or before_ns - 12 * 10**6 <= born_ns <= time.time_ns()
