"""A scan that falls into the middle of calls: whatever it saw of them, the records decide what happened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch.bpf.records import FLAG_NEEDS_RESCAN
from sowatch.engine.effects import Causes
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, File, Proc, scan
from support.tracking import KeptEffects

REPAIR = Causes("repair", "repair")
FILES = [File("/usr/lib/libssl.so.3", 100), File("/usr/lib/libcrypto.so.3", 101), File("/usr/lib/libc.so.6", 102)]
SSL, CRYPTO, _ = FILES
BASE = 0x7F0000000000
#: When the visit begins, and ends.
VISIT = (1000, 2000)


def new_table():
    return KeptEffects(RuleSet([Rule(r"libssl|libcrypto")]))


def reported(table):
    return [(one.is_load, one.name.path, one.cause, one.t_ns) for one in table.take_changes()]


def address(page):
    return BASE + page * PAGE


class Pages:
    """What the calls have done so far."""

    def __init__(self):
        self.files = {}

    def do(self, file, pages):
        for page in pages:
            self.files.pop(page, None)
            if file is not None:
                self.files[page] = file

    def rows(self, p):
        """As the iterator shows them: neighbours of one file are one row."""
        rows = []
        for page in sorted(self.files):
            if rows and rows[-1][0] is self.files[page] and rows[-1][2] == page:
                rows[-1][2] = page + 1
            else:
                rows.append([self.files[page], page, page + 1])
        return [p.map(file, address(start), address(end), t=VISIT[1]) for file, start, end in rows]


def record_of(p, file, pages, t, flags=0):
    start, end = address(pages[0]), address(pages[-1] + 1)
    if file is None:
        return p.range(start, end, t=t, flags=flags)
    return p.map(file, start, end, t=t, flags=flags)


calls = st.tuples(
    st.sampled_from([None, *FILES]),
    st.integers(0, 5).flatmap(lambda first: st.integers(1, 3).map(lambda count: range(first, first + count))),
)


@given(before=st.lists(calls, max_size=4), meanwhile=st.lists(calls, min_size=1, max_size=6), data=st.data())
def test_of_a_process_with_one_thread_a_reading_tells_nothing_that_its_records_do_not(before, meanwhile, data):
    """The calls before the visit are told; the reading sees any number of those that are told from its begin on."""
    p, pages, with_scan, without = Proc(), Pages(), new_table(), new_table()
    for number, (file, where) in enumerate(before):
        pages.do(file, where)
        for table in (with_scan, without):
            table.apply(record_of(p, file, where, number + 1))
    seen = data.draw(st.integers(0, len(meanwhile)), label="calls that the reading saw")
    inside = data.draw(st.integers(min(seen, len(meanwhile)), len(meanwhile)), label="told inside the visit")
    late = data.draw(st.integers(0, min(1, seen)), label="and told after it, though seen")
    records = []
    rows = pages.rows(p)
    for number, (file, where) in enumerate(meanwhile):
        pages.do(file, where)
        is_inside = number < (inside if not late else seen - 1)
        records.append(record_of(p, file, where, (VISIT[0] if is_inside else VISIT[1] + 1) + number))
        if number + 1 == seen:
            rows = pages.rows(p)
    for record in records:
        without.apply(record)
    with_scan.merge([scan(p, *VISIT, *rows)], records, REPAIR)
    assert reported(with_scan) == reported(without)


def test_what_the_records_do_not_explain_is_told_by_the_reading():
    table, p = new_table(), Proc()
    rows = [p.map(CRYPTO, address(3), t=VISIT[1])]
    inside = [p.map(SSL, address(0), t=VISIT[0] + 1), p.range(address(0), address(1), t=VISIT[0] + 2)]
    after = [p.range(address(3), address(4), t=VISIT[1] + 1)]
    assert table.merge([scan(p, *VISIT, *rows)], [*inside, *after], REPAIR) == {p.pid}
    assert [(is_load, path, cause) for is_load, path, cause, _ in reported(table)] == [
        (True, SSL.path, "mmap"),
        (False, SSL.path, "munmap"),
        (True, CRYPTO.path, "repair"),
        (False, CRYPTO.path, "munmap"),
    ]


@pytest.mark.parametrize("flags", [0, FLAG_NEEDS_RESCAN])
def test_a_claim_after_the_visit_stays_a_claim(flags):
    table, p = new_table(), Proc()
    rows = [p.map(SSL, address(0), t=VISIT[1])]
    table.merge([scan(p, *VISIT, *rows)], [p.map(SSL, address(0), t=VISIT[1] + 1, flags=flags)], REPAIR)
    assert (p.pid in table.needs_rescan) == bool(flags)
    assert table.get(p.pid).space.needs_rescan == bool(flags)


def test_an_unmapping_in_company_is_told_and_read_again():
    table, p = new_table(), Proc()
    table.apply(p.map(SSL, address(0), t=1))
    table.apply(p.range(address(0), address(1), t=2, flags=FLAG_NEEDS_RESCAN))
    assert [(is_load, cause) for is_load, _, cause, _ in reported(table)] == [(True, "mmap"), (False, "munmap")]
    assert p.pid in table.needs_rescan
