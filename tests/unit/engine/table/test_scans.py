"""Scans: what happened before, inside and after the scan of a process."""

from __future__ import annotations

import pytest

from sowatch.bpf.records import FLAG_ASK, FLAG_NEEDS_RESCAN, FLAG_SHARED_VM
from sowatch.engine.effects import Causes
from support.records import PAGE, Proc, scan
from support.tracking import BASE, CRYPTO, LIBC, LIVE, REPAIR, SNAPSHOT, SSL, feed, reported, the_map

# ---- readings: before, inside, after a visit ----------------------------------------------------


def test_a_snapshot_tells_what_is_mapped(table):
    p = Proc()
    rows = (p.map(SSL, BASE, t=11), p.map(SSL, BASE + PAGE, t=12), p.map(LIBC, t=13))
    assert table.merge([scan(p, 10, 13, *rows, intro=True)], [], SNAPSHOT, is_start=True) == set()
    (change,) = table.take_changes()
    assert (change.cause, change.t_ns, change.process.exe) == ("snapshot", 11, "/usr/sbin/nginx")
    assert (change.ranges, change.range_count) == (((BASE, BASE + 2 * PAGE),), None)


def test_a_record_before_the_visit_is_overruled_by_it(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    again = table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20))], [p.map(CRYPTO, BASE + PAGE, t=9)], REPAIR)
    assert again == set()
    assert reported(table) == ["+10 libcrypto.so.3 mmap", "-10 libcrypto.so.3 repair"]


def test_a_record_before_the_visit_that_the_visit_saw_is_told_once(table):
    p = Proc()
    row = p.map(SSL, BASE, t=20)
    assert table.merge([scan(p, 10, 20, row)], [p.map(SSL, BASE, t=9)], REPAIR) == set()
    assert reported(table) == ["+10 libssl.so.3 mmap"]


def test_at_the_start_a_record_before_the_visit_tells_nothing(table):
    p = Proc()
    row = p.map(SSL, BASE, t=20)
    early = [p.map(SSL, BASE, t=8), p.map(CRYPTO, BASE + PAGE, t=9)]
    table.merge([scan(p, 10, 20, row)], early, SNAPSHOT, is_start=True)
    assert reported(table) == ["+10 libssl.so.3 snapshot"]


def test_at_the_start_a_record_before_the_visit_still_introduces(table):
    p = Proc()
    table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20))], [p.intro(t=8)], SNAPSHOT, is_start=True)
    assert table.take_changes()[0].process.uid == 33


def test_at_the_start_a_question_before_the_visit_is_answered(table):
    p = Proc()
    early = p.map(LIBC, t=9, flags=FLAG_ASK)
    table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20))], [early], SNAPSHOT, is_start=True)
    assert table.take_answers() == ([], [LIBC.key])


@pytest.mark.parametrize("is_start", [True, False])
def test_a_record_after_the_visit_comes_on_top(table, is_start):
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    later = [p.range(BASE, BASE + PAGE, t=21), p.map(CRYPTO, BASE, t=22)]
    assert table.merge(rows, later, SNAPSHOT, is_start=is_start) == set()
    assert reported(table) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


def test_a_record_inside_the_visit_makes_another_one(table):
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=11))]
    assert table.merge(rows, [p.range(BASE, BASE + PAGE, t=15)], LIVE) == {10}


@pytest.mark.parametrize("t", [10, 20])
def test_the_ends_of_the_visit_are_inside(table, t):
    p = Proc()
    assert table.merge([scan(p, 10, 20, p.map(SSL, t=20))], [p.range(0, PAGE, t=t)], LIVE) == {10}


def test_at_the_start_no_live_change_of_a_file_comes_before_its_snapshot(table):
    # The engine tells what the snapshot found first, so such an order would be turned round.
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=12))]
    inside = [p.map(SSL, BASE, t=11), p.range(BASE, BASE + PAGE, t=13)]
    assert table.merge(rows, inside, SNAPSHOT, is_start=True) == {10}
    causes = [line.split()[-1] for line in reported(table)]
    assert causes == sorted(causes, key=lambda cause: cause != "snapshot")


