"""Builds reports from gathered facts: pure, without I/O, threads or a clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Final, Self

from msgspec import Struct
from msgspec.structs import replace

from sowatch.engine.activation import BlockedFile, RegisteredFile
from sowatch.engine.file_inspector import FileFacts
from sowatch.engine.queries import Known, KnownFile, KnownProcess
from sowatch.explain.audit import Difference
from sowatch.explain.mapped import FilesByAddress, Group, Shown
from sowatch.explain.probing import unprobed
from sowatch.explain.records import (
    Blocked,
    Candidate,
    FileLook,
    MappedIn,
    MappingReport,
    PathReport,
    ProcessReport,
    RuleAnswer,
    Seen,
    VerdictAnswer,
)
from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import Link, Stat
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.literals import Kind
from sowatch.model.rules import RuleSet
from sowatch.model.wire_explain import IdSource, NotReportedReason, Relation, Why
from sowatch.sources.base import Verdict

__all__ = [
    "MEMORY",
    "Memory",
    "PathFacts",
    "ProcessFacts",
    "answers",
    "ids_of",
    "path_report",
    "process_report",
    "relation_of",
    "same_file",
    "verdict_of",
]

MEMORY: Final = "memory"  # the type of file of a path like ``/memfd:NAME``
_SEGMENTS: Final = ("/SYSV", "/dev/zero")  # that no directory holds; see `MappedFile.is_anonymous`


class ProcessFacts(Struct, frozen=True):
    """What ``/proc`` shows of a process. ``maps`` are its files; ``interpreter_base`` is 0 without one.

    ``sees_our_files``: its root is ours; None: not known.
    """

    process: Process
    stat: Stat
    is_32bit: bool | Miss
    exe: Link | Miss
    interpreter_base: int
    maps: tuple[Group, ...] | Miss
    sees_our_files: bool | None


class Memory(Struct, frozen=True):
    """What is remembered of files: verdicts of the kernel side, blocked and registered files.

    ``exact`` has the verdicts for the names in the mapping table, ``others``, by inode number, those that may be of a
    file of which ``/proc`` shows no more. ``now_s`` is the registry's clock.
    """

    exact: Mapping[Hashable, Verdict | None]
    others: Mapping[int, Sequence[Verdict]]
    blocked: Sequence[BlockedFile]
    registered: Mapping[FileId, Sequence[RegisteredFile]]
    now_s: float
    is_repaired: bool

    @classmethod
    def of(
        cls,
        exact: Mapping[Hashable, Verdict | None],
        others: Iterable[Verdict],
        blocked: Sequence[BlockedFile],
        registered: Iterable[RegisteredFile],
        *,
        now_s: float,
        is_repaired: bool,
    ) -> Self:
        """From plain lists: a process may have tens of thousands of files, so they are looked up, not searched."""
        by_inode: dict[int, list[Verdict]] = {}
        for verdict in others:
            by_inode.setdefault(verdict.file_id.inode, []).append(verdict)
        by_id: dict[FileId, list[RegisteredFile]] = {}
        for one in registered:
            by_id.setdefault(one.library.id, []).append(one)
        return cls(exact, by_inode, blocked, by_id, now_s, is_repaired)

    def about(self, shown: Shown, views: Collection[Hashable]) -> list[Verdict]:
        """The answers that may be about a file; those on its very device, if there are any."""
        found = [
            one
            for one in self.others.get(shown.inode, ())
            if shown.could_be(one.file_id) and (not views or one.view in views)
        ]
        certain = [one for one in found if one.file_id.dev == shown.dev]
        return certain or found

    def blocks(self, is_it: Callable[[BlockedFile], bool]) -> tuple[Blocked, ...]:
        """The files on the blocklist that are it."""
        return tuple(
            Blocked(one.rule, one.reason, max(0.0, one.expires_s - self.now_s), one.sample_path, one.time_ns)
            for one in self.blocked
            if is_it(one)
        )

    def activations(self, ids: Iterable[FileId]) -> tuple[tuple[str, str], ...]:
        """(rule, state) of every file with one of these identities."""
        return tuple((one.rule, one.state) for file_id in ids for one in self.registered.get(file_id, ()))


class PathFacts(Struct, frozen=True):
    """What a path stands for here. ``shown`` is None if there is nothing, or not ``could_look``; ``error`` says why."""

    path: str
    resolved: str
    file_type: str | None
    error: str | None
    shown: Shown | None
    could_look: bool = True


# ---- rules --------------------------------------------------------------------------------------


def answers(
    rules: RuleSet, path: str, kind: str, exports: frozenset[str] | None, *, gave_up_exports: bool = False
) -> tuple[RuleAnswer, ...]:
    """What each rule says of a file, in order; at most one wants it. As `sowatch.model.rules.RuleSet.match`.

    >>> from sowatch.model.rules import Rule
    >>> answers(RuleSet([Rule("ssl"), Rule("/usr")]), "/usr/lib/libz.so", "library", None)[0].why
    'pattern'
    """
    found: list[RuleAnswer] = []
    # A rule whose exports could not be read stands in the way of all that follow.
    is_settled = False
    for rule in rules:
        why: Why | None = None
        missing: tuple[str, ...] = ()
        if not rule.matches_path(path):
            why = "pattern"
        elif kind not in rule.kind:
            why = "kind"
        elif rule.exports and exports is None:
            why = "exports_unknown"
        elif rule.exports and not rule.exports <= (exports or frozenset()):
            why = "exports_given_up" if gave_up_exports else "exports"
            missing = tuple(sorted(rule.exports - (exports or frozenset())))
        elif is_settled:
            why = "earlier_rule"
        is_settled |= why in (None, "exports_unknown")
        found.append(RuleAnswer(rule.name, why is None, why, missing))
    return tuple(found)


def _winner(found: Iterable[RuleAnswer]) -> str | None:
    return next((answer.rule for answer in found if answer.wants), None)


# ---- which file is it -----------------------------------------------------------------------------


def verdict_of(verdicts: Iterable[Verdict | None]) -> VerdictAnswer:
    """Several answers, one for each name and view, as one."""
    found = [one for one in verdicts if one is not None]
    if not found:
        return VerdictAnswer("none")
    if all(one.is_match for one in found):
        return VerdictAnswer("match")
    if any(one.is_match for one in found):
        return VerdictAnswer("mixed")
    return VerdictAnswer("ignore", max(one.seconds_left or 0 for one in found))


def _seen(file: KnownFile | None) -> Seen | None:
    load = None if file is None else file.load
    return None if load is None else Seen(load.rule, load.cause, load.t_ns, load.time_ns)


# ---- a process ----------------------------------------------------------------------------------


def process_report(
    facts: ProcessFacts,
    known: Known,
    memory: Memory,
    looks: Mapping[Group, FileLook],
    rules: RuleSet,
    differences: Sequence[Difference],
    *,
    now_ns: int,
    monotonic_ns: int,
) -> ProcessReport:
    """Puts a process's report together.

    Args:
        facts: what ``/proc`` says.
        known: what map and kernel side know.
        memory: what is remembered of files.
        looks: at the files in ``facts.maps``.
        rules: the watch's.
        differences: what the audit found.
        now_ns: the wall clock.
        monotonic_ns: CLOCK_MONOTONIC at that moment.
    """
    process = facts.process
    known_process = known.processes.get(process.pid)
    if known_process is not None and not known_process.process.id.same_tick(process.id):
        known_process = None
    followed = known.tracked
    if followed is not None and not process.id.same_tick(process.id._replace(start_ns=followed.start_ns)):
        followed = None
    kernel_start_ns = [one.start_ns for one in (followed, known_process and known_process.process) if one is not None]
    if kernel_start_ns:
        process = replace(process, start_ns=kernel_start_ns[0])
    groups = () if isinstance(facts.maps, Miss) else facts.maps
    files = FilesByAddress(known_process)
    views = {file.name.view for file in (known_process.files if known_process else ()) if file.name.view is not None}
    if facts.sees_our_files and known.own_view_id is not None:
        views.add(known.own_view_id)
    at = {(one.start, one.end): one for one in differences}
    mappings = tuple(
        _mapping(
            group,
            facts,
            files.find(group),
            memory,
            looks[group],
            rules,
            views,
            untold=lambda file, rule: _reason(file, known_process, known, rule),
            differences=tuple(at[span] for span in group.ranges if span in at),
        )
        for group in groups
    )
    reported = {difference for mapping in mappings for difference in mapping.differences}
    state = "kernel_thread" if facts.stat.is_kernel_thread else "running"
    if facts.stat.is_dead and facts.stat.threads < 2:
        state = "zombie"
    return ProcessReport(
        process=process,
        state=state,  # type: ignore[arg-type]
        threads=facts.stat.threads,
        is_leader_alive=not facts.stat.is_dead,
        is_32bit=None if isinstance(facts.is_32bit, Miss) else facts.is_32bit,
        followed=followed,
        known=known_process,
        known_since_ns=None if known_process is None else now_ns - (monotonic_ns - known_process.since_ns),
        mappings=mappings,
        extra=tuple(one for one in differences if one not in reported),
        notes=tuple(_notes(facts, state, mappings, memory, is_unread=known.unread_since_s is not None)),
    )


def _notes(
    facts: ProcessFacts, state: str, mappings: Sequence[MappingReport], memory: Memory, *, is_unread: bool
) -> Iterable[str]:
    if state != "running":
        yield state
    elif facts.maps is Miss.DENIED:
        yield "no_permission"
    elif facts.maps is Miss.HUNG:
        pass
    elif not mappings:
        yield "no_files"
    else:
        if not facts.interpreter_base and not any(one.library.kind == "library" for one in mappings):
            yield "static"
        if not any(one.rule for one in mappings):
            yield "nothing_wanted"
    if facts.is_32bit is True:
        yield "narrow"
    if is_unread or facts.maps is Miss.HUNG:
        yield "unread"
    if not memory.is_repaired:
        yield "unrepaired"


def _mapping(
    group: Group,
    facts: ProcessFacts,
    file: KnownFile | None,
    memory: Memory,
    look: FileLook,
    rules: RuleSet,
    views: Collection[Hashable],
    *,
    untold: Callable[[KnownFile | None, str | None], NotReportedReason],
    differences: tuple[Difference, ...],
) -> MappingReport:
    shown = group.shown(look.generation)
    about = memory.about(shown, views)
    file_id, id_from = shown.file_id, "proc"
    if file is not None:
        file_id, id_from = file.name.file_id, "map"
    elif len(found := {one.file_id for one in about}) == 1:
        file_id, id_from = found.pop(), "verdict"
    path = group.path if file is None else file.name.path
    kind = _kind_of(group, facts, file, look)
    rule_answers = answers(rules, path, kind, look.exports, gave_up_exports=look.gave_up_exports)
    seen = _seen(file)
    rule = seen.rule if seen else _winner(rule_answers)
    ranges, range_count = group.where
    load = None if file is None else file.load
    return MappingReport(
        library=Library(
            path=path,
            id=file_id,
            host_path=next((one.path for one in look.tries if one.error is None), None),
            kind=kind,
            build_id=look.build_id if load is None else load.library.build_id or look.build_id,
            soname=look.soname if load is None else load.library.soname or look.soname,
            deleted=group.is_deleted,
            path_partial=file is not None and file.name.is_partial,
        ),
        id_from=id_from,  # type: ignore[arg-type]
        ranges=ranges,
        range_count=range_count,
        seen=seen,
        rule=rule,
        rules=rule_answers,
        untold=None if seen else untold(file, rule),
        verdict=verdict_of(about if file is None else [memory.exact.get(file.name.key)]),
        look=look,
        activations=memory.activations([file_id]),
        blocked=memory.blocks(lambda one: shown.could_be(one.id) if id_from == "proc" else one.id == file_id),
        differences=differences,
        unprobed=unprobed(group.rows, is_hugetlb=look.is_hugetlb),
    )


def _kind_of(group: Group, facts: ProcessFacts, file: KnownFile | None, look: FileLook) -> Kind:
    """What the file is to the process, by the rules of mapping table and publisher."""
    if file is not None and file.load is not None:
        return file.load.library.kind
    kind: Kind = "library" if file is None else file.kind
    if file is None:
        exe = facts.exe
        if not isinstance(exe, Miss) and exe.path.encode("utf-8", "surrogateescape") == group.rows[0].path:
            kind = "executable"
        elif facts.interpreter_base in {row.start - row.offset_bytes for row in group.rows} - {0}:
            kind = "interpreter"
        elif look.elf == "not_regular" or (group.is_deleted and group.path.startswith(_SEGMENTS)):
            return "other"
    is_elf = True if look.elf in ("elf", "partial") else False if look.elf == "not_elf" else None
    is_memfd = group.is_deleted and group.path.startswith("/memfd:") and "/" not in group.path[5:]
    return FileFacts(is_elf, image_kinds=look.image_kinds).kind(kind, group.path, is_anonymous=is_memfd)


def _reason(file: KnownFile | None, process: KnownProcess | None, known: Known, rule: str | None) -> NotReportedReason:
    if rule is None:
        return "no_rule"
    if file is None or process is None:
        return "not_in_map"
    if not process.is_selected:
        return "not_selected"
    if not process.is_announced:
        return "passing"
    if known.is_waiting_for_facts:
        return "awaiting_facts"
    return "baseline" if known.is_silent_start else "unresolved"


# ---- a path -------------------------------------------------------------------------------------


def relation_of(facts: PathFacts, path: str, *, is_deleted: bool, is_same_file: bool | None) -> Relation | None:
    """How a mapped file is related to the path; None: not at all. ``is_same_file`` is None if not known."""
    is_same_path = path in (facts.path, facts.resolved)
    is_deleted &= facts.file_type != MEMORY  # memory never had a name that could be gone
    if is_same_file:
        return "same" if is_same_path and not is_deleted else "other_name"
    if is_same_file is None and (facts.shown is not None or is_same_path):
        return "deleted" if is_same_path and is_deleted else "unknown"
    if not is_same_path:
        return None
    return "deleted" if is_deleted else "other_file"


def ids_of(facts: PathFacts, known: Known, memory: Memory) -> tuple[Candidate, ...]:
    """The identities that the path may stand for, the kernel's own first."""
    shown = facts.shown
    if shown is None:
        return ()
    found: dict[FileId, IdSource] = {}
    for process in known.processes.values():
        for file in process.files:
            name = file.name
            is_named = name.path == facts.resolved and name.view == known.own_view_id
            if shown.could_be(name.file_id) and (name.file_id.dev == shown.dev or is_named):
                found[name.file_id] = "map"
    for one in memory.about(shown, {known.own_view_id} if known.own_view_id is not None else ()):
        found.setdefault(one.file_id, "verdict")
    if not found:
        found[shown.file_id] = "proc"
    return tuple(Candidate(file_id, id_from) for file_id, id_from in found.items())


