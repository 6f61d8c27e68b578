"""Collects what an explanation is made of: `/proc`, the map, the kernel side's memory, the files.

Runs on the caller's thread; whatever may hang is done aside.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from sowatch.engine.activation import FileRegistry
from sowatch.engine.address_space import Name
from sowatch.engine.queries import Known, View
from sowatch.explain.assemble import (
    FilesByAddress,
    Group,
    Memory,
    PathFacts,
    ProcessFacts,
    Shown,
    group_rows,
    ids_of,
    path_report,
    process_report,
    relation_of,
    same_file,
)
from sowatch.explain.audit import Difference, audit
from sowatch.explain.looks import Aside, Subject, look_at, look_at_place
from sowatch.explain.records import Candidate, FileLook, MappedIn, PathReport, ProcessReport, Seen
from sowatch.linux.containers import container_id
from sowatch.linux.proc import MapRow, Miss, ProcFs, Stat
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.rules import RuleSet

__all__ = ["Desk", "check_process", "explain"]

_AT_BASE: Final = 7
_NO_ANSWER: Final = FileLook("no_answer")
_SKIPPED: Final = FileLook("skipped", "there are too many")
#: A process may have 65,530 mappings, each of another file; what is not looked at within this time is not.
LOOKING_S: Final = 10.0
_TYPES: Final = (
    (stat.S_ISREG, "regular file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)


@dataclass(frozen=True, slots=True)
class Desk:
    """What is asked: ``ask_map`` is `sowatch.engine.loop.Engine.known`, ``view`` its `view`, on its thread."""

    proc: ProcFs
    rules: RuleSet
    registry: FileRegistry
    ask_map: Callable[[int | None, Callable[[Name], bool]], Known]
    view: Callable[[], View]
    is_repaired: Callable[[], bool]

    @property
    def exports(self) -> frozenset[str]:
        """Symbols that some rule asks for."""
        return frozenset().union(*(rule.exports for rule in self.rules))


def explain(target: int | str | os.PathLike[str], desk: Desk) -> ProcessReport | PathReport:
    """The decision trail of a process (an ``int``) or of a file (its path as we see it).

    Raises:
        SowatchError: there is no such process, or no such file and nobody has one of that name mapped.
        UsageError: the id of a thread, an empty path, or one with a NUL in it.
    """
    with Aside() as aside:
        if isinstance(target, int):
            return _explain_process(target, desk, aside)
        return _explain_path(os.fspath(target), desk, aside)


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
        raise SowatchError(f"there is no process {pid} in {proc.root}. Look for the right one with `ps -e`.")
    if status.tgid != pid:
        raise UsageError(f"{pid} is a thread of process {status.tgid}. Give {status.tgid}.")
    return about


def _explain_process(pid: int, desk: Desk, aside: Aside) -> ProcessReport:
    first = check_process(desk.proc, pid)
    known = desk.ask_map(pid, lambda _: True)
    now_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
    with known.verdicts:
        facts = _facts_of(desk.proc, first, aside)
        groups = () if isinstance(facts.maps, Miss) else facts.maps
        memory = _memory(desk, known, {group.inode for group in groups})
    # Who would look through its own link to a mapping waits behind the same lock.
    is_unread = known.unread_since_s is not None
    looks = dict.fromkeys(groups, _NO_ANSWER) if is_unread else _looks(groups, facts, known, desk, aside)
    differences = _differences(pid, desk)
    last = desk.proc.stat(pid)
    if isinstance(last, Miss) or last.start_ticks != first.start_ticks:
        raise SowatchError(f"process {pid} ended while it was looked at. Nothing to do; look for the next one.")
    return process_report(
        facts, known, memory, looks, desk.rules, differences, now_ns=now_ns, monotonic_ns=monotonic_ns
    )


def _facts_of(proc: ProcFs, about: Stat, aside: Aside) -> ProcessFacts:
    pid = about.pid
    process = proc.process(pid, container_of=container_id)
    if process is None:
        raise SowatchError(f"process {pid} ended while it was looked at. Nothing to do; look for the next one.")
    rows = _settled(proc, pid, proc.executable_maps(pid), aside)
    is_32bit = proc.is_32bit(pid)
    return ProcessFacts(
        process=process,
        stat=about,
        is_32bit=is_32bit,
        exe=proc.exe(pid),
        interpreter_base=_interpreter_base(proc, pid, is_narrow=is_32bit is True),
        maps=rows if isinstance(rows, Miss) else group_rows(rows, _root_of(proc, pid)),
        sees_our_files=_sees_our_files(proc, pid),
    )


def _settled(proc: ProcFs, pid: int, rows: list[MapRow] | Miss, aside: Aside) -> list[MapRow] | Miss:
    """Rows with ``is_deleted`` as it is: the text alone cannot tell, see `ProcFs.settle_deleted`."""
    if isinstance(rows, Miss):
        return rows
    asked: dict[tuple[bytes, int], bool] = {}
    settled = []
    end_s = time.monotonic() + LOOKING_S
    for row in rows:
        if row.is_deleted and not row.path.startswith((b"/memfd:", b"/SYSV", b"/dev/zero")):
            file = (row.path, row.inode)
            if file not in asked and time.monotonic() > end_s:
                asked[file] = True
            if file not in asked:
                answer = aside.run(partial(proc.settle_deleted, pid, row))
                asked[file] = answer is None or answer.is_deleted
            if not asked[file]:
                row = row._replace(path=row.shown_path, is_deleted=False)  # noqa: PLW2901
        settled.append(row)
    return settled


def _interpreter_base(proc: ProcFs, pid: int, *, is_narrow: bool) -> int:
    """Where exec mapped the dynamic loader; 0 if there is none, or it cannot be told."""
    try:
        with open(f"{proc.root}/{proc.live_thread(pid)}/auxv", "rb") as file:
            vector: dict[int, int] = dict(struct.iter_unpack("=II" if is_narrow else "=QQ", file.read(1024)))
            return vector.get(_AT_BASE, 0)
    except (OSError, struct.error):
        return 0


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


def _memory(desk: Desk, known: Known, inodes: set[int]) -> Memory:
    verdicts = known.verdicts
    keys = {file.name.key for process in known.processes.values() for file in process.files}
    return Memory.of(
        {key: verdicts.look_up(key) for key in keys},
        verdicts.of_inodes(inodes) if inodes else (),
        desk.registry.blocked(),
        desk.registry.files(),
        now_s=time.monotonic(),
        is_repaired=desk.is_repaired(),
    )


def _looks(
    groups: Sequence[Group], facts: ProcessFacts, known: Known, desk: Desk, aside: Aside
) -> dict[Group, FileLook]:
    """A look at each file, as long as there is time."""
    files = FilesByAddress(known.processes.get(facts.process.pid))
    end_s = time.monotonic() + LOOKING_S
    found: dict[Group, FileLook] = {}
    for group in groups:
        file = files.find(group)
        subject = Subject(
            pid=facts.process.pid,
            path=group.path if file is None else file.name.path,
            inode=group.inode if file is None else file.name.file_id.inode,
            ranges=group.ranges,
            is_own_view=bool(facts.sees_our_files),
            is_deleted=group.is_deleted,
        )
        if time.monotonic() > end_s:
            found[group] = _SKIPPED
        else:
            found[group] = aside.run(partial(look_at, desk.proc, subject, desk.exports)) or _NO_ANSWER
    return found


def _differences(pid: int, desk: Desk) -> tuple[Difference, ...]:
    def view() -> View:
        return {known: held for known, held in desk.view().items() if known == pid}

    return audit(view, desk.proc, desk.rules, only=pid).differences


# ---- a path -------------------------------------------------------------------------------------


def _explain_path(path: str, desk: Desk, aside: Aside) -> PathReport:
    if not path or "\0" in path:
        raise UsageError("a path has at least one character, and none of them is NUL. Give the path of a file.")
    found: list[PathFacts] = []
    look = aside.run(lambda: _look_at_path(path, desk.exports, found.append)) or _NO_ANSWER
    plain = os.path.abspath(path)
    facts = found[0] if found else PathFacts(plain, plain, None, "the file system does not answer", None)
    if facts.shown is not None:
        facts = replace(facts, shown=facts.shown._replace(generation=look.generation))
    rows = _rows_near(facts, desk.proc)
    inodes = {row.inode for found in rows.values() for row in found}
    if facts.shown is not None:
        inodes.add(facts.shown.inode)
    known = desk.ask_map(None, lambda name: name.file_id.inode in inodes or name.path in (facts.path, facts.resolved))
    with known.verdicts:
        memory = _memory(desk, known, set() if facts.shown is None else {facts.shown.inode})
    ids = ids_of(facts, known, memory)
    mapped = list(_mapped(facts, ids, known, rows, desk, aside))
    if facts.file_type is None and not mapped:
        raise SowatchError(
            f"cannot look at {path!r}: {facts.error}; and no process has a file of that name mapped. "
            "`sowatch list` shows what is mapped."
        )
    return path_report(facts, ids, mapped, known.own_view, memory, look, desk.rules)


def _look_at_path(path: str, exports: Collection[str], tell: Callable[[PathFacts], None]) -> FileLook:
    """What stands under a path, and a look at it: at one file, whatever takes its name meanwhile.

    ``tell`` is called before the file is read, which may take for ever.
    """
    plain = os.path.abspath(path)
    try:
        # O_PATH opens nothing: no device, no FIFO that would wait for a writer.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        facts = PathFacts(plain, plain, None, os.strerror(error.errno or 0), None)
        tell(facts)
        return FileLook("gone", facts.error)
    try:
        status = os.fstat(place)
        resolved = plain
        with contextlib.suppress(OSError):  # longer than a page
            resolved = os.readlink(f"/proc/self/fd/{place}")
        file_type = next((name for is_it, name in _TYPES if is_it(status.st_mode)), "something else")
        tell(PathFacts(plain, resolved, file_type, None, _shown(status)))
        look = look_at_place(place, plain, exports)
        return look if look.elf != "not_regular" else FileLook("not_regular", file_type)
    finally:
        os.close(place)


def _shown(status: os.stat_result) -> Shown:
    return Shown(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)


def _rows_near(facts: PathFacts, proc: ProcFs) -> dict[int, list[MapRow]]:
    """Rows, by process, that may be of the file, or of another one under its path."""
    inode = None if facts.shown is None else facts.shown.inode
    # A chroot's paths begin with its root.
    names = tuple(os.fsencode(path) for path in {facts.path, facts.resolved})
    found: dict[int, list[MapRow]] = {}
    for pid in proc.pids():
        rows = proc.executable_maps(pid)
        for row in () if isinstance(rows, Miss) else rows:
            if row.inode == inode or row.path.endswith(names) or row.shown_path.endswith(names):
                found.setdefault(pid, []).append(row)
    return found


def _mapped(
    facts: PathFacts,
    ids: Sequence[Candidate],
    known: Known,
    near: Mapping[int, list[MapRow]],
    desk: Desk,
    aside: Aside,
) -> Iterator[MappedIn]:
    """Every process that has the file mapped, or another one under its path."""
    proc = desk.proc
    file_ids = {one.id for one in ids}
    # Below an overlay the map may know the file by another number than /proc shows.
    by_map = {pid for pid, one in known.processes.items() if any(file.name.file_id in file_ids for file in one.files)}
    for pid in sorted(near.keys() | by_map):
        rows = _settled(proc, pid, proc.executable_maps(pid) if pid in by_map else near[pid], aside)
        process = known.processes.get(pid)
        record = process.process if process is not None else proc.process(pid, container_of=container_id)
        if isinstance(rows, Miss) or record is None:
            continue  # it has ended meanwhile
        files = FilesByAddress(process)
        for group in group_rows(rows, _root_of(proc, pid)):
            file = files.find(group)
            is_same = same_file(facts, file_ids, group, file)
            if is_same is None:
                is_same = bool(aside.run(partial(_is_mapped, facts, proc, pid, group)))
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
                )


def _is_mapped(facts: PathFacts, proc: ProcFs, pid: int, group: Group) -> bool:
    """Whether the mapping itself is of the file: stat shows both through the same file system."""
    links = proc.map_files_dir(pid)
    try:
        about = os.stat(f"{links}/{group.rows[0].start:x}-{group.rows[0].end:x}")
    except OSError:
        return False
    return facts.shown is not None and facts.shown._replace(generation=None) == _shown(about)
