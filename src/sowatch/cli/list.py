"""Which process has which library mapped, now.

With --stale only mapped files that were deleted or replaced on disk: who must restart after an
upgrade, with the package the file belongs to and the systemd unit or container of the process.
It is one scan of the host without hooks, and each process is read at one moment; with --duration
the host is watched for that time first. JSON has one object for each process and file, whatever
--by says; --by only sorts it. The first line, event "head", says which host that is, when it was
scanned and how: "source":"scan" is one scan without hooks. Where processes could not be read a
last object, event "coverage", has their number, and --stale ends with 3: what runs on stale files
may be among them. A unit of a user's service manager, or of a container's, is shown with the unit
that runs that manager, as dbus.service (user@1000.service); JSON has unit, unit_manager and unit_uid.

Examples:
  sowatch list libssl                      who uses which libssl
  sowatch list --by process --pid 1234     everything one process has mapped
  sowatch list --stale                     what still runs on files that are gone
  sowatch list --json | jq -r 'select(.event=="mapping").library.build_id' | sort | uniq -c
"""

# Heavy modules (the watcher, rich) are imported only where they are used.

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, Struct
from msgspec.structs import replace

from sowatch.cli._options import MappedLike, OpenWatcher, add_common, open_watcher, selection_of, wants_json
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli._table import write_table
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import ProcFs
from sowatch.model import wire
from sowatch.model.encoding import dumps
from sowatch.model.errors import PidNamespaceError, UsageError
from sowatch.model.escape import one_line, visible
from sowatch.model.lines import SCHEMA, head_line, library_line, process_line, ranges_list
from sowatch.model.literals import KINDS, ONE_SCAN

if TYPE_CHECKING:
    from sowatch.cli._options import Selection, WatcherLike
    from sowatch.inventory.coverage import Coverage
    from sowatch.inventory.staleness import Disk, StaleAnswer
    from sowatch.linux.cgroups import Unit
    from sowatch.model.events import Ready

