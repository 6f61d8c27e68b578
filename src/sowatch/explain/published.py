"""Explanations from the published map only, for askers without the agent's rights.

Nothing is opened or resolved in a file system: a client over TCP must not learn through the agent what
the kernel would not let them see. Only files that some load event names are known here, by the path of that event or by
their build id, and processes; everything else is answered as if it did not exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from sowatch.engine.queries import Known, KnownFile, KnownProcess
from sowatch.explain.assemble import Memory, answers, verdict_of
from sowatch.explain.gather import ExplainContext, check_process
from sowatch.explain.records import (
    Candidate,
    FileLook,
    MappedIn,
    MappingReport,
    PathReport,
    ProcessReport,
    RuleAnswer,
    Seen,
)
from sowatch.linux.proc import ProcFs
from sowatch.linux.proc_parse import Stat
from sowatch.model.errors import SowatchError
from sowatch.model.events import Load, Process
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.rules import RuleSet
from sowatch.model.wire_explain import Relation

__all__ = ["Published", "explain_published_file", "explain_published_process"]

#: Why the file itself was not asked.
_REASON: Final = "no file is opened for this answer; the facts are those of the load event"


class Published(Struct, frozen=True):
    """What is asked: ``context`` as for `sowatch.explain.explain`, ``loads`` are the load events of everything held."""

    context: ExplainContext
    loads: Callable[[], Mapping[ProcessId, Mapping[FileId, Load]]]


def explain_published_file(published: Published, *, path: str | None = None, build_id: str | None = None) -> PathReport:
    """Who has a file mapped, by the path of its load events or by its build id; one of the two is given.

    Raises:
        SowatchError: no load event that is still in force names it.
    """
    context = published.context
    found = [
        load
        for files in published.loads().values()
        for load in files.values()
        if (load.library.path == path if build_id is None else load.library.build_id == build_id)
    ]
    if not found:
        what = path if build_id is None else f"build id {build_id}"
        raise SowatchError(f"no process has {what!r} mapped, as far as this watch reports. See /inventory.")
    first = found[0].library
    ids = tuple(dict.fromkeys(load.library.id for load in found))
    known = context.query(None, lambda name: name.file_id in ids)
    memory = _memory(known, context)
    shown_path = first.path if path is None else path
    rules = _answers(context.rules, shown_path, first.kind, found[0].rule)
    mapped = [one for process in known.processes.values() for one in _mapped(process, ids, shown_path)]
    return PathReport(
        path=shown_path,
        resolved=shown_path,
        file_type="regular file" if first.kind != "other" else "something else",
        error=None,
        kind=first.kind,
        ids=tuple(Candidate(file_id, "map") for file_id in ids),
        rule=found[0].rule,
        rules=rules,
        verdict=verdict_of(memory.exact.values()),
        look=FileLook("skipped", _REASON, build_id=first.build_id, soname=first.soname),
        mapped=tuple(sorted(mapped, key=lambda one: one.process.pid)),
        activations=memory.activations(ids),
        blocked=memory.blocks(lambda one: one.id in ids),
        notes=tuple(_notes(memory)),
    )


def explain_published_process(published: Published, pid: int) -> ProcessReport:
    """What a process has mapped of what this watch reports.

    Raises:
        SowatchError: there is no such process.
        UsageError: it is one thread of a process.
    """
    context = published.context
    about = check_process(context.proc, pid)
    known = context.query(pid, lambda _: True)
    memory = _memory(known, context)
    now_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
    process = known.processes.get(pid)
    if process is not None and not process.process.id.same_tick(ProcessId(pid, about.start_ns)):
        process = None
    mappings = tuple(_mappings(process, context.rules, memory))
    withheld = 0 if process is None else len(process.files) - len(mappings)
    return ProcessReport(
        process=_record(context.proc, about) if process is None else process.process,
        state=_state(about),  # type: ignore[arg-type]
        threads=about.threads,
        is_leader_alive=not about.is_dead,
        is_32bit=None,
        # Its ranges may be of files that no load event names.
        followed=None if process is None or known.tracked is None else known.tracked._replace(ranges=()),
        known=process,
        known_since_ns=None if process is None else now_ns - (monotonic_ns - process.since_ns),
        mappings=mappings,
        extra=(),
        notes=(*(["zombie"] if _state(about) == "zombie" else []), *_notes(memory)),
        withheld=withheld,
    )


def _state(about: Stat) -> str:
    if about.is_kernel_thread:
        return "kernel_thread"
    return "zombie" if about.is_dead and about.threads < 2 else "running"


def _record(proc: ProcFs, about: Stat) -> Process:
    """A process without published loads, from what every user may read: no link is resolved, no cgroup reported."""
    status = proc.status(about.pid)
    return Process(
        pid=about.pid,
        start_ns=about.start_ns,
        ppid=about.ppid,
        comm=about.comm.decode("utf-8", "surrogateescape"),
        uid=status.uid if status else None,
    )


def _memory(known: Known, context: ExplainContext) -> Memory:
    keys = {file.name.key for process in known.processes.values() for file in process.files if file.load is not None}
    with context.open_verdicts() as verdicts:
        exact = {key: verdicts.look_up(key) for key in keys}
    registry = context.registry
    return Memory.of(
        exact,
        (),
        registry.blocked(),
        registry.files(),
        now_s=time.monotonic(),
        is_repaired=context.is_repaired(),
    )


def _notes(memory: Memory) -> Iterator[str]:
    yield "published_only"
    if not memory.is_repaired:
        yield "unrepaired"


def _answers(rules: RuleSet, path: str, kind: str, winner: str) -> tuple[RuleAnswer, ...]:
    """What each rule says. Of the exports only those are known that the rule of the load asked for."""
    rule = rules.named(winner)
    return answers(rules, path, kind, frozenset() if rule is None else rule.exports)


def _seen(load: Load) -> Seen:
    return Seen(load.rule, load.cause, load.t_ns, load.time_ns)


def _published(process: KnownProcess) -> Iterator[tuple[KnownFile, Load]]:
    for file in process.files:
        if file.load is not None:
            yield file, file.load


def _mappings(process: KnownProcess | None, rules: RuleSet, memory: Memory) -> Iterator[MappingReport]:
    for file, load in () if process is None else _published(process):
        library = load.library
        yield MappingReport(
            library=library,
            id_from="map",
            ranges=file.ranges,
            range_count=file.range_count,
            seen=_seen(load),
            rule=load.rule,
            rules=_answers(rules, library.path, library.kind, load.rule),
            untold=None,
            verdict=verdict_of([memory.exact.get(file.name.key)]),
            look=FileLook("skipped", _REASON, build_id=library.build_id, soname=library.soname),
            activations=memory.activations([library.id]),
            blocked=memory.blocks(lambda one, file_id=library.id: one.id == file_id),  # type: ignore[misc]
            differences=(),
        )


def _mapped(process: KnownProcess, ids: Sequence[FileId], path: str) -> Iterator[MappedIn]:
    for file, load in _published(process):
        library = load.library
        if library.id not in ids:
            continue
        relation: Relation = "deleted" if library.deleted else "same" if library.path == path else "other_name"
        yield MappedIn(
            process=process.process,
            path=library.path,
            inode=library.id.inode,
            relation=relation,
            ranges=file.ranges,
            range_count=file.range_count,
            in_map=True,
            seen=_seen(load),
        )
