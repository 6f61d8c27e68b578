"""One mapping: its rules, its file, what the kernel remembers of it, and whether it was told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from sowatch.bpf.records import file_id_of
from sowatch.engine.activation import BlockedFile, RegisteredFile
from sowatch.engine.queries import KnownFile, KnownProcess
from sowatch.explain import FileLook, VerdictAnswer
from sowatch.explain.assemble import answers, verdict_of
from sowatch.explain.audit import Difference
from sowatch.explain.mapped import FilesByAddress, group_rows
from sowatch.linux.proc_parse import MapRow
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.literals import KINDS
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.base import Verdict
from support.explained import ELF, LIBRARY, NOW_NS, OTHER_VIEW, UNTOLD, Case, group, known_file, no_rule, row, verdict
from support.records import File, key_of

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


def test_a_search_of_exports_that_was_given_up_is_told_from_one_that_found_nothing() -> None:
    rules = RuleSet([Rule(name="tls", exports=("SSL_read", "SSL_new")), Rule(None, name="all")])
    found = answers(rules, LIBRARY, "library", frozenset({"SSL_new"}), gave_up_exports=True)
    # The watch goes on to the next rule, as with exports that are missing.
    assert [(one.wants, one.why, one.missing) for one in found] == [
        (False, "exports_given_up", ("SSL_read",)),
        (True, None, ()),
    ]


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
    process = KnownProcess(Process(10, 1), 0, True, True, False, False, tuple(files))
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
        ([verdict(b"", True, None), None], VerdictAnswer("match")),
        ([verdict(b"", False, 7), verdict(b"", False, 9)], VerdictAnswer("ignore", 9)),
        ([verdict(b"", False, 7), verdict(b"", True, None)], VerdictAnswer("mixed")),
    ],
)
def test_several_verdicts_are_told_as_one(found: list[Verdict | None], expected: VerdictAnswer) -> None:
    assert verdict_of(found) == expected


def test_a_file_of_the_map_has_the_verdict_of_its_own_name(case: Case) -> None:
    key = case.files[0].name.key
    assert isinstance(key, bytes)
    case.exact = {key: verdict(key, True, None)}
    case.others = [verdict(key_of(100, dentry=0x99), False, 30)]
    assert case.only().verdict == VerdictAnswer("match")


def test_a_file_that_the_map_has_not_is_identified_by_the_kernels_memory(case: Case) -> None:
    case.files = []
    case.others = [verdict(key_of(100, generation=5), False, 30), verdict(key_of(100, dev=(8, 1)), True, None)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(254, 0, 100, 5), "verdict")
    assert found.verdict == VerdictAnswer("ignore", 30)


def test_a_verdict_for_another_view_of_the_file_system_does_not_count(case: Case) -> None:
    case.files = []
    case.others = [verdict(key_of(100, root=OTHER_VIEW), False, 30)]
    found = case.only()
    assert (found.verdict, found.id_from) == (VerdictAnswer("none"), "proc")


def test_a_verdict_in_the_view_of_the_processs_other_files_counts(case: Case) -> None:
    case.sees_our_files = False
    case.rows = [row("/app/other.so", 0x1000, inode=55), row(start=0x5000)]
    case.files = [known_file(File("/app/other.so", 55, root=OTHER_VIEW))]
    case.others = [verdict(key_of(100), True, None), verdict(key_of(100, root=OTHER_VIEW), False, 30)]
    assert case.report().mappings[1].verdict == VerdictAnswer("ignore", 30)


def test_two_kernel_identities_that_fit_are_none(case: Case) -> None:
    case.files = []
    case.rows = [row(dev=(0, 40))]
    case.others = [verdict(key_of(100, dev=(254, 0)), False, 30), verdict(key_of(100, dev=(254, 1)), False, 20)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(0, 40, 100), "proc")
    assert found.verdict == VerdictAnswer("ignore", 30)


def test_an_identity_on_the_very_device_goes_before_one_below_an_overlay(case: Case) -> None:
    case.files = []
    case.rows = [row(dev=(0, 40))]
    case.others = [verdict(key_of(100, dev=(254, 0)), False, 30), verdict(key_of(100, dev=(0, 40)), False, 20)]
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
    ("the main program", row("/usr/sbin/nginx"), replace(ELF, image_kinds={"executable"}), "executable"),
    ("a library that is said to be the main program", row("/usr/sbin/nginx"), ELF, "library"),
    (
        "what starts where exec put the interpreter",
        row(start=0xA000, offset=0x1000),
        replace(ELF, image_kinds={"executable", "interpreter"}),
        "interpreter",
    ),
    (
        "a program that is said to start there",
        row(start=0xA000, offset=0x1000),
        replace(ELF, image_kinds={"executable"}),
        "library",
    ),
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
    case.others = [verdict(key_of(100, generation=5), True, None)]
    found = case.only()
    assert (found.library.id, found.id_from) == (FileId(254, 0, 100, 6), "proc")
    assert (found.verdict, found.blocked) == (VerdictAnswer("none"), ())
    case.others.append(verdict(key_of(100, generation=6), False, 30))
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
