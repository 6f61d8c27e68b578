"""What an explanation is made of, and its wire form. Frozen values, no I/O."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from msgspec import UNSET, Struct, UnsetType, to_builtins

from sowatch.engine.queries import KnownProcess
from sowatch.explain.audit import Difference
from sowatch.explain.probing import AttachmentReport, TlsAnswer, attachment_line, tls_line
from sowatch.linux.wall_clock import started_ns
from sowatch.model import wire_explain as wire
from sowatch.model.events import Library, Process
from sowatch.model.identity import FileId
from sowatch.model.lines import SCHEMA, library_line, process_line, ranges_list, stamp
from sowatch.model.literals import Kind, LoadCause, Staleness
from sowatch.model.wire_explain import By, ElfState, IdSource, NotReportedReason, Relation, Unprobed, Why
from sowatch.sources.base import TrackedEntry

__all__ = [
    "Blocked",
    "Candidate",
    "FileLook",
    "MappedIn",
    "MappingReport",
    "PathReport",
    "ProcessReport",
    "RuleAnswer",
    "Seen",
    "Try",
    "VerdictAnswer",
    "difference_line",
    "explanation",
    "to_dict",
]

Range: TypeAlias = tuple[int, int]

# ---- the report ---------------------------------------------------------------------------------


class RuleAnswer(Struct, frozen=True):
    """What one rule says of a file. ``why`` not; ``missing`` are exports it asks for and the file lacks."""

    rule: str
    wants: bool
    why: Why | None = None
    missing: tuple[str, ...] = ()


class VerdictAnswer(Struct, frozen=True):
    """What the kernel side does with a file when somebody maps it.

    ``match``: it reports the mapping; ``ignore``: drops it, for ``seconds_left``; ``none``: asks;
    ``mixed``: several names, or files that it may be, have different answers.
    """

    verdict: Literal["match", "ignore", "none", "mixed"]
    seconds_left: int | None = None


class Try(Struct, frozen=True):
    """One way to open the very file, and why it did not work (None: it did).

    ``by``: ``map_files``, the kernel's own link to the mapping; ``root``, the path below the root of
    the process; ``own_view``, the path as the agent sees it; ``layer``, a layer of the overlay that shows another file
    under the path by now.
    """

    by: By
    path: str
    error: str | None


class FileLook(Struct, frozen=True):
    """A read of a file, now. ``exports`` are those that rules ask for and it has, None if unknown.

    ``generation`` is what its file system says of the inode, None if it does not show it. ``gave_up_exports``: the
    search for some was given up, ``reason`` says why.
    """

    elf: ElfState
    reason: str | None = None
    opened_by: By | None = None
    tries: tuple[Try, ...] = ()
    build_id: str | None = None
    soname: str | None = None
    exports: frozenset[str] | None = None
    generation: int | None = None
    gave_up_exports: bool = False
    #: What the kernel can start a process with it as; see `sowatch.linux.elf.ElfFacts`.
    image_kinds: frozenset[str] = frozenset()
    #: Of huge pages, where the kernel probes nothing.
    is_hugetlb: bool = False


class Blocked(Struct, frozen=True):
    """An activation that failed and will not be tried again for ``seconds_left``."""

    rule: str
    reason: str
    seconds_left: float
    path: str
    time_ns: int


class Seen(Struct, frozen=True):
    """The load that was reported: see `sowatch.model.events.LibraryEvent`."""

    rule: str
    cause: LoadCause | None
    t_ns: int | None
    time_ns: int


class MappingReport(Struct, frozen=True):
    """One file that a process has mapped executable, by ``/proc``, and what became of it.

    ``activations`` are (rule, state) of the registry; ``rule`` is the one that wants the file,
    ``rules`` has all answers. ``differences`` are ranges that the mapping table has not. ``ranges`` and
    ``range_count`` are as in `sowatch.LibraryEvent`. ``unprobed``: why some of its mappings take no probes.
    ``attachments`` are put in by what attaches, such as the agent, and what `sowatch.inventory.staleness` answers by
    `sowatch.inventory.explained`: ``stale`` is UNSET where it was not asked.
    """

    library: Library
    id_from: IdSource
    ranges: tuple[Range, ...]
    seen: Seen | None
    rule: str | None
    rules: tuple[RuleAnswer, ...]
    untold: NotReportedReason | None
    verdict: VerdictAnswer
    look: FileLook
    activations: tuple[tuple[str, str], ...]
    blocked: tuple[Blocked, ...]
    differences: tuple[Difference, ...]
    range_count: int | None = None
    unprobed: tuple[Unprobed, ...] = ()
    attachments: tuple[AttachmentReport, ...] = ()
    stale: Staleness | UnsetType | None = UNSET
    stale_reason: str | None = None
    is_same_build: bool | None = None


class ProcessReport(Struct, frozen=True):
    """A process and all it has mapped. ``notes`` are words for what would otherwise be silence.

    They are ``kernel_thread``, ``zombie``, ``no_permission`` (its mappings may not be read), ``compat``
    (32-bit: nothing is seen, it is read again and again), ``static`` (no dynamic loader),
    ``nothing_wanted`` (no rule wants any of its files), ``no_files``, ``unread`` (the kernel does
    not answer who reads its mappings: what is known may be old), ``unrepaired`` (records were lost
    and the mapping table is not repaired yet), ``published_only`` (see `sowatch.explain.published`).

    ``known`` is None if the mapping table lacks it. ``extra`` is in the table and not mapped. ``withheld`` counts the
    files of the table that no load event names, where those are left out. ``http``: why it has no HTTP flows; None
    where its files were not read.
    """

    process: Process
    state: Literal["running", "zombie", "kernel_thread"]
    threads: int
    is_leader_alive: bool
    is_32bit: bool | None
    followed: TrackedEntry | None
    known: KnownProcess | None
    known_since_ns: int | None
    mappings: tuple[MappingReport, ...]
    extra: tuple[Difference, ...]
    notes: tuple[str, ...]
    withheld: int = 0
    http: TlsAnswer | None = None


class Candidate(Struct, frozen=True):
    """An identity that a path may stand for."""

    id: FileId
    id_from: IdSource


class MappedIn(Struct, frozen=True):
    """A process that has the file, or another one under its path, mapped executable.

    ``seen`` is None if no load was reported; ``in_map``: whether the mapping table has it nevertheless. ``unprobed`` as
    of `MappingReport`.
    """

    process: Process
    path: str
    inode: int
    relation: Relation
    ranges: tuple[Range, ...]
    in_map: bool
    seen: Seen | None
    range_count: int | None = None
    unprobed: tuple[Unprobed, ...] = ()


class PathReport(Struct, frozen=True):
    """A path and the file it names, if any. ``resolved`` is where it leads.

    ``file_type`` is None if there is nothing; ``error`` then says what the kernel reported. ``rules`` are
    the answers for a process that has it mapped as a library (as ``kind``). ``notes``:
    ``not_mapped``, ``mapped_unknown`` (nobody who could be read has it), ``not_regular``, ``nothing_wants``,
    ``unrepaired``, ``published_only``.
    """

    path: str
    resolved: str
    file_type: str | None
    error: str | None
    kind: Kind
    ids: tuple[Candidate, ...]
    rule: str | None
    rules: tuple[RuleAnswer, ...]
    verdict: VerdictAnswer
    look: FileLook
    mapped: tuple[MappedIn, ...]
    activations: tuple[tuple[str, str], ...]
    blocked: tuple[Blocked, ...]
    notes: tuple[str, ...]
    unreadable: int = 0
    is_hidden: bool = False
    attachments: tuple[AttachmentReport, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether somebody else may have the file mapped, too."""
        return bool(self.unreadable or self.is_hidden)