def path_report(
    facts: PathFacts,
    ids: tuple[Candidate, ...],
    mapped: Sequence[MappedIn],
    own_view_id: Hashable,
    memory: Memory,
    look: FileLook,
    rules: RuleSet,
    *,
    unreadable: int = 0,
    is_hidden: bool = False,
) -> PathReport:
    """Puts a path's report together.

    Args:
        facts: what the path stands for.
        ids: see `ids_of`.
        mapped: who has it, or another file under its path, mapped.
        own_view_id: the agent's root, see `Known`.
        memory: what is remembered of files.
        look: at the file.
        rules: the watch's.
        unreadable: processes that may have it mapped, too.
        is_hidden: ``/proc`` does not show all processes.
    """
    kind: Kind = "other" if look.elf in ("not_elf", "not_regular") else "library"
    rule_answers = answers(rules, facts.resolved, kind, look.exports, gave_up_exports=look.gave_up_exports)
    rule = _winner(rule_answers)
    file_ids = {one.id for one in ids}
    shown = facts.shown
    about = () if shown is None else memory.about(shown, {own_view_id} if own_view_id is not None else ())

    def is_it(one: BlockedFile) -> bool:
        if shown is None:
            return one.sample_path in (facts.path, facts.resolved)
        return one.id in file_ids or (ids[0].id_from == "proc" and shown.could_be(one.id))

    notes = []
    may_be_mapped = facts.file_type in (None, "regular file", MEMORY)
    if not may_be_mapped:
        notes.append("not_regular")
    if not any(one.relation in ("same", "other_name") for one in mapped):
        is_open = unreadable or is_hidden or not facts.could_look or any(one.relation == "unknown" for one in mapped)
        if is_open and may_be_mapped:
            notes.append("mapped_unknown")
        elif facts.file_type is not None:
            notes.append("not_mapped")
    if rule is None:
        notes.append("nothing_wants")
    if not memory.is_repaired:
        notes.append("unrepaired")
    return PathReport(
        path=facts.path,
        resolved=facts.resolved,
        file_type=facts.file_type,
        error=facts.error,
        kind=kind,
        ids=ids,
        rule=rule,
        rules=rule_answers,
        verdict=verdict_of(about),
        look=look,
        mapped=tuple(mapped),
        activations=memory.activations(file_ids),
        blocked=memory.blocks(is_it),
        notes=tuple(notes),
        unreadable=unreadable,
        is_hidden=is_hidden,
    )


def same_file(facts: PathFacts, ids: Collection[FileId], group: Group, file: KnownFile | None) -> bool | None:
    """Whether rows show the file that the path names; None: only the mapping itself can show it."""
    shown = facts.shown
    if shown is None:
        return False if facts.could_look else None
    if file is not None and file.name.file_id in ids:
        return True
    # While it is mapped nobody else can get its number, so the generation need not be asked.
    if group.shown() == shown._replace(generation=None):
        return True
    return None if group.inode == shown.inode and group.major == shown.major == 0 else False
