"""Processes with very many ranges or files: what is kept of them, and what a record of one costs."""

from __future__ import annotations

import time

import pytest

from sowatch.bpf.records import FLAG_MANY, FLAG_NEEDS_RESCAN, MAX_FILE_RANGES
from sowatch.engine.merge import merge
from sowatch.engine.table import MappingTable
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, File, Proc, scan
from support.tracking import BASE, CRYPTO, LIVE, SSL, feed, reported, the_map

MANY = MAX_FILE_RANGES + 44


def every_second_page(p, file=SSL, count=MANY, *, t=0):
    """So many ranges of one page with a page between them."""
    return [p.map(file, BASE + 2 * number * PAGE, t=t) for number in range(count)]


def split(table, p, count):
    """As a process does it that maps a file whole and takes execution from every second page."""
    table.apply(p.map(SSL, BASE, BASE + 2 * count * PAGE))
    for number in range(count):
        table.apply(p.range(BASE + (2 * number + 1) * PAGE, BASE + (2 * number + 2) * PAGE))


def mapping_of(table, p, file=SSL):
    return table.get(p.pid).space.mappings()[file.id]


def test_of_a_file_with_few_ranges_each_is_kept(table):
    p = Proc()
    split(table, p, MAX_FILE_RANGES)
    found = mapping_of(table, p)
    assert found.ranges == tuple((BASE + 2 * n * PAGE, BASE + (2 * n + 1) * PAGE) for n in range(MAX_FILE_RANGES))
    assert found.range_count is None
    assert table.needs_rescan == {}


def test_of_a_file_with_many_ranges_the_first_and_what_spans_the_others_is_kept(table):
    p = Proc()
    for record in every_second_page(p):
        table.apply(record)
    found = mapping_of(table, p)
    assert found.ranges == ((BASE, BASE + PAGE), (BASE + 2 * PAGE, BASE + (2 * MANY - 1) * PAGE))
    assert found.range_count == MANY
    assert reported(table) == ["+10 libssl.so.3 mmap"]


def test_a_file_that_falls_into_many_ranges_is_kept_as_one_that_was_mapped_so(table):
    p = Proc()
    split(table, p, MANY)
    found = mapping_of(table, p)
    assert found.ranges == ((BASE, BASE + PAGE), (BASE + 2 * PAGE, BASE + 2 * MANY * PAGE))
    assert (found.range_count, reported(table)) == (MAX_FILE_RANGES + 1, ["+10 libssl.so.3 mmap"])
    assert list(table.needs_rescan) == [p.pid]


def test_taking_some_of_many_ranges_away_unloads_nothing_before_a_scan_has_told(table):
    p = Proc()
    feed(table, *every_second_page(p))
    assert feed(table, p.range(BASE, BASE + 2 * MANY * PAGE)) == []
    assert list(table.needs_rescan) == [p.pid]
    table.begin_rescans(list(table.needs_rescan))
    assert table.merge([scan(p, 10, 20, intro=True)], [], LIVE) == set()
    assert reported(table) == ["-10 libssl.so.3 munmap"]


def test_what_lies_below_many_ranges_needs_no_scan(table):
    p = Proc()
    feed(table, *every_second_page(p))
    assert feed(table, p.map(CRYPTO, BASE - 4 * PAGE), p.range(BASE - 4 * PAGE, BASE - 3 * PAGE)) == [
        "+10 libcrypto.so.3 mmap",
        "-10 libcrypto.so.3 munmap",
    ]
    assert table.needs_rescan == {}


def test_a_range_before_the_first_of_many_becomes_the_first(table):
    p = Proc()
    feed(table, *every_second_page(p), p.map(SSL, BASE - 8 * PAGE))
    found = mapping_of(table, p)
    assert found.ranges == ((BASE - 8 * PAGE, BASE - 7 * PAGE), (BASE, BASE + (2 * MANY - 1) * PAGE))
    assert found.range_count == MANY + 1


def test_a_scan_that_finds_few_ranges_again_keeps_each(table):
    p = Proc()
    feed(table, *every_second_page(p))
    table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20), intro=True)], [], LIVE)
    assert (mapping_of(table, p).ranges, mapping_of(table, p).range_count) == (((BASE, BASE + PAGE),), None)
    assert reported(table) == []


def test_ranges_that_a_scan_does_not_list_are_counted(table):
    p = Proc()
    rows = every_second_page(p, count=MAX_FILE_RANGES, t=20)
    marks = [
        p.map(SSL, BASE + 2 * number * PAGE, t=20, flags=FLAG_MANY)._replace(offset_bytes=left_out)
        for number, left_out in ((MAX_FILE_RANGES, 0), (2 * MAX_FILE_RANGES, MAX_FILE_RANGES - 1))
    ]
    table.merge([scan(p, 10, 20, *rows, *marks, intro=True)], [], LIVE)
    (change,) = table.take_changes()
    assert change.range_count == 2 * MAX_FILE_RANGES + 1
    assert change.ranges == ((BASE, BASE + PAGE), (BASE + 2 * PAGE, BASE + (4 * MAX_FILE_RANGES + 1) * PAGE))


