"""Backlog: what waits in a queue, by number and by size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sowatch.engine.backlog import Backlog


def test_either_limit_makes_it_full() -> None:
    by_number, by_size = Backlog(2, 1000), Backlog(1000, 100)
    for one in (by_number, by_size):
        one.add(60)
        assert not one.is_full
        one.add(60)
        assert one.is_full
        one.take(60)
        assert not one.is_full


def test_a_part_of_both_limits_is_waited_for() -> None:
    backlog = Backlog(8, 800)
    backlog.add(500, 2)
    assert (backlog.is_below(4), backlog.is_below(1)) == (False, True)
    backlog.take(300, 0)
    assert backlog.is_below(4)
    backlog.add(0)
    assert (backlog.is_below(4), backlog.is_below(2)) == (False, True)


@given(st.lists(st.integers(0, 10_000)), st.integers(0, 100))
def test_what_waits_is_what_was_added_and_not_taken(sizes: list[int], taken: int) -> None:
    backlog = Backlog(10, 10_000)
    for size in sizes:
        backlog.add(size)
    gone = sizes[:taken]
    backlog.take(sum(gone), len(gone))

    assert (backlog.events, backlog.bytes) == (len(sizes) - len(gone), sum(sizes) - sum(gone))
    assert backlog.is_full is (backlog.events >= 10 or backlog.bytes >= 10_000)
