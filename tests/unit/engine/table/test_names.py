"""What files are called and what kind they are, what the kernel is answered, which processes need not be tracked."""

from __future__ import annotations

import pytest

from sowatch.bpf.records import FLAG_ASK, FLAG_IMAGE, FLAG_NEEDS_RESCAN
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, File, Proc, scan
from support.tracking import BASE, LIBC, LIVE, SNAPSHOT, SSL, KeptEffects, feed

# ---- kinds --------------------------------------------------------------------------------------


def kind_of(table, record):
    table.apply(record)
    return table.take_changes()[-1].kind


def test_the_main_binary_is_the_executable(table):
    p = Proc()
    table.apply(p.intro())
    assert kind_of(table, p.map(p.exe, flags=FLAG_IMAGE)) == "executable"
    assert kind_of(table, p.map(SSL, BASE)) == "library"


def test_what_exec_mapped_beside_the_main_binary_is_the_interpreter(table):
    p = Proc()
    table.apply(p.intro())
    assert kind_of(table, p.map(SSL, BASE, flags=FLAG_IMAGE)) == "interpreter"


def test_images_are_loaded_by_exec(table):
    p = Proc()
    table.apply(p.intro())
    assert feed(table, p.map(p.exe, flags=FLAG_IMAGE)) == ["+10 nginx exec"]


def test_a_mapped_device_is_other(table):
    assert kind_of(table, Proc().map(SSL.but(mode=0o020666))) == "other"


@pytest.mark.parametrize("path", ["/SYSV00000000", "/dev/zero"])
def test_shared_memory_without_a_file_is_other(path):
    everything = KeptEffects(RuleSet())
    assert kind_of(everything, Proc().map(File(path, 5, is_deleted=True))) == "other"


def test_a_memfd_is_a_library_until_its_content_says_otherwise(table):
    p = Proc()
    table.apply(p.map(File("/memfd:jit", 5, is_deleted=True)))
    (change,) = table.take_changes()
    assert (change.kind, change.name.is_anonymous, change.name.is_deleted) == ("library", True, True)


def test_a_memfd_with_a_slash_in_its_name_is_a_memfd(table):
    # memfd_create takes any name; it is one component.
    p = Proc()
    table.apply(p.map(File("/memfd:a/b", 5, is_deleted=True, text=b"memfd:a/b\0")))
    (change,) = table.take_changes()
    assert change.name.path == "/memfd:a/b"
    assert change.name.is_anonymous


def test_a_file_below_a_directory_called_like_a_memfd_is_a_file(table):
    p = Proc()
    table.apply(p.map(File("/memfd:a/b", 5, is_deleted=True)))
    assert not table.take_changes()[0].name.is_anonymous


def test_a_file_called_like_a_memfd_that_is_still_there_is_a_file(table):
    table.apply(Proc().map(File("/memfd:a", 5)))
    assert not table.take_changes()[0].name.is_anonymous


# ---- names and answers --------------------------------------------------------------------------


def test_a_question_about_a_wanted_file_is_answered_with_yes(table):
    table.apply(Proc().map(SSL, flags=FLAG_ASK))
    assert table.take_answers() == ([SSL.key], [])
    assert table.take_answers() == ([], [])


def test_a_question_about_an_unwanted_file_is_answered_with_no(table):
    assert feed(table, Proc().map(LIBC, flags=FLAG_ASK)) == []
    assert table.take_answers() == ([], [LIBC.key])


def test_a_known_answer_is_not_given_again(table):
    table.apply(Proc().map(SSL))
    assert table.take_answers() == ([], [])


def test_a_question_is_answered_each_time_it_is_asked(table):
    # The kernel's memory of answers is an LRU: it may have forgotten.
    for process in (Proc(), Proc(11, 2)):
        feed(table, process.map(SSL, flags=FLAG_ASK))
        assert table.take_answers() == ([SSL.key], [])


def test_a_renamed_directory_that_makes_a_file_unwanted_takes_the_answer_back(table):
    feed(table, Proc().map(SSL, flags=FLAG_ASK))
    table.take_answers()
    moved = SSL.but(path="/old/libz.so")  # the same key: an ancestor's rename changes no dentry below
    assert feed(table, Proc(11, 2).map(moved)) == []
    assert table.take_answers() == ([], [SSL.key])