@pytest.mark.parametrize("is_start", [True, False])
def test_an_exit_inside_the_visit_is_the_end(table, is_start):
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert table.merge(rows, [p.exit(t=15)], LIVE, is_start=is_start) == set()
    assert the_map(table) == {}
    assert len(table) == 0


@pytest.mark.parametrize("is_start", [True, False])
def test_an_exit_after_the_visit_is_the_end(table, is_start):
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert table.merge(rows, [p.exit(t=21)], SNAPSHOT, is_start=is_start) == set()
    assert reported(table) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 exit"]


def test_an_exec_inside_the_visit_does_not_bring_the_old_program_back(table):
    p = Proc()
    feed(table, p.intro(), p.map(SSL, BASE))
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    table.merge(rows, [p.exec(t=15), p.map(CRYPTO, BASE, t=16)], LIVE)
    assert reported(table) == ["-10 libssl.so.3 exec", "+10 libcrypto.so.3 mmap"]


def test_an_exec_after_the_visit_drops_what_it_found(table):
    p = Proc()
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert table.merge(rows, [p.exec(t=21)], SNAPSHOT, is_start=True) == set()
    assert reported(table) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 exec"]


def test_a_record_that_was_overtaken_on_its_way_to_the_ring_makes_another_visit(table):
    # Walking a long path takes its time: what another thread says a little later comes first.
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 20, p.map(CRYPTO, BASE, t=20))]
    late, first = p.map(SSL, BASE, t=9), p.fork(child, t=21, flags=FLAG_NEEDS_RESCAN)
    again = table.merge(rows, [first, late], LIVE)
    assert 10 in again | set(table.needs_rescan)


def test_a_fork_before_the_visit_of_its_parent_is_looked_at_if_it_was_not_met(table):
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert table.merge(rows, [p.fork(child, t=9)], SNAPSHOT, is_start=True) == {11}


def test_a_fork_before_the_visit_of_its_parent_that_was_met_is_what_was_seen(table):
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20)), scan(child, 30, 40, child.map(CRYPTO, BASE, t=40))]
    assert table.merge(rows, [p.fork(child, t=9)], SNAPSHOT, is_start=True) == set()
    assert reported(table) == ["+10 libssl.so.3 snapshot", "+11 libcrypto.so.3 snapshot"]


@pytest.mark.parametrize("is_start", [True, False])
def test_a_fork_after_the_visit_of_its_parent_copies_what_was_seen(table, is_start):
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert table.merge(rows, [p.fork(child, t=21)], SNAPSHOT, is_start=is_start) == set()
    assert reported(table) == ["+10 libssl.so.3 snapshot", "+11 libssl.so.3 fork"]


@pytest.mark.parametrize("is_start", [True, False])
def test_a_child_visited_before_its_fork_was_told_is_loaded_once(table, is_start):
    # copy_process makes the child visible, kernel_clone tells of it a moment later.
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 11, p.map(SSL, BASE, t=11)), scan(child, 12, 13, child.map(SSL, BASE, t=13))]
    table.merge(rows, [p.fork(child, t=14)], SNAPSHOT, is_start=is_start)
    assert sorted(reported(table)) == ["+10 libssl.so.3 snapshot", "+11 libssl.so.3 snapshot"]
    assert feed(table, child.exit()) == ["-11 libssl.so.3 exit"]


def test_a_vfork_child_visited_before_its_fork_was_told_takes_its_loads_back(table):
    p, child = Proc(10), Proc(11, 2)
    rows = [scan(p, 10, 11, p.map(SSL, BASE, t=11)), scan(child, 12, 13, child.map(SSL, BASE, t=13))]
    table.merge(rows, [p.fork(child, t=14, flags=FLAG_SHARED_VM)], SNAPSHOT, is_start=True)
    lines = reported(table) + feed(table, child.exec(t=15))
    assert lines.count("+11 libssl.so.3 snapshot") == sum(line.startswith("-11") for line in lines)
    assert feed(table, p.exit(t=16)) == ["-10 libssl.so.3 exit"]


