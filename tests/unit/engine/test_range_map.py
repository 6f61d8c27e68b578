"""The interval structure, compared with sets of pages; and what its operations cost."""

from __future__ import annotations

import itertools
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.engine.range_map import MAX_TENTATIVE, Coverage, RangeMap, RangeSnapshot

KEYS = "abc"

spans = st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda at: (at[0], at[0] + at[1]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(KEYS), spans),
        st.tuples(st.just("take_away"), st.sampled_from([*KEYS, None]), spans),
        st.tuples(st.just("without"), st.sampled_from(KEYS), spans),
    ),
    max_size=30,
)


def pages_of(ranges):
    return {page for start, end in ranges for page in range(start, end)}


@settings(max_examples=400, derandomize=True)
@given(steps)
def test_any_run_of_changes_leaves_what_a_set_of_pages_for_each_key_would(changes):
    ranges, model = RangeMap(), {key: set() for key in KEYS}
    for how, key, (start, end) in changes:
        before = {one for one, pages in model.items() if pages}
        hole = set(range(start, end))
        if how == "add":
            gone = ranges.add(key, start, end)
            model[key] |= hole
        elif how == "take_away":
            gone = ranges.take_away(start, end, but=key)
            for one in KEYS:
                if one != key:
                    model[one] -= hole
        else:
            ranges = ranges.without({key})
            gone = [key] if model[key] else []
            model[key] = set()
        assert sorted(gone) == sorted(before - {one for one, pages in model.items() if pages})
        found = ranges.of_each()
        assert {one: pages_of(spans) for one, spans in found.items()} == {k: p for k, p in model.items() if p}
        # Sorted, disjoint, and neighbours are one.
        assert all(first[1] < second[0] for one in found.values() for first, second in itertools.pairwise(one))
        assert all(bool(model[one]) == (one in ranges) for one in KEYS)
        within = {
            (page, one) for low, high, keys in ranges.within(start, end) for one in keys for page in range(low, high)
        }
        assert within == {(page, one) for one, pages in model.items() for page in pages & hole}


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.tuples(spans, st.sampled_from(KEYS)), max_size=15))
def test_rows_in_any_order_are_what_they_cover(rows):
    ranges = RangeMap.of_rows((start, end, key) for (start, end), key in rows)
    expected = {key: pages_of(span for span, one in rows if one == key) for _, key in rows}
    assert {key: pages_of(found) for key, found in ranges.of_each().items()} == expected


@settings(max_examples=200, derandomize=True)
@given(steps, steps)
def test_a_copy_goes_its_own_way(first, second):
    ranges = RangeMap()

    def run(one, changes):
        for how, key, (start, end) in changes:
            one.add(key, start, end) if how == "add" else one.take_away(start, end)

    run(ranges, first)
    before = ranges.of_each()
    run(ranges.copy(), second)
    assert ranges.of_each() == before


def test_of_too_many_claims_at_one_address_the_first_goes():
    ranges = RangeMap()
    gone = [key for number in range(MAX_TENTATIVE + 2) for key in ranges.add(number, 0, 10)]
    assert gone == [0, 1]
    assert set(ranges.of_each()) == set(range(2, MAX_TENTATIVE + 2))


@settings(max_examples=200, derandomize=True)
@given(st.lists(spans, max_size=12), spans)
def test_coverage_counts_the_pages_within(ranges, window):
    coverage = Coverage(ranges)
    assert coverage.within(*window) == len(pages_of(ranges) & set(range(*window)))
    assert coverage.total == len(pages_of(ranges))


@settings(max_examples=400, derandomize=True)
@given(
    steps,
    st.lists(st.tuples(st.sampled_from([*KEYS, None]), spans), max_size=12),
    st.lists(st.tuples(st.sampled_from(KEYS), spans), max_size=6),
    st.sets(st.sampled_from(KEYS), max_size=1),
)
def test_ranges_are_the_same_as_scanned_exactly_where_the_pages_of_each_key_are(start, records, scan, left_out):
    ranges = RangeMap()
    for how, key, (low, high) in start:
        ranges.add(key, low, high) if how == "add" else ranges.take_away(low, high)
    model = {key: pages_of(found) for key, found in ranges.of_each().items()}
    scanned = {key: pages_of(span for one, span in scan if one == key) for key in KEYS}
    before = ranges.of_each()
    snapshot = RangeSnapshot(ranges, ((low, high, key) for key, (low, high) in scan), left_out)
    for key, span in [(None, (0, 0)), *records]:
        snapshot.put(key, *span)
        for pages in model.values():
            pages -= set(range(*span))
        if key is not None:
            model.setdefault(key, set()).update(range(*span))
        compared = set(KEYS) - left_out
        assert snapshot.is_same == all(model.get(one, set()) == scanned[one] for one in compared)
    assert ranges.of_each() == before


# ---- what it costs: four times as many ranges may take some four times as long, not sixteen -------------


def fill_and_empty(count):
    """Every second page, from both ends, then away again one by one."""
    ranges = RangeMap()
    for number in range(count):
        ranges.add(number % 7, 4 * number, 4 * number + 2)
        ranges.take_away(8 * count - 4 * number, 8 * count - 4 * number + 1)
    for number in range(count):
        ranges.take_away(4 * number + 1, 4 * number + 3)
    ranges.of_each()


def split_one(count):
    """One range that loses every second page."""
    ranges = RangeMap()
    ranges.add("a", 0, 2 * count)
    for number in range(count):
        ranges.take_away(2 * number + 1, 2 * number + 2)


def compare_with_a_scan(count):
    """A scan of many ranges, beside as many records, some of which take away all."""
    rows = [(2 * number, 2 * number + 1, number % 5) for number in range(count)]
    snapshot = RangeSnapshot(RangeMap.of_rows(rows), rows)
    for number in range(count):
        snapshot.put(None, 2 * number, 2 * number + 1)
        assert not snapshot.is_same
        snapshot.put(number % 5, 2 * number, 2 * number + 1)
        assert snapshot.is_same
    for _ in range(count):
        snapshot.put(None, 0, 2 * count)


def claims_at_one_address(count):
    ranges = RangeMap()
    for number in range(count):
        ranges.add(number, 0, 1)


def cpu_s(work, count):
    """The least CPU time of three runs."""
    spent = []
    for _ in range(3):
        begun = time.thread_time()
        work(count)
        spent.append(time.thread_time() - begun)
    return min(spent)


def test_no_operation_costs_what_all_ranges_together_are():
    for work in (fill_and_empty, split_one, compare_with_a_scan, claims_at_one_address):
        assert cpu_s(work, 12_000) < 9 * cpu_s(work, 3_000), work.__name__