def test_a_renamed_directory_that_makes_a_file_wanted_is_seen_when_it_is_asked_again(table):
    odd = File("/a/libz.so", 5)
    feed(table, Proc().map(odd, flags=FLAG_ASK))
    table.take_answers()
    assert feed(table, Proc().map(odd.but(path="/libssl/libz.so"), flags=FLAG_ASK)) == ["+10 libz.so mmap"]
    assert table.take_answers() == ([odd.key], [])


def test_a_load_after_a_rename_carries_the_path_of_now(table):
    feed(table, Proc().map(SSL))
    table.apply(Proc(11, 2).map(SSL.but(path="/new/libssl.so.3")))
    (change,) = table.take_changes()
    assert change.name.path == "/new/libssl.so.3"


def test_an_unload_after_a_rename_is_of_the_file_that_was_loaded(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    feed(table, Proc(11, 2).map(SSL.but(path="/new/libssl.so.3")))
    table.apply(p.range(BASE, BASE + PAGE))
    (change,) = table.take_changes()
    assert (change.name.path, change.name.file_id) == (SSL.path, SSL.id)


def test_a_file_deleted_between_two_loads_is_told_as_deleted(table):
    feed(table, Proc().map(SSL))
    table.apply(Proc(11, 2).map(SSL.but(is_deleted=True)))
    assert table.take_changes()[0].name.is_deleted


def test_a_file_that_came_back_is_told_as_there(table):
    feed(table, Proc().map(SSL.but(is_deleted=True)))
    table.apply(Proc(11, 2).map(SSL))
    assert not table.take_changes()[0].name.is_deleted


def test_a_path_that_is_cut_off_says_so(table):
    table.apply(Proc().map(SSL.but(is_partial=True)))
    assert table.take_changes()[0].name.is_partial


def test_two_views_of_one_file_are_two_names(table):
    feed(table, Proc().map(SSL))
    inside = SSL.but(path="/libssl.so.3", root=(1, 2))
    table.apply(Proc(11, 2).map(inside))
    (change,) = table.take_changes()
    assert (change.name.path, change.name.view) == ("/libssl.so.3", inside.key[40:56])


def test_new_rules_ask_every_name_again(table):
    feed(table, Proc().map(SSL))
    table.set_rules(RuleSet([Rule("libz")]))
    assert feed(table, Proc(11, 2).map(SSL)) == []
    assert table.take_answers() == ([], [SSL.key])


# ---- idle processes -----------------------------------------------------------------------------


def test_a_process_of_which_nothing_is_wanted_can_be_settled(table):
    p = Proc(10, activity=3)
    feed(table, p.intro(), p.map(LIBC, flags=FLAG_ASK), p.map(LIBC, BASE, flags=FLAG_ASK))
    assert table.take_idle() == [(10, p.start_ns, 3)]
    assert table.take_idle() == []
    table.untracked(10, p.start_ns)
    assert len(table) == 0


def test_a_process_that_has_something_wanted_by_then_is_not_settled(table):
    p = Proc()
    feed(table, p.map(LIBC, flags=FLAG_ASK), p.map(SSL, BASE))
    assert table.take_idle() == []


def test_a_process_the_kernel_does_not_follow_is_not_settled(table):
    feed(table, Proc(activity=0).map(LIBC, flags=FLAG_ASK))
    assert table.take_idle() == []


def test_a_reading_without_anything_wanted_settles_its_process(table):
    p = Proc(10, activity=2)
    table.merge([scan(p, 1, 2, p.map(LIBC, t=2), intro=True)], [], SNAPSHOT, is_start=True)
    assert table.take_idle() == [(10, p.start_ns, 2)]


def test_a_process_that_is_to_be_read_is_not_settled(table):
    feed(table, Proc().tentative(LIBC, flags=FLAG_ASK))
    assert table.take_idle() == []


def test_a_process_that_is_to_be_read_by_then_is_not_settled(table):
    p = Proc()
    feed(table, p.map(LIBC, flags=FLAG_ASK), p.needs_rescan())
    assert table.take_idle() == []
    assert table.needs_rescan == {10: LIVE}


def test_a_child_in_doubt_is_not_settled_before_it_was_read(table):
    # Settling forgets that it is dirty, and with that what its parent's other thread had mapped.
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.intro(), p.fork(child, flags=FLAG_NEEDS_RESCAN))
    assert table.take_idle() == []
    assert 11 in table.needs_rescan


def test_a_child_of_an_unknown_parent_is_settled_too(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.fork(child))
    assert table.take_idle() == [(11, child.start_ns, 1)]
