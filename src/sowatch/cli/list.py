"""Which process has which library mapped, now.

Without a PATTERN there is a row for each file, with how many processes and
containers have it; with one, who they are stands below it. --by shows the same by
process, unit or container. -o chooses columns: there is a row then for each
combination of what they say, and processes, containers and files are counted in it.
A unit of a user's service manager is shown with the unit that runs that manager, as
dbus.service (user@1000.service). The unit of a process in a container is one inside
that container.

It is one scan of the host without hooks, and each process is read at one moment;
with --duration the host is watched for that time first. JSON has one object for each
process and file, whatever --by says; --by only sorts it. The first line, event
"head", says which host that is, when it was scanned and how: "source":"scan" is one
scan without hooks; with --agent it is "agent". Where processes could not be read a
last object, event "coverage", has their number.

With --stale only mapped files that are not the ones on disk any more: who must
restart after an upgrade.
  deleted   the path leads to nothing any more
  replaced  it leads to another file; "an identical build" if that has the same build id
  modified  the file was written to after its process had started, or was seen to map it
  unknown   that cannot be determined; the reason stands beside it
There is a row for each unit or container, with the command that restarts it, or in
parentheses what to do where there is none; below it are its processes with their
files, and the packages that own these. --plan prints only the commands, for a shell
of root, with comments: what each is for, which packages and builds still run, and on
which ports is listened; nothing is restarted. With --json it is one object, event
"restart", for each. --check says by its exit code whether there is something, and prints nothing
if there is not.

With --vulnerable only mapped files that are affected by something, of the package
that they were of when they were mapped: a row for each vulnerability and package,
and below it who has it mapped. The data are yours: --osv, --build-ids, --vex. What
has no package that is known, no data of its distribution, or no version that can be
compared, is unknown, never not affected: how many files that are stands below, and
JSON has each. --check: 0 nothing is affected or unknown; 1 something is affected;
3 nothing that is known, but something is unknown, or it could not be done.

Exit codes: 0 done; 1 no process is in a container that --container names; 2 wrong
usage; 3 not permitted, and with --stale that processes could not be read: what runs
on stale files may be among them. With --check: 0 nothing is stale; 1 something is;
3 nothing that is known, but not all could be read or determined, or any other error.

Examples:
  sowatch list libssl                      who uses which libssl
  sowatch list --by process --pid 1234     everything one process has mapped
  sowatch list libssl --comm '!nginx' --user www-data,root
  sowatch list --match-build-ids bad.txt -o build_id,path,processes
  sowatch list --stale                     what has to be restarted
  sowatch list --stale --agent             the same of a running agent, which needs no root
  sowatch list --stale --plan | less       by which commands
  sowatch list --vulnerable --osv /var/lib/osv     what runs that has a known flaw
  sowatch list --json | jq -r 'select(.event=="mapping").library.build_id' | sort | uniq -c
"""

# What takes long to import (the watcher, JSON, rich) is imported where it is used: programs are loaded meanwhile.

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from sowatch.cli._agent import add_agent, refuse_own_watch
from sowatch.cli._list_filters import EXCLUDED, add_filters, filters_of, with_exports
from sowatch.cli._list_plan import plan_of, write_plan, write_plan_lines
from sowatch.cli._list_vulnerable import add_vulnerable, check_options, conclude, judge, write_json, write_text
from sowatch.cli._list_vulnerable import load as load_data
from sowatch.cli._options import OpenWatcher, add_common, open_watcher, output_format, selection_of
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.containers import container_id
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import ProcFs
from sowatch.model import wire
from sowatch.model.encoding import dumps
from sowatch.model.errors import PidNamespaceError, SowatchError, UsageError
from sowatch.model.lines import head_line
from sowatch.model.literals import KINDS, ONE_SCAN

if TYPE_CHECKING:
    from sowatch.cli._agent_scan import AgentScan
    from sowatch.cli._list_entries import ListEntry
    from sowatch.cli._list_filters import Filters
    from sowatch.cli._list_vulnerable import Judged
    from sowatch.cli._options import Selection, WatcherLike
    from sowatch.inventory.coverage import Coverage
    from sowatch.model.events import Ready

#: The exit code where some of it takes more than this user may do; as `sowatch.model.errors.NotPermitted`.
NOT_PERMITTED = 3
#: Of --check: something is stale.
FOUND = 1
_REMEDY = "To read all of them takes CAP_SYS_PTRACE: run it as root, `sudo sowatch list --stale`."
_AGENT_REMEDY = "Start the agent with CAP_SYS_PTRACE, as root or by its unit of systemd."
_FORMATS = ("json", "csv", "table", "text")
_ORDERS = ("process", "unit", "container", "library")
#: What an upgrade replaces, and a restart brings.
_STALE_KINDS = tuple(kind for kind in KINDS if kind != "other")

