"""Authoritative records, and which changes the table makes of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sowatch.bpf.records import FLAG_NEEDS_RESCAN
from sowatch.engine.effects import Causes
from sowatch.model.rules import Rule, RuleSet
from support.records import PAGE, Proc
from support.tracking import BASE, CRYPTO, LIBC, SSL, KeptEffects, feed, the_map

# ---- facts: mappings come and go ----------------------------------------------------------------


def test_a_mapping_is_a_load(table):
    p = Proc()
    table.apply(p.intro(t=1))
    table.apply(p.map(SSL, BASE, BASE + 3 * PAGE, t=42))
    (change,) = table.take_changes()
    assert (change.is_load, change.cause, change.t_ns) == (True, "mmap", 42)
    assert (change.name.file_id, change.name.path) == (SSL.id, SSL.path)
    assert (change.kind, change.ranges) == ("library", ((BASE, BASE + 3 * PAGE),))


def test_second_mapping_of_a_file_does_not_repeat_its_load(table):
    p = Proc()
    assert feed(table, p.map(SSL, BASE), p.map(SSL, BASE + 8 * PAGE)) == ["+10 libssl.so.3 mmap"]
    assert the_map(table) == {(10, 100): [(BASE, BASE + PAGE), (BASE + 8 * PAGE, BASE + 9 * PAGE)]}


def test_a_file_is_gone_with_its_last_range(table):
    p = Proc()
    feed(table, p.map(SSL, BASE), p.map(SSL, BASE + 8 * PAGE))
    assert feed(table, p.range(BASE, BASE + PAGE)) == []
    assert feed(table, p.range(BASE + 8 * PAGE, BASE + 9 * PAGE)) == ["-10 libssl.so.3 munmap"]
    assert the_map(table) == {}


def test_partial_munmap_leaves_the_rest(table):
    p = Proc()
    feed(table, p.map(SSL, BASE, BASE + 10 * PAGE))
    assert feed(table, p.range(BASE + 3 * PAGE, BASE + 5 * PAGE)) == []
    assert the_map(table) == {(10, 100): [(BASE, BASE + 3 * PAGE), (BASE + 5 * PAGE, BASE + 10 * PAGE)]}


def test_one_munmap_takes_several_files(table):
    p = Proc()
    feed(table, p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(table, p.range(0, 1 << 47)) == ["-10 libssl.so.3 munmap", "-10 libcrypto.so.3 munmap"]


def test_munmap_beside_a_mapping_changes_nothing(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.range(BASE - PAGE, BASE), p.range(BASE + PAGE, BASE + 2 * PAGE)) == []
    assert the_map(table) == {(10, 100): [(BASE, BASE + PAGE)]}


def test_mapping_over_another_file_unloads_that_one(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.map(CRYPTO, BASE)) == ["-10 libssl.so.3 munmap", "+10 libcrypto.so.3 mmap"]


def test_mapping_over_a_part_of_another_file_keeps_the_rest_of_it(table):
    p = Proc()
    feed(table, p.map(SSL, BASE, BASE + 4 * PAGE))
    assert feed(table, p.map(CRYPTO, BASE + PAGE)) == ["+10 libcrypto.so.3 mmap"]
    assert the_map(table) == {
        (10, 100): [(BASE, BASE + PAGE), (BASE + 2 * PAGE, BASE + 4 * PAGE)],
        (10, 101): [(BASE + PAGE, BASE + 2 * PAGE)],
    }


def test_mapping_a_file_over_itself_is_no_news(table):
    p = Proc()
    feed(table, p.map(SSL, BASE, BASE + 4 * PAGE))
    assert feed(table, p.map(SSL, BASE + PAGE)) == []
    assert feed(table, p.range(BASE, BASE + 4 * PAGE)) == ["-10 libssl.so.3 munmap"]


def test_an_unwanted_file_mapped_over_a_wanted_one_unloads_that_one(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.map(LIBC, BASE)) == ["-10 libssl.so.3 munmap"]


def test_the_last_page_of_the_address_space_is_a_page_like_others(table):
    p = Proc()
    top = 1 << 64
    feed(table, p.map(SSL, top - 2 * PAGE, top - PAGE))
    assert feed(table, p.range(top - 2 * PAGE, top - PAGE)) == ["-10 libssl.so.3 munmap"]


def test_two_files_under_one_path_are_two(table):
    p = Proc()
    replaced = SSL.but(inode=200)
    assert feed(table, p.map(SSL, BASE), p.map(replaced, BASE + PAGE)) == [
        "+10 libssl.so.3 mmap",
        "+10 libssl.so.3 mmap",
    ]
    assert feed(table, p.range(BASE, BASE + PAGE)) == ["-10 libssl.so.3 munmap"]
    assert list(the_map(table)) == [(10, 200)]


def test_one_file_under_two_names_is_one(table):
    p = Proc()
    link = SSL.but(path="/opt/libssl-link.so", dentry=0x9999)
    assert feed(table, p.map(SSL, BASE), p.map(link, BASE + PAGE)) == ["+10 libssl.so.3 mmap"]


# ---- facts: processes ---------------------------------------------------------------------------


def test_a_fork_copies_what_its_parent_has(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.intro(), p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(table, p.fork(child, t=5)) == ["+11 libssl.so.3 fork", "+11 libcrypto.so.3 fork"]


def test_a_forked_childs_mappings_are_its_own(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.map(SSL, BASE, BASE + 2 * PAGE), p.fork(child))
    assert feed(table, child.range(BASE, BASE + PAGE), p.range(BASE, BASE + 2 * PAGE)) == ["-10 libssl.so.3 munmap"]
    assert the_map(table) == {(11, 100): [(BASE + PAGE, BASE + 2 * PAGE)]}


def test_exec_drops_everything_and_the_process_goes_on(table):
    p = Proc()
    feed(table, p.map(SSL, BASE), p.map(CRYPTO, BASE + PAGE))
    assert feed(table, p.exec(t=9)) == ["-10 libssl.so.3 exec", "-10 libcrypto.so.3 exec"]
    assert feed(table, p.map(SSL, BASE)) == ["+10 libssl.so.3 mmap"]


def test_exit_drops_everything(table):
    p = Proc()
    feed(table, p.map(SSL, BASE))
    assert feed(table, p.exit(t=9)) == ["-10 libssl.so.3 exit"]
    assert len(table) == 0


def test_a_second_exit_says_nothing_new(table):
    p = Proc()
    feed(table, p.map(SSL, BASE), p.exit())
    assert feed(table, p.exit()) == []


def test_an_exit_of_an_earlier_owner_of_the_pid_leaves_the_new_one(table):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(table, new.map(SSL, BASE))
    assert feed(table, old.exit(), old.exec(), old.range(BASE, BASE + PAGE)) == []
    assert list(the_map(table)) == [(10, 100)]


def test_a_new_owner_of_a_pid_ends_the_old_one_whose_exit_was_lost(table):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(table, old.map(SSL, BASE))
    table.apply(new.map(SSL, BASE, t=7))
    gone, come = table.take_changes()
    assert (gone.is_load, gone.cause, gone.process.start_ns) == (False, "repair", old.start_ns)
    assert (come.is_load, come.cause, come.process.start_ns) == (True, "mmap", new.start_ns)


def test_a_fork_into_the_pid_of_a_process_whose_exit_was_lost_ends_that_one(table):
    p, old, new = Proc(10), Proc(11, 2), Proc(11, 3)
    feed(table, p.map(SSL, BASE), old.map(CRYPTO, BASE))
    assert feed(table, p.fork(new)) == ["-11 libcrypto.so.3 repair", "+11 libssl.so.3 fork"]


def test_an_unwanted_mapping_by_a_new_owner_of_the_pid_says_nothing_of_the_old_ones_ranges(table):
    old, new = Proc(10, 1), Proc(10, 2)
    feed(table, old.map(SSL, BASE))
    assert "-10 libssl.so.3 munmap" not in feed(table, new.map(LIBC, BASE))


def test_a_fork_of_an_unknown_parent_has_nothing(table):
    assert feed(table, Proc(10).fork(Proc(11, 2))) == []


def test_a_fork_of_an_earlier_owner_of_the_pid_copies_nothing_of_the_new_one(table):
    old, new, child = Proc(10, 1), Proc(10, 2), Proc(11, 3)
    feed(table, new.map(SSL, BASE))
    assert feed(table, old.fork(child)) == []


def test_a_fork_in_doubt_of_an_unknown_parent_is_looked_at(table):
    feed(table, Proc(10).fork(Proc(11, 2), flags=FLAG_NEEDS_RESCAN))
    assert table.needs_rescan == {11: Causes("fork", "munmap")}


def test_events_carry_what_the_intro_said(table):
    p = Proc(10, comm=b"worker", uid=33, ns_pid=7, ppid=1, cgroup="/docker/abc")
    table.apply(p.intro())
    table.apply(p.map(SSL))
    (change,) = table.take_changes()
    process = change.process
    assert (process.pid, process.start_ns, process.ns_pid, process.ppid) == (10, p.start_ns, 7, 1)
    assert (process.comm, process.exe, process.uid) == ("worker", "/usr/sbin/nginx", 33)
    assert (process.cgroup, process.container) == ("/docker/abc", "docker/abc")


def test_what_was_never_said_is_none_not_invented(table):
    table.apply(Proc(10, comm=b"worker").map(SSL))
    (change,) = table.take_changes()
    process = change.process
    assert (process.comm, process.exe, process.uid, process.ppid, process.ns_pid) == ("worker", None, None, None, None)


def test_a_process_that_renames_itself_is_told_under_its_new_name(table):
    p = Proc(10, comm=b"before")
    feed(table, p.map(SSL, BASE))
    p.comm = b"after"
    table.apply(p.map(CRYPTO, BASE + PAGE))
    assert table.take_changes()[0].process.comm == "after"


def test_a_comm_that_is_not_utf8_is_kept(table):
    table.apply(Proc(comm=b"\xff\xfe\n").map(SSL))
    assert table.take_changes()[0].process.comm == "\udcff\udcfe\n"


def test_a_forks_child_has_its_parents_executable_if_the_record_brings_none(table):
    p, child = Proc(10), Proc(11, 2)
    feed(table, p.intro(), p.map(SSL, BASE))
    table.apply(p.fork(child))
    assert table.take_changes()[0].process.exe == "/usr/sbin/nginx"


def test_a_child_whose_parent_was_settled_keeps_what_its_fork_said(table):
    # The parent's fork stood in the ring when it was settled, so the kernel will not introduce the child again.
    p, child = Proc(10), Proc(11, 2, uid=1000, cgroup="/docker/abc")
    table.apply(p.fork(child, with_exe=True))
    table.apply(child.map(SSL))
    (change,) = table.take_changes()
    process = change.process
    assert (process.uid, process.exe, process.container) == (1000, "/usr/sbin/nginx", "docker/abc")


# ---- ranges: compared with a set of pages -------------------------------------------------------

pages = st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda at: (at[0], at[0] + at[1]))


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([SSL, CRYPTO, LIBC, None]), pages), max_size=25))
def test_any_run_of_facts_leaves_what_a_set_of_pages_would(calls):
    table = KeptEffects(RuleSet([Rule("libssl|libcrypto")]))
    p = Proc()
    model = {}
    for file, (first, end) in calls:
        had = {one.id for one in model.values() if one is not LIBC}
        for page in range(first, end):
            model.pop(page, None)
            if file is not None:
                model[page] = file
        if file is None:
            table.apply(p.range(first * PAGE, end * PAGE))
        else:
            table.apply(p.map(file, first * PAGE, end * PAGE))
        has = {one.id for one in model.values() if one is not LIBC}
        changes = table.take_changes()
        assert {one.name.file_id for one in changes if one.is_load} == has - had
        assert {one.name.file_id for one in changes if not one.is_load} == had - has
        assert len(changes) == len(has ^ had)
    found = {}
    for _, mapping in table.mappings():
        for start, stop in mapping.ranges:
            for page in range(start // PAGE, stop // PAGE):
                assert page not in found, "a page belongs to one file, once"
                found[page] = mapping.name.file_id
    assert found == {page: one.id for page, one in model.items() if one is not LIBC}