# ---- the wire form ------------------------------------------------------------------------------


def to_dict(report: ProcessReport | PathReport) -> dict[str, Any]:
    """The one object of ``sowatch explain --json`` as a plain one."""
    found: dict[str, Any] = to_builtins(explanation(report))
    return found


def explanation(report: ProcessReport | PathReport) -> wire.ProcessReport | wire.PathReport:
    """The one object of ``sowatch explain --json``; `sowatch.cli.explain` describes it."""
    return _process_report(report) if isinstance(report, ProcessReport) else _path_report(report)


def _process_report(report: ProcessReport) -> wire.ProcessReport:
    followed, known = report.followed, report.known
    return wire.ProcessReport(
        SCHEMA,
        "explain",
        "process",
        process_line(report.process),
        report.state,
        report.threads,
        report.is_leader_alive,
        None if report.is_32bit is None else 32 if report.is_32bit else 64,
        followed
        and wire.Kernel(
            followed.activity > 0,
            followed.activity,
            followed.range_count,
            ranges_list(followed.ranges),
            followed.needs_rescan,
            followed.shares_vm,
        ),
        known
        and wire.Map(
            None if report.known_since_ns is None else stamp(report.known_since_ns),
            known.since_ns,
            len(known.files),
            known.is_announced,
            known.awaits_rescan,
            len(known.files),
        ),
        [_mapping(one) for one in report.mappings],
        [difference_line(one) for one in report.extra],
        report.withheld,
        list(report.notes),
        None if report.http is None else tls_line(report.http),
        stamp(started_ns(report.process.start_ns)),
        1,
    )