#: The exit code where some of it takes more than this user may do; as `sowatch.model.errors.NotPermitted`.
NOT_PERMITTED = 3
#: Strategies that find files in /proc, and so only those of processes that it may be asked about.
_READ_FROM_PROC = ("prebuilt", "procfs")
_REMEDY = "To read all of them takes CAP_SYS_PTRACE: run it as root, `sudo sowatch list --stale`."
_ORDERS = ("library", "process")
_ID_LENGTH = 12


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(parser, default_kind="library; with --stale all", with_own_process=False)
    parser.add_argument(
        "--by", default="library", metavar="WHAT", help="library or process: how the table is grouped. Default: library"
    )
    parser.add_argument("--stale", action="store_true", help="only files that were deleted or replaced on disk")


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Take one snapshot and print it; returns the exit code."""
    if args.by not in _ORDERS:
        raise UsageError(f"unknown --by {args.by!r}. Use one of: {', '.join(_ORDERS)}.")
    if args.no_snapshot:
        raise UsageError("--no-snapshot leaves `sowatch list` nothing to show. Use it with `sowatch watch`.")
    as_json = wants_json(args)
    selection = selection_of(args, default_kinds=KINDS if args.stale else ("library",))
    from sowatch.inventory.staleness import Disk

    watcher = open_watcher(replace(selection, is_scan=args.duration is None))
    try:
        ready = watcher.start()
        if ready.guarantee != ONE_SCAN:
            warn_of_fallback(ready, warn)
        if args.duration is not None:
            watcher.wait(args.duration)
        disk = Disk(ProcFs(selection.config.proc_root))
        entries = [_Entry(one, disk.staleness(one.process, one.library, one.ranges)) for one in watcher.snapshot()]
        hung = _hung(watcher, selection)
    finally:
        watcher.stop()
    elsewhere = why_not_whole_host(ProcFs(selection.config.proc_root)) if args.stale else None
    if args.stale:
        entries = _with_owners([entry for entry in entries if entry.answer.stale], disk)
    disk.close()
    coverage = _coverage(selection, ready.strategy, entries, hung)
    if args.by == "process":
        entries.sort(key=lambda entry: (entry.mapped.process.id, entry.mapped.library.path, entry.mapped.library.id))
    else:
        entries.sort(key=lambda entry: (entry.mapped.library.path, entry.mapped.library.id, entry.mapped.process.id))
    _print(_head(ready, args), entries, coverage, args, out, as_json=as_json)
    if ready.guarantee == ONE_SCAN and not as_json:
        warn("one scan: each process was read at one moment.")  # after the table: nobody may be there to read it
    open_ends = [] if coverage.is_complete else [f"{coverage}. {_REMEDY}"]
    if hung:
        open_ends.append(f"of {len(hung)} of them a page fault waits for a file system that does not answer")
    if elsewhere:
        open_ends.append(f"{elsewhere}: processes outside it are not seen. {PidNamespaceError.remedy}")
    if args.stale:
        _conclude(entries, open_ends, warn, as_json=as_json)
        return NOT_PERMITTED if open_ends else 0
    return 0  # what could not be read is among the limits that were shown at the start


def _head(ready: Ready, args: Namespace) -> wire.Head:
    """The first line: whose mappings follow, of when, and how they were found."""
    return replace(
        head_line(ready.origin, ready.time_ns, 1),
        source="watch" if ready.guarantee != ONE_SCAN or args.duration is not None else "scan",
        strategy=ready.strategy,
        guarantee=ready.guarantee,
        hooks=ready.hooks,
        limits=list(ready.limits),
        seconds=round(ready.seconds, 6),
    )


def _print(
    head: wire.Head, entries: Sequence[_Entry], coverage: Coverage, args: Namespace, out: Out, *, as_json: bool
) -> None:
    if as_json:
        out.write(dumps(head) + "\n")
        for seq, entry in enumerate(entries, 2):
            out.write(dumps(entry.line(seq, with_owner=args.stale)) + "\n")
        if not coverage.is_complete:
            out.write(dumps(_coverage_line(coverage, len(entries) + 2)) + "\n")
        out.flush()
    elif args.stale:
        _stale_table(entries, out)
    elif args.by == "process":
        _process_table(entries, out)
    else:
        _library_table(entries, out)


def _conclude(
    entries: Sequence[_Entry], open_ends: Sequence[str], warn: Callable[[str], None], *, as_json: bool
) -> None:
    """Says that nothing is stale, if so, and what that leaves open."""
    unknown = sum(entry.answer.stale == "unknown" for entry in entries)
    text = ""
    if unknown == len(entries):
        text = "nothing that can be seen runs" if open_ends else "nothing runs"
        text += " on deleted or replaced files"
        if unknown:
            text += f", as far as it can be determined: of {unknown} mapped file{'s' * (unknown != 1)} it cannot"
    if open_ends:
        warn(f"{text}, but {open_ends[0]}" if text else open_ends[0])
    elif text and not as_json:
        warn(f"{text}.")
    for open_end in open_ends[1:]:
        warn(open_end)


def _hung(watcher: WatcherLike, selection: Selection) -> frozenset[int]:
    """Processes that nobody can read now: a page fault of theirs is not answered."""
    hung = frozenset(getattr(watcher, "unread", ()))
    return hung & selection.pids if selection.pids else hung


def _coverage(selection: Selection, strategy: str, entries: Sequence[_Entry], hung: frozenset[int]) -> Coverage:
    """How many of the processes that were asked for could be read."""
    from sowatch.inventory.coverage import Coverage, coverage_of
    from sowatch.inventory.staleness import NOT_PERMITTED as REASON
    from sowatch.linux.containers import container_id

    if strategy not in _READ_FROM_PROC:
        # The kernel side read all but those that hang. Whether their files are stale takes a read of the process.
        closed = {entry.mapped.process.pid for entry in entries if entry.answer.reason == REASON} | hung
        return Coverage(len({entry.mapped.process.pid for entry in entries} - closed), len(closed), is_hidden=False)
    proc, container = ProcFs(selection.config.proc_root), selection.container

    def is_wanted(pid: int) -> bool:
        cgroup = proc.cgroup(pid)
        return container is None or not cgroup or (container_id(cgroup) or "").startswith(container)

    return coverage_of(proc, selection.pids, is_wanted)


def _coverage_line(coverage: Coverage, seq: int) -> wire.Coverage:
    readable = wire.Readable(coverage.read, coverage.unreadable, coverage.is_hidden)
    return wire.Coverage(SCHEMA, "coverage", seq, readable, readable)


class _Entry(Struct, frozen=True):
    """One process and file; package and unit are looked up for ``--stale`` only."""

    mapped: MappedLike
    answer: StaleAnswer
    package: str | None = None
    unit: Unit | None = None

    @property
    def path(self) -> str:
        """The name under which the file is stale, or else its own."""
        return self.answer.path or self.mapped.library.path

    def line(self, seq: int, *, with_owner: bool) -> wire.Mapping:
        mapped, answer, unit = self.mapped, self.answer, self.unit
        return wire.Mapping(
            SCHEMA,
            "mapping",
            seq,
            mapped.rule,
            process_line(mapped.process),
            library_line(mapped.library),
            ranges_list(mapped.ranges),
            answer.stale,
            answer.reason,
            answer.path or UNSET,
            UNSET if mapped.range_count is None else mapped.range_count,
            package=self.package if with_owner else UNSET,
            unit=(unit and unit.name) if with_owner else UNSET,
            unit_manager=(unit and unit.manager) if with_owner else UNSET,
            unit_uid=(unit and unit.uid) if with_owner else UNSET,
        )


def _with_owners(entries: Sequence[_Entry], disk: Disk) -> list[_Entry]:
    from sowatch.linux.cgroups import unit_of

    owners = disk.owners((entry.mapped.process.pid, entry.path) for entry in entries)
    return [
        _Entry(
            entry.mapped,
            entry.answer,
            owners[entry.mapped.process.pid, entry.path],
            unit_of(entry.mapped.process.cgroup),
        )
        for entry in entries
    ]


def _library_table(entries: Sequence[_Entry], out: Out) -> None:
    counts: dict[Any, int] = {}
    for entry in entries:
        library = entry.mapped.library
        key = (library.path, library.id, library.build_id, library.kind, entry.answer.stale)
        counts[key] = counts.get(key, 0) + 1
    rows = [
        (str(count), kind, _short(build_id), _word(stale), visible(path))
        for (path, _, build_id, kind, stale), count in counts.items()
    ]
    write_table(out, ("PROCESSES", "KIND", "BUILD ID", "STALE", "PATH"), rows, right=(0,), warning=3)


def _process_table(entries: Sequence[_Entry], out: Out) -> None:
    rows = [
        (
            str(entry.mapped.process.pid),
            _word(entry.mapped.process.comm),
            _short(entry.mapped.process.container),
            entry.mapped.library.kind,
            _word(entry.answer.stale),
            visible(entry.mapped.library.path),
        )
        for entry in entries
    ]
    write_table(out, ("PID", "COMM", "CONTAINER", "KIND", "STALE", "PATH"), rows, right=(0,), warning=4)


def _stale_table(entries: Sequence[_Entry], out: Out) -> None:
    rows = [
        (
            str(entry.mapped.process.pid),
            _word(entry.mapped.process.comm),
            _word(entry.answer.stale),
            _word(entry.package),
            _unit(entry.unit),
            _short(entry.mapped.process.container),
            visible(entry.path) + (f" ({one_line(entry.answer.reason)})" if entry.answer.reason else ""),
        )
        for entry in entries
    ]
    write_table(out, ("PID", "COMM", "STALE", "PACKAGE", "UNIT", "CONTAINER", "PATH"), rows, right=(0,), warning=2)


def _unit(unit: Unit | None) -> str:
    """The unit as systemctl takes it, with its backslashes, and whose it is if not the system's."""
    if unit is None:
        return "-"
    return one_line(unit.name if unit.manager is None else f"{unit.name} ({unit.manager})")


def _word(text: str | None) -> str:
    return "-" if not text else visible(text)


def _short(text: str | None) -> str:
    return _word(text if text is None else text[:_ID_LENGTH])
