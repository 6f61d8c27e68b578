"""Tentative records, and processes that share an address space."""

from __future__ import annotations

import pytest

from sowatch.bpf.records import FLAG_NEEDS_RESCAN, FLAG_SHARED_VM
from sowatch.engine.effects import Causes
from sowatch.sources.scan_rows import group
from support.records import PAGE, Proc, scan
from support.tracking import BASE, CRYPTO, LIBC, LIVE, REPAIR, SSL, feed, reported, the_map

# ---- claims -------------------------------------------------------------------------------------


def test_a_claim_is_told_at_once_and_its_process_is_to_be_read(table):
    p = Proc()
    assert feed(table, p.tentative(SSL)) == ["+10 libssl.so.3 mmap"]
    assert table.needs_rescan == {10: LIVE}


def test_a_claim_takes_nothing_away_from_other_files(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.tentative(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]


def test_what_follows_a_claim_before_the_reading_is_a_claim_too(table):
    # Dirty is a bit: only the record that turns it on says so.
    p = Proc()
    feed(table, p.tentative(SSL, BASE))
    assert feed(table, p.map(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]


def test_an_unwanted_claim_takes_nothing_away(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.tentative(LIBC, BASE)) == []
    assert table.needs_rescan == {10: LIVE}


def test_a_dirty_record_asks_for_a_reading_once(table):
    p = Proc()
    feed(table, p.map(SSL), p.needs_rescan(), p.needs_rescan())
    assert table.needs_rescan == {10: LIVE}


def test_an_exit_makes_the_reading_needless(table):
    p = Proc()
    feed(table, p.tentative(SSL), p.exit())
    assert table.needs_rescan == {}


def test_a_copy_that_was_never_confirmed_needs_no_scan_once_its_process_has_ended(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.map(SSL))
    assert feed(table, p.fork(child, flags=FLAG_NEEDS_RESCAN)) == ["+11 libssl.so.3 fork"]
    assert table.needs_rescan == {11: Causes("fork", "munmap")}
    assert feed(table, child.exit()) == ["-11 libssl.so.3 exit"]
    assert table.needs_rescan == {}


def test_a_child_of_a_process_in_doubt_is_in_doubt(table):
    # A threaded server forks, and its child, alone by then, forks at once to become a daemon.
    p, child, daemon = Proc(10), Proc(11, 2), Proc(12, 3)
    feed(table, p.map(SSL), p.fork(child, flags=FLAG_NEEDS_RESCAN), child.fork(daemon))
    assert set(table.needs_rescan) == {11, 12}


def test_a_fork_that_the_kernel_does_not_follow_copies_nothing(table):
    # Its parent's exec was lost: the kernel knows by itself that nothing is left.
    p, child = Proc(10), Proc(11, 2, activity=0)
    feed(table, p.map(SSL))
    assert feed(table, p.fork(child)) == []


def test_a_reading_takes_back_a_claim_that_was_wrong(table):
    p = Proc()
    feed(table, p.tentative(SSL, BASE, t=1))
    table.merge([scan(p, 2, 3, p.map(CRYPTO, BASE, t=3))], [], LIVE)
    assert reported(table) == ["-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


# ---- one address space, several processes -------------------------------------------------------


@pytest.fixture
def pair(table):
    """A parent with libssl, and a child that shares its address space."""
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.intro(), p.map(SSL, BASE))
    assert feed(table, p.fork(child, t=5, flags=FLAG_SHARED_VM)) == []
    return p, child


def test_a_child_in_its_parents_space_is_silent_until_exec(table, pair):
    _, child = pair
    assert feed(table, child.exec()) == []
    assert feed(table, child.map(CRYPTO)) == ["+11 libcrypto.so.3 mmap"]


def test_a_silent_child_that_exits_leaves_the_parent_alone(table, pair):
    _, child = pair
    assert feed(table, child.exit()) == []
    assert list(the_map(table)) == [(10, 100)]


def test_what_a_silent_child_maps_its_parent_has(table, pair):
    _, child = pair
    assert feed(table, child.tentative(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap"]


def test_a_child_that_outlives_its_parent_has_what_the_parent_had(table, pair):
    p, _ = pair
    assert feed(table, p.exit(t=9)) == ["+11 libssl.so.3 fork", "-10 libssl.so.3 exit"]
    assert list(the_map(table)) == [(11, 100)]


def test_a_child_whose_parent_executes_another_program_keeps_the_old_space(table, pair):
    p, child = pair
    assert feed(table, p.exec(t=9)) == ["+11 libssl.so.3 fork", "-10 libssl.so.3 exec"]
    assert feed(table, p.map(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]
    assert feed(table, child.exit()) == ["-11 libssl.so.3 exit"]


def test_a_child_that_was_met_by_a_reading_has_what_its_parent_has(table, pair):
    _, child = pair
    table.merge([scan(child, 6, 7, child.map(SSL, BASE, t=7))], [], LIVE)
    assert reported(table) == ["+11 libssl.so.3 fork"]


def test_two_announced_holders_both_hear_of_a_change(table, pair):
    p, child = pair
    table.merge([scan(child, 6, 7, child.map(SSL, BASE, t=7))], [], LIVE)
    reported(table)
    assert feed(table, p.tentative(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap", "+11 libcrypto.so.3 mmap"]
    assert feed(table, child.range(BASE, BASE + PAGE)) == ["-10 libssl.so.3 munmap", "-11 libssl.so.3 munmap"]


def test_children_that_are_silent_for_long_are_named(table, pair):
    _, child = pair
    assert [one.id.pid for one in table.unannounced(before_ns=6)] == [child.pid]
    assert table.unannounced(before_ns=5) == []


def test_a_vfork_child_that_goes_does_not_give_away_another_one(table, pair):
    # posix_spawn by two threads at once: both children sit in the space, the parent is still there.
    p, child = pair
    other = Proc(12, 3)
    feed(table, p.fork(other, flags=FLAG_SHARED_VM))
    assert feed(table, child.exec()) == []


def test_a_fork_of_a_silent_child_has_what_is_in_the_space(table, pair):
    _, child = pair
    grandchild = Proc(12, 3)
    assert feed(table, child.fork(grandchild)) == ["+12 libssl.so.3 fork"]


def test_a_reading_of_a_child_whose_exec_was_lost_leaves_the_parent_alone(table, pair):
    p, child = pair
    child.exec_id += 1  # what its records say from now on; the exec record itself did not get through
    rows = [scan(p, 6, 7, p.map(SSL, BASE, t=7)), scan(child, 8, 9, child.map(CRYPTO, BASE, t=9))]
    table.merge(rows, [], REPAIR)
    assert reported(table) == ["+11 libcrypto.so.3 repair"]
    assert feed(table, child.exit()) == ["-11 libcrypto.so.3 exit"]
    assert list(the_map(table)) == [(10, 100)]


def test_a_reading_of_a_process_whose_exec_was_lost_says_what_it_has_now(table):
    p = Proc()
    feed(table, p.intro(), p.map(SSL, BASE))
    p.exec_id += 1
    table.merge([scan(p, 6, 7, p.map(CRYPTO, BASE, t=7))], [], REPAIR)
    assert reported(table) == ["-10 libssl.so.3 repair", "+10 libcrypto.so.3 repair"]


# ---- address spaces that nobody saw shared ------------------------------------------------------


def test_two_that_a_reading_finds_in_one_space_are_told_of_together_from_then_on(table):
    first, second = Proc(10), Proc(11)
    feed(table, first.map(SSL, BASE, t=1))
    rows = (first.map(SSL, BASE, t=5),), (second.map(SSL, BASE, t=7),)
    scans = [scan(first, 4, 5, *rows[0], space=99), scan(second, 6, 7, *rows[1], space=99)]
    table.merge(scans, [], LIVE)
    assert reported(table) == ["+11 libssl.so.3 mmap"]
    assert feed(table, second.map(CRYPTO, BASE + 8 * PAGE, t=8)) == [
        "+10 libcrypto.so.3 mmap",
        "+11 libcrypto.so.3 mmap",
    ]
    assert feed(table, first.exit(t=9)) == ["-10 libssl.so.3 exit", "-10 libcrypto.so.3 exit"]
    assert the_map(table).keys() == {(11, 100), (11, 101)}


def test_what_only_one_of_two_in_one_space_was_told_of_is_told_of_the_other_or_taken_back(table):
    first, second = Proc(10), Proc(11)
    feed(table, first.map(SSL, BASE, t=1), second.map(CRYPTO, BASE + 8 * PAGE, t=2))
    scans = [
        scan(first, 4, 5, first.map(SSL, BASE, t=5), space=99),
        scan(second, 6, 7, second.map(SSL, BASE, t=7), space=99),
    ]
    table.merge(scans, [], LIVE)
    assert reported(table) == ["-11 libcrypto.so.3 munmap", "+11 libssl.so.3 mmap"]


def test_spaces_without_a_number_and_of_processes_that_have_gone_are_not_taken_for_one(table):
    first, second, third = Proc(10), Proc(11), Proc(12)
    scans = [
        scan(first, 1, 2, first.map(SSL, BASE, t=2), space=99),
        scan(second, 4, 5, second.map(SSL, BASE, t=5), space=99),
        scan(third, 6, 7, third.map(SSL, BASE, t=7)),
    ]
    table.merge(scans, [first.exit(t=3)], LIVE)
    reported(table)
    assert feed(table, second.exit(t=8)) == ["-11 libssl.so.3 exit"]
    assert the_map(table).keys() == {(12, 100)}


def test_who_shares_its_address_space_is_not_untracked_until_nobody_does(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.intro(), parent.fork(child, t=1, flags=FLAG_SHARED_VM))
    table.merge([scan(parent, 2, 3)], [], LIVE)
    assert not table.is_idle(10)
    assert not table.is_idle(11)
    # What one of them maps, the other has.
    assert feed(table, child.map(SSL, BASE, t=4)) == ["+10 libssl.so.3 mmap"]
    assert feed(table, parent.range(BASE, BASE + PAGE, t=5)) == ["-10 libssl.so.3 munmap"]
    feed(table, child.exec(t=6))
    assert list(table.needs_rescan) == [10]  # its scan brings the activity that it is untracked by
    table.begin_rescans([10])
    table.merge([scan(parent, 7, 8)], [], LIVE)
    assert table.is_idle(10)


def test_what_a_holder_claimed_and_took_with_it_is_read_through_another(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM), child.needs_rescan())
    table.begin_rescans(list(table.needs_rescan))  # its owner is about to read the child
    feed(table, child.exit())
    assert list(table.needs_rescan) == [10]


def test_a_holder_that_claimed_nothing_since_the_last_reading_leaves_nothing_to_read(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM), child.needs_rescan(t=3))
    table.begin_rescans(list(table.needs_rescan))
    table.merge([scan(parent, 4, 5, parent.map(SSL, BASE, t=5))], [], LIVE)
    feed(table, child.exit(t=6))
    assert not table.needs_rescan


def test_a_holder_that_is_still_owed_a_scan_leaves_it_to_another_that_was_scanned_meanwhile(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM), child.needs_rescan(t=3))
    # The child reports nothing more until its own scan begins.
    table.merge([scan(parent, 4, 5, parent.map(SSL, BASE, t=5))], [], LIVE)
    assert list(table.needs_rescan) == [11]
    feed(table, child.exec(t=6))
    assert list(table.needs_rescan) == [10]


def test_what_a_holder_claimed_while_it_was_read_is_read_through_another_if_it_is_gone(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE, t=1), parent.fork(child, t=2, flags=FLAG_SHARED_VM))
    rows = scan(child, 3, 6, child.map(SSL, BASE, t=6))
    assert table.merge([rows], [child.needs_rescan(t=5)], LIVE) == {11}
    table.begin_rescans(list(table.needs_rescan))  # its owner is about to read the child again
    feed(table, child.exec(t=7))
    assert list(table.needs_rescan) == [10]


def test_a_child_whose_exec_was_lost_and_that_has_nothing_leaves_its_parent_what_that_one_has(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM))
    child.exec()
    table.merge([scan(child, 5, 6)], [], LIVE)
    assert reported(table) == []
    assert the_map(table).keys() == {(10, 100)}


def test_the_first_word_of_an_unknown_sharer_asks_for_a_reading_of_all(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert not table.kept.with_untracked_sharers
    feed(table, p.map(CRYPTO, BASE + 8 * PAGE, flags=FLAG_SHARED_VM))
    assert table.kept.with_untracked_sharers
    assert list(table.needs_rescan) == [10]


def test_who_reads_the_mappings_of_a_child_whose_fork_was_seen_is_no_unknown_sharer(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child))
    feed(table, child.map(CRYPTO, BASE + 8 * PAGE, flags=FLAG_SHARED_VM))
    row = child.map(SSL, BASE, t=5)
    table.merge([scan(child, 4, 6, row, space=99, flags=FLAG_SHARED_VM)], [], LIVE)
    assert not table.kept.with_untracked_sharers
    # After an exec it has another address space, which nobody saw it get.
    feed(table, child.exec(t=7), child.map(SSL, BASE, t=8, flags=FLAG_SHARED_VM))
    assert table.kept.with_untracked_sharers == {child.pid: child.start_ns}


def test_after_a_lost_exec_of_such_a_child_its_sharers_are_unknown(table):
    parent, child = Proc(10), Proc(11)
    feed(table, parent.map(SSL, BASE), parent.fork(child))
    child.exec()
    table.merge([scan(child, 4, 6, child.map(SSL, BASE, t=5), space=99)], [], LIVE)
    feed(table, child.map(CRYPTO, BASE + 8 * PAGE, t=7, flags=FLAG_SHARED_VM))
    assert table.kept.with_untracked_sharers == {child.pid: child.start_ns}


def test_a_reading_that_meets_an_unknown_sharer_asks_for_a_reading_of_all_unless_it_found_it(table):
    first, second = Proc(10), Proc(11)
    alone = scan(first, 1, 2, first.map(SSL, BASE, t=2), space=99, flags=FLAG_SHARED_VM)
    table.merge([alone], [], LIVE)
    assert table.kept.with_untracked_sharers
    table.kept.with_untracked_sharers.clear()
    both = [
        scan(first, 4, 5, first.map(SSL, BASE, t=5), space=99, flags=FLAG_SHARED_VM),
        scan(second, 6, 7, intro=True, space=99, flags=FLAG_SHARED_VM),
    ]
    table.merge(both, [], LIVE)
    assert not table.kept.with_untracked_sharers


def test_the_introduction_in_a_reading_of_one_in_company_lets_nobody_settle_it(table):
    p = Proc(activity=0)
    visit = p.visit(t=1)
    p.activity = 3
    (found,) = group([visit, p.intro(t=2)])
    table.merge([found], [], LIVE)
    assert table.take_idle() == []
