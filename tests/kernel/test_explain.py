"""The decision trail on real processes and files, against what is known of them otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sowatch.bpf
from sowatch import ActiveFile, Rule, Watcher
from sowatch.config import Config
from sowatch.errors import SowatchError, UsageError
from sowatch.explain import MappingReport, PathReport, ProcessReport
from sowatch.inspector import open_mapped
from sowatch.procfs import ProcFs
from sowatch.rules import KINDS
from sowatch.sources import FILE_KEY, PROCESS_HEAD, PROCESS_TAIL, BpfSource, value_bytes
from support import bpfsys
from support.kernel import IN_OWN_MOUNTS, TAG, executable_ranges, host_pid, id_by_stat, with_prelude
from support.programs import Mapper

PAGE = 4096
Start = Callable[..., Mapper]
NewLibrary = Callable[..., Path]
Watch = Callable[..., Watcher]

PROGRAMS = Path(sowatch.bpf.__file__).parent / "programs"
#: Of the one rule that the tests share; the tag keeps other runs of the tests out.
WANTED = f"libwanted{TAG}.so"
OTHER = f"libother{TAG}.so"


@pytest.fixture(scope="module")
def long_watcher() -> Iterator[Watcher]:
    error = bpfsys.why_no_bpf()
    if error is not None:
        pytest.skip(f"bpf(2) cannot create a map: {error.strerror}")
    with Watcher(Rule(re.escape(f"wanted{TAG}"), name="wanted")) as watcher:
        yield watcher


@pytest.fixture
def watcher(long_watcher: Watcher, wait_until: Any) -> Iterator[Watcher]:
    """A running watcher whose one rule, ``wanted``, looks for ``wanted`` and our tag in a path."""
    yield long_watcher
    # Then it has nothing to read while the descriptors of the next test are counted.
    wait_until(lambda: not long_watcher.snapshot(), what="the end of the test's processes")


@pytest.fixture
def watch(closing: contextlib.ExitStack) -> Watch:
    """``watch(*rules, **options)`` is a Watcher of the test's own, running."""
    return lambda *rules, **options: closing.enter_context(Watcher(*rules, **options))


def pages(length: int) -> int:
    """A length in bytes, as whole pages."""
    return -(-length // PAGE) * PAGE


def process(watcher: Watcher, pid: int) -> ProcessReport:
    report = watcher.explain(pid)
    assert isinstance(report, ProcessReport)
    return report


def path_of(watcher: Watcher, path: Path | str) -> PathReport:
    report = watcher.explain(os.fspath(path))
    assert isinstance(report, PathReport)
    return report


def told(watcher: Watcher, pid: int, path: Path | str, wait_until: Any) -> MappingReport:
    """The mapping of a file, once its load was told."""

    def find() -> MappingReport | None:
        found = mapping(process(watcher, pid), path)
        return found if found.seen else None

    found = wait_until(find, what=f"a load of {path}")
    assert isinstance(found, MappingReport)
    return found


def mapping(report: ProcessReport, path: Path | str) -> MappingReport:
    found = [one for one in report.mappings if one.library.path == os.fspath(path)]
    assert len(found) == 1, [one.library.path for one in report.mappings]
    return found[0]


# ---- the kernel side's memory ---------------------------------------------------------------------


def test_a_process_entry_and_a_file_key_are_the_same_in_c_and_in_python(tmp_path: Path) -> None:
    text = (PROGRAMS / "state.bpf.h").read_text(encoding="utf-8")
    (limit,) = re.findall(r"^#define MAX_RANGES \d+$", text, re.MULTILINE)
    (entry,) = re.findall(r"^struct process \{\n.*?^\};", text, re.MULTILINE | re.DOTALL)
    fields = ["start_ns", "range_count", "dirty", "introduced", "shares_vm", "touches", "ranges"]
    questions = [f"offsetof(struct process, {name})" for name in fields]
    questions += ["sizeof(struct process)", "sizeof(struct file_key)", "offsetof(struct file_key, epoch)"]
    lines = "".join(f'printf("%zu\\n", {question});\n' for question in questions)
    (tmp_path / "ask.c").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "records.h"\n'
        f"{limit}\n{entry}\nint main(void) {{ {lines} }}\n",
        encoding="utf-8",
    )
    subprocess.run(["cc", f"-I{PROGRAMS}", "-o", tmp_path / "ask", tmp_path / "ask.c"], check=True)
    said = subprocess.run([tmp_path / "ask"], check=True, capture_output=True, text=True).stdout
    *offsets, size, key_size, epoch = map(int, said.split())
    assert (PROCESS_HEAD.format, PROCESS_HEAD.size) == ("=QQQIIII", 40)
    assert (PROCESS_TAIL.format, PROCESS_TAIL.size) == ("=I64Q", 516)
    assert offsets == [0, 24, 28, 32, 36, size - 516, size - 512]
    assert FILE_KEY.size == key_size == 64
    assert epoch == 60
    assert limit == "#define MAX_RANGES 32"


