"""A process with one library, as `sowatch.explain` finds it: facts to change one at a time, and their report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from sowatch.bpf.records import file_and_view_of
from sowatch.engine.activation import BlockedFile, RegisteredFile
from sowatch.engine.address_space import MappedFile
from sowatch.engine.queries import Known, KnownFile, KnownProcess
from sowatch.explain import FileLook, MappedIn, Try
from sowatch.explain.assemble import Memory, PathFacts, ProcessFacts, path_report, process_report
from sowatch.explain.audit import Difference
from sowatch.explain.mapped import Group, Shown, group_rows
from sowatch.explain.records import Candidate
from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import Link, MapRow, Stat
from sowatch.model.events import Library, Load, Process
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.base import TrackedEntry, Verdict
from support.records import File, Proc, key_of

__all__ = [
    "ALL",
    "ELF",
    "HERE",
    "LIBRARY",
    "NOTES",
    "NOW_NS",
    "OTHER_VIEW",
    "UNTOLD",
    "Case",
    "group",
    "known_file",
    "mapped_in",
    "no_rule",
    "path_of",
    "row",
    "verdict",
]

NOW_NS = 1_700_000_000_000_000_000
PROCESS = Process(pid=10, start_ns=10_000_000, comm="nginx", exe="/usr/sbin/nginx")
LIBRARY = "/usr/lib/libssl.so.3"
ELF = FileLook("elf", None, "map_files", (Try("map_files", "/proc/10/map_files/1-2", None),), "aa", "libssl.so.3")
ALL = RuleSet([Rule(None, name="all")])
OTHER_VIEW = (0x7100, 0x7101)
HERE = PathFacts("/lib/libssl.so.3", LIBRARY, "regular file", None, Shown(254, 0, 100))


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
    rules: RuleSet = ALL,
) -> KnownFile:
    name = MappedFile(Proc().map(file or File()), rules)
    load = None
    if rule is not None:
        library = Library(name.path, name.file_id, kind=kind, build_id="aa", soname="libssl.so.3")
        load = Load(rule, library, PROCESS, "mmap", 7, NOW_NS - 9, ranges)
    return KnownFile(name, kind, ranges, load)


class Case:
    """A process with one library, told of as it should be; each test changes one thing."""

    def __init__(self) -> None:
        self.process = PROCESS
        self.stat = Stat(10, b"nginx", "S", 1, 10, 10, 0, 1, 1)
        self.rows: list[MapRow] | Miss = [row()]
        self.root = "/"
        self.is_32bit: bool | Miss = False
        self.exe: Link | Miss = Link("/usr/sbin/nginx", False)
        self.base = 0x9000
        self.sees_our_files: bool | None = True
        self.files: Sequence[KnownFile] = [known_file()]
        self.is_announced = True
        self.is_selected = True
        self.start_ns = 10_000_077
        self.is_known = True
        self.followed: TrackedEntry | None = TrackedEntry(10_000_077, 1, False, True, False, 1, ((0x1000, 0x2000),))
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
            replace(self.process, start_ns=self.start_ns),
            4_000,
            self.is_announced,
            self.is_selected,
            False,
            False,
            tuple(self.files),
        )
        return Known(
            {10: process} if self.is_known else {},
            self.followed,
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


# ---- why a library was not told -----------------------------------------------------------------


def no_rule(case: Case) -> None:
    case.rules = RuleSet([Rule("libz", name="z")])


def not_selected(case: Case) -> None:
    case.files = [known_file(rule=None)]
    case.is_selected = False


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


# ---- what is said about a process ---------------------------------------------------------------


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
    case.look = replace(case.look, image_kinds=frozenset({"executable"}))
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


def unread(case: Case) -> None:
    case.rows = Miss.HUNG


NOTES = [kernel_thread, zombie, no_permission, no_files, static, nothing_wanted, narrow, unread, unrepaired]


# ---- a path -------------------------------------------------------------------------------------


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


def verdict(key: bytes, is_match: bool, seconds_left: int | None) -> Verdict:
    """The answer that is filed under a struct file_key."""
    return Verdict(*file_and_view_of(key or key_of(1)), is_match, seconds_left)