def test_a_process_visited_and_found_empty_has_lost_everything(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    table.merge([scan(p, 10, 10)], [], REPAIR)
    assert reported(table) == ["-10 libssl.so.3 repair"]


def test_a_stranger_visited_and_found_empty_is_nobody(table):
    p = Proc(activity=0)
    table.merge([scan(p, 10, 10)], [], SNAPSHOT, is_start=True)
    assert len(table) == 0


def test_a_process_that_was_not_visited_keeps_what_it_has(table):
    p, other = Proc(10), Proc(11, 2)
    feed(table, p.map(SSL, BASE), other.map(SSL, BASE))
    table.merge([scan(p, 10, 10)], [], REPAIR)
    assert list(the_map(table)) == [(11, 100)]


def test_a_visit_of_a_new_owner_of_the_pid_ends_the_old_one(table):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(table, old.map(SSL, BASE))
    table.merge([scan(new, 10, 20, new.map(SSL, BASE, t=20))], [], REPAIR)
    gone, come = table.take_changes()
    assert (gone.is_load, gone.process.start_ns) == (False, old.start_ns)
    assert (come.is_load, come.process.start_ns) == (True, new.start_ns)


def test_a_record_of_an_old_owner_does_not_disturb_the_visit_of_the_new_one(table):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(table, old.map(SSL, BASE))
    again = table.merge([scan(new, 10, 20, new.map(CRYPTO, BASE, t=20))], [old.exit(t=15)], REPAIR)
    assert again == set()
    assert reported(table) == ["-10 libssl.so.3 exit", "+10 libcrypto.so.3 repair"]


def test_what_is_owed_goes_by_its_own_causes(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.map(SSL, BASE), child.map(SSL, BASE))
    rows = [
        scan(p, 10, 20, p.map(CRYPTO, BASE, t=20)),
        scan(child, 21, 22, child.map(CRYPTO, BASE, t=22)),
    ]
    table.merge(rows, [], LIVE, own_causes={11: Causes("fork", "munmap")})
    assert reported(table) == [
        "-10 libssl.so.3 munmap",
        "+10 libcrypto.so.3 mmap",
        "-11 libssl.so.3 munmap",
        "+11 libcrypto.so.3 fork",
    ]


def test_a_reading_replaces_the_ranges_that_were_known(table):
    p = Proc()
    feed(table, p.map(SSL, BASE, BASE + 4 * PAGE))
    table.merge([scan(p, 10, 20, p.map(SSL, BASE + 2 * PAGE, BASE + 3 * PAGE, t=20))], [], LIVE)
    assert reported(table) == []
    assert feed(table, p.range(BASE + 2 * PAGE, BASE + 3 * PAGE)) == ["-10 libssl.so.3 munmap"]


def test_a_reading_learns_from_its_intro(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20), p.map(CRYPTO, BASE + PAGE, t=20), intro=True)], [], LIVE)
    assert table.take_changes()[0].process.uid == 33


def test_a_claim_inside_the_visit_stays_dirty(table):
    p = Proc()
    feed(table, p.tentative(SSL, BASE, t=1))
    table.begin_rescans(list(table.needs_rescan))  # as its owner does before it reads
    table.merge([scan(p, 10, 20, p.map(SSL, BASE, t=20))], [p.tentative(CRYPTO, BASE + PAGE, t=15)], LIVE)
    assert 10 in table.needs_rescan
    assert "+10 libcrypto.so.3 mmap" in reported(table)


def test_an_owed_reading_of_an_exited_process_changes_nothing(table):
    p = Proc()
    feed(table, p.tentative(SSL, BASE))
    table.begin_rescans(list(table.needs_rescan))
    assert table.merge([], [p.exit(t=9)], LIVE) == set()
    assert reported(table) == ["-10 libssl.so.3 exit"]