def test_the_room_for_an_entry_is_as_large_as_the_kernel_writes() -> None:
    source = BpfSource(Config())
    try:
        assert value_bytes(source._processes) >= PROCESS_HEAD.size + PROCESS_TAIL.size
        assert value_bytes(source._verdicts) == 8
    finally:
        source.close()


def test_the_kernels_entry_of_a_process_has_its_start_and_its_ranges(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(WANTED)
    at, length = mapper.map(new)
    report = process(watcher, mapper.pid)
    assert report.followed is not None
    assert report.followed.start_ns == report.process.start_ns
    assert report.followed.touches > 0
    assert (at, at + pages(length)) in report.followed.ranges
    assert report.followed.range_count == len(report.followed.ranges)
    assert report.known is not None
    assert report.known.process.start_ns == report.process.start_ns


def test_a_process_of_which_nothing_is_wanted_is_not_followed(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    mapper = start()
    mapper.map(library(OTHER))
    report = process(watcher, mapper.pid)
    assert report.followed is None or report.followed.touches == 0
    assert report.known is None
    assert "nothing_wanted" in report.notes


def test_the_kernels_answers_outlive_their_source(tap: Any, start: Start, library: NewLibrary) -> None:
    source = BpfSource(Config())
    try:
        key = bytes(63) + b"\1"
        source.answer([bytes(64)], is_wanted=True)
        source.answer([key], is_wanted=False)
        verdicts = source.open_verdicts()
    finally:
        source.close()
    with verdicts:
        assert verdicts.look_up(bytes(64)) == (bytes(64), True, None)
        assert verdicts.of_inodes([0]) == [(bytes(64), True, None)], "the other key is of another epoch"
        assert verdicts.of_inodes([1]) == []
    assert verdicts.of_inodes([0]) == []


# ---- libraries of a process -----------------------------------------------------------------------


def test_a_library_that_is_wanted_has_a_trail_without_gaps(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    at, length = mapper.map(new)
    found = told(watcher, mapper.pid, new, wait_until)
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
    found = told(watch(*rules), mapper.pid, program, wait_until)
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
    found = told(watcher, mapper.pid, new, wait_until)
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
    mapper.tell("memfd", WANTED, library(OTHER))
    found = told(watcher, mapper.pid, f"/memfd:{WANTED}", wait_until)
    assert (found.library.kind, found.library.deleted) == ("library", True)
    assert (found.look.opened_by, found.look.elf) == ("map_files", "elf")


def test_a_memfd_that_holds_no_library_is_wanted_by_no_rule_for_libraries(
    watcher: Watcher, start: Start, scratch: Path
) -> None:
    text = scratch / "text"
    text.write_bytes(bytes(PAGE))
    mapper = start()
    mapper.tell("memfd", WANTED, text)
    found = mapping(process(watcher, mapper.pid), f"/memfd:{WANTED}")
    assert (found.library.kind, found.look.elf, found.untold) == ("other", "not_elf", "no_rule")
    assert [one.why for one in found.rules] == ["kind"]


def test_a_library_behind_several_dead_threads_is_explained(
    watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any
) -> None:
    mapper, new = start(), library(WANTED)
    mapper.tell("thread", "idle", new)
    mapper.tell("leaderexit")
    mapper.map(new)
    wait_until(lambda: not process(watcher, mapper.pid).is_leader_alive, what="the end of the leader")
    found = told(watcher, mapper.pid, new, wait_until)
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
    told(watcher, mapper.pid, new, wait_until)
    child = mapper.fork(how="clonevm")
    first = mapping(process(watcher, child.pid), new)
    assert (first.seen, first.untold) in [(None, "passing"), (first.seen, None)]
    assert told(watcher, child.pid, new, wait_until).seen
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
    found = told(watcher, mapper.pid, new, wait_until)
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
    found = told(watcher, mapper.pid, made, wait_until)
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


# ---- processes that are special -------------------------------------------------------------------


def test_a_process_that_does_not_exist_is_an_error(watcher: Watcher, start: Start) -> None:
    mapper = start()
    mapper.exit()
    with pytest.raises(SowatchError, match=rf"^there is no process {mapper.pid} in /proc\. ") as caught:
        watcher.explain(mapper.pid)
    assert caught.value.exit_code == 1


def test_the_id_of_a_thread_is_wrong_usage(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper = start()
    mapper.tell("thread", "idle", library(OTHER))
    (thread,) = {int(name) for name in os.listdir(f"/proc/{mapper.pid}/task")} - {mapper.pid}
    with pytest.raises(UsageError, match=f"{thread} is a thread of process {mapper.pid}"):
        watcher.explain(thread)


def test_a_zombie_says_that_it_has_ended(watcher: Watcher, spawn: Any, wait_until: Any) -> None:
    ended = spawn(["true"])
    report = wait_until(
        lambda: next((r for r in [process(watcher, ended.pid)] if r.state == "zombie"), None), what="its end"
    )
    assert (report.mappings, report.notes) == ((), ("zombie",))


def test_a_kernel_thread_says_that_it_is_one(watcher: Watcher) -> None:
    proc = ProcFs()
    kernel_threads = [pid for pid in proc.pids() if (about := proc.stat(pid)) and about.is_kernel_thread]
    if not kernel_threads:
        pytest.skip("this pid namespace shows no kernel thread")
    report = process(watcher, kernel_threads[0])
    assert (report.state, report.mappings, report.notes) == ("kernel_thread", (), ("kernel_thread",))


def test_a_program_without_a_dynamic_loader_says_what_that_means(watch: Watch, programs: Any, spawn: Any) -> None:
    program = programs.variant("mapper", "-static", "-Wno-error")
    running = spawn([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout.readline()
    report = process(watch(), running.pid)
    assert report.notes == ("static", "nothing_wanted")
    assert [one.library.kind for one in report.mappings] == ["executable"]


def test_a_process_in_its_own_root_is_explained_with_the_paths_that_it_sees(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, programs: Any, wait_until: Any
) -> None:
    library(f"jail/{WANTED}")
    library(f"jail/{OTHER}")
    static = programs.variant("mapper", "-static", "-Wno-error")
    (scratch / "jail/mapper").write_bytes(static.read_bytes())
    (scratch / "jail/mapper").chmod(0o755)
    mapper = start(with_prelude(scratch, static, f'exec chroot {scratch}/jail /mapper # "$0"'))
    mapper.map(f"/{WANTED}")
    mapper.map(f"/{OTHER}")
    wanted = told(watcher, mapper.pid, f"/{WANTED}", wait_until)
    assert (wanted.library.kind, wanted.look.elf) == ("library", "elf")
    other = mapping(process(watcher, mapper.pid), f"/{OTHER}")
    assert (other.untold, other.verdict.verdict) == ("no_rule", "ignore")


def test_below_an_overlay_the_identity_is_the_kernels(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    library(f"lower/{WANTED}")
    library(f"lower/{OTHER}")
    commands = f"""
    mkdir {scratch}/up {scratch}/tmpfs {scratch}/seen
    mount -t tmpfs none {scratch}/tmpfs
    mkdir {scratch}/tmpfs/up {scratch}/tmpfs/work
    mount -t overlay none -o lowerdir={scratch}/lower,upperdir={scratch}/tmpfs/up,workdir={scratch}/tmpfs/work \\
        {scratch}/seen
    """
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    for name in (WANTED, OTHER):
        mapper.map(scratch / "seen" / name)
    wanted = told(watcher, mapper.pid, scratch / "seen" / WANTED, wait_until)
    other = mapping(process(watcher, mapper.pid), scratch / "seen" / OTHER)
    assert wanted.library.id[:3] == id_by_stat(scratch / "lower" / WANTED)[:3]
    assert (wanted.id_from, wanted.differences) == ("map", ())
    assert (other.verdict.verdict, other.untold) == ("ignore", "no_rule")
    lower = path_of(watcher, scratch / "lower" / WANTED)
    assert [(one.process.pid, one.relation) for one in lower.mapped] == [(mapper.pid, "other_name")]


def test_a_process_in_a_pid_namespace_of_its_own_has_both_numbers(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    program = start()._program
    mapper = start(with_prelude(scratch, program, "", launcher="unshare --pid --fork sh -c"))
    new = library(WANTED)
    mapper.map(new)
    pid = host_pid(mapper)
    assert told(watcher, pid, new, wait_until).seen
    report = process(watcher, pid)
    assert (report.process.pid, report.process.ns_pid) == (pid, 1)


# ---- paths ----------------------------------------------------------------------------------------


def test_a_path_says_who_has_it_mapped(watcher: Watcher, start: Start, library: NewLibrary, wait_until: Any) -> None:
    first, second, new = start(), start(), library(WANTED)
    at, length = first.map(new)
    second.map(new)
    told(watcher, first.pid, new, wait_until)
    told(watcher, second.pid, new, wait_until)
    report = path_of(watcher, new)
    assert (report.file_type, report.rule, report.notes) == ("regular file", "wanted", ())
    assert [(one.id[:3], one.id_from) for one in report.ids] == [(id_by_stat(new)[:3], "map")]
    assert sorted((one.process.pid, one.relation, one.in_map) for one in report.mapped) == sorted(
        (mapper.pid, "same", True) for mapper in (first, second)
    )
    assert next(one for one in report.mapped if one.process.pid == first.pid).ranges == ((at, at + pages(length)),)
    assert all(one.seen and one.seen.rule == "wanted" for one in report.mapped)
    assert report.verdict.verdict == "match"


def test_a_path_that_nobody_maps_says_so(watcher: Watcher, library: NewLibrary) -> None:
    new = library(WANTED)
    report = path_of(watcher, new)
    assert (report.mapped, report.notes) == ((), ("not_mapped",))
    assert (report.rule, report.look.elf, report.verdict.verdict) == ("wanted", "elf", "none")
    assert [one.id_from for one in report.ids] == ["proc"]


def test_a_path_that_no_rule_wants_is_found_in_proc_alone(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(OTHER)
    mapper.map(new)
    report = path_of(watcher, new)
    assert [(one.process.pid, one.relation, one.in_map, one.seen) for one in report.mapped] == [
        (mapper.pid, "same", False, None)
    ]
    assert report.notes == ("nothing_wants",)
    assert report.verdict.verdict == "ignore"


def test_a_symbolic_link_leads_to_the_file(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    link = new.with_name("link.so")
    link.symlink_to(new.name)
    report = path_of(watcher, link)
    assert (report.path, report.resolved) == (str(link), str(new))
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "same")]


def test_a_hard_link_is_the_same_file_by_another_name(watcher: Watcher, start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    link = new.with_name("hard.so")
    link.hardlink_to(new)
    (found,) = path_of(watcher, link).mapped
    assert (found.process.pid, found.path, found.relation) == (mapper.pid, str(new), "other_name")


def test_after_an_upgrade_the_path_shows_who_still_runs_on_the_deleted_file(
    watcher: Watcher, start: Start, library: NewLibrary
) -> None:
    old, young, new = start(), start(), library(WANTED)
    old.map(new)
    library("fresh.so").rename(new)
    young.map(new)
    report = path_of(watcher, new)
    assert sorted((one.process.pid, one.relation) for one in report.mapped) == sorted(
        [(old.pid, "deleted"), (young.pid, "same")]
    )


@pytest.mark.parametrize("name", [WANTED, OTHER])
def test_a_path_whose_file_is_gone_is_explained_while_it_is_mapped(
    watcher: Watcher, start: Start, library: NewLibrary, name: str
) -> None:
    mapper, new = start(), library(name)
    mapper.map(new)
    new.unlink()
    report = path_of(watcher, new)
    assert (report.file_type, report.error) == (None, "No such file or directory")
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "deleted")]
    mapper.exit()
    with pytest.raises(SowatchError, match="No such file or directory; and no process has a file of that name") as err:
        watcher.explain(new)
    assert err.value.exit_code == 1


def test_a_file_in_another_mount_namespace_is_found_through_its_process(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary, wait_until: Any
) -> None:
    source = library(OTHER)
    commands = f"mkdir {scratch}/t; mount -t tmpfs none {scratch}/t; cp {source} {scratch}/t/{WANTED}"
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    path = scratch / "t" / WANTED
    mapper.map(path)
    told(watcher, mapper.pid, path, wait_until)
    report = path_of(watcher, f"/proc/{mapper.pid}/root{path}")
    assert [(one.process.pid, one.path) for one in report.mapped] == [(mapper.pid, str(path))]
    assert report.notes == ()


def test_another_file_under_the_same_path_elsewhere_is_told_apart(
    watcher: Watcher, start: Start, scratch: Path, library: NewLibrary
) -> None:
    here = library(f"t/{WANTED}")
    commands = f"cp {here} {scratch}/copy; mount -t tmpfs none {scratch}/t; cp {scratch}/copy {here}"
    mapper = start(with_prelude(scratch, start()._program, commands, launcher=IN_OWN_MOUNTS))
    mapper.map(here)
    report = path_of(watcher, here)
    assert [(one.process.pid, one.relation) for one in report.mapped] == [(mapper.pid, "other_file")]
    assert "not_mapped" in report.notes


@pytest.mark.parametrize(("make", "file_type"), [(os.mkdir, "directory"), (os.mkfifo, "FIFO")])
def test_what_is_no_file_is_looked_at_without_being_opened(
    watcher: Watcher, scratch: Path, make: Callable[[Path], None], file_type: str
) -> None:
    make(scratch / "thing")
    report = path_of(watcher, scratch / "thing")
    assert (report.file_type, report.look.elf) == (file_type, "not_regular")
    assert report.notes == ("not_regular", "not_mapped", "nothing_wants")


def test_a_watch_that_has_ended_explains_nothing(watch: Watch) -> None:
    watcher = watch(Rule(TAG))
    watcher.stop()
    with pytest.raises(SowatchError, match="the watch is not running"):
        watcher.explain(os.getpid())


# ---- the command ----------------------------------------------------------------------------------


def sowatch_explain(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sowatch", "explain", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_the_command_explains_a_process_as_one_object(start: Start, library: NewLibrary) -> None:
    mapper, new = start(), library(WANTED)
    mapper.map(new)
    done = sowatch_explain("--json", "--rule", TAG, str(mapper.pid))
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = json.loads(done.stdout)
    assert (found["event"], found["target"], found["process"]["pid"]) == ("explain", "process", mapper.pid)
    (one,) = [one for one in found["mappings"] if one["library"]["path"] == str(new)]
    assert (one["seen"]["cause"], one["rule"], one["verdict"]["verdict"]) == ("snapshot", TAG, "match")
    assert one["ranges"] == [
        [f"{first:x}", f"{end:x}"] for first, end in executable_ranges(mapper.pid, new.stat().st_ino)
    ]


def test_the_command_explains_a_path_to_people_without_letting_it_steer_their_terminal(
    start: Start, library: NewLibrary
) -> None:
    mapper, new = start(), library(f"lib\x1b[31m\n{TAG}.so")
    mapper.map(new)
    done = sowatch_explain("--format", "text", new)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"lib\\x1b[31m\\n{TAG}.so" in done.stdout
    assert "\x1b" not in done.stdout
    assert re.search(rf"^ *{mapper.pid}  mapper\b.*  this file  snapshot at ", done.stdout, re.MULTILINE)


def test_the_command_takes_a_path_of_digits_after_its_directory(scratch: Path, library: NewLibrary) -> None:
    new = library("12345")
    done = sowatch_explain("--json", new)
    assert json.loads(done.stdout)["path"] == str(new)


@pytest.mark.parametrize("word", ["/no/such/file", "4194303"])
def test_the_command_ends_with_one_line_and_1_where_there_is_nothing(word: str) -> None:
    done = sowatch_explain(word)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