def test_a_scan_of_many_ranges_is_placed_by_the_other_files(table):
    """A record that came before the visit and is told after it says nothing anew."""
    p = Proc()
    feed(table, *every_second_page(p))
    seen = [*every_second_page(p, t=20), p.map(CRYPTO, BASE - 9 * PAGE, t=20)]
    late = p.map(CRYPTO, BASE - 9 * PAGE, t=15)
    assert table.merge([scan(p, 10, 20, *seen, intro=True)], [late], LIVE) == {p.pid}
    assert reported(table) == ["+10 libcrypto.so.3 mmap"]


def test_children_share_the_ranges_of_their_parent_until_they_change_them(table):
    parent, child, other = Proc(), Proc(pid=11), Proc(pid=12)
    split(table, parent, 200)
    table.take_changes()
    for one in (child, other):
        table.apply(parent.fork(one))
    loads = table.take_changes()
    assert [one.ranges is loads[0].ranges for one in loads] == [True, True]
    feed(table, child.range(BASE, BASE + 398 * PAGE))
    assert len(mapping_of(table, child).ranges) == 1
    assert len(mapping_of(table, parent).ranges) == len(mapping_of(table, other).ranges) == 200
    feed(table, parent.range(BASE, BASE + PAGE), other.exit(), child.exit())
    assert len(mapping_of(table, parent).ranges) == 199


def test_one_who_shares_with_nobody_any_more_changes_its_ranges_in_place(table):
    parent, child = Proc(), Proc(pid=11)
    split(table, parent, 3)
    feed(table, parent.fork(child), child.exit())
    layout = table.get(parent.pid).space._layout
    feed(table, parent.range(BASE, BASE + PAGE))
    assert table.get(parent.pid).space._layout is layout


def test_what_many_claim_at_one_address_is_told_and_untold(table):
    """At most one file is there; the ones claimed first go before the scan that is owed."""
    p = Proc()
    files = [File(f"/usr/lib/libssl{number}.so", 500 + number) for number in range(12)]
    events = feed(table, p.tentative(files[0], BASE), *(p.map(file, BASE) for file in files[1:]))
    assert len([one for one in events if one.startswith("+")]) == 12
    assert len([one for one in events if one.startswith("-")]) == 4
    assert {inode for _, inode in the_map(table)} == {508, 509, 510, 511, 504, 505, 506, 507}


# ---- what a record costs: with four times as many, some four times as much, not sixteen times ----------


def of_one_file(table, p, count):
    split(table, p, count)


def of_files(table, p, count):
    for number in range(count):
        file = File(f"/usr/lib/libssl{number}.so", 1000 + number)
        table.apply(p.map(file, BASE + 2 * number * PAGE))
    for number in range(count):
        table.apply(p.map(SSL, BASE - PAGE))
        table.apply(p.range(BASE - PAGE, BASE))
        table.apply(p.range(BASE + (2 * number + 1) * PAGE, BASE + (2 * number + 2) * PAGE))


def of_files_that_are_scanned(table, p, count):
    """Many records within the visit of a process with many files, none of which makes the two the same."""
    files = [File(f"/usr/lib/libssl{number}.so", 1000 + number) for number in range(count)]
    rows = [p.map(file, BASE + 2 * number * PAGE, t=20) for number, file in enumerate(files)]
    records = [p.tentative(SSL, BASE - PAGE, t=11)]
    for number in range(count):
        records += [p.range(BASE - PAGE, BASE, t=12 + number % 8), p.map(SSL, BASE - PAGE, t=12 + number % 8)]
    merge(table, [scan(p, 10, 20, *rows, intro=True)], records, LIVE)


def of_forks(table, p, count):
    """Children of one with 256 ranges each."""
    split(table, p, MAX_FILE_RANGES)
    for number in range(count // 4):
        table.apply(p.fork(Proc(pid=1000 + number)))


@pytest.mark.parametrize("work", [of_one_file, of_files, of_files_that_are_scanned, of_forks])
def test_no_record_costs_what_all_ranges_of_its_process_are(work):
    def cpu_s(count):
        spent = []
        for _ in range(3):
            table = MappingTable(RuleSet([Rule("libssl")]))
            begun = time.thread_time()
            work(table, Proc(), count)
            spent.append(time.thread_time() - begun)
        return min(spent)

    assert cpu_s(8_000) < 9 * cpu_s(2_000)


def test_a_claim_in_the_middle_of_many_ranges_is_no_more_than_that(table):
    p = Proc()
    feed(table, *every_second_page(p))
    assert feed(table, p.map(CRYPTO, BASE + PAGE, flags=FLAG_NEEDS_RESCAN)) == ["+10 libcrypto.so.3 mmap"]
    assert mapping_of(table, p).range_count == MANY


def test_a_range_in_which_much_is_claimed_is_still_one(table):
    p = Proc()
    feed(table, p.tentative(SSL, BASE, BASE + 4 * MANY * PAGE))
    for record in every_second_page(p, CRYPTO, MAX_FILE_RANGES - 2):
        table.apply(record)
    assert (mapping_of(table, p).ranges, mapping_of(table, p).range_count) == (
        ((BASE, BASE + 4 * MANY * PAGE),),
        None,
    )
