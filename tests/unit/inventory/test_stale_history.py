"""The history of stale files: spells, their ends, their bound."""

from __future__ import annotations

from msgspec.structs import replace

from sowatch.inventory.stale_history import KEPT, StaleHistory
from sowatch.inventory.stale_watch import StaleChange
from sowatch.inventory.staleness import FRESH, StaleAnswer, Staleness
from sowatch.model.stats import Mapped
from support.scripted import PROCESS, SSL

REPLACED, DELETED = StaleAnswer(Staleness.REPLACED), StaleAnswer(Staleness.DELETED, "why")


def mapped(pid: int = 7) -> Mapped:
    return Mapped(replace(PROCESS, pid=pid), SSL, "mine", ())


def test_a_spell_begins_changes_and_ends_and_the_next_one_is_another() -> None:
    history = StaleHistory()
    history.add([StaleChange(mapped(), DELETED)], 1, is_first=True)
    history.add([StaleChange(mapped(), REPLACED)], 2, is_first=False)
    history.add([StaleChange(mapped(), FRESH, "restored")], 3, is_first=False)
    history.add([StaleChange(mapped(), REPLACED)], 4, is_first=False)
    (first, second), left_out = history.spells()
    assert (first.staleness, first.reason, first.since_ns, first.is_older) == ("replaced", None, 1, True)
    assert (first.until_ns, first.cause) == (3, "restored")
    assert (second.since_ns, second.is_older, second.until_ns, second.cause) == (4, False, None, None)
    assert (first.number < second.number, left_out) == (True, 0)


def test_of_too_many_those_that_are_over_go_first_and_each_is_counted() -> None:
    history = StaleHistory()
    history.add([StaleChange(mapped(pid), REPLACED) for pid in range(KEPT)], 1, is_first=False)
    history.add([StaleChange(mapped(9), FRESH, "unmapped")], 2, is_first=False)
    history.add([StaleChange(mapped(KEPT), REPLACED)], 3, is_first=False)
    found, left_out = history.spells()
    pids = {one.mapped.process.pid for one in found}
    assert (len(found), 9 in pids, KEPT in pids, left_out) == (KEPT, False, True, 1)
    history.add([StaleChange(mapped(pid), REPLACED) for pid in range(1000, 1000 + KEPT)], 4, is_first=False)
    # What ends of those that were left out is no news.
    history.add([StaleChange(mapped(10), FRESH, "unmapped")], 5, is_first=False)
    found, left_out = history.spells()
    assert {one.mapped.process.pid for one in found} == set(range(1000, 1000 + KEPT))
    assert (left_out, {one.until_ns for one in found}) == (KEPT + 1, {None})
