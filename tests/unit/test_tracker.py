"""The tracker as a state machine: one record or reading in, and what it says came or went."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.bpf.records import FLAG_ASK, FLAG_DIRTY, FLAG_IMAGE, FLAG_SHARED_VM
from sowatch.rules import Rule, RuleSet
from sowatch.sources import group
from sowatch.spaces import subtract
from sowatch.tracker import Causes, Tracker
from support.records import PAGE, File, Proc, reading

LIVE = Causes("mmap", "munmap")
REPAIR = Causes("repair", "repair")
SNAPSHOT = Causes("snapshot", "repair")

SSL = File("/usr/lib/libssl.so.3", 100)
CRYPTO = File("/usr/lib/libcrypto.so.3", 101)
LIBC = File("/usr/lib/libc.so.6", 102)
BASE = 0x7F0000000000


@pytest.fixture
def tracker():
    return Tracker(RuleSet([Rule(r"libssl|libcrypto|nginx|memfd")]), label=lambda cgroup: cgroup and cgroup.strip("/"))


def told(tracker):
    """What came (+) and went (-) since the last look."""
    return [
        f"{'+' if one.is_load else '-'}{one.process.pid} {one.name.path.rsplit('/', 1)[-1]} {one.cause}"
        for one in tracker.take_changes()
    ]


def the_map(tracker):
    return {
        (process.id.pid, mapping.name.file_id.inode): sorted(mapping.ranges) for process, mapping in tracker.mappings()
    }


def feed(tracker, *records):
    for record in records:
        tracker.apply(record)
    return told(tracker)


# ---- facts: mappings come and go ----------------------------------------------------------------


def test_a_mapping_is_a_load(tracker):
    p = Proc()
    tracker.apply(p.intro(t=1))
    tracker.apply(p.map(SSL, BASE, BASE + 3 * PAGE, t=42))
    (change,) = tracker.take_changes()
    assert (change.is_load, change.cause, change.t_ns) == (True, "mmap", 42)
    assert (change.name.file_id, change.name.path) == (SSL.id, SSL.path)
    assert (change.kind, change.ranges) == ("library", ((BASE, BASE + 3 * PAGE),))


def test_second_mapping_of_a_file_does_not_repeat_its_load(tracker):
    p = Proc()
    assert feed(tracker, p.map(SSL, BASE), p.map(SSL, BASE + 8 * PAGE)) == ["+10 libssl.so.3 mmap"]
    assert the_map(tracker) == {(10, 100): [(BASE, BASE + PAGE), (BASE + 8 * PAGE, BASE + 9 * PAGE)]}


def test_a_file_is_gone_with_its_last_range(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE), p.map(SSL, BASE + 8 * PAGE))
    assert feed(tracker, p.range(BASE, BASE + PAGE)) == []
    assert feed(tracker, p.range(BASE + 8 * PAGE, BASE + 9 * PAGE)) == ["-10 libssl.so.3 munmap"]
    assert the_map(tracker) == {}


def test_partial_munmap_leaves_the_rest(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE, BASE + 10 * PAGE))
    assert feed(tracker, p.range(BASE + 3 * PAGE, BASE + 5 * PAGE)) == []
    assert the_map(tracker) == {(10, 100): [(BASE, BASE + 3 * PAGE), (BASE + 5 * PAGE, BASE + 10 * PAGE)]}


def test_one_munmap_takes_several_files(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(tracker, p.range(0, 1 << 47)) == ["-10 libssl.so.3 munmap", "-10 libcrypto.so.3 munmap"]


def test_munmap_beside_a_mapping_changes_nothing(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.range(BASE - PAGE, BASE), p.range(BASE + PAGE, BASE + 2 * PAGE)) == []
    assert the_map(tracker) == {(10, 100): [(BASE, BASE + PAGE)]}


def test_mapping_over_another_file_unloads_that_one(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.map(CRYPTO, BASE)) == ["-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


def test_mapping_over_a_part_of_another_file_keeps_the_rest_of_it(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE, BASE + 4 * PAGE))
    assert feed(tracker, p.map(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap"]
    assert the_map(tracker) == {
        (10, 100): [(BASE, BASE + PAGE), (BASE + 2 * PAGE, BASE + 4 * PAGE)],
        (10, 101): [(BASE + PAGE, BASE + 2 * PAGE)],
    }


def test_mapping_a_file_over_itself_is_no_news(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE, BASE + 4 * PAGE))
    assert feed(tracker, p.map(SSL, BASE + PAGE)) == []
    assert feed(tracker, p.range(BASE, BASE + 4 * PAGE)) == ["-10 libssl.so.3 munmap"]


def test_an_unwanted_file_mapped_over_a_wanted_one_unloads_that_one(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.map(LIBC, BASE)) == ["-10 libssl.so.3 munmap"]


def test_the_last_page_of_the_address_space_is_a_page_like_others(tracker):
    p = Proc()
    top = 1 << 64
    feed(tracker, p.map(SSL, top - 2 * PAGE, top - PAGE))
    assert feed(tracker, p.range(top - 2 * PAGE, top - PAGE)) == ["-10 libssl.so.3 munmap"]


def test_two_files_under_one_path_are_two(tracker):
    p = Proc()
    replaced = SSL.but(inode=200)
    assert feed(tracker, p.map(SSL, BASE), p.map(replaced, BASE + PAGE)) == [
        "+10 libssl.so.3 mmap",
        "+10 libssl.so.3 mmap",
    ]
    assert feed(tracker, p.range(BASE, BASE + PAGE)) == ["-10 libssl.so.3 munmap"]
    assert list(the_map(tracker)) == [(10, 200)]


def test_one_file_under_two_names_is_one(tracker):
    p = Proc()
    link = SSL.but(path="/opt/libssl-link.so", dentry=0x9999)
    assert feed(tracker, p.map(SSL, BASE), p.map(link, BASE + PAGE)) == ["+10 libssl.so.3 mmap"]


# ---- facts: processes ---------------------------------------------------------------------------


def test_a_fork_copies_what_its_parent_has(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.intro(), p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(tracker, p.fork(child, t=5)) == ["+11 libssl.so.3 fork", "+11 libcrypto.so.3 fork"]


def test_a_forked_childs_mappings_are_its_own(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.map(SSL, BASE, BASE + 2 * PAGE), p.fork(child))
    assert feed(tracker, child.range(BASE, BASE + PAGE), p.range(BASE, BASE + 2 * PAGE)) == ["-10 libssl.so.3 munmap"]
    assert the_map(tracker) == {(11, 100): [(BASE + PAGE, BASE + 2 * PAGE)]}


def test_exec_drops_everything_and_the_process_goes_on(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(tracker, p.exec(t=9)) == ["-10 libssl.so.3 exec", "-10 libcrypto.so.3 exec"]
    assert feed(tracker, p.map(SSL, BASE)) == ["+10 libssl.so.3 mmap"]


def test_exit_drops_everything(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    assert feed(tracker, p.exit(t=9)) == ["-10 libssl.so.3 exit"]
    assert len(tracker) == 0


def test_a_second_exit_says_nothing_new(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE), p.exit())
    assert feed(tracker, p.exit()) == []


def test_an_exit_of_an_earlier_owner_of_the_pid_leaves_the_new_one(tracker):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(tracker, new.map(SSL, BASE))
    assert feed(tracker, old.exit(), old.exec(), old.range(BASE, BASE + PAGE)) == []
    assert list(the_map(tracker)) == [(10, 100)]


def test_a_new_owner_of_a_pid_ends_the_old_one_whose_exit_was_lost(tracker):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(tracker, old.map(SSL, BASE))
    tracker.apply(new.map(SSL, BASE, t=7))
    gone, come = tracker.take_changes()
    assert (gone.is_load, gone.cause, gone.process.start_ns) == (False, "repair", old.start_ns)
    assert (come.is_load, come.cause, come.process.start_ns) == (True, "mmap", new.start_ns)


def test_a_fork_into_the_pid_of_a_process_whose_exit_was_lost_ends_that_one(tracker):
    p, old, new = Proc(10), Proc(11, 2), Proc(11, 3)
    feed(tracker, p.map(SSL, BASE), old.map(CRYPTO, BASE))
    assert feed(tracker, p.fork(new)) == ["-11 libcrypto.so.3 repair", "+11 libssl.so.3 fork"]


def test_an_unwanted_mapping_by_a_new_owner_of_the_pid_says_nothing_of_the_old_ones_ranges(tracker):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(tracker, old.map(SSL, BASE))
    assert "-10 libssl.so.3 munmap" not in feed(tracker, new.map(LIBC, BASE))


def test_a_fork_of_an_unknown_parent_has_nothing(tracker):
    assert feed(tracker, Proc(10).fork(Proc(11, 2))) == []


def test_a_fork_of_an_earlier_owner_of_the_pid_copies_nothing_of_the_new_one(tracker):
    old, new, child = Proc(10, 1), Proc(10, 2), Proc(11, 3)
    feed(tracker, new.map(SSL, BASE))
    assert feed(tracker, old.fork(child)) == []


def test_a_fork_in_doubt_of_an_unknown_parent_is_looked_at(tracker):
    feed(tracker, Proc(10).fork(Proc(11, 2), flags=FLAG_DIRTY))
    assert tracker.dirty == {11: Causes("fork", "munmap")}


def test_events_carry_what_the_intro_said(tracker):
    p = Proc(10, comm=b"worker", uid=33, ns_pid=7, ppid=1, cgroup="/docker/abc")
    tracker.apply(p.intro())
    tracker.apply(p.map(SSL))
    (change,) = tracker.take_changes()
    process = change.process
    assert (process.pid, process.start_ns, process.ns_pid, process.ppid) == (10, p.start_ns, 7, 1)
    assert (process.comm, process.exe, process.uid) == ("worker", "/usr/sbin/nginx", 33)
    assert (process.cgroup, process.container) == ("/docker/abc", "docker/abc")


def test_what_was_never_said_is_none_not_invented(tracker):
    tracker.apply(Proc(10, comm=b"worker").map(SSL))
    (change,) = tracker.take_changes()
    process = change.process
    assert (process.comm, process.exe, process.uid, process.ppid, process.ns_pid) == ("worker", None, None, None, None)


def test_a_process_that_renames_itself_is_told_under_its_new_name(tracker):
    p = Proc(10, comm=b"before")
    feed(tracker, p.map(SSL, BASE))
    p.comm = b"after"
    tracker.apply(p.map(CRYPTO, BASE + PAGE))
    assert tracker.take_changes()[0].process.comm == "after"


def test_a_comm_that_is_not_utf8_is_kept(tracker):
    tracker.apply(Proc(comm=b"\xff\xfe\n").map(SSL))
    assert tracker.take_changes()[0].process.comm == "\udcff\udcfe\n"


def test_a_forks_child_has_its_parents_executable_if_the_record_brings_none(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.intro(), p.map(SSL, BASE))
    tracker.apply(p.fork(child))
    assert tracker.take_changes()[0].process.exe == "/usr/sbin/nginx"


def test_a_child_whose_parent_was_settled_keeps_what_its_fork_said(tracker):
    # The parent's fork stood in the ring when it was settled, so the kernel will not introduce the child again.
    p, child = Proc(10), Proc(11, 2, uid=1000, cgroup="/docker/abc")
    tracker.apply(p.fork(child, with_exe=True))
    tracker.apply(child.map(SSL))
    (change,) = tracker.take_changes()
    process = change.process
    assert (process.uid, process.exe, process.container) == (1000, "/usr/sbin/nginx", "docker/abc")


# ---- kinds --------------------------------------------------------------------------------------


def kind_of(tracker, record):
    tracker.apply(record)
    return tracker.take_changes()[-1].kind


def test_the_main_binary_is_the_executable(tracker):
    p = Proc()
    tracker.apply(p.intro())
    assert kind_of(tracker, p.map(p.exe, flags=FLAG_IMAGE)) == "executable"
    assert kind_of(tracker, p.map(SSL, BASE)) == "library"


def test_what_exec_mapped_beside_the_main_binary_is_the_interpreter(tracker):
    p = Proc()
    tracker.apply(p.intro())
    assert kind_of(tracker, p.map(SSL, BASE, flags=FLAG_IMAGE)) == "interpreter"


def test_images_are_loaded_by_exec(tracker):
    p = Proc()
    tracker.apply(p.intro())
    assert feed(tracker, p.map(p.exe, flags=FLAG_IMAGE)) == ["+10 nginx exec"]


def test_a_mapped_device_is_other(tracker):
    assert kind_of(tracker, Proc().map(SSL.but(mode=0o020666))) == "other"


@pytest.mark.parametrize("path", ["/SYSV00000000", "/dev/zero"])
def test_shared_memory_without_a_file_is_other(path):
    everything = Tracker(RuleSet())
    assert kind_of(everything, Proc().map(File(path, 5, is_deleted=True))) == "other"


def test_a_memfd_is_a_library_until_its_content_says_otherwise(tracker):
    p = Proc()
    tracker.apply(p.map(File("/memfd:jit", 5, is_deleted=True)))
    (change,) = tracker.take_changes()
    assert (change.kind, change.name.is_anonymous, change.name.is_deleted) == ("library", True, True)


def test_a_memfd_with_a_slash_in_its_name_is_a_memfd(tracker):
    # memfd_create takes any name; it is one component.
    p = Proc()
    tracker.apply(p.map(File("/memfd:a/b", 5, is_deleted=True, text=b"memfd:a/b\0")))
    (change,) = tracker.take_changes()
    assert change.name.path == "/memfd:a/b"
    assert change.name.is_anonymous


def test_a_file_below_a_directory_called_like_a_memfd_is_a_file(tracker):
    p = Proc()
    tracker.apply(p.map(File("/memfd:a/b", 5, is_deleted=True)))
    assert not tracker.take_changes()[0].name.is_anonymous


def test_a_file_called_like_a_memfd_that_is_still_there_is_a_file(tracker):
    tracker.apply(Proc().map(File("/memfd:a", 5)))
    assert not tracker.take_changes()[0].name.is_anonymous


# ---- names and answers --------------------------------------------------------------------------


def test_a_question_about_a_wanted_file_is_answered_with_yes(tracker):
    tracker.apply(Proc().map(SSL, flags=FLAG_ASK))
    assert tracker.take_answers() == ([SSL.key], [])
    assert tracker.take_answers() == ([], [])


def test_a_question_about_an_unwanted_file_is_answered_with_no(tracker):
    assert feed(tracker, Proc().map(LIBC, flags=FLAG_ASK)) == []
    assert tracker.take_answers() == ([], [LIBC.key])


def test_a_known_answer_is_not_given_again(tracker):
    tracker.apply(Proc().map(SSL))
    assert tracker.take_answers() == ([], [])


def test_a_question_is_answered_each_time_it_is_asked(tracker):
    # The kernel's memory of answers is an LRU: it may have forgotten.
    feed(tracker, Proc().map(SSL, flags=FLAG_ASK), Proc(11, 2).map(SSL, flags=FLAG_ASK))
    assert tracker.take_answers() == ([SSL.key, SSL.key], [])


def test_a_renamed_directory_that_makes_a_file_unwanted_takes_the_answer_back(tracker):
    feed(tracker, Proc().map(SSL, flags=FLAG_ASK))
    tracker.take_answers()
    moved = SSL.but(path="/old/libz.so")  # the same key: an ancestor's rename changes no dentry below
    assert feed(tracker, Proc(11, 2).map(moved)) == []
    assert tracker.take_answers() == ([], [SSL.key])


def test_a_renamed_directory_that_makes_a_file_wanted_is_seen_when_it_is_asked_again(tracker):
    odd = File("/a/libz.so", 5)
    feed(tracker, Proc().map(odd, flags=FLAG_ASK))
    tracker.take_answers()
    assert feed(tracker, Proc().map(odd.but(path="/libssl/libz.so"), flags=FLAG_ASK)) == ["+10 libz.so mmap"]
    assert tracker.take_answers() == ([odd.key], [])


def test_a_load_after_a_rename_carries_the_path_of_now(tracker):
    feed(tracker, Proc().map(SSL))
    tracker.apply(Proc(11, 2).map(SSL.but(path="/new/libssl.so.3")))
    (change,) = tracker.take_changes()
    assert change.name.path == "/new/libssl.so.3"


def test_an_unload_after_a_rename_is_of_the_file_that_was_loaded(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    feed(tracker, Proc(11, 2).map(SSL.but(path="/new/libssl.so.3")))
    tracker.apply(p.range(BASE, BASE + PAGE))
    (change,) = tracker.take_changes()
    assert (change.name.path, change.name.file_id) == (SSL.path, SSL.id)


def test_a_file_deleted_between_two_loads_is_told_as_deleted(tracker):
    feed(tracker, Proc().map(SSL))
    tracker.apply(Proc(11, 2).map(SSL.but(is_deleted=True)))
    assert tracker.take_changes()[0].name.is_deleted


def test_a_file_that_came_back_is_told_as_there(tracker):
    feed(tracker, Proc().map(SSL.but(is_deleted=True)))
    tracker.apply(Proc(11, 2).map(SSL))
    assert not tracker.take_changes()[0].name.is_deleted


def test_a_path_that_is_cut_off_says_so(tracker):
    tracker.apply(Proc().map(SSL.but(is_partial=True)))
    assert tracker.take_changes()[0].name.is_partial


def test_two_views_of_one_file_are_two_names(tracker):
    feed(tracker, Proc().map(SSL))
    inside = SSL.but(path="/libssl.so.3", root=(1, 2))
    tracker.apply(Proc(11, 2).map(inside))
    (change,) = tracker.take_changes()
    assert (change.name.path, change.name.view) == ("/libssl.so.3", inside.key[40:56])


def test_new_rules_ask_every_name_again(tracker):
    feed(tracker, Proc().map(SSL))
    tracker.set_rules(RuleSet([Rule("libz")]))
    assert feed(tracker, Proc(11, 2).map(SSL)) == []
    assert tracker.take_answers() == ([], [SSL.key])


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


# ---- ranges: compared with a set of pages -------------------------------------------------------

pages = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda at: (at[0], at[0] + at[1]))


@settings(max_examples=200, derandomize=True)
@given(st.lists(pages, max_size=6), pages)
def test_subtract_leaves_exactly_the_pages_outside(ranges, hole):
    left = subtract(ranges, *hole)
    assert all(start < end for start, end in left)
    for page in range(45):
        covered = sum(start <= page < end for start, end in ranges)
        expected = 0 if hole[0] <= page < hole[1] else covered
        assert sum(start <= page < end for start, end in left) == expected


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([SSL, CRYPTO, LIBC, None]), pages), max_size=25))
def test_any_run_of_facts_leaves_what_a_set_of_pages_would(calls):
    tracker = Tracker(RuleSet([Rule("libssl|libcrypto")]))
    p = Proc()
    model = {}
    for file, (first, end) in calls:
        had = {one.id for one in model.values() if one is not LIBC}
        for page in range(first, end):
            model.pop(page, None)
            if file is not None:
                model[page] = file
        if file is None:
            tracker.apply(p.range(first * PAGE, end * PAGE))
        else:
            tracker.apply(p.map(file, first * PAGE, end * PAGE))
        has = {one.id for one in model.values() if one is not LIBC}
        changes = tracker.take_changes()
        assert {one.name.file_id for one in changes if one.is_load} == has - had
        assert {one.name.file_id for one in changes if not one.is_load} == had - has
        assert len(changes) == len(has ^ had)
    found = {}
    for _, mapping in tracker.mappings():
        for start, stop in mapping.ranges:
            for page in range(start // PAGE, stop // PAGE):
                assert page not in found, "a page belongs to one file, once"
                found[page] = mapping.name.file_id
    assert found == {page: one.id for page, one in model.items() if one is not LIBC}


# ---- idle processes -----------------------------------------------------------------------------


def test_a_process_of_which_nothing_is_wanted_can_be_settled(tracker):
    p = Proc(10, touches=3)
    feed(tracker, p.intro(), p.map(LIBC, flags=FLAG_ASK), p.map(LIBC, BASE, flags=FLAG_ASK))
    assert tracker.take_idle() == [(10, p.start_ns, 3)]
    assert tracker.take_idle() == []
    tracker.settled(10, p.start_ns)
    assert len(tracker) == 0


def test_a_process_that_has_something_wanted_by_then_is_not_settled(tracker):
    p = Proc()
    feed(tracker, p.map(LIBC, flags=FLAG_ASK), p.map(SSL, BASE))
    assert tracker.take_idle() == []


def test_a_process_the_kernel_does_not_follow_is_not_settled(tracker):
    feed(tracker, Proc(touches=0).map(LIBC, flags=FLAG_ASK))
    assert tracker.take_idle() == []


def test_a_reading_without_anything_wanted_settles_its_process(tracker):
    p = Proc(10, touches=2)
    tracker.merge([reading(p, 1, 2, p.map(LIBC, t=2), intro=True)], [], SNAPSHOT, is_start=True)
    assert tracker.take_idle() == [(10, p.start_ns, 2)]


def test_a_process_that_is_to_be_read_is_not_settled(tracker):
    feed(tracker, Proc().claim(LIBC, flags=FLAG_ASK))
    assert tracker.take_idle() == []


def test_a_process_that_is_to_be_read_by_then_is_not_settled(tracker):
    p = Proc()
    feed(tracker, p.map(LIBC, flags=FLAG_ASK), p.dirty())
    assert tracker.take_idle() == []
    assert tracker.dirty == {10: LIVE}


def test_a_child_in_doubt_is_not_settled_before_it_was_read(tracker):
    # Settling forgets that it is dirty, and with that what its parent's other thread had mapped.
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.intro(), p.fork(child, flags=FLAG_DIRTY))
    assert tracker.take_idle() == []
    assert 11 in tracker.dirty


def test_a_child_of_an_unknown_parent_is_settled_too(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.fork(child))
    assert tracker.take_idle() == [(11, child.start_ns, 1)]


# ---- readings: before, inside, after a visit ----------------------------------------------------


def test_a_snapshot_tells_what_is_mapped(tracker):
    p = Proc()
    rows = (p.map(SSL, BASE, t=11), p.map(SSL, BASE + PAGE, t=12), p.map(LIBC, t=13))
    assert tracker.merge([reading(p, 10, 13, *rows, intro=True)], [], SNAPSHOT, is_start=True) == set()
    (change,) = tracker.take_changes()
    assert (change.cause, change.t_ns, change.process.exe) == ("snapshot", 11, "/usr/sbin/nginx")
    assert change.ranges == ((BASE, BASE + PAGE), (BASE + PAGE, BASE + 2 * PAGE))


def test_a_record_before_the_visit_is_overruled_by_it(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    again = tracker.merge([reading(p, 10, 20, p.map(SSL, BASE, t=20))], [p.map(CRYPTO, BASE + PAGE, t=9)], REPAIR)
    assert again == set()
    assert told(tracker) == ["+10 libcrypto.so.3 mmap", "-10 libcrypto.so.3 repair"]


def test_a_record_before_the_visit_that_the_visit_saw_is_told_once(tracker):
    p = Proc()
    row = p.map(SSL, BASE, t=20)
    assert tracker.merge([reading(p, 10, 20, row)], [p.map(SSL, BASE, t=9)], REPAIR) == set()
    assert told(tracker) == ["+10 libssl.so.3 mmap"]


def test_at_the_start_a_record_before_the_visit_tells_nothing(tracker):
    p = Proc()
    row = p.map(SSL, BASE, t=20)
    early = [p.map(SSL, BASE, t=8), p.map(CRYPTO, BASE + PAGE, t=9)]
    tracker.merge([reading(p, 10, 20, row)], early, SNAPSHOT, is_start=True)
    assert told(tracker) == ["+10 libssl.so.3 snapshot"]


def test_at_the_start_a_record_before_the_visit_still_introduces(tracker):
    p = Proc()
    tracker.merge([reading(p, 10, 20, p.map(SSL, BASE, t=20))], [p.intro(t=8)], SNAPSHOT, is_start=True)
    assert tracker.take_changes()[0].process.uid == 33


def test_at_the_start_a_question_before_the_visit_is_answered(tracker):
    p = Proc()
    early = p.map(LIBC, t=9, flags=FLAG_ASK)
    tracker.merge([reading(p, 10, 20, p.map(SSL, BASE, t=20))], [early], SNAPSHOT, is_start=True)
    assert tracker.take_answers() == ([], [LIBC.key])


@pytest.mark.parametrize("is_start", [True, False])
def test_a_record_after_the_visit_comes_on_top(tracker, is_start):
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    later = [p.range(BASE, BASE + PAGE, t=21), p.map(CRYPTO, BASE, t=22)]
    assert tracker.merge(rows, later, SNAPSHOT, is_start=is_start) == set()
    assert told(tracker) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


def test_a_record_inside_the_visit_makes_another_one(tracker):
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=11))]
    assert tracker.merge(rows, [p.range(BASE, BASE + PAGE, t=15)], LIVE) == {10}


@pytest.mark.parametrize("t", [10, 20])
def test_the_ends_of_the_visit_are_inside(tracker, t):
    p = Proc()
    assert tracker.merge([reading(p, 10, 20, p.map(SSL, t=20))], [p.range(0, PAGE, t=t)], LIVE) == {10}


def test_at_the_start_no_live_change_of_a_file_comes_before_its_snapshot(tracker):
    # The engine tells what the snapshot found first, so such an order would be turned round.
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=12))]
    inside = [p.map(SSL, BASE, t=11), p.range(BASE, BASE + PAGE, t=13)]
    assert tracker.merge(rows, inside, SNAPSHOT, is_start=True) == {10}
    causes = [line.split()[-1] for line in told(tracker)]
    assert causes == sorted(causes, key=lambda cause: cause != "snapshot")


@pytest.mark.parametrize("is_start", [True, False])
def test_an_exit_inside_the_visit_is_the_end(tracker, is_start):
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert tracker.merge(rows, [p.exit(t=15)], LIVE, is_start=is_start) == set()
    assert the_map(tracker) == {}
    assert len(tracker) == 0


@pytest.mark.parametrize("is_start", [True, False])
def test_an_exit_after_the_visit_is_the_end(tracker, is_start):
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert tracker.merge(rows, [p.exit(t=21)], SNAPSHOT, is_start=is_start) == set()
    assert told(tracker) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 exit"]


def test_an_exec_inside_the_visit_does_not_bring_the_old_program_back(tracker):
    p = Proc()
    feed(tracker, p.intro(), p.map(SSL, BASE))
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    tracker.merge(rows, [p.exec(t=15), p.map(CRYPTO, BASE, t=16)], LIVE)
    assert told(tracker) == ["-10 libssl.so.3 exec", "+10 libcrypto.so.3 mmap"]


def test_an_exec_after_the_visit_drops_what_it_found(tracker):
    p = Proc()
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert tracker.merge(rows, [p.exec(t=21)], SNAPSHOT, is_start=True) == set()
    assert told(tracker) == ["+10 libssl.so.3 snapshot", "-10 libssl.so.3 exec"]


def test_a_record_that_was_overtaken_on_its_way_to_the_ring_makes_another_visit(tracker):
    # Walking a long path takes its time: what another thread says a little later comes first.
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 20, p.map(CRYPTO, BASE, t=20))]
    late, first = p.map(SSL, BASE, t=9), p.fork(child, t=21, flags=FLAG_DIRTY)
    again = tracker.merge(rows, [first, late], LIVE)
    assert 10 in again | set(tracker.dirty)


def test_a_fork_before_the_visit_of_its_parent_is_looked_at_if_it_was_not_met(tracker):
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert tracker.merge(rows, [p.fork(child, t=9)], SNAPSHOT, is_start=True) == {11}


def test_a_fork_before_the_visit_of_its_parent_that_was_met_is_what_was_seen(tracker):
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20)), reading(child, 30, 40, child.map(CRYPTO, BASE, t=40))]
    assert tracker.merge(rows, [p.fork(child, t=9)], SNAPSHOT, is_start=True) == set()
    assert told(tracker) == ["+10 libssl.so.3 snapshot", "+11 libcrypto.so.3 snapshot"]


@pytest.mark.parametrize("is_start", [True, False])
def test_a_fork_after_the_visit_of_its_parent_copies_what_was_seen(tracker, is_start):
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 20, p.map(SSL, BASE, t=20))]
    assert tracker.merge(rows, [p.fork(child, t=21)], SNAPSHOT, is_start=is_start) == set()
    assert told(tracker) == ["+10 libssl.so.3 snapshot", "+11 libssl.so.3 fork"]


@pytest.mark.parametrize("is_start", [True, False])
def test_a_child_visited_before_its_fork_was_told_is_loaded_once(tracker, is_start):
    # copy_process makes the child visible, kernel_clone tells of it a moment later.
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 11, p.map(SSL, BASE, t=11)), reading(child, 12, 13, child.map(SSL, BASE, t=13))]
    tracker.merge(rows, [p.fork(child, t=14)], SNAPSHOT, is_start=is_start)
    assert sorted(told(tracker)) == ["+10 libssl.so.3 snapshot", "+11 libssl.so.3 snapshot"]
    assert feed(tracker, child.exit()) == ["-11 libssl.so.3 exit"]


def test_a_vfork_child_visited_before_its_fork_was_told_takes_its_loads_back(tracker):
    p, child = Proc(10), Proc(11, 2)
    rows = [reading(p, 10, 11, p.map(SSL, BASE, t=11)), reading(child, 12, 13, child.map(SSL, BASE, t=13))]
    tracker.merge(rows, [p.fork(child, t=14, flags=FLAG_SHARED_VM)], SNAPSHOT, is_start=True)
    lines = told(tracker) + feed(tracker, child.exec(t=15))
    assert lines.count("+11 libssl.so.3 snapshot") == sum(line.startswith("-11") for line in lines)
    assert feed(tracker, p.exit(t=16)) == ["-10 libssl.so.3 exit"]


def test_a_process_visited_and_found_empty_has_lost_everything(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    tracker.merge([reading(p, 10, 10)], [], REPAIR)
    assert told(tracker) == ["-10 libssl.so.3 repair"]


def test_a_stranger_visited_and_found_empty_is_nobody(tracker):
    p = Proc(touches=0)
    tracker.merge([reading(p, 10, 10)], [], SNAPSHOT, is_start=True)
    assert len(tracker) == 0


def test_a_process_that_was_not_visited_keeps_what_it_has(tracker):
    p, other = Proc(10), Proc(11, 2)
    feed(tracker, p.map(SSL, BASE), other.map(SSL, BASE))
    tracker.merge([reading(p, 10, 10)], [], REPAIR)
    assert list(the_map(tracker)) == [(11, 100)]


def test_a_visit_of_a_new_owner_of_the_pid_ends_the_old_one(tracker):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(tracker, old.map(SSL, BASE))
    tracker.merge([reading(new, 10, 20, new.map(SSL, BASE, t=20))], [], REPAIR)
    gone, come = tracker.take_changes()
    assert (gone.is_load, gone.process.start_ns) == (False, old.start_ns)
    assert (come.is_load, come.process.start_ns) == (True, new.start_ns)


def test_a_record_of_an_old_owner_does_not_disturb_the_visit_of_the_new_one(tracker):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(tracker, old.map(SSL, BASE))
    again = tracker.merge([reading(new, 10, 20, new.map(CRYPTO, BASE, t=20))], [old.exit(t=15)], REPAIR)
    assert again == set()
    assert told(tracker) == ["-10 libssl.so.3 exit", "+10 libcrypto.so.3 repair"]


def test_what_is_owed_goes_by_its_own_causes(tracker):
    p, child = Proc(10), Proc(11, 2)
    feed(tracker, p.map(SSL, BASE), child.map(SSL, BASE))
    rows = [
        reading(p, 10, 20, p.map(CRYPTO, BASE, t=20)),
        reading(child, 21, 22, child.map(CRYPTO, BASE, t=22)),
    ]
    tracker.merge(rows, [], LIVE, own_causes={11: Causes("fork", "munmap")})
    assert told(tracker) == [
        "-10 libssl.so.3 munmap",
        "+10 libcrypto.so.3 mmap",
        "-11 libssl.so.3 munmap",
        "+11 libcrypto.so.3 fork",
    ]


def test_a_reading_replaces_the_ranges_that_were_known(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE, BASE + 4 * PAGE))
    tracker.merge([reading(p, 10, 20, p.map(SSL, BASE + 2 * PAGE, BASE + 3 * PAGE, t=20))], [], LIVE)
    assert told(tracker) == []
    assert feed(tracker, p.range(BASE + 2 * PAGE, BASE + 3 * PAGE)) == ["-10 libssl.so.3 munmap"]


def test_a_reading_learns_from_its_intro(tracker):
    p = Proc()
    feed(tracker, p.map(SSL, BASE))
    tracker.merge([reading(p, 10, 20, p.map(SSL, BASE, t=20), p.map(CRYPTO, BASE + PAGE, t=20), intro=True)], [], LIVE)
    assert tracker.take_changes()[0].process.uid == 33


def test_a_claim_inside_the_visit_stays_dirty(tracker):
    p = Proc()
    feed(tracker, p.claim(SSL, BASE, t=1))
    tracker.dirty.clear()  # as its owner does before it reads
    tracker.merge([reading(p, 10, 20, p.map(SSL, BASE, t=20))], [p.claim(CRYPTO, BASE + PAGE, t=15)], LIVE)
    assert 10 in tracker.dirty
    assert "+10 libcrypto.so.3 mmap" in told(tracker)


def test_an_owed_reading_of_an_exited_process_changes_nothing(tracker):
    p = Proc()
    feed(tracker, p.claim(SSL, BASE))
    tracker.dirty.clear()
    assert tracker.merge([], [p.exit(t=9)], LIVE) == set()
    assert told(tracker) == ["-10 libssl.so.3 exit"]


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
