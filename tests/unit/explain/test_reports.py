"""What is put together about a process, and about a path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from sowatch.engine.activation import BlockedFile
from sowatch.explain import FileLook, VerdictAnswer
from sowatch.explain.assemble import PathFacts, ids_of, relation_of, same_file
from sowatch.explain.mapped import Shown
from sowatch.explain.records import Candidate
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.base import TrackedEntry
from support.explained import (
    ELF,
    HERE,
    LIBRARY,
    NOTES,
    NOW_NS,
    OTHER_VIEW,
    Case,
    group,
    known_file,
    mapped_in,
    path_of,
    row,
    verdict,
)
from support.records import File, key_of

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
    case.followed = TrackedEntry(30_000_000, 0, False, False, False, 1, ())
    report = case.report()
    assert (report.known, report.followed, report.known_since_ns) == (None, None, None)
    assert report.mappings[0].untold == "not_in_map"


def nothing_special(case: Case) -> None:
    pass


@pytest.mark.parametrize("change", [nothing_special, *NOTES], ids=lambda change: change.__name__)
def test_what_would_be_silence_is_said(case: Case, change: Callable[[Case], None]) -> None:
    change(case)
    assert case.report().notes == (() if change is nothing_special else (change.__name__,))


def test_a_process_whose_leader_has_ended_runs_on(case: Case) -> None:
    case.stat = case.stat._replace(state="Z", threads=3)
    report = case.report()
    assert (report.state, report.is_leader_alive, report.notes) == ("running", False, ())


# ---- a path -------------------------------------------------------------------------------------

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
    case.others = [verdict(key_of(100, generation=3), True, None)]
    assert ids_of(HERE, case.known, case.memory) == (Candidate(FileId(254, 0, 100, 3), "verdict"),)
    assert ids_of(GONE, case.known, case.memory) == ()


def test_a_file_below_an_overlay_is_identified_by_its_name_in_our_view(case: Case) -> None:
    here = replace(HERE, shown=Shown(0, 30, 100))
    assert ids_of(here, case.known, case.memory) == (Candidate(FileId(254, 0, 100, 1), "map"),)
    case.files = [known_file(File(LIBRARY, 100, root=OTHER_VIEW))]
    assert ids_of(here, case.known, case.memory) == (Candidate(FileId(0, 30, 100), "proc"),)


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
    case.others = [verdict(key_of(100), False, 12), verdict(key_of(100, root=OTHER_VIEW), True, None)]
    assert path_of(case).verdict == VerdictAnswer("ignore", 12)


# ---- what cannot be told ------------------------------------------------------------------------

CLOSED = PathFacts(LIBRARY, LIBRARY, None, "Permission denied", None, could_look=False)
A_MEMFD = PathFacts("/memfd:jit", "/memfd:jit", "memory", None, Shown(0, 1, 100))


def test_whether_it_is_the_file_of_a_path_that_may_not_be_looked_at_cannot_be_told() -> None:
    assert same_file(CLOSED, (), group(), None) is None
    assert relation_of(CLOSED, LIBRARY, is_deleted=False, is_same_file=None) == "unknown"
    assert relation_of(CLOSED, LIBRARY, is_deleted=True, is_same_file=None) == "deleted"
    assert relation_of(CLOSED, "/opt/other.so", is_deleted=False, is_same_file=None) is None


def test_a_mapping_that_may_not_be_looked_at_may_be_of_the_file_under_any_name() -> None:
    assert relation_of(HERE, LIBRARY, is_deleted=False, is_same_file=None) == "unknown"
    assert relation_of(HERE, "/opt/hard.so", is_deleted=False, is_same_file=None) == "unknown"


def test_memory_has_its_name_although_the_kernel_marks_it_as_deleted() -> None:
    assert relation_of(A_MEMFD, "/memfd:jit", is_deleted=True, is_same_file=True) == "same"
    assert relation_of(A_MEMFD, "/memfd:jit", is_deleted=True, is_same_file=False) == "other_file"
