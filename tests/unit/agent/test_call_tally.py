"""From counts by process to sums by library, function and container: nothing twice, nothing lost, nothing for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import hypothesis.strategies as some
import pytest
from msgspec.structs import replace

from sowatch.agent.call_tally import BOUNDS_S, CallTally
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Library, Load, Process, Unload
from sowatch.model.identity import FileId, ProcessId
from sowatch.telemetry import MetricRegistry
from sowatch.uprobes import Calls, Site

NOBODY = 4_194_000  # a pid that is there as good as never


class Kernel:
    """What a `CallCounter` shows, filled by the test: the table as the kernel has it, and what is attached."""

    is_timed = True

    def __init__(self) -> None:
        self.sites: dict[int, Site] = {}
        self.table: dict[tuple[int, ProcessId], Calls] = {}

    @property
    def attacher(self) -> Kernel:
        return self

    def calls_at(self, sites: Mapping[int, Site]) -> Iterator[Calls]:
        return iter([one for (cookie, _), one in self.table.items() if cookie in sites])

    def forget(self, calls: Calls) -> None:
        del self.table[calls.site.cookie, calls.process]

    def call(self, cookie: int, process: ProcessId, times: int = 1, *, bucket: int = 12) -> None:
        key = (cookie, process)
        before = self.table.get(key) or Calls(self.sites[cookie], process, 0, 0, 0, (0,) * 64)
        latency = tuple(count + times * (place == bucket) for place, count in enumerate(before.latency))
        self.table[key] = Calls(
            before.site, process, before.calls + times, before.timed + times, before.sum_ns + (times << bucket), latency
        )


def site(cookie: int, symbol: str = "f", inode: int = 1, **facts: Any) -> Site:
    library = Library(f"/app/lib{inode}.so", FileId(8, 1, inode), build_id="ab", soname=f"lib{inode}.so")
    return Site(cookie, replace(library, **facts), symbol, 16, "calls_entered", is_return=False)


def load(process: ProcessId, container: str | None) -> Load:
    about = Process(pid=process.pid, start_ns=process.start_ns, container=container)
    return Load("r", site(1).library, about, "mmap", 0, 0)


def unload(process: ProcessId) -> Unload:
    return Unload("r", site(1).library, Process(pid=process.pid, start_ns=process.start_ns), "exit", 0, 0)


@pytest.fixture
def metrics() -> MetricRegistry:
    return MetricRegistry(max_series=3)


@pytest.fixture
def tally(metrics: MetricRegistry) -> CallTally:
    return CallTally(metrics, ProcFs(), cpu_share=1.0)


@pytest.fixture
def kernel(tally: CallTally) -> Kernel:
    made = Kernel()
    tally.follow("r", made)  # type: ignore[arg-type]
    return made


def counts(metrics: MetricRegistry) -> dict[str, float]:
    """By container, or ``overflow``."""
    found: dict[str, float] = {}
    for one in metrics.metrics():
        if one.name == "calls":
            container = one.labels.get("container", "overflow")
            found[container] = found.get(container, 0) + one.get()  # type: ignore[attr-defined]
    return found


def dead(number: int) -> ProcessId:
    return ProcessId(NOBODY + number, 5)


def test_what_a_process_called_stays_in_the_sum_and_its_place_is_given_back(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    kernel.sites[1] = site(1)
    for number in range(3):
        tally.note(load(dead(number), "c1"))
        kernel.call(1, dead(number), 5)
        tally.note(unload(dead(number)))
    tally.take()
    tally.take()
    assert counts(metrics) == {"c1": 15}
    assert kernel.table == {}
    assert tally._containers == {}
    assert tally._ended == {}


def test_calls_between_the_last_take_and_the_detachment_are_counted(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    kernel.sites[1] = site(1)
    process = ProcessId(os.getpid(), 0)
    tally.note(load(process, "c1"))
    tally.take()
    kernel.call(1, process, 3)
    tally.note_sites(kernel)  # type: ignore[arg-type]
    kernel.sites.clear()
    tally.take()
    assert counts(metrics) == {"c1": 3}
    tally.take()
    assert (kernel.table, tally.sums()) == ({}, {})


def test_who_is_not_known_and_gone_is_waited_for_once(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    kernel.sites[1] = site(1)
    kernel.call(1, dead(0), 2)
    kernel.call(1, dead(1), 2)
    tally.take()
    assert counts(metrics) == {}
    tally.note(load(dead(0), "late"))
    tally.take()
    assert counts(metrics) == {"late": 2, "": 2}


def test_of_two_rules_that_meet_one_file_one_counts_it(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    other = Kernel()
    tally.follow("other", other)  # type: ignore[arg-type]
    kernel.sites[1], other.sites[9] = site(1), site(9)
    tally.note(load(dead(0), "c"))
    for table, cookie in ((kernel, 1), (other, 9)):
        table.call(cookie, dead(0), 4)
    tally.take()
    assert counts(metrics) == {"c": 4}
    kernel.sites.clear()
    tally.take()
    tally.take()
    other.call(9, dead(0), 2)
    tally.take()
    assert counts(metrics) == {"c": 6}


def test_a_table_that_takes_long_is_taken_less_often_and_at_the_end_all_the_same(
    metrics: MetricRegistry, kernel: Kernel
) -> None:
    slow = CallTally(metrics, ProcFs(), cpu_share=1e-9)
    slow.follow("r", kernel)  # type: ignore[arg-type]
    kernel.sites[1] = site(1)
    slow.note(load(dead(0), "c"))
    kernel.call(1, dead(0))
    slow.take()
    kernel.call(1, dead(0))
    slow.take()
    assert counts(metrics) == {"c": 1}
    slow.unfollow(kernel)  # type: ignore[arg-type]
    assert counts(metrics) == {"c": 2}


def test_more_sets_of_labels_than_there_may_be_go_to_one_series(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    for number in range(10):
        kernel.sites[number] = site(number, inode=number)
        tally.note(load(dead(number), f"c{number}"))
        kernel.call(number, dead(number), 1)
    tally.take()
    found = counts(metrics)
    assert len([one for one in metrics.metrics() if one.name == "calls"]) == 4
    assert found["overflow"] == 7
    assert sum(found.values()) == 10


def test_latencies_go_to_the_bounds_that_are_powers_of_two_of_nanoseconds(
    metrics: MetricRegistry, tally: CallTally, kernel: Kernel
) -> None:
    kernel.sites[1] = site(1)
    tally.note(load(dead(0), ""))
    # 512 to 1,024 ns, 4,096 to 8,192 ns, and beyond all bounds.
    for bucket, times in ((9, 1), (12, 2), (40, 3)):
        kernel.call(1, dead(0), times, bucket=bucket)
    tally.take()
    (histogram,) = [one for one in metrics.metrics() if one.name == "calls.duration_seconds"]
    found = histogram.get()  # type: ignore[attr-defined]
    assert found.bounds == BOUNDS_S
    assert BOUNDS_S[:3] == (1.024e-06, 4.096e-06, 1.6384e-05)
    assert found.counts == (1, 0, 2, *(0,) * 10, 3)
    assert found.total == pytest.approx((512 + 2 * 4096 + (3 << 40)) / 1e9)


@hypothesis.given(
    some.lists(
        some.tuples(some.sampled_from(["call", "take", "detach", "exit"]), some.integers(1, 3), some.integers(0, 2)),
        max_size=40,
    )
)
def test_the_sum_is_what_was_called_in_whatever_order_things_happen(steps: list[tuple[str, int, int]]) -> None:
    metrics = MetricRegistry()
    tally = CallTally(metrics, ProcFs(), cpu_share=1.0)
    kernel = Kernel()
    tally.follow("r", kernel)  # type: ignore[arg-type]
    cookies: dict[int, int] = {}
    made = 0
    for step, file, number in steps:
        if step == "take":
            tally.take()
        elif step == "detach":
            kernel.sites.pop(cookies.pop(file, 0), None)
        elif step == "exit":
            tally.note(unload(dead(number)))
        else:
            if file not in cookies:  # attached anew, a function has another cookie
                made += 1
                cookies[file] = made
                kernel.sites[made] = site(made, inode=file)
                tally.note_sites(kernel)  # type: ignore[arg-type]
                tally.note(load(dead(number), "c"))
                kernel.call(made, dead(number))
                continue
            made += 1
            tally.note(load(dead(number), "c"))
            kernel.call(cookies[file], dead(number))
    tally.unfollow(kernel)  # type: ignore[arg-type]
    assert sum(counts(metrics).values()) == made
