"""The figures of stale processes: by unit or container, and bounded."""

from __future__ import annotations

from sowatch.agent.stale_feed import MAX_NAMES, _counted
from sowatch.model.events import Process

CONTAINER = "0123456789abcdef" * 4


def of(number: int, cgroup: str | None) -> Process:
    return Process(number, 1, cgroup=cgroup)


def test_processes_are_counted_by_unit_or_container_and_what_is_in_neither_apart() -> None:
    found = _counted(
        [
            of(1, "/system.slice/nginx.service"),
            of(2, "/system.slice/nginx.service/workers"),
            of(3, f"/system.slice/docker-{CONTAINER}.scope"),
            of(4, "/"),
            of(5, None),
        ]
    )
    assert found == {("unit", "nginx.service"): 2, ("container", CONTAINER): 1, ("host", ""): 2}


def test_without_any_there_is_a_series_all_the_same() -> None:
    assert _counted([]) == {("host", ""): 0}


def test_beyond_so_many_names_the_rest_is_counted_together() -> None:
    many = [of(number, f"/system.slice/s{number % 80}.service") for number in range(200)]
    found = _counted(many)
    assert len(found) == MAX_NAMES + 2
    assert sum(found.values()) == 200
    assert found["other", ""] == 200 - sum(count for (by, _), count in found.items() if by == "unit")
