"""What files are called and what kind they are, what the kernel is answered, and who need not be followed."""

from __future__ import annotations

import pytest

from sowatch.bpf.records import FLAG_ASK, FLAG_DIRTY, FLAG_IMAGE
from sowatch.engine.table import Tracker
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, File, Proc, reading
from support.tracking import BASE, LIBC, LIVE, SNAPSHOT, SSL, feed

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
