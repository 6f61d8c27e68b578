"""Collects what an explanation is made of: `/proc`, the mapping table, the kernel side's verdicts, the files.

Runs on the caller's thread; whatever may hang is done by a `TimeoutWorker`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import MappedFile
from sowatch.engine.queries import Known
from sowatch.explain.assemble import (
    MEMORY,
    Memory,
    PathFacts,
    ProcessFacts,
    ids_of,
    path_report,
    process_report,
    relation_of,
    same_file,
)
from sowatch.explain.audit import Difference, audit
from sowatch.explain.looks import Subject, TimeoutWorker, look_at, look_at_place
from sowatch.explain.mapped import FilesByAddress, Group, Shown, group_rows
from sowatch.explain.probing import tls_answer, unprobed, unread_answer
from sowatch.explain.records import Candidate, FileLook, MappedIn, PathReport, ProcessReport, Seen
from sowatch.linux.containers import container_id
from sowatch.linux.descriptors import close_fd
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.hidepid import hides_processes
from sowatch.linux.liveness import running_stat
from sowatch.linux.memory_files import is_memory
from sowatch.linux.proc import Miss, ProcFs
from sowatch.linux.proc_parse import MapRow, Stat, as_maps_shows, seen_path
from sowatch.linux.tls_libraries import look_for_tls
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.identity import FileId
from sowatch.model.rules import Rule, RuleSet
from sowatch.sources.base import Verdicts

__all__ = ["ExplainContext", "check_process", "explain", "paths_named"]

#: Names that are shown where the one that was asked for is not mapped.
_MOST_NAMES: Final = 5
_NO_ANSWER: Final = FileLook("no_answer")
_SKIPPED: Final = FileLook("skipped", "there are too many")
#: A process may have 65,530 mappings, each of another file; what is not read within this time is not.
LOOKING_S: Final = 10.0
_TYPES: Final = (
    (stat.S_ISREG, "regular file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)


class ExplainContext(Struct, frozen=True):
    """What is asked: ``query`` and ``open_verdicts`` are those of `sowatch.engine.loop.Engine`."""

    proc: ProcFs
    rules: RuleSet
    registry: FileRegistry
    query: Callable[[int | None, Callable[[MappedFile], bool]], Known]
    open_verdicts: Callable[[], Verdicts]
    is_repaired: Callable[[], bool]
    #: Whether the mapping table is from what ``/proc`` shows us, so that it lacks processes that may not be read.
    reads_proc: bool = False
    #: What does not answer, from one question to the next; None: nobody asks again.
    hanging: HangingCalls | None = None

    @property
    def exports(self) -> frozenset[str]:
        """Symbols that some rule asks for."""
        return frozenset().union(*(rule.exports for rule in self.rules))


def explain(target: int | str | os.PathLike[str], context: ExplainContext) -> ProcessReport | PathReport:
    """The decision trail of a process (an ``int``) or of a file (its path as we see it).

    Raises:
        SowatchError: there is no such process, or no such file and nobody has one of that name mapped.
        UsageError: the id of a thread, an empty path, or one with a NUL in it.
    """
    if not isinstance(target, int):
        target = os.fspath(target)
        if not target or "\0" in target:
            raise UsageError("a path has at least one character, and none of them is NUL. Give the path of a file.")
    with TimeoutWorker(hanging=context.hanging) as worker:
        if isinstance(target, int):
            return _explain_process(target, context, worker)
        return _explain_path(target, context, worker)


# ---- a process ----------------------------------------------------------------------------------


def check_process(proc: ProcFs, pid: int) -> Stat:
    """The stat of a process.

    Raises:
        SowatchError: there is none.
        UsageError: it is one thread of a process.
    """
    status = proc.status(pid) if 0 < pid < 1 << 31 else Miss.GONE
    about = proc.stat(pid) if status else Miss.GONE
    if isinstance(status, Miss) or isinstance(about, Miss):
        raise SowatchError(f"there is no process {pid} in {proc.root}. Find the right one with `ps -e`.")
    if status.tgid != pid:
        raise UsageError(f"{pid} is a thread of process {status.tgid}. Give {status.tgid}.")
    return about


def _explain_process(pid: int, context: ExplainContext, worker: TimeoutWorker) -> ProcessReport:
    first = check_process(context.proc, pid)
    known = context.query(pid, lambda _: True)
    now_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
    facts = _facts_of(context.proc, first, worker)
    groups = () if isinstance(facts.maps, Miss) else facts.maps
    memory = _memory(context, known, {group.inode for group in groups})
    # Opening a mapping by its link in /proc waits for the same lock.
    is_unread = known.unread_since_s is not None
    looks = dict.fromkeys(groups, _NO_ANSWER) if is_unread else _looks(groups, facts, known, context, worker)
    differences = _differences(pid, context)
    last = context.proc.stat(pid)
    if isinstance(last, Miss) or last.start_ticks != first.start_ticks:
        raise SowatchError(f"process {pid} ended while it was read. Nothing to do; take the next one.")
    report = process_report(
        facts, known, memory, looks, context.rules, differences, now_ns=now_ns, monotonic_ns=monotonic_ns
    )
    tls = None if is_unread else worker.run(partial(look_for_tls, context.proc, pid), ("tls", pid))
    if tls is None or isinstance(tls, Miss):
        return replace(report, http=unread_answer(tls))
    unprobed_paths = {one.library.path for one in report.mappings if one.unprobed}
    return replace(report, http=tls_answer(tls, unprobed_paths))


def _facts_of(proc: ProcFs, about: Stat, worker: TimeoutWorker) -> ProcessFacts:
    pid = about.pid
    process = proc.process(pid, container_of=container_id)
    if process is None:
        raise SowatchError(f"process {pid} ended while it was read. Nothing to do; take the next one.")
    rows = _resolved(proc, pid, proc.executable_maps(pid), worker)
    is_32bit = proc.is_32bit(pid)
    return ProcessFacts(
        process=process,
        stat=about,
        is_32bit=is_32bit,
        exe=proc.exe(pid),
        interpreter_base=proc.interpreter_base(pid),
        maps=rows if isinstance(rows, Miss) else group_rows(rows, _root_of(proc, pid)),
        sees_our_files=_sees_our_files(proc, pid),
    )


def _resolved(proc: ProcFs, pid: int, rows: list[MapRow] | Miss, worker: TimeoutWorker) -> list[MapRow] | Miss:
    """Rows with what their text leaves open, see `ProcFs.resolve`."""
    if isinstance(rows, Miss):
        return rows
    return worker.run(partial(proc.resolve, pid, rows), ("names", pid)) or rows


def _root_of(proc: ProcFs, pid: int) -> str:
    link = proc.root_dir(pid)
    try:
        return "/" if isinstance(link, Miss) else os.readlink(link)
    except OSError:
        return "/"


def _sees_our_files(proc: ProcFs, pid: int) -> bool | None:
    """Whether its root directory and its mounts are ours."""
    tid = proc.live_thread(pid)
    try:
        if os.readlink(f"{proc.root}/{tid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            return False
        root, own = os.stat(f"{proc.root}/{tid}/root"), os.stat("/")
    except OSError:
        return None
    return (root.st_dev, root.st_ino) == (own.st_dev, own.st_ino)


def _memory(context: ExplainContext, known: Known, inodes: set[int]) -> Memory:
    keys = {file.name.key for process in known.processes.values() for file in process.files}
    with context.open_verdicts() as verdicts:
        exact = {key: verdicts.look_up(key) for key in keys}
        others = verdicts.of_inodes(inodes) if inodes else ()
    return Memory.of(
        exact,
        others,
        context.registry.blocked(),
        context.registry.files(),
        now_s=time.monotonic(),
        is_repaired=context.is_repaired(),
    )


def _looks(
    groups: Sequence[Group], facts: ProcessFacts, known: Known, context: ExplainContext, worker: TimeoutWorker
) -> dict[Group, FileLook]:
    """Reads each file, as long as there is time."""
    files = FilesByAddress(known.processes.get(facts.process.pid))
    end_s = time.monotonic() + LOOKING_S
    found: dict[Group, FileLook] = {}
    for group in groups:
        file = files.find(group)
        subject = Subject(
            pid=facts.process.pid,
            path=group.path if file is None else file.name.path,
            file_id=group.file_id if file is None else file.name.file_id,
            ranges=group.ranges,
            is_own_view=bool(facts.sees_our_files),
            is_deleted=group.is_deleted,
            changed_ns=0 if file is None else max(0, file.name.changed_ns),
        )
        if time.monotonic() > end_s:
            found[group] = _SKIPPED
        else:
            look = partial(look_at, context.proc, subject, context.exports)
            found[group] = worker.run(look, ("look", subject.pid, subject.file_id)) or _NO_ANSWER
    return found


def _differences(pid: int, context: ExplainContext) -> tuple[Difference, ...]:
    query = partial(context.query, pid, lambda _: True)
    return audit(query, context.proc, context.rules, only=pid, hanging=context.hanging).differences


def paths_named(proc: ProcFs, name: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """The paths, as processes see them, of files that are mapped and have a base name; sorted.

    Args:
        proc: the host's.
        name: the base name.
        known: paths that are wanted, too.

    Raises:
        SowatchError: there is none; names that have it as a part are shown.
    """
    found, near = set(known), set()
    for pid in proc.pids():
        rows = proc.executable_maps(pid)
        for row in () if isinstance(rows, Miss) else rows:
            base = os.fsdecode(os.path.basename(row.path))
            if base == name and row.path.startswith(b"/"):
                found.add(seen_path(os.fsdecode(row.path), _root_of(proc, pid)))
            elif name in base:
                near.add(base)
    if found:
        return tuple(sorted(found))
    others = f"; there are {', '.join(sorted(near)[:_MOST_NAMES])}" if near else ""
    raise SowatchError(
        f"no process that can be read has a file named {name!r} mapped{others}. `sowatch list` shows what is mapped; "
        f"for a file of the current directory give ./{name}."
    )


# ---- a path -------------------------------------------------------------------------------------


def _explain_path(path: str, context: ExplainContext, worker: TimeoutWorker) -> PathReport:
    found: list[PathFacts] = []
    look = worker.run(lambda: _look_at_path(path, context.exports, found.append), ("path", path)) or _NO_ANSWER
    plain = os.path.abspath(path)
    facts = (
        found[0] if found else PathFacts(plain, plain, None, "the file system does not answer", None, could_look=False)
    )
    if facts.shown is not None:
        facts = replace(facts, shown=facts.shown._replace(generation=look.generation))
    rows, unreadable = _rows_near(facts, context.proc)
    facts, look = _memory_facts(facts, look, rows, context, worker)
    inodes = {row.inode for found in rows.values() for row in found}
    if facts.shown is not None:
        inodes.add(facts.shown.inode)
    known = context.query(None, lambda name: name.file_id.inode in inodes or name.path in (facts.path, facts.resolved))
    memory = _memory(context, known, set() if facts.shown is None else {facts.shown.inode})
    ids = ids_of(facts, known, memory)
    mapped = list(_mapped(facts, ids, known, rows, context, worker, is_hugetlb=look.is_hugetlb))
    is_hidden = hides_processes(context.proc)
    if facts.file_type is None and not mapped:
        rest = f", of those that could be read: {unreadable} could not" if unreadable else ""
        rest += ", of those that /proc shows: it hides others (hidepid)" * is_hidden
        raise SowatchError(
            f"cannot read {path!r}: {facts.error}; and no process has a file of that name mapped{rest}. "
            "`sowatch list` shows what is mapped."
        )
    kind = "other" if look.elf in ("not_elf", "not_regular") else "library"
    if not context.reads_proc and isinstance(context.rules.match(facts.resolved, kind, look.exports), Rule):
        unreadable, is_hidden = 0, False  # the mapping table has all that is wanted, of every process
    return path_report(
        facts, ids, mapped, known.own_view_id, memory, look, context.rules, unreadable=unreadable, is_hidden=is_hidden
    )


def _memory_facts(
    facts: PathFacts, look: FileLook, near: Mapping[int, list[MapRow]], context: ExplainContext, worker: TimeoutWorker
) -> tuple[PathFacts, FileLook]:
    """Of a path that names nothing: those of memory that is mapped under that name."""
    if facts.shown is not None or not facts.could_look:
        return facts, look
    name = os.fsencode(facts.path)
    for pid, rows in near.items():
        for row in rows:
            if row.path == name and is_memory(FileId(row.major, row.minor, row.inode)):
                file_id = FileId(row.major, row.minor, row.inode)
                ranges = ((row.start, row.end),)
                subject = Subject(pid, facts.path, file_id, ranges, is_own_view=False, is_deleted=True)
                read = partial(look_at, context.proc, subject, context.exports)
                look = worker.run(read, ("look", pid, file_id)) or _NO_ANSWER
                shown = Shown(row.major, row.minor, row.inode)
                return replace(facts, file_type=MEMORY, error=None, shown=shown), look
    return facts, look


def _look_at_path(path: str, exports: Collection[str], emit: Callable[[PathFacts], None]) -> FileLook:
    """What stands under a path, and a read it: at one file, whatever takes its name meanwhile.

    ``emit`` is called before the file is read, which may take for ever.
    """
    plain = os.path.abspath(path)
    try:
        # O_PATH opens nothing: no device, no FIFO that would wait for a writer.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        is_absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
        facts = PathFacts(plain, plain, None, os.strerror(error.errno or 0), None, could_look=is_absent)
        emit(facts)
        return FileLook("gone" if is_absent else "not_permitted", facts.error)
    try:
        status = os.fstat(place)
        resolved = plain
        with contextlib.suppress(OSError):  # longer than a page
            resolved = os.readlink(f"/proc/self/fd/{place}")
        file_type = next((name for is_it, name in _TYPES if is_it(status.st_mode)), "something else")
        emit(PathFacts(plain, resolved, file_type, None, _shown(status)))
        look = look_at_place(place, plain, exports)
        return look if look.elf != "not_regular" else FileLook("not_regular", file_type)
    finally:
        close_fd(place)


def _shown(status: os.stat_result) -> Shown:
    return Shown(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)


def _rows_near(facts: PathFacts, proc: ProcFs) -> tuple[dict[int, list[MapRow]], int]:
    """Rows, by process, that may be of the file, or of another one under its path; and how many could not be read."""
    inode = None if facts.shown is None else facts.shown.inode
    # A chroot's paths begin with its root.
    names = tuple(as_maps_shows(os.fsencode(path)) for path in {facts.path, facts.resolved})
    found: dict[int, list[MapRow]] = {}
    unreadable = 0
    for pid in proc.pids():
        rows = proc.executable_maps(pid)
        if isinstance(rows, Miss):
            unreadable += rows not in (Miss.GONE, Miss.ABSENT) and _is_running(proc, pid)
            continue
        for row in rows:
            if row.inode == inode or as_maps_shows(row.path).endswith(names) or row.raw.endswith(names):
                found.setdefault(pid, []).append(row)
    return found, unreadable


def _is_running(proc: ProcFs, pid: int) -> bool:
    """Whether it is a process that may have something mapped."""
    stat = running_stat(proc, pid)
    return stat is Miss.DENIED if isinstance(stat, Miss) else not stat.is_kernel_thread


def _mapped(
    facts: PathFacts,
    ids: Sequence[Candidate],
    known: Known,
    near: Mapping[int, list[MapRow]],
    context: ExplainContext,
    worker: TimeoutWorker,
    *,
    is_hugetlb: bool,
) -> Iterator[MappedIn]:
    """Every process that has the file mapped, or another one under its path."""
    proc = context.proc
    file_ids = {one.id for one in ids}
    # Below an overlay the mapping table may have the file under another number than /proc shows.
    by_map = {pid for pid, one in known.processes.items() if any(file.name.file_id in file_ids for file in one.files)}
    for pid in sorted(near.keys() | by_map):
        rows = _resolved(proc, pid, proc.executable_maps(pid) if pid in by_map else near[pid], worker)
        process = known.processes.get(pid)
        record = process.process if process is not None else proc.process(pid, container_of=container_id)
        if isinstance(rows, Miss) or record is None:
            continue  # it has ended meanwhile
        files = FilesByAddress(process)
        for group in group_rows(rows, _root_of(proc, pid)):
            file = files.find(group)
            is_same = same_file(facts, file_ids, group, file)
            if is_same is None:
                is_same = worker.run(partial(_is_mapped, facts, proc, pid, group), ("mapped", pid, group.inode))
            relation = relation_of(facts, group.path, is_deleted=group.is_deleted, is_same_file=is_same)
            if relation is not None:
                load = None if file is None else file.load
                ranges, range_count = group.where
                yield MappedIn(
                    process=record,
                    path=group.path,
                    inode=group.inode,
                    relation=relation,
                    ranges=ranges,
                    in_map=file is not None,
                    seen=None if load is None else Seen(load.rule, load.cause, load.t_ns, load.time_ns),
                    range_count=range_count,
                    unprobed=unprobed(group.rows, is_hugetlb=is_hugetlb and is_same is True),
                )


def _is_mapped(facts: PathFacts, proc: ProcFs, pid: int, group: Group) -> bool | None:
    """Whether the mapping itself is of the file: stat shows both alike. None: it is not shown."""
    if facts.shown is None:
        return None
    links = proc.map_files_dir(pid)
    try:
        about = os.stat(f"{links}/{group.rows[0].start:x}-{group.rows[0].end:x}")
    except OSError:
        return None
    return facts.shown._replace(generation=None) == _shown(about)
