"""Claims, and processes that share an address space."""

from __future__ import annotations

import pytest

from sowatch.bpf.records import FLAG_DIRTY, FLAG_SHARED_VM
from sowatch.engine.table import Causes
from sowatch.sources.scan_rows import group
from support.records import PAGE, Proc, reading
from support.tracking import BASE, CRYPTO, LIBC, LIVE, REPAIR, SSL, feed, the_map, told

# ---- claims -------------------------------------------------------------------------------------


def test_a_claim_is_told_at_once_and_its_process_is_to_be_read(tracker):
    p = Proc()
    assert feed(tracker, p.claim(SSL)) == ["+10 libssl.so.3 mmap"]
    assert tracker.dirty == {10: LIVE}


def test_a_claim_takes_nothing_away_from_other_files(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.claim(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]


def test_what_follows_a_claim_before_the_reading_is_a_claim_too(tracker):
    # Dirty is a bit: only the record that turns it on says so.
    p = Proc()
    feed(tracker, p.claim(SSL, BASE))
    assert feed(tracker, p.map(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]


def test_an_unwanted_claim_takes_nothing_away(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.claim(LIBC, BASE)) == []
    assert tracker.dirty == {10: LIVE}


def test_a_dirty_record_asks_for_a_reading_once(tracker):
    p = Proc()
    feed(tracker, p.map(SSL), p.dirty(), p.dirty())
    assert tracker.dirty == {10: LIVE}


def test_an_exit_makes_the_reading_needless(tracker):
    p = Proc()
    feed(tracker, p.claim(SSL), p.exit())
    assert tracker.dirty == {}


def test_a_copy_that_was_never_confirmed_is_counted(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.map(SSL))
    assert feed(tracker, p.fork(child, flags=FLAG_DIRTY)) == ["+11 libssl.so.3 fork"]
    assert tracker.dirty == {11: Causes("fork", "munmap")}
    feed(tracker, child.exit())
    assert tracker.unverified == 1


def test_a_child_of_a_process_in_doubt_is_in_doubt(tracker):
    # A threaded server forks, and its child, alone by then, forks at once to become a daemon.
    p, child, daemon = Proc(10), Proc(11, 2), Proc(12, 3)
    feed(tracker, p.map(SSL), p.fork(child, flags=FLAG_DIRTY), child.fork(daemon))
    assert set(tracker.dirty) == {11, 12}


def test_a_fork_that_the_kernel_does_not_follow_copies_nothing(tracker):
    # Its parent's exec was lost: the kernel knows by itself that nothing is left.
    p, child = Proc(10), Proc(11, 2, touches=0)
    feed(tracker, p.map(SSL))
    assert feed(tracker, p.fork(child)) == []


def test_a_reading_takes_back_a_claim_that_was_wrong(tracker):
    p = Proc()
    feed(tracker, p.claim(SSL, BASE, t=1))
    tracker.merge([reading(p, 2, 3, p.map(CRYPTO, BASE, t=3))], [], LIVE)
    assert told(tracker) == ["-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


# ---- one address space, several processes -------------------------------------------------------


@pytest.fixture
def pair(tracker):
    """A parent with libssl, and a child that shares its address space."""
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.intro(), p.map(SSL, BASE))
    assert feed(tracker, p.fork(child, t=5, flags=FLAG_SHARED_VM)) == []
    return p, child


def test_a_child_in_its_parents_space_is_silent_until_exec(tracker, pair):
    _, child = pair
    assert feed(tracker, child.exec()) == []
    assert feed(tracker, child.map(CRYPTO)) == ["+11 libcrypto.so.3 mmap"]


def test_a_silent_child_that_exits_leaves_the_parent_alone(tracker, pair):
    _, child = pair
    assert feed(tracker, child.exit()) == []
    assert list(the_map(tracker)) == [(10, 100)]


def test_what_a_silent_child_maps_its_parent_has(tracker, pair):
    _, child = pair
    assert feed(tracker, child.claim(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap"]


def test_a_child_that_outlives_its_parent_has_what_the_parent_had(tracker, pair):
    p, _ = pair
    assert feed(tracker, p.exit(t=9)) == ["+11 libssl.so.3 fork", "-10 libssl.so.3 exit"]
    assert list(the_map(tracker)) == [(11, 100)]


def test_a_child_whose_parent_executes_another_program_keeps_the_old_space(tracker, pair):
    p, child = pair
    assert feed(tracker, p.exec(t=9)) == ["+11 libssl.so.3 fork", "-10 libssl.so.3 exec"]
    assert feed(tracker, p.map(CRYPTO, BASE)) == ["+10 libcrypto.so.3 mmap"]
    assert feed(tracker, child.exit()) == ["-11 libssl.so.3 exit"]


def test_a_child_that_was_met_by_a_reading_has_what_its_parent_has(tracker, pair):
    _, child = pair
    tracker.merge([reading(child, 6, 7, child.map(SSL, BASE, t=7))], [], LIVE)
    assert told(tracker) == ["+11 libssl.so.3 fork"]


def test_two_announced_holders_both_hear_of_a_change(tracker, pair):
    p, child = pair
    tracker.merge([reading(child, 6, 7, child.map(SSL, BASE, t=7))], [], LIVE)
    told(tracker)
    assert feed(tracker, p.claim(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap", "+11 libcrypto.so.3 mmap"]
    assert feed(tracker, child.range(BASE, BASE + PAGE)) == ["-10 libssl.so.3 munmap", "-11 libssl.so.3 munmap"]


def test_children_that_are_silent_for_long_are_named(tracker, pair):
    _, child = pair
    assert [one.id.pid for one in tracker.unannounced(before_ns=6)] == [child.pid]
    assert tracker.unannounced(before_ns=5) == []


def test_a_vfork_child_that_goes_does_not_give_away_another_one(tracker, pair):
    # posix_spawn by two threads at once: both children sit in the space, the parent is still there.
    p, child = pair
    other = Proc(12, 3)
    feed(tracker, p.fork(other, flags=FLAG_SHARED_VM))
    assert feed(tracker, child.exec()) == []


def test_a_fork_of_a_silent_child_has_what_is_in_the_space(tracker, pair):
    _, child = pair
    grandchild = Proc(12, 3)
    assert feed(tracker, child.fork(grandchild)) == ["+12 libssl.so.3 fork"]


def test_a_reading_of_a_child_whose_exec_was_lost_leaves_the_parent_alone(tracker, pair):
    p, child = pair
    child.exec_id += 1  # what its records say from now on; the exec record itself did not get through
    rows = [reading(p, 6, 7, p.map(SSL, BASE, t=7)), reading(child, 8, 9, child.map(CRYPTO, BASE, t=9))]
    tracker.merge(rows, [], REPAIR)
    assert told(tracker) == ["+11 libcrypto.so.3 repair"]
    assert feed(tracker, child.exit()) == ["-11 libcrypto.so.3 exit"]
    assert list(the_map(tracker)) == [(10, 100)]


def test_a_reading_of_a_process_whose_exec_was_lost_says_what_it_has_now(tracker):
    p = Proc()
    feed(tracker, p.intro(), p.map(SSL, BASE))
    p.exec_id += 1
    tracker.merge([reading(p, 6, 7, p.map(CRYPTO, BASE, t=7))], [], REPAIR)
    assert told(tracker) == ["-10 libssl.so.3 repair", "+10 libcrypto.so.3 repair"]


# ---- address spaces that nobody saw shared ------------------------------------------------------


def test_two_that_a_reading_finds_in_one_space_are_told_of_together_from_then_on(tracker):
    first, second = Proc(10), Proc(11)
    feed(tracker, first.map(SSL, BASE, t=1))
    rows = (first.map(SSL, BASE, t=5),), (second.map(SSL, BASE, t=7),)
    readings = [reading(first, 4, 5, *rows[0], space=99), reading(second, 6, 7, *rows[1], space=99)]
    tracker.merge(readings, [], LIVE)
    assert told(tracker) == ["+11 libssl.so.3 mmap"]
    assert feed(tracker, second.map(CRYPTO, BASE + 8 * PAGE, t=8)) == [
        "+10 libcrypto.so.3 mmap",
        "+11 libcrypto.so.3 mmap",
    ]
    assert feed(tracker, first.exit(t=9)) == ["-10 libssl.so.3 exit", "-10 libcrypto.so.3 exit"]
    assert the_map(tracker).keys() == {(11, 100), (11, 101)}


def test_what_only_one_of_two_in_one_space_was_told_of_is_told_of_the_other_or_taken_back(tracker):
    first, second = Proc(10), Proc(11)
    feed(tracker, first.map(SSL, BASE, t=1), second.map(CRYPTO, BASE + 8 * PAGE, t=2))
    readings = [
        reading(first, 4, 5, first.map(SSL, BASE, t=5), space=99),
        reading(second, 6, 7, second.map(SSL, BASE, t=7), space=99),
    ]
    tracker.merge(readings, [], LIVE)
    assert told(tracker) == ["-11 libcrypto.so.3 munmap", "+11 libssl.so.3 mmap"]


def test_spaces_without_a_number_and_of_processes_that_have_gone_are_not_taken_for_one(tracker):
    first, second, third = Proc(10), Proc(11), Proc(12)
    readings = [
        reading(first, 1, 2, first.map(SSL, BASE, t=2), space=99),
        reading(second, 4, 5, second.map(SSL, BASE, t=5), space=99),
        reading(third, 6, 7, third.map(SSL, BASE, t=7)),
    ]
    tracker.merge(readings, [first.exit(t=3)], LIVE)
    told(tracker)
    assert feed(tracker, second.exit(t=8)) == ["-11 libssl.so.3 exit"]
    assert the_map(tracker).keys() == {(12, 100)}


def test_what_a_holder_claimed_and_took_with_it_is_read_through_another(tracker):
    parent, child = Proc(10), Proc(11)
    feed(tracker, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM), child.dirty())
    tracker.dirty.clear()  # its owner is about to read the child
    feed(tracker, child.exit())
    assert list(tracker.dirty) == [10]


def test_a_holder_that_claimed_nothing_since_the_last_reading_leaves_nothing_to_read(tracker):
    parent, child = Proc(10), Proc(11)
    feed(tracker, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM), child.dirty(t=3))
    tracker.dirty.clear()
    tracker.merge([reading(parent, 4, 5, parent.map(SSL, BASE, t=5))], [], LIVE)
    feed(tracker, child.exit(t=6))
    assert not tracker.dirty


def test_what_a_holder_claimed_while_it_was_read_is_read_through_another_if_it_is_gone(tracker):
    parent, child = Proc(10), Proc(11)
    feed(tracker, parent.map(SSL, BASE, t=1), parent.fork(child, t=2, flags=FLAG_SHARED_VM))
    rows = reading(child, 3, 6, child.map(SSL, BASE, t=6))
    assert tracker.merge([rows], [child.dirty(t=5)], LIVE) == {11}
    tracker.dirty.clear()  # its owner is about to read the child again
    feed(tracker, child.exec(t=7))
    assert list(tracker.dirty) == [10]


def test_a_child_whose_exec_was_lost_and_that_has_nothing_leaves_its_parent_what_that_one_has(tracker):
    parent, child = Proc(10), Proc(11)
    feed(tracker, parent.map(SSL, BASE), parent.fork(child, flags=FLAG_SHARED_VM))
    child.exec()
    tracker.merge([reading(child, 5, 6)], [], LIVE)
    assert told(tracker) == []
    assert the_map(tracker).keys() == {(10, 100)}


def test_the_first_word_of_an_unknown_sharer_asks_for_a_reading_of_all(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert not tracker.has_strangers
    feed(tracker, p.map(CRYPTO, BASE + 8 * PAGE, flags=FLAG_SHARED_VM))
    assert tracker.has_strangers
    assert list(tracker.dirty) == [10]


def test_a_reading_that_meets_an_unknown_sharer_asks_for_a_reading_of_all_unless_it_found_it(tracker):
    first, second = Proc(10), Proc(11)
    alone = reading(first, 1, 2, first.map(SSL, BASE, t=2), space=99, flags=FLAG_SHARED_VM)
    tracker.merge([alone], [], LIVE)
    assert tracker.has_strangers
    tracker.has_strangers = False
    both = [
        reading(first, 4, 5, first.map(SSL, BASE, t=5), space=99, flags=FLAG_SHARED_VM),
        reading(second, 6, 7, intro=True, space=99, flags=FLAG_SHARED_VM),
    ]
    tracker.merge(both, [], LIVE)
    assert not tracker.has_strangers


def test_the_introduction_in_a_reading_of_one_in_company_lets_nobody_settle_it(tracker):
    p = Proc(touches=0)
    visit = p.visit(t=1)
    p.touches = 3
    (found,) = group([visit, p.intro(t=2)])
    tracker.merge([found], [], LIVE)
    assert tracker.take_idle() == []
