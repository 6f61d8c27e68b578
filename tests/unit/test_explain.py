"""The decision trail of a process or a file: what is put together from what was found, and how it is shown."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sowatch import cli
from sowatch.audit import Difference
from sowatch.bpf.records import file_id_of
from sowatch.cli import explain as command
from sowatch.events import Library, LibraryEvent, Process
from sowatch.explain import FileLook, Known, KnownFile, KnownProcess, MappedIn, Try, VerdictAnswer, to_dict
from sowatch.explain.assemble import (
    FilesByAddress,
    Group,
    Memory,
    PathFacts,
    ProcessFacts,
    Shown,
    answers,
    group_rows,
    ids_of,
    path_report,
    process_report,
    relation_of,
    same_file,
    verdict_of,
)
from sowatch.explain.gather import explain
from sowatch.explain.looks import MAX_STUCK, Aside, Subject, look_at, look_at_path
from sowatch.explain.records import Candidate
from sowatch.identity import FileId
from sowatch.procfs import Link, MapRow, Miss, ProcFs, Stat, executable_maps
from sowatch.registry import BlockedFile, RegisteredFile
from sowatch.rules import KINDS, Rule, RuleSet
from sowatch.sources import Followed, Verdict
from sowatch.spaces import Name
from support.elf_files import Made
from support.records import File, Proc, key_of

NOW_NS = 1_700_000_000_000_000_000
LIBRARY = "/usr/lib/libssl.so.3"
ELF = FileLook("elf", None, "map_files", (Try("map_files", "/proc/10/map_files/1-2", None),), "aa", "libssl.so.3")
ALL = RuleSet([Rule(None, name="all")])
OTHER_VIEW = (0x7100, 0x7101)


def row(
    path: str = LIBRARY,
    start: int = 0x1000,
    *,
    inode: int = 100,
    dev: tuple[int, int] = (254, 0),
    is_deleted: bool = False,
    offset: int = 0,
) -> MapRow:
    return MapRow(start, start + 0x1000, "r-xp", offset, *dev, inode, os.fsencode(path), is_deleted)


def group(*rows: MapRow) -> Group:
    (found,) = group_rows(rows or [row()], "/")
    return found


def known_file(
    file: File | None = None,
    ranges: tuple[tuple[int, int], ...] = ((0x1000, 0x2000),),
    *,
    rule: str | None = "all",
    kind: str = "library",
    is_selected: bool = True,
    rules: RuleSet = ALL,
) -> KnownFile:
    name = Name(Proc().map(file or File()), rules)
    load = None
    if rule is not None:
        library = Library(name.path, name.file_id, kind=kind, build_id="aa", soname="libssl.so.3")
        load = LibraryEvent("load", rule, library, None, "mmap", 7, NOW_NS - 9, ranges)
    return KnownFile(name, kind, ranges, is_selected, load)


class Case:
    """A process with one library, told of as it should be; each test changes one thing."""

    def __init__(self) -> None:
        self.process = Process(pid=10, start_ns=10_000_000, comm="nginx", exe="/usr/sbin/nginx")
        self.stat = Stat(10, b"nginx", "S", 1, 10, 10, 0, 1, 1)
        self.rows: list[MapRow] | Miss = [row()]
        self.root = "/"
        self.is_32bit: bool | Miss = False
        self.exe: Link | Miss = Link("/usr/sbin/nginx", False)
        self.base = 0x9000
        self.sees_our_files: bool | None = True
        self.files: Sequence[KnownFile] = [known_file()]
        self.is_announced = True
        self.start_ns = 10_000_077
        self.is_known = True
        self.followed: Followed | None = Followed(10_000_077, 1, False, True, False, 1, ((0x1000, 0x2000),))
        self.is_waiting = False
        self.is_silent = False
        self.exact: dict[Any, Verdict | None] = {}
        self.others: list[Verdict] = []
        self.blocked: list[BlockedFile] = []
        self.registered: list[RegisteredFile] = []
        self.is_repaired = True
        self.look = ELF
        self.rules = ALL
        self.differences: list[Difference] = []

    @property
    def known(self) -> Known:
        process = KnownProcess(
            replace(self.process, start_ns=self.start_ns), 4_000, self.is_announced, False, False, tuple(self.files)
        )
        return Known(
            {10: process} if self.is_known else {},
            self.followed,
            None,  # type: ignore[arg-type] - what it would answer is given to the pure functions
            key_of(1)[40:56],
            self.is_waiting,
            self.is_silent,
        )

    @property
    def memory(self) -> Memory:
        return Memory.of(
            self.exact, self.others, self.blocked, self.registered, now_s=1000.0, is_repaired=self.is_repaired
        )

    def report(self) -> Any:
        maps = self.rows if isinstance(self.rows, Miss) else group_rows(self.rows, self.root)
        facts = ProcessFacts(self.process, self.stat, self.is_32bit, self.exe, self.base, maps, self.sees_our_files)
        looks = {} if isinstance(maps, Miss) else dict.fromkeys(maps, self.look)
        return process_report(
            facts, self.known, self.memory, looks, self.rules, self.differences, now_ns=NOW_NS, monotonic_ns=5_000
        )

    def only(self) -> Any:
        (found,) = self.report().mappings
        return found


@pytest.fixture
def case() -> Case:
    return Case()


# ---- rules --------------------------------------------------------------------------------------


def test_each_rule_says_why_it_does_not_want_a_file() -> None:
    rules = RuleSet(
        [
            Rule("libz", name="z"),
            Rule("libssl", name="programs", kind="executable"),
            Rule(name="tls", exports=("SSL_read", "SSL_write", "SSL_new")),
            Rule("libssl", name="ssl"),
            Rule(None, name="all"),
        ]
    )
    found = answers(rules, LIBRARY, "library", frozenset({"SSL_new"}))
    assert [(one.rule, one.wants, one.why) for one in found] == [
        ("z", False, "pattern"),
        ("programs", False, "kind"),
        ("tls", False, "exports"),
        ("ssl", True, None),
        ("all", False, "earlier_rule"),
    ]
    assert found[2].missing == ("SSL_read", "SSL_write")


def test_a_rule_whose_exports_are_unknown_stands_before_all_that_follow() -> None:
    rules = RuleSet([Rule(name="tls", exports=("SSL_read",)), Rule(None, name="all")])
    assert [one.why for one in answers(rules, LIBRARY, "library", None)] == ["exports_unknown", "earlier_rule"]


some_rules = st.lists(
    st.tuples(
        st.sampled_from([None, "ssl", "libz", "^/usr"]), st.sampled_from(KINDS[:2]), st.sets(st.sampled_from("ab"))
    ),
    min_size=1,
    max_size=5,
)


@given(
    some_rules,
    st.sampled_from([LIBRARY, "/opt/libz.so"]),
    st.sampled_from(KINDS[:2]),
    st.none() | st.frozensets(st.sampled_from("ab")),
)
def test_the_rule_that_wants_it_is_the_one_that_the_watch_would_take(
    made: list[tuple[str | None, str, set[str]]], path: str, kind: str, exports: frozenset[str] | None
) -> None:
    rules = RuleSet([Rule(text, name=f"rule {n}", kind=of, exports=names) for n, (text, of, names) in enumerate(made)])
    found = answers(rules, path, kind, exports)
    expected = rules.match(path, kind, exports)
    assert [one.rule for one in found if one.wants] == ([expected.name] if isinstance(expected, Rule) else [])
    assert [one.rule for one in found] == [rule.name for rule in rules]
    assert all((one.why is None) == one.wants for one in found)


# ---- which file ---------------------------------------------------------------------------------


def test_rows_of_one_file_are_one_group_with_the_path_as_the_process_sees_it() -> None:
    rows = [row("/jail/lib/a.so", 0x1000), row("/jail/lib/b.so", 0x2000, inode=7), row("/jail/lib/a.so", 0x3000)]
    first, second = group_rows(rows, "/jail")
    assert (first.path, first.ranges) == ("/lib/a.so", ((0x1000, 0x2000), (0x3000, 0x4000)))
    assert (second.path, second.inode) == ("/lib/b.so", 7)


def test_a_deleted_file_and_the_new_one_under_its_name_are_two() -> None:
    rows = [row(is_deleted=True), row(start=0x3000, inode=101)]
    assert [(one.inode, one.is_deleted) for one in group_rows(rows, "/")] == [(100, True), (101, False)]


def find(files: Sequence[KnownFile], *rows: MapRow) -> KnownFile | None:
    process = KnownProcess(Process(10, 1), 0, True, False, False, tuple(files))
    return FilesByAddress(process).find(group(*rows))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1)), max_size=8), st.integers(0, 9), st.integers(1, 3))
def test_the_file_is_the_one_that_a_search_of_all_ranges_finds(
    made: list[tuple[int, int]], start: int, length: int
) -> None:
    spans = {at: ((0x1000 * at, 0x1000 * (at + 1)), inode) for at, inode in made}
    ranges = {inode: tuple(span for span, of in spans.values() if of == inode) for inode in (0, 1)}
    files = [known_file(File(inode=100 + inode), ranges[inode]) for inode in (0, 1)]
    wanted = row(start=0x1000 * start)._replace(end=0x1000 * (start + length))
    expected = any(begin < wanted.end and end > wanted.start for begin, end in ranges[0])
    assert find(files, wanted) == (files[0] if expected else None)


def test_a_file_of_the_map_is_found_by_its_address() -> None:
    file = known_file()
    assert find([file], row(start=0x1000)) is file
    assert find([file], row(start=0x2000)) is None


def test_another_inode_on_the_same_device_is_another_file_at_the_same_address() -> None:
    assert find([known_file()], row(inode=101)) is None


def test_on_another_device_the_inode_may_differ_as_it_does_on_overlayfs() -> None:
    file = known_file()
    assert find([file], row(inode=101, dev=(0, 40))) is file


# ---- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], VerdictAnswer("none")),
        ([None], VerdictAnswer("none")),
        ([Verdict(b"", True, None), None], VerdictAnswer("match")),
        ([Verdict(b"", False, 7), Verdict(b"", False, 9)], VerdictAnswer("ignore", 9)),
        ([Verdict(b"", False, 7), Verdict(b"", True, None)], VerdictAnswer("mixed")),
    ],
)
def test_several_verdicts_are_told_as_one(found: list[Verdict | None], expected: VerdictAnswer) -> None:
    assert verdict_of(found) == expected


def test_a_file_of_the_map_has_the_verdict_of_its_own_name(case: Case) -> None:
    key = case.files[0].name.key
    assert isinstance(key, bytes)
    case.exact = {key: Verdict(key, True, None)}
    case.others = [Verdict(key_of(100, dentry=0x99), False, 30)]
    assert case.only().verdict == VerdictAnswer("match")


def test_a_file_that_the_map_has_not_is_identified_by_the_kernels_memory(case: Case) -> None:
    case.files = []
    case.others = [Verdict(key_of(100, generation=5), False, 30), Verdict(key_of(100, dev=(8, 1)), True, None)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(254, 0, 100, 5), "verdict")
    assert found.verdict == VerdictAnswer("ignore", 30)


def test_a_verdict_for_another_view_of_the_file_system_does_not_count(case: Case) -> None:
    case.files = []
    case.others = [Verdict(key_of(100, root=OTHER_VIEW), False, 30)]
    found = case.only()
    assert (found.verdict, found.id_from) == (VerdictAnswer("none"), "proc")


def test_a_verdict_in_the_view_of_the_processs_other_files_counts(case: Case) -> None:
    case.sees_our_files = False
    case.rows = [row("/app/other.so", 0x1000, inode=55), row(start=0x5000)]
    case.files = [known_file(File("/app/other.so", 55, root=OTHER_VIEW))]
    case.others = [Verdict(key_of(100), True, None), Verdict(key_of(100, root=OTHER_VIEW), False, 30)]
    assert case.report().mappings[1].verdict == VerdictAnswer("ignore", 30)


def test_two_kernel_identities_that_fit_are_none(case: Case) -> None:
    case.files = []
    case.rows = [row(dev=(0, 40))]
    case.others = [Verdict(key_of(100, dev=(254, 0)), False, 30), Verdict(key_of(100, dev=(254, 1)), False, 20)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(0, 40, 100), "proc")
    assert found.verdict == VerdictAnswer("ignore", 30)


def test_an_identity_on_the_very_device_goes_before_one_below_an_overlay(case: Case) -> None:
    case.files = []
    case.rows = [row(dev=(0, 40))]
    case.others = [Verdict(key_of(100, dev=(254, 0)), False, 30), Verdict(key_of(100, dev=(0, 40)), False, 20)]
    assert case.only().library.id == FileId(0, 40, 100, 1)


def test_the_writer_of_keys_and_the_reader_of_identities_agree() -> None:
    assert file_id_of(key_of(100, generation=5)) == FileId(254, 0, 100, 5)


# ---- a mapping ----------------------------------------------------------------------------------


def test_a_library_that_was_told_says_how_and_when(case: Case) -> None:
    found = case.only()
    assert (found.seen.rule, found.seen.cause, found.seen.t_ns, found.seen.time_ns) == ("all", "mmap", 7, NOW_NS - 9)
    assert (found.rule, found.untold, found.id_from) == ("all", None, "map")
    assert found.library.id == FileId(254, 0, 100, 1)
    assert found.library.host_path == "/proc/10/map_files/1-2"


def no_rule(case: Case) -> None:
    case.rules = RuleSet([Rule("libz", name="z")])


def not_selected(case: Case) -> None:
    case.files = [known_file(rule=None, is_selected=False)]


def passing(case: Case) -> None:
    case.files = [known_file(rule=None)]
    case.is_announced = False


def awaiting_facts(case: Case) -> None:
    case.files = [known_file(rule=None)]
    case.is_waiting = True


def baseline(case: Case) -> None:
    case.files = [known_file(rule=None)]
    case.is_silent = True


def unresolved(case: Case) -> None:
    case.files = [known_file(rule=None)]


def not_in_map(case: Case) -> None:
    case.files = []


UNTOLD = [no_rule, not_selected, passing, awaiting_facts, baseline, unresolved, not_in_map]


@pytest.mark.parametrize("change", UNTOLD, ids=lambda change: change.__name__)
def test_a_library_that_was_not_told_says_why(case: Case, change: Callable[[Case], None]) -> None:
    change(case)
    if change is no_rule:
        case.files = []
    found = case.only()
    assert (found.seen, found.untold) == (None, change.__name__)


def test_what_was_told_stands_even_if_the_file_cannot_be_read_any_more(case: Case) -> None:
    case.rules = RuleSet([Rule(name="tls", exports=("SSL_read",))])
    case.files = [known_file(rule="tls")]
    case.look = FileLook("gone")
    found = case.only()
    assert (found.rule, found.untold) == ("tls", None)
    assert [one.why for one in found.rules] == ["exports_unknown"]
    assert (found.library.build_id, found.library.soname) == ("aa", "libssl.so.3")


KIND_CASES: list[tuple[str, MapRow, FileLook, str]] = [
    ("the main program", row("/usr/sbin/nginx"), ELF, "executable"),
    ("what starts where exec put the interpreter", row(start=0xA000, offset=0x1000), ELF, "interpreter"),
    ("a library", row(), ELF, "library"),
    ("a file that could not be read", row(), FileLook("gone"), "library"),
    ("a lying ELF file", row(), FileLook("partial"), "library"),
    ("a file that is no ELF", row(), FileLook("not_elf"), "other"),
    ("a device", row(), FileLook("not_regular"), "other"),
    ("shared anonymous memory", row("/dev/zero", is_deleted=True), FileLook("not_elf"), "other"),
    ("a SysV segment", row("/SYSV00000000", is_deleted=True), ELF, "other"),
    ("a memfd that is a library", row("/memfd:lib", is_deleted=True), ELF, "library"),
    ("a memfd that is not", row("/memfd:jit", is_deleted=True), FileLook("gone"), "other"),
]


@pytest.mark.parametrize(("what", "one", "look", "kind"), KIND_CASES, ids=[case[0] for case in KIND_CASES])
def test_the_kind_of_a_file_that_the_map_has_not(case: Case, what: str, one: MapRow, look: FileLook, kind: str) -> None:
    case.files, case.rows, case.look = [], [one], look
    assert case.only().library.kind == kind


def test_the_kind_that_was_told_is_the_kind(case: Case) -> None:
    case.files = [known_file(kind="interpreter")]
    assert case.only().library.kind == "interpreter"


def test_a_file_of_the_map_that_turns_out_to_be_no_elf_is_no_library(case: Case) -> None:
    case.files, case.look = [known_file(rule=None)], FileLook("not_elf", exports=frozenset())
    found = case.only()
    assert (found.library.kind, found.untold, found.rules[0].why) == ("other", "no_rule", "kind")


def test_a_blocked_file_says_by_whom_why_and_for_how_long(case: Case) -> None:
    case.blocked = [
        BlockedFile("tls", FileId(254, 0, 100, 1), LIBRARY, "no symbol", 900.0, 1600.0, NOW_NS),
        BlockedFile("old", FileId(254, 0, 100, 1), LIBRARY, "late", 0.0, 999.0, NOW_NS),
        BlockedFile("tls", FileId(254, 0, 101, 1), LIBRARY, "another file", 900.0, 1600.0, NOW_NS),
    ]
    assert [(one.rule, one.reason, one.seconds_left) for one in case.only().blocked] == [
        ("tls", "no symbol", 600.0),
        ("old", "late", 0.0),
    ]


def test_an_earlier_file_with_the_inode_number_is_not_this_one(case: Case) -> None:
    case.blocked = [BlockedFile("tls", FileId(254, 0, 100, 2), "/tmp/gone.so", "no symbol", 900.0, 1600.0, NOW_NS)]
    assert case.only().blocked == ()


def test_a_file_without_a_kernel_identity_is_compared_by_device_and_inode(case: Case) -> None:
    case.files = []
    case.blocked = [BlockedFile("tls", FileId(254, 0, 100, 2), "/tmp/x.so", "no symbol", 900.0, 1600.0, NOW_NS)]
    assert [one.reason for one in case.only().blocked] == ["no symbol"]


def test_the_generation_that_a_file_system_tells_rules_out_what_had_the_number_before(case: Case) -> None:
    case.files = []
    case.look = replace(ELF, generation=6)
    case.blocked = [BlockedFile("tls", FileId(254, 0, 100, 5), "/tmp/x.so", "no symbol", 900.0, 1600.0, NOW_NS)]
    case.others = [Verdict(key_of(100, generation=5), True, None)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(254, 0, 100, 6), "proc")
    assert (found.verdict, found.blocked) == (VerdictAnswer("none"), ())
    case.others.append(Verdict(key_of(100, generation=6), False, 30))
    found = case.only()
    assert (found.library.id, found.id_from, found.verdict.verdict) == (FileId(254, 0, 100, 6), "verdict", "ignore")


def test_the_state_of_an_activation_is_told(case: Case) -> None:
    library = Library(LIBRARY, FileId(254, 0, 100, 1))
    case.registered = [
        RegisteredFile("all", library, "attached", frozenset(), 0.0, NOW_NS),
        RegisteredFile("all", Library("/x", FileId(254, 0, 1, 1)), "held", frozenset(), 0.0, NOW_NS),
    ]
    assert case.only().activations == (("all", "attached"),)


def test_a_difference_stands_with_its_mapping_and_what_is_not_mapped_by_itself(case: Case) -> None:
    missing = Difference("missing", 10, LIBRARY, 100, 0x1000, 0x2000)
    extra = Difference("extra", 10, "/usr/lib/libgone.so", 77, 0x7000, 0x8000)
    case.differences = [missing, extra]
    report = case.report()
    assert report.mappings[0].differences == (missing,)
    assert report.extra == (extra,)


# ---- the process --------------------------------------------------------------------------------


def test_the_start_is_the_kernels_where_it_is_known(case: Case) -> None:
    assert case.report().process.start_ns == 10_000_077
    case.is_known = False
    assert case.report().process.start_ns == 10_000_077
    case.followed = None
    assert case.report().process.start_ns == 10_000_000


def test_the_time_since_when_it_is_known_is_the_wall_clocks(case: Case) -> None:
    assert case.report().known_since_ns == NOW_NS - 1_000


def test_what_is_known_of_an_earlier_process_with_that_pid_does_not_count(case: Case) -> None:
    case.start_ns = 30_000_000
    case.followed = Followed(30_000_000, 0, False, False, False, 1, ())
    report = case.report()
    assert (report.known, report.followed, report.known_since_ns) == (None, None, None)
    assert report.mappings[0].untold == "not_in_map"


def nothing_special(case: Case) -> None:
    pass


def kernel_thread(case: Case) -> None:
    case.stat = case.stat._replace(flags=0x00200000)
    case.rows = []


def zombie(case: Case) -> None:
    case.stat = case.stat._replace(state="Z")
    case.rows = []


def no_permission(case: Case) -> None:
    case.rows = Miss.DENIED


def no_files(case: Case) -> None:
    case.rows = []


def static(case: Case) -> None:
    case.base = 0
    case.rows = [row("/usr/sbin/nginx")]
    case.files = []
    case.rules = RuleSet([Rule("nginx", kind="executable")])


def nothing_wanted(case: Case) -> None:
    case.files = []
    case.rules = RuleSet([Rule("libz")])


def narrow(case: Case) -> None:
    case.is_32bit = True


def unrepaired(case: Case) -> None:
    case.is_repaired = False


NOTES = [kernel_thread, zombie, no_permission, no_files, static, nothing_wanted, narrow, unrepaired]


@pytest.mark.parametrize("change", [nothing_special, *NOTES], ids=lambda change: change.__name__)
def test_what_would_be_silence_is_said(case: Case, change: Callable[[Case], None]) -> None:
    change(case)
    assert case.report().notes == (() if change is nothing_special else (change.__name__,))


def test_a_process_whose_leader_has_ended_runs_on(case: Case) -> None:
    case.stat = case.stat._replace(state="Z", threads=3)
    report = case.report()
    assert (report.state, report.is_leader_alive, report.notes) == ("running", False, ())


# ---- a path -------------------------------------------------------------------------------------

HERE = PathFacts("/lib/libssl.so.3", LIBRARY, "regular file", None, Shown(254, 0, 100))
GONE = PathFacts(LIBRARY, LIBRARY, None, "No such file or directory", None)


@pytest.mark.parametrize(
    ("path", "is_deleted", "is_same_file", "relation"),
    [
        (LIBRARY, False, True, "same"),
        ("/lib/libssl.so.3", False, True, "same"),
        ("/opt/hard.so", False, True, "other_name"),
        (LIBRARY, True, True, "other_name"),
        (LIBRARY, True, False, "deleted"),
        (LIBRARY, False, False, "other_file"),
        ("/opt/hard.so", False, False, None),
        ("/opt/hard.so", True, False, None),
    ],
)
def test_how_a_mapped_file_is_related_to_a_path(
    path: str, is_deleted: bool, is_same_file: bool, relation: str | None
) -> None:
    assert relation_of(HERE, path, is_deleted=is_deleted, is_same_file=is_same_file) == relation


def test_rows_on_the_device_with_the_inode_are_of_the_file() -> None:
    assert same_file(HERE, (), group(), None) is True
    assert same_file(HERE, (), group(row(inode=101)), None) is False
    assert same_file(HERE, (), group(row(dev=(254, 1))), None) is False
    assert same_file(GONE, (), group(), None) is False


def test_on_devices_that_file_systems_invent_only_the_mapping_itself_can_tell() -> None:
    here = replace(HERE, shown=Shown(0, 30, 100))
    assert same_file(here, (), group(row(dev=(0, 40))), None) is None
    assert same_file(here, (), group(row(dev=(254, 0))), None) is False


def test_an_identity_of_the_kernel_settles_which_file_it_is() -> None:
    here = replace(HERE, shown=Shown(0, 30, 100))
    file = known_file()
    assert same_file(here, {file.name.file_id}, group(row(dev=(0, 40))), file) is True


def test_the_identities_of_a_path_are_the_kernels_where_it_has_any(case: Case) -> None:
    assert ids_of(HERE, case.known, case.memory) == (Candidate(FileId(254, 0, 100, 1), "map"),)
    case.is_known = False
    assert ids_of(HERE, case.known, case.memory) == (Candidate(FileId(254, 0, 100), "proc"),)
    case.others = [Verdict(key_of(100, generation=3), True, None)]
    assert ids_of(HERE, case.known, case.memory) == (Candidate(FileId(254, 0, 100, 3), "verdict"),)
    assert ids_of(GONE, case.known, case.memory) == ()


def test_a_file_below_an_overlay_is_identified_by_its_name_in_our_view(case: Case) -> None:
    here = replace(HERE, shown=Shown(0, 30, 100))
    assert ids_of(here, case.known, case.memory) == (Candidate(FileId(254, 0, 100, 1), "map"),)
    case.files = [known_file(File(LIBRARY, 100, root=OTHER_VIEW))]
    assert ids_of(here, case.known, case.memory) == (Candidate(FileId(0, 30, 100), "proc"),)


def mapped_in(relation: str, **changes: Any) -> MappedIn:
    facts: dict[str, Any] = {
        "process": Process(10, 10_000_000, comm="nginx"),
        "path": LIBRARY,
        "inode": 100,
        "relation": relation,
        "ranges": ((0x1000, 0x2000),),
        "in_map": True,
        "seen": None,
    }
    return MappedIn(**(facts | changes))


def path_of(
    case: Case, facts: PathFacts = HERE, mapped: Sequence[MappedIn] = (), look: FileLook = ELF, ids: Any = None
) -> Any:
    candidates = (Candidate(FileId(254, 0, 100, 1), "map"),) if ids is None else ids
    return path_report(facts, candidates, mapped, key_of(1)[40:56], case.memory, look, case.rules)


def test_a_file_that_nobody_maps_is_not_met_with_silence(case: Case) -> None:
    report = path_of(case)
    assert (report.rule, report.mapped, report.notes) == ("all", (), ("not_mapped",))


@pytest.mark.parametrize(("relation", "notes"), [("same", ()), ("other_name", ()), ("deleted", ("not_mapped",))])
def test_only_the_file_itself_counts_as_mapped(case: Case, relation: str, notes: tuple[str, ...]) -> None:
    assert path_of(case, mapped=[mapped_in(relation)]).notes == notes


def test_a_path_to_something_else_is_no_library(case: Case) -> None:
    facts = replace(HERE, file_type="directory")
    report = path_of(case, facts, look=FileLook("not_regular"))
    assert (report.kind, report.rule) == ("other", None)
    assert report.notes == ("not_regular", "not_mapped", "nothing_wants")


def test_the_rules_are_asked_about_where_the_path_leads(case: Case) -> None:
    case.rules = RuleSet([Rule("^/usr/lib/", name="usr"), Rule("^/lib/", name="lib")])
    assert [(one.rule, one.why) for one in path_of(case).rules] == [("usr", None), ("lib", "pattern")]


def test_exports_that_are_missing_are_named_for_a_path_too(case: Case) -> None:
    case.rules = RuleSet([Rule(name="tls", exports=("SSL_read", "SSL_write"))])
    report = path_of(case, look=replace(ELF, exports=frozenset({"SSL_read"})))
    assert [(one.why, one.missing) for one in report.rules] == [("exports", ("SSL_write",))]


def test_a_deleted_file_is_still_found_blocked_by_its_path(case: Case) -> None:
    case.blocked = [BlockedFile("tls", FileId(254, 0, 9, 1), LIBRARY, "no symbol", 900.0, 1600.0, NOW_NS)]
    assert [one.reason for one in path_of(case, GONE, [mapped_in("deleted")], ids=()).blocked] == ["no symbol"]


def test_the_verdict_on_a_path_is_the_one_in_our_view(case: Case) -> None:
    case.others = [Verdict(key_of(100), False, 12), Verdict(key_of(100, root=OTHER_VIEW), True, None)]
    assert path_of(case).verdict == VerdictAnswer("ignore", 12)


# ---- looks at files -----------------------------------------------------------------------------


def subject(path: Path | str, **changes: Any) -> Subject:
    inode = os.stat(path).st_ino if os.path.exists(path) else 0
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "path": str(path),
        "inode": inode,
        "ranges": (),
        "is_own_view": False,
        "is_deleted": False,
    }
    return Subject(**(facts | changes))


def tries(look: FileLook) -> list[tuple[str, str | None]]:
    return [(one.by, one.error) for one in look.tries]


def test_a_file_is_opened_below_the_root_of_its_process(make_library: Callable[..., Path]) -> None:
    made = make_library("libx.so", ["one", "two"])
    look = look_at(ProcFs(), subject(made), {"one", "three"})
    assert (look.elf, look.opened_by, look.soname) == ("elf", "root", "libx.so")
    assert look.exports == {"one"}
    assert tries(look) == [("map_files", "nothing is mapped any more"), ("root", None)]


def test_another_file_under_the_name_is_not_taken_for_it(make_library: Callable[..., Path]) -> None:
    look = look_at(ProcFs(), subject(make_library(), inode=1, is_own_view=True), ())
    assert (look.elf, look.opened_by) == ("gone", None)
    assert tries(look)[1:] == [
        ("root", "another file has that name now"),
        ("own_view", "another file has that name now"),
    ]


def test_a_deleted_file_is_not_looked_for_by_its_name(make_library: Callable[..., Path]) -> None:
    look = look_at(ProcFs(), subject(make_library(), is_deleted=True), ())
    assert (look.elf, tries(look)[1:]) == ("gone", [("root", "its name is gone")])


def test_a_fifo_is_never_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert look_at(ProcFs(), subject(fifo), ()).elf == "not_regular"


def test_a_process_that_is_gone_leaves_no_way_to_the_file(tmp_path: Path) -> None:
    look = look_at(ProcFs(), subject(tmp_path / "x.so", pid=(1 << 22) - 1), ())
    assert (look.elf, {error for _, error in tries(look)}) == ("gone", {"the process is gone"})


def test_a_file_that_is_no_elf_says_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\n")
    look = look_at(ProcFs(), subject(tmp_path / "text"), {"one"})
    assert (look.elf, look.exports) == ("not_elf", frozenset())


def test_a_file_that_lies_says_what_about(tmp_path: Path) -> None:
    lying = tmp_path / "lying.so"
    made = Made()
    made.gnu["buckets"] = 1 << 30
    lying.write_bytes(made.data())
    look = look_at_path(str(lying), {"made_read"})
    assert (look.elf, look.soname, look.exports) == ("partial", "libmade.so.1", frozenset())
    assert look.reason == "it claims 1073741824 dynamic symbols; the limit is 300000"


def test_a_path_that_is_gone_when_it_is_opened_is_no_error(tmp_path: Path) -> None:
    look = look_at_path(str(tmp_path / "none"), ())
    assert (look.elf, tries(look)) == ("gone", [("own_view", "No such file or directory")])


# ---- what hangs ---------------------------------------------------------------------------------


@pytest.fixture
def dam() -> Iterator[threading.Event]:
    """Set when the test ends, so that no thread hangs on."""
    event = threading.Event()
    yield event
    event.set()


def test_what_hangs_is_left_behind_and_the_rest_goes_on(dam: threading.Event) -> None:
    with Aside(patience_s=0.05) as aside:
        assert aside.run(lambda: 1) == 1
        assert aside.run(dam.wait) is None
        assert aside.run(lambda: 2) == 2


def test_after_a_few_that_hang_nothing_more_is_tried(dam: threading.Event) -> None:
    with Aside(patience_s=0.01) as aside:
        for _ in range(MAX_STUCK):
            assert aside.run(dam.wait) is None
        assert aside.run(lambda: 1) is None


def test_what_a_look_raises_comes_out() -> None:
    def fail() -> None:
        raise TimeoutError("of its own")

    with Aside() as aside, pytest.raises(TimeoutError, match="of its own"):
        aside.run(fail)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with Aside() as aside:
        aside.run(lambda: 1)
    assert threading.active_count() == before


# ---- how it is shown ----------------------------------------------------------------------------

NASTY = "/tmp/lib\x1b[31m\n\u202e\udcff.so"


def nasty(case: Case) -> Case:
    case.process = replace(case.process, comm="a\x1b]0;b", exe=NASTY, cgroup=NASTY, container=NASTY, ns_pid=3)
    case.rows = [row(NASTY)]
    case.files = [known_file(File(NASTY), rule=None)]
    case.look = FileLook("gone", NASTY, None, (Try("root", NASTY, "its name is gone"),), None, NASTY)
    case.rules = RuleSet([Rule(None, name=NASTY, exports=(NASTY,))])
    case.blocked = [BlockedFile(NASTY, FileId(254, 0, 100, 1), NASTY, NASTY, 900.0, 1600.0, NOW_NS)]
    library = Library(NASTY, FileId(254, 0, 100, 1))
    case.registered = [RegisteredFile(NASTY, library, "attached", frozenset(), 0.0, NOW_NS)]
    case.differences = [Difference("extra", 10, NASTY, 1, 0x1000, 0x9000)]
    return case


def test_names_that_others_chose_are_escaped_in_the_text_of_a_process(case: Case) -> None:
    text = "\n".join(command._process(nasty(case).report()))
    assert "/tmp/lib\\x1b[31m\\n\\u202e\\xff.so" in text
    assert text.replace("\n", "").isprintable()


def test_names_that_others_chose_are_escaped_in_the_text_of_a_path(case: Case) -> None:
    facts = PathFacts(NASTY, f"/x{NASTY}", "regular file", None, Shown(254, 0, 100))
    report = path_of(nasty(case), facts, [mapped_in("deleted", path=NASTY, process=case.process)], case.look)
    text = "\n".join(command._path(report))
    assert "/tmp/lib\\x1b[31m\\n\\u202e\\xff.so" in text
    assert text.replace("\n", "").isprintable()


def test_every_word_has_a_sentence(case: Case) -> None:
    for change in [*NOTES, *UNTOLD]:
        one = Case()
        change(one)
        for as_look in command._ELF:
            one.look = FileLook(as_look)  # type: ignore[arg-type]
            assert list(command._process(one.report()))
    for relation in command._RELATION:
        assert list(command._path(path_of(case, mapped=[mapped_in(relation)])))
    facts = replace(HERE, file_type="directory")
    assert list(command._path(path_of(case, facts, look=FileLook("not_regular"))))


def test_the_text_of_a_process_names_the_rule_the_verdict_and_the_way(case: Case) -> None:
    case.exact = {case.files[0].name.key: Verdict(b"", True, None)}  # type: ignore[dict-item]
    assert list(command._process(case.report())) == [
        "process    10 nginx",
        "start      0.010000077 s after boot",
        "exe        /usr/sbin/nginx",
        "cgroup     -",
        "state      running, 1 thread, 64-bit, leader alive",
        "kernel     follows it: 1 touches, 1 ranges known, no reading is owed",
        "map        knows it since 2023-11-14T22:13:19.999999Z, 1 files",
        "",
        "/usr/lib/libssl.so.3",
        "  ranges   1000-2000",
        "  file     254:0/100.1 by the map; to this process: library",
        "  seen     mmap at 2023-11-14T22:13:19.999999Z",
        "  rule     all wants it",
        "  verdict  match: the kernel side reports it",
        "  open     yes, by map_files: /proc/10/map_files/1-2",
        "  elf      an ELF file, build id aa, soname libssl.so.3",
    ]


def test_the_object_of_a_process_has_every_part(case: Case) -> None:
    found = json.loads(json.dumps(to_dict(nasty(case).report())))
    assert list(found) == [
        *("schema", "event", "target", "process", "state", "threads", "leader_alive", "bits"),
        *("kernel", "map", "mappings", "extra", "notes"),
    ]
    assert (found["schema"], found["event"], found["target"], found["bits"]) == (1, "explain", "process", 64)
    assert found["kernel"] == {
        "followed": True,
        "touches": 1,
        "range_count": 1,
        "ranges": [["1000", "2000"]],
        "dirty": False,
        "shares_vm": False,
    }
    assert found["map"]["since"] == "2023-11-14T22:13:19.999999Z"
    (one,) = found["mappings"]
    assert list(one) == [
        *("library", "id_from", "ranges", "seen", "rule", "rules", "untold", "verdict", "file"),
        *("activations", "blocked", "differences"),
    ]
    assert one["library"]["path"] == NASTY
    assert one["blocked"][0]["seconds_left"] == 600.0
    assert one["file"]["tries"] == [{"by": "root", "path": NASTY, "error": "its name is gone"}]
    assert found["extra"][0]["range"] == ["1000", "9000"]


def test_the_object_of_a_process_that_is_not_known_has_nulls(case: Case) -> None:
    case.is_known, case.followed, case.is_32bit = False, None, Miss.DENIED
    found = to_dict(case.report())
    assert (found["kernel"], found["map"], found["bits"]) == (None, None, None)
    assert found["mappings"][0]["seen"] is None


def test_the_object_of_a_path_has_every_part(case: Case) -> None:
    found = json.loads(json.dumps(to_dict(path_of(case, mapped=[mapped_in("same")]))))
    assert list(found) == [
        *("schema", "event", "target", "path", "resolved", "type", "error", "ids", "kind", "rule", "rules"),
        *("verdict", "file", "activations", "blocked", "mapped", "notes"),
    ]
    assert found["ids"] == [{"dev": "254:0", "inode": 100, "generation": 1, "subvol": 0, "id_from": "map"}]
    assert found["mapped"][0]["relation"] == "same"
    assert found["mapped"][0]["process"]["pid"] == 10


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "give one PID or PATH"),
        (["1", "2"], 2, "give one PID or PATH"),
        (["--rule", "(", "1"], 2, "bad pattern"),
        (["--kind", "cow", "1"], 2, "unknown kind"),
        (["--strategy", "cow", "1"], 2, "unknown strategy"),
        (["--proc-root", "/", "1"], 2, "not a proc file system"),
        (["--json", "--format", "text", "1"], 2, "contradict"),
        (["0"], 1, "there is no process 0"),
        ([str((1 << 22) - 1)], 1, "there is no process 4194303"),
        (["9" * 5000], 1, "there is no process 999"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_a_question_that_cannot_be_answered_is_one_line(
    words: list[str], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", *words]) == code
    stdout, stderr = capfd.readouterr()
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert said in stderr


def test_a_thread_is_sent_to_its_process(capfd: pytest.CaptureFixture[str], dam: threading.Event) -> None:
    thread = threading.Thread(target=dam.wait)
    thread.start()
    assert cli.main(["explain", str(thread.native_id)]) == 2
    assert f"is a thread of process {os.getpid()}. Give {os.getpid()}." in capfd.readouterr().err
    dam.set()
    thread.join()


@pytest.mark.parametrize(("text", "pid"), [("123", 123), ("0123", 123), ("./123", None), ("/123", None), ("٣", None)])
def test_only_digits_are_a_process(text: str, pid: int | None) -> None:
    assert command._pid(text, "/proc") == pid


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_is_no_path_is_wrong_usage(path: str) -> None:
    with pytest.raises(command.UsageError):
        explain(path, None)  # type: ignore[arg-type]


def test_the_rows_here_are_what_proc_gives() -> None:
    data = b"00001000-00002000 r-xp 00000000 fe:00 100                        /usr/lib/libssl.so.3\n"
    assert executable_maps(data) == [row()]