#: The columns by --by, where nobody chose any. By library, and of stale files by unit and container, for CSV only.
_COLUMNS = {
    "library": ("processes", "containers", "kind", "build_id", "stale", "path"),
    "process": ("pid", "comm", "container", "kind", "stale", "path"),
    "unit": ("unit", "container", "processes", "files"),
    "container": ("container", "processes", "files"),
}
_STALE_COLUMNS = {
    "library": ("processes", "containers", "kind", "stale", "package", "path"),
    "process": ("pid", "comm", "stale", "package", "unit", "container", "path"),
    "unit": ("unit", "container", "restart", "pid", "comm", "stale", "package", "path"),
    "container": ("container", "unit", "restart", "pid", "comm", "stale", "package", "path"),
}


class _Shape(NamedTuple):
    """How the answer is shown; ``columns`` are those that somebody chose."""

    format: str
    by: str
    columns: list[str] | None
    has_head: bool
    is_stale: bool
    is_plan: bool
    #: Below each file, who has it.
    has_who: bool


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_common(
        parser,
        default_kind=f"library; with --stale {', '.join(_STALE_KINDS)}",
        with_own_process=False,
        formats=_FORMATS,
    )
    parser.add_argument(
        "--by",
        metavar="WHAT",
        help=f"{', '.join(_ORDERS)}: how the table is grouped. Default: library; with --stale unit, and container "
        "where a process is in one",
    )
    add_agent(parser)
    parser.add_argument("--stale", action="store_true", help="only files that are not the ones on disk any more")
    parser.add_argument(
        "--check",
        action="store_true",
        help="with --stale or --vulnerable: exit code 0 nothing, 1 something, 3 not all is known",
    )
    parser.add_argument(
        "--plan", action="store_true", help="with --stale: the commands that restart, and what they are for"
    )
    parser.add_argument(
        "-o",
        "--columns",
        action="append",
        metavar="COLUMNS",
        help="the columns, with commas; `-o help` lists them",
    )
    parser.add_argument("--no-headers", action="store_true", help="no names of columns above them")
    add_vulnerable(parser)
    add_filters(parser)


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Take one snapshot and print it; returns the exit code."""
    try:
        return _run(args, out, warn, open_watcher)
    except SowatchError as error:
        if args.check and not isinstance(error, UsageError):
            error.exit_code = NOT_PERMITTED  # 1 says that there is something
        raise


def _run(args: Namespace, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher) -> int:
    shape = _shape_of(args)
    if shape.columns == ["help"]:
        from sowatch.cli._list_columns import COLUMNS

        out.write("".join(f"{name}\n" for name in COLUMNS))
        out.flush()
        return 0
    filters = filters_of(args)
    data = load_data(args) if args.vulnerable else None
    selection = selection_of(args, default_kinds=_STALE_KINDS if args.stale or args.vulnerable else ("library",))
    selection = replace(selection, rules=with_exports(selection.rules, args.exports))
    proc = ProcFs(selection.config.proc_root)
    asked = None if args.agent is None else _agent_scan(args, selection)
    watcher = asked or open_watcher(replace(selection, is_scan=args.duration is None))
    try:
        # Now, as the program of the scan is loaded meanwhile.
        from sowatch.cli._list_entries import entries_of, with_packages
        from sowatch.inventory.staleness import Disk

        ready = watcher.start()
        if ready.guarantee != ONE_SCAN and asked is None:
            warn_of_fallback(ready, warn)
        if args.duration is not None:
            watcher.wait(args.duration)
        disk = Disk(proc) if asked is None else asked.disk
        mapped = [one for one in watcher.snapshot() if not one.rule.startswith(EXCLUDED)]
        if not mapped and selection.container is not None:
            check_container(selection.container, running_containers(proc) if asked is None else asked.containers)
        taken = [one for one in mapped if filters.take(one.process, one.library)]
        entries = entries_of(taken, None if args.vulnerable else disk)
        hung = hung_processes(watcher, selection)
    finally:
        watcher.stop()
    # Before the processes end, as far as that can be.
    judged = None if data is None else judge(_sorted(entries, "process"), data, proc)
    elsewhere = why_not_whole_host(proc) if (args.stale or args.vulnerable) and asked is None else None
    if args.stale:
        entries = with_packages([entry for entry in entries if entry.answer.stale], disk)
    disk.close()
    if asked is None:
        coverage = _coverage(selection, filters, ready.strategy, entries, hung)
    else:
        coverage = asked.coverage_of(partial(filters.take_process, is_readable=False))
    open_ends = _open_ends(coverage, len(hung), elsewhere, _REMEDY if asked is None else _AGENT_REMEDY)
    if judged is not None:
        return _conclude_vulnerable(_head(ready, args), judged, coverage, open_ends, shape, args, out, warn)
    if not (args.check and not entries):
        head = _head(ready, args) if asked is None else asked.head
        _print(head, _sorted(entries, shape.by), coverage, shape, out, (proc, asked))
        how = "one scan: each process was read at one moment" if ready.guarantee == ONE_SCAN else ""
        how = how if asked is None else ready.limits[-1]
        if how and shape.format == "text" and not args.check and not args.plan:
            warn(f"{how}.")  # after the table: nobody may be there to read it
    if args.stale:
        return _conclude(entries, open_ends, warn, is_quiet=shape.format != "text" or args.check, is_check=args.check)
    return 0  # what could not be read is among the limits that were shown at the start


def _agent_scan(args: Namespace, selection: Selection) -> AgentScan:
    """The answer of a running agent, which also says what is stale."""
    refuse_own_watch(args)
    from sowatch.cli._agent_scan import AgentScan
    from sowatch.cli._client import Agent

    return AgentScan(Agent(args.agent), selection, with_packages=args.stale)


def _shape_of(args: Namespace) -> _Shape:
    """How it is to be shown.

    Raises:
        UsageError: options that contradict each other, or an unknown word.
    """
    if args.by is not None and args.by not in _ORDERS:
        raise UsageError(f"unknown --by {args.by!r}. Use one of: {', '.join(_ORDERS)}.")
    if args.no_snapshot:
        raise UsageError("--no-snapshot leaves `sowatch list` nothing to show. Use it with `sowatch watch`.")
    check_options(args)
    if args.check and not (args.stale or args.vulnerable):
        raise UsageError("--check is about stale or vulnerable files. Write `sowatch list --stale --check`.")
    if args.plan and not args.stale:
        raise UsageError("--plan is about stale files. Write `sowatch list --stale --plan`.")
    shown = output_format(args, _FORMATS)
    columns = None
    if args.columns is not None:
        from sowatch.cli._list_columns import columns_of

        columns = columns_of(args.columns)
    if shown == "json" and (columns is not None or args.no_headers):
        raise UsageError("JSON has every field, and no headers. Leave out -o and --no-headers, or use --format csv.")
    if args.plan and (shown not in ("text", "json") or columns is not None):
        raise UsageError("--plan is lines for a shell, or JSON. Leave it out: the column `restart` has the commands.")
    return _Shape(
        format=shown,
        by=args.by or ("unit" if args.stale else "library"),
        columns=columns,
        has_head=not args.no_headers,
        is_stale=args.stale,
        is_plan=args.plan,
        has_who=any(args.patterns) or bool(args.exports or args.build_id or args.match_build_ids),
    )


def _sorted(entries: Sequence[ListEntry], by: str) -> list[ListEntry]:
    def order(entry: ListEntry) -> tuple[object, ...]:
        by_process = (entry.process.id, entry.library.path, entry.library.id)
        if by == "library":
            return entry.library.path, entry.library.id, entry.process.id
        if by == "unit":
            return entry.target.label, *by_process
        return (entry.process.container or "", *by_process) if by == "container" else by_process

    return sorted(entries, key=order)


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
    head: wire.Head,
    entries: Sequence[ListEntry],
    coverage: Coverage,
    shape: _Shape,
    out: Out,
    source: tuple[ProcFs, AgentScan | None],
) -> None:
    restarts = plan_of(entries, *source) if shape.is_plan else None
    if shape.format == "json":
        from sowatch.inventory.coverage import coverage_line

        if restarts is not None:
            seq = write_plan_lines(out, head, restarts)
        else:
            out.write(dumps(head) + "\n")
            seq = len(entries) + 1
            for number, entry in enumerate(entries, 2):
                out.write(dumps(entry.line(number, with_owner=shape.is_stale)) + "\n")
        if not coverage.is_complete:
            out.write(dumps(coverage_line(coverage, seq + 1)) + "\n")
        out.flush()
        return
    if restarts is not None:
        write_plan(out, restarts)
        return
    from sowatch.cli._list_columns import write_columns, write_csv

    columns = shape.columns or (_STALE_COLUMNS if shape.is_stale else _COLUMNS)[shape.by]
    if shape.format == "csv":
        write_csv(out, entries, columns, has_head=shape.has_head)
    elif shape.columns is None and shape.by == "library":
        from sowatch.cli._list_views import library_table

        has_who = shape.has_who or shape.is_stale
        library_table(out, entries, has_who=has_who, has_package=shape.is_stale, has_head=shape.has_head)
    elif shape.columns is None and shape.is_stale and shape.by in ("unit", "container"):
        from sowatch.cli._list_views import restart_table

        restart_table(out, entries, by_container=shape.by == "container", has_head=shape.has_head)
    else:
        write_columns(out, entries, columns, has_head=shape.has_head, is_for_people=shape.columns is None)


def _conclude(
    entries: Sequence[ListEntry],
    open_ends: Sequence[str],
    warn: Callable[[str], None],
    *,
    is_quiet: bool,
    is_check: bool,
) -> int:
    """Says that nothing is stale, if so, and what that leaves open; returns the exit code."""
    unknown = sum(entry.answer.stale == "unknown" for entry in entries)
    text = ""
    if unknown == len(entries):
        text = "nothing that can be seen runs" if open_ends else "nothing runs"
        text += " on deleted or replaced files"
        if unknown:
            text += f", as far as it can be determined: of {unknown} mapped file{'s' * (unknown != 1)} it cannot"
    if open_ends:
        warn(f"{text}, but {open_ends[0]}" if text else open_ends[0])
    elif text and not is_quiet:
        warn(f"{text}.")
    for open_end in open_ends[1:]:
        warn(open_end)
    if is_check and unknown < len(entries):
        return FOUND
    return NOT_PERMITTED if open_ends or (is_check and unknown) else 0


def _open_ends(coverage: Coverage, hung: int, elsewhere: str | None, remedy: str) -> list[str]:
    """What an answer leaves open, a sentence each."""
    found = [] if coverage.is_complete else [f"{coverage}. {remedy}"]
    if hung:
        found.append(f"of {hung} of them a page fault waits for a file system that does not answer")
    if elsewhere:
        found.append(f"{elsewhere}: processes outside it are not seen. {PidNamespaceError.remedy}")
    return found


def _conclude_vulnerable(
    head: wire.Head,
    judged: Judged,
    coverage: Coverage,
    open_ends: Sequence[str],
    shape: _Shape,
    args: Namespace,
    out: Out,
    warn: Callable[[str], None],
) -> int:
    """Prints what is affected; returns the exit code."""
    if shape.format == "json":
        from sowatch.inventory.coverage import coverage_line

        seq = write_json(out, head, judged)
        if not coverage.is_complete:
            out.write(dumps(coverage_line(coverage, seq + 1)) + "\n")
    elif judged.affected or judged.open:
        write_text(out, judged)
    out.flush()
    return conclude(judged, open_ends, warn, is_check=args.check, is_quiet=shape.format == "json")


def hung_processes(watcher: WatcherLike | AgentScan, selection: Selection) -> frozenset[int]:
    """Processes that nobody can read now: a page fault of theirs is not answered."""
    hung = frozenset(getattr(watcher, "unread", ()))
    return hung & selection.pids if selection.pids else hung


def running_containers(proc: ProcFs) -> Iterator[str]:
    """The ids of containers in which processes run."""
    return (found for pid in proc.pids() if (found := container_id(proc.cgroup(pid) or "")))


def check_container(prefix: str, containers: Iterable[str]) -> None:
    """Refuses a container that there is not.

    Raises:
        SowatchError: no process is in one whose id begins so.
    """
    if not any(one.startswith(prefix) for one in containers):
        raise SowatchError(
            f"there is no container whose id begins with {prefix!r} in which a process runs. "
            "`sowatch list --by container` shows them."
        )


def _coverage(
    selection: Selection, filters: Filters, strategy: str, entries: Sequence[ListEntry], hung: frozenset[int]
) -> Coverage:
    """How many of the processes that were asked for could be read."""
    from sowatch.inventory.coverage import coverage_of_answers
    from sowatch.inventory.staleness import NOT_PERMITTED as REASON

    closed = {entry.process.pid for entry in entries if entry.answer.reason == REASON} | hung
    proc, container = ProcFs(selection.config.proc_root), selection.container

    def is_wanted(pid: int) -> bool:
        process = proc.process(pid, container_of=container_id)
        if process is None:
            return True
        if container is not None and process.cgroup and not (process.container or "").startswith(container):
            return False
        return filters.take_process(process, is_readable=False)

    found = {entry.process.pid for entry in entries}
    return coverage_of_answers(proc, strategy, found, closed, selection.pids, is_wanted)
