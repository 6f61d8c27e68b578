"""The decision trail of real mappings, against what is known of them otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sowatch import ActiveFile, Rule, Watcher
from sowatch.engine.file_inspector import open_mapped
from sowatch.linux.proc import ProcFs
from sowatch.model.config import Config
from sowatch.model.literals import KINDS
from support.asked import OTHER, PAGE, WANTED, NewLibrary, Start, Watch, mapping, pages, path_of, process, reported
from support.kernel import TAG, id_by_stat

# ---- libraries of a process -----------------------------------------------------------------------


def test_a_library_that_is_wanted_has_a_trail_without_gaps(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    at, length = mapper.map(new)
    found = reported(watcher, mapper.pid, new, wait_until)
    assert found.seen
    assert (found.seen.rule, found.seen.cause) == ("wanted", "mmap")
    assert (found.rule, found.untold, found.id_from) == ("wanted", None, "map")
    assert found.library.id[:3] == id_by_stat(new)[:3]
    assert (found.library.kind, found.library.deleted) == ("library", False)
    assert found.ranges == ((at, at + pages(length)),)
    assert found.verdict.verdict == "match"
    assert (found.look.opened_by, found.look.elf) == ("map_files", "elf")
    assert found.library.build_id
    assert found.library.soname == "libtemplate.so"
    assert (found.blocked, found.differences) == ((), ())


def test_a_library_that_no_rule_wants_is_ignored_for_a_while(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(OTHER)
    mapper.map(new)
    found = mapping(process(watcher, mapper.pid), new)
    assert (found.seen, found.untold, found.rule) == (None, "no_rule", None)
    assert [(one.rule, one.why) for one in found.rules] == [("wanted", "pattern")]
    assert found.verdict.verdict == "ignore"
    assert found.verdict.seconds_left is not None
    assert 0 < found.verdict.seconds_left <= 60
    assert found.id_from == "verdict"
    assert found.library.id[:3] == id_by_stat(new)[:3]


def test_the_rules_look_at_libraries_unless_they_say_otherwise(
    watch: Watch, start: Start, programs: Any, scratch: Path, wait_until: Any
) -> None:
    program = scratch / f"mapper-wanted{TAG}"
    program.write_bytes(programs["mapper"].read_bytes())
    program.chmod(0o755)
    mapper = start(program)
    rules = [Rule(TAG, name="libraries"), Rule(TAG, name="programs", kind="executable")]
    found = reported(watch(*rules), mapper.pid, program, wait_until)
    assert found.library.kind == "executable"
    assert [(one.rule, one.wants, one.why) for one in found.rules] == [
        ("libraries", False, "kind"),
        ("programs", True, None),
    ]


def test_every_mapping_of_a_process_is_explained_once(watch: Watch, start: Start, wait_until: Any) -> None:
    mapper = start()
    watcher = watch(Rule(None, name="everything", kind=KINDS))
    report = wait_until(
        lambda: next((r for r in [process(watcher, mapper.pid)] if all(m.seen for m in r.mappings)), None),
        what="every load",
    )
    shown = {(row.start, row.end) for row in ProcFs().executable_maps(mapper.pid)}  # type: ignore[union-attr]
    assert {span for one in report.mappings for span in one.ranges} == shown
    assert {"executable", "interpreter", "library"} == {one.library.kind for one in report.mappings}
    assert {one.id_from for one in report.mappings} == {"map"}


def test_the_kinds_are_told_without_the_map_as_they_are_with_it(watch: Watch, watcher: Watcher, start: Start) -> None:
    mapper = start()
    with_map = process(watch(Rule(None, name="everything", kind=KINDS)), mapper.pid)
    without = process(watcher, mapper.pid)
    assert {one.library.path: one.library.kind for one in without.mappings} == {
        one.library.path: one.library.kind for one in with_map.mappings
    }
    assert {one.id_from for one in without.mappings}.isdisjoint({"map"})


def test_a_deleted_library_is_opened_by_the_kernels_link_only(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    new.unlink()
    found = reported(watcher, mapper.pid, new, wait_until)
    assert found.look.opened_by == "map_files"
    assert found.look.elf == "elf"
    assert found.library.host_path
    assert "/map_files/" in found.library.host_path


def test_a_name_that_only_ends_like_a_deleted_ones_is_taken_as_it_is(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(f"{OTHER} (deleted)")
    mapper.map(new)
    assert mapping(process(watcher, mapper.pid), new).library.deleted is False


def test_a_memfd_is_explained_like_any_library(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper = start()
    mapper.emit("memfd", WANTED, library(OTHER))
    found = reported(watcher, mapper.pid, f"/memfd:{WANTED}", wait_until)
    assert (found.library.kind, found.library.deleted) == ("library", True)
    assert (found.look.opened_by, found.look.elf) == ("map_files", "elf")


def test_a_memfd_that_holds_no_library_is_wanted_by_no_rule_for_libraries(
    watcher: Watcher, start: Start, scratch: Path
) -> None:
    text = scratch / "text"
    text.write_bytes(bytes(PAGE))
    mapper = start()
    mapper.emit("memfd", WANTED, text)
    found = mapping(process(watcher, mapper.pid), f"/memfd:{WANTED}")
    assert (found.library.kind, found.look.elf, found.untold) == ("other", "not_elf", "no_rule")
    assert [one.why for one in found.rules] == ["kind"]


def test_a_library_behind_several_dead_threads_is_explained(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.emit("thread", "idle", new)
    mapper.emit("leaderexit")
    mapper.map(new)
    wait_until(lambda: not process(watcher, mapper.pid).is_leader_alive, what="the end of the leader")
    found = reported(watcher, mapper.pid, new, wait_until)
    assert found.look.opened_by == "map_files"
    threads = {int(name) for name in os.listdir(f"/proc/{mapper.pid}/task")} - {mapper.pid}
    assert found.look.tries[-1].path.split("/")[2] in {str(thread) for thread in threads}
    report = process(watcher, mapper.pid)
    assert (report.state, report.extra) == ("running", ())
    assert report.threads >= 2


def test_a_mapping_that_shares_its_parents_memory_is_told_as_passing(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    reported(watcher, mapper.pid, new, wait_until)
    child = mapper.fork(how="clonevm")
    first = mapping(process(watcher, child.pid), new)
    assert (first.seen, first.untold) in [(None, "passing"), (first.seen, None)]
    assert reported(watcher, child.pid, new, wait_until).seen
    child.close()


def test_explaining_changes_nothing(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, ignored = start(), library(OTHER)
    mapper.map(ignored)
    first, second = process(watcher, mapper.pid), process(watcher, mapper.pid)
    assert second.followed == first.followed
    assert [one.verdict.verdict for one in second.mappings] == [one.verdict.verdict for one in first.mappings]
    assert [one.look for one in second.mappings] == [one.look for one in first.mappings]


def test_the_way_a_file_is_opened_is_the_way_that_callbacks_get_it(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    found = reported(watcher, mapper.pid, new, wait_until)
    fd = open_mapped(ProcFs(), mapper.pid, found.library.id, str(new), found.ranges, is_own_view=True, is_deleted=False)
    assert fd is not None
    assert found.library.host_path
    assert os.path.samestat(os.fstat(fd), os.stat(found.library.host_path))
    os.close(fd)


# ---- rules that ask for more, and watches that tell less ------------------------------------------


def test_exports_that_a_library_lacks_are_named(
    watch: Watch, start: Start, make_library: Callable[..., Path], wait_until: Any
) -> None:
    made = make_library("libtls.so", ["tls_read", "tls_write"])
    mapper = start()
    mapper.map(made)
    watcher = watch(
        Rule(re.escape(str(made)), name="more", exports=("tls_read", "tls_open", "tls_close")),
        Rule(re.escape(str(made.parent)), name="enough", exports=("tls_read",)),
    )
    found = reported(watcher, mapper.pid, made, wait_until)
    assert [(one.rule, one.why, one.missing) for one in found.rules] == [
        ("more", "exports", ("tls_close", "tls_open")),
        ("enough", None, ()),
    ]
    assert found.seen
    assert (found.seen.rule, found.look.exports) == ("enough", {"tls_read"})
    report = path_of(watcher, made)
    assert (report.rule, report.rules) == ("enough", found.rules)


def test_a_blocked_library_says_by_which_rule_and_why(
    watch: Watch, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    def refuse(file: ActiveFile) -> None:
        raise ValueError(f"no symbol in {file.library.path}")

    mapper, new = start(), library(WANTED)
    watcher = watch(Rule(TAG, name="probes", on_activate=refuse), config=Config(block_ttl_s=500))
    mapper.map(new)
    wait_until(watcher.registry.blocked, what="the block")
    for report in (mapping(process(watcher, mapper.pid), new), path_of(watcher, new)):
        (block,) = report.blocked
        assert (block.rule, block.reason, block.path) == ("probes", f"no symbol in {new}", str(new))
        assert 400 < block.seconds_left <= 500
    watcher.registry.clear_blocked()
    assert mapping(process(watcher, mapper.pid), new).blocked == ()


def test_an_activation_that_stands_is_told(watch: Watch, start: Start, library: NewLibrary, wait_until: Any) -> None:
    mapper, new = start(), library(WANTED)
    watcher = watch(Rule(TAG, name="probes", on_activate=lambda _: None))
    mapper.map(new)
    wait_until(
        lambda: mapping(process(watcher, mapper.pid), new).activations == (("probes", "attached"),), what="activation"
    )


def test_a_watch_of_other_processes_says_so(watch: Watch, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    found = mapping(process(watch(Rule(TAG), pids=[os.getpid()]), mapper.pid), new)
    assert (found.untold, found.rule, found.id_from) == ("not_selected", TAG, "map")


def test_what_was_there_before_a_watch_without_snapshot_is_its_baseline(
    watch: Watch, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    found = mapping(process(watch(Rule(TAG), snapshot=False), mapper.pid), new)
    assert (found.seen, found.untold, found.rule) == (None, "baseline", TAG)