def _mapping(one: MappingReport) -> wire.MappingReport:
    return wire.MappingReport(
        library=library_line(one.library),
        id_from=one.id_from,
        ranges=ranges_list(one.ranges),
        range_count=UNSET if one.range_count is None else one.range_count,
        seen=_seen(one.seen),
        rule=one.rule,
        rules=[_rule(answer) for answer in one.rules],
        untold=one.untold,
        verdict=_verdict(one.verdict),
        file=_look(one.look),
        activations=[wire.Active(rule, state) for rule, state in one.activations],
        blocked=[_blocked(block) for block in one.blocked],
        differences=[difference_line(difference) for difference in one.differences],
        unprobed=list(one.unprobed),
        attachments=[attachment_line(each) for each in one.attachments],
        stale=one.stale,
        stale_reason=UNSET if one.stale is UNSET else one.stale_reason,
        same_build=UNSET if one.is_same_build is None else one.is_same_build,
    )


def _path_report(report: PathReport) -> wire.PathReport:
    return wire.PathReport(
        schema=SCHEMA,
        event="explain",
        target="path",
        path=report.path,
        resolved=report.resolved,
        type=report.file_type,
        error=report.error,
        ids=[
            wire.FileIdentity(one.id.dev, one.id.inode, one.id.generation, one.id.subvolume, one.id_from)
            for one in report.ids
        ],
        kind=report.kind,
        rule=report.rule,
        rules=[_rule(answer) for answer in report.rules],
        verdict=_verdict(report.verdict),
        file=_look(report.look, with_facts=True),
        activations=[wire.Active(rule, state) for rule, state in report.activations],
        blocked=[_blocked(block) for block in report.blocked],
        attachments=[attachment_line(each) for each in report.attachments],
        mapped=[
            wire.MappedIn(
                process=process_line(one.process),
                path=one.path,
                inode=one.inode,
                relation=one.relation,
                ranges=ranges_list(one.ranges),
                range_count=UNSET if one.range_count is None else one.range_count,
                in_map=one.in_map,
                seen=_seen(one.seen),
                unprobed=list(one.unprobed),
            )
            for one in report.mapped
        ],
        notes=list(report.notes),
        unreadable=report.unreadable if report.is_open else UNSET,
        hidden=report.is_hidden if report.is_open else UNSET,
        seq=1,
    )


def _seen(seen: Seen | None) -> wire.Seen | None:
    return None if seen is None else wire.Seen(seen.rule, seen.cause, seen.t_ns, stamp(seen.time_ns))


def _rule(answer: RuleAnswer) -> wire.RuleAnswer:
    return wire.RuleAnswer(answer.rule, answer.wants, answer.why, list(answer.missing))


def _verdict(one: VerdictAnswer) -> wire.VerdictAnswer:
    return wire.VerdictAnswer(one.verdict, one.seconds_left, one.verdict)


def _look(look: FileLook, *, with_facts: bool = False) -> wire.FileLook:
    return wire.FileLook(
        look.opened_by,
        [wire.Try(one.by, one.path, one.error) for one in look.tries],
        look.elf,
        look.reason,
        None if look.exports is None else sorted(look.exports),
        look.build_id if with_facts else UNSET,
        look.soname if with_facts else UNSET,
    )


def _blocked(block: Blocked) -> wire.Blocked:
    since = stamp(block.time_ns)
    return wire.Blocked(block.rule, block.reason, round(block.seconds_left, 3), block.path, since)


def difference_line(one: Difference) -> wire.Difference:
    """What the table and ``/proc`` do not agree on, of one process."""
    return wire.Difference(one.kind, one.path, one.inode, [f"{one.start:x}", f"{one.end:x}"])
