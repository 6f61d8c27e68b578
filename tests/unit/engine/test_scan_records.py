"""Records that come while processes are scanned: those that concern the scan wait for it, no others."""

from __future__ import annotations

from sowatch.engine import scan_records
from sowatch.engine.effects import LIVE
from sowatch.engine.merge import merge
from sowatch.engine.scan_records import ScanRecords
from sowatch.engine.table import MappingTable
from sowatch.model.rules import RuleSet
from sowatch.sources import scan_rows
from support.records import PAGE, Proc, scan
from support.tracking import BASE, SSL

ONE, OTHER, CHILD = Proc(10), Proc(20), Proc(30)


def test_records_of_a_scanned_process_and_of_its_children_are_keep_back_in_order():
    concerned = ScanRecords([ONE.pid])
    fork = ONE.fork(CHILD, t=2)
    records = [ONE.map(SSL, t=1), fork, OTHER.map(SSL, t=3), CHILD.map(SSL, t=4), OTHER.exit(t=5)]
    assert concerned.keep_back(records) == [records[2], records[4]]
    assert list(concerned.take()) == [records[0], fork, records[3]]
    assert list(concerned.take()) == []


def test_beyond_the_limit_nothing_is_drained_before_the_merge(monkeypatch):
    monkeypatch.setattr(scan_records, "MAX_WAITING_BYTES", 1000)
    concerned = ScanRecords([ONE.pid])
    concerned.keep_back([ONE.map(SSL, t=1)._replace(size=100)] * 10)
    drained = []

    def drain():
        drained.append(True)
        return []

    concerned.take_others(drain, lambda _: None)
    assert drained == []
    concerned.take()
    concerned.take_others(drain, lambda _: None)
    assert drained == [True]


def test_what_was_kept_is_applied_in_parts_and_what_others_do_between_them():
    concerned = ScanRecords([ONE.pid])
    concerned.keep_back([ONE.map(SSL, t=1), ONE.range(0, PAGE, t=2)])
    concerned.keep_back([ONE.exit(t=3)])
    applied, came = [], [[OTHER.map(SSL, t=4), ONE.exit(t=5)], []]

    def apply(records):
        applied.extend(record.t_ns for record in records)

    concerned.apply_kept(apply, lambda: concerned.take_others(lambda: came.pop(0), apply))
    assert applied == [1, 2, 4, 3, 5]
    assert list(concerned.take()) == []


def test_what_came_while_it_was_applied_is_applied_in_parts_too():
    concerned = ScanRecords([ONE.pid])
    concerned.keep_back([ONE.map(SSL, t=1)])
    concerned.keep_back([ONE.exit(t=2)])
    parts, came = [], [[ONE.map(SSL, t=3), ONE.exit(t=4)], [ONE.map(SSL, t=5)]]
    concerned.apply_kept(
        lambda records: parts.append([record.t_ns for record in records]),
        lambda: concerned.take_others(lambda: came.pop(0), lambda _: None),
    )
    assert parts == [[1], [2], [3, 4], [5]]


def test_what_others_do_is_applied_between_the_slices_of_a_merge():
    table = MappingTable(RuleSet(()))
    rows = [ONE.map(SSL.but(path=f"/usr/lib/lib{n}.so", inode=1000 + n), BASE + n * 2 * PAGE) for n in range(600)]
    came = [[OTHER.map(SSL, t=5)], [OTHER.map(SSL.but(inode=7), BASE + 10 * PAGE, t=6)]]
    seen = []
    concerned = ScanRecords([ONE.pid])

    def apply(records):
        seen.extend((change.process.pid, change.name.file_id.inode) for change in table.apply(*records).changes)

    effects = merge(
        table,
        [scan(ONE, 10, 20, *rows)],
        [],
        LIVE,
        between=lambda _: concerned.take_others(lambda: came.pop(0) if came else [], apply),
    )
    assert seen == [(OTHER.pid, SSL.inode), (OTHER.pid, 7)]
    assert len(effects.changes) == 600
    assert {change.process.pid for change in effects.changes} == {ONE.pid}
    assert scan_rows.SLICE * 2 <= 600


def test_the_changes_of_a_merge_may_be_taken_away_before_it_is_over():
    table = MappingTable(RuleSet(()))
    rows = [ONE.map(SSL.but(path=f"/usr/lib/lib{n}.so", inode=1000 + n), BASE + n * 2 * PAGE) for n in range(600)]
    taken = []

    def take(effects):
        taken.append(effects.changes)
        effects.changes = []

    records = [OTHER.map(SSL, BASE + n * 2 * PAGE, t=30 + n) for n in range(600)]
    rest = merge(table, [scan(ONE, 10, 20, *rows)], records, LIVE, between=take)
    found = [(one.process.pid, one.name.file_id.inode) for changes in [*taken, rest.changes] for one in changes]
    assert sorted(found) == [*((ONE.pid, row.file_id.inode) for row in rows), (OTHER.pid, SSL.inode)]
    assert any(taken)
