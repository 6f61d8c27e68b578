"""What is really loaded, as a bill of materials: CycloneDX or SPDX 3.

Libraries, executables and interpreters that processes have mapped, not what is installed
or lies in an image. There is a component for each build of a package, with where it was
loaded from and its build id; a file whose package is unknown is there as a file. The
package is the one that the mapped file is of: what an upgrade has put in its place since
does not count.

A running agent has seen every load since its start. With --since-start what was loaded
and has gone is there, too, also of processes that lived for a moment.

The document says whether it is complete, and if not, why. Equal answers give equal
documents but for the time, which is that of SOURCE_DATE_EPOCH if that is set; the serial
number is made of the content unless --serial-number gives one.

It needs the extra `sbom`: pip install 'sowatch[sbom]'.

Exit codes: 0 done; 1 no process is in a container that --container names; 2 wrong usage;
3 not permitted: processes could not be read, and the document is incomplete.

Examples:
  sowatch sbom > host.cdx.json                what runs on this host
  sowatch sbom --container 3f2a -o app.json   in one container
  sowatch sbom --format spdx3 ssl             only files with ssl in their path
  sowatch sbom --agent --since-start          all that was loaded since the agent runs
"""

# Heavy modules (the watcher, the libraries of the formats) are imported only where they are used.

from __future__ import annotations

import os
import tempfile
import time
import uuid
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from sowatch.cli._agent import add_agent, refuse_own_watch
from sowatch.cli._options import (
    OpenWatcher,
    add_cri_socket,
    add_kinds,
    add_patterns,
    add_proc_root,
    add_selection,
    add_strategy,
    open_watcher,
    selection_of,
)
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli.list import NOT_PERMITTED, check_container, hung_processes, running_containers
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.containers import container_id
from sowatch.linux.pid_namespaces import why_not_whole_host
from sowatch.linux.proc import ProcFs
from sowatch.model.errors import PidNamespaceError, SowatchError, UsageError
from sowatch.model.literals import KINDS, ONE_SCAN, Staleness

if TYPE_CHECKING:
    from sowatch.cli._options import Selection
    from sowatch.inventory.sbom import LoadedFile, Sbom
    from sowatch.model.events import Origin

FORMATS: Final = ("cyclonedx", "spdx3")
_KINDS: Final = tuple(kind for kind in KINDS if kind != "other")
_GONE: Final = (Staleness.REPLACED, Staleness.DELETED)
_REMEDY: Final = "To read all of them takes CAP_SYS_PTRACE: run it as root, `sudo sowatch sbom`."


def configure(parser: Parser) -> None:
    """Add the command's options."""
    add_patterns(parser)
    parser.add_argument(
        "--format", default="cyclonedx", metavar="FORMAT", help=f"{' or '.join(FORMATS)}. Default: cyclonedx"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write there, not to standard output")
    add_selection(parser)
    add_kinds(parser, default=", ".join(_KINDS))
    add_agent(parser)
    parser.add_argument(
        "--since-start",
        action="store_true",
        help="of a running agent: what was loaded since its start and has gone, too",
    )
    parser.add_argument(
        "--serial-number", type=_uuid, metavar="UUID", help="of the document. Default: one that is made of the content"
    )
    add_strategy(parser)
    add_proc_root(parser)
    add_cri_socket(parser)
    parser.add_argument(
        "--include-self", dest="exclude_self", action="store_false", help="show sowatch's own process, too"
    )
    parser.set_defaults(no_snapshot=False)


class _Found(NamedTuple):
    """What is loaded, and what that leaves out."""

    files: Sequence[LoadedFile]
    origin: Origin
    time_ns: int
    open_ends: Sequence[str]
    limits: Sequence[str]
    since_s: int | None = None
    is_of_all: bool = True


def run(args: Namespace, *, out: Out, warn: Callable[[str], None], open_watcher: OpenWatcher = open_watcher) -> int:
    """Find out what is loaded, and write the document; returns the exit code."""
    write = _writer(args.format)
    time_s = _source_date()
    if args.since_start and args.agent is None:
        raise UsageError("--since-start asks a running agent, which has seen what has gone. Add --agent.")
    if args.since_start and args.pid:
        raise UsageError("--since-start is of processes that have ended, too. Leave out --pid.")
    selection = selection_of(args, default_kinds=_KINDS)
    if args.agent is None:
        found = _scan(replace(selection, is_scan=True), warn, open_watcher)
    else:
        refuse_own_watch(args)
        found = _ask(args, selection)
    document = _sbom(args, selection, found, found.time_ns // 10**9 if time_s is None else time_s)
    text = write(document)
    if args.output in (None, "-"):
        out.write(text)
        out.flush()
    else:
        _replace_file(args.output, text)
    for open_end in found.open_ends:
        warn(f"the document is incomplete: {open_end}")
    return NOT_PERMITTED if found.open_ends else 0


def _scan(selection: Selection, warn: Callable[[str], None], open_watcher: OpenWatcher) -> _Found:
    proc = ProcFs(selection.config.proc_root)
    watcher = open_watcher(selection)
    try:
        # Now, as the program of the scan is loaded meanwhile.
        from sowatch.inventory.coverage import coverage_of_answers
        from sowatch.inventory.loaded import limits_of_memory, loaded_files, place_of
        from sowatch.inventory.packages import Packages
        from sowatch.inventory.staleness import Disk

        ready = watcher.start()
        if ready.guarantee != ONE_SCAN:
            warn_of_fallback(ready, warn)
        mapped = watcher.snapshot()
        if not mapped and selection.container is not None:
            check_container(selection.container, running_containers(proc))
        with Disk(proc) as disk, Packages(proc) as packages:
            stale = {
                place_of(one)
                for one in sorted(mapped, key=lambda one: one.process.id)  # the mappings of each are read once
                if disk.staleness(one.process, one.library, one.ranges).stale in _GONE
            }
            files = loaded_files(mapped, packages, stale)
        hung = hung_processes(watcher, selection)
    finally:
        watcher.stop()

    def is_wanted(pid: int) -> bool:
        process = proc.process(pid, container_of=container_id)
        if process is None or selection.container is None or not process.cgroup:
            return True
        return (process.container or "").startswith(selection.container)

    pids = {one.process.pid for one in mapped}
    coverage = coverage_of_answers(proc, ready.strategy, pids, hung, selection.pids, is_wanted)
    open_ends = [] if coverage.is_complete else [f"{coverage}. {_REMEDY}"]
    elsewhere = why_not_whole_host(proc)
    if elsewhere:
        open_ends.append(f"{elsewhere}: processes outside it are not seen. {PidNamespaceError.remedy}")
    limits = ["one scan: what is loaded later is not there", *limits_of_memory(mapped)]
    return _Found(files, ready.origin, time.time_ns(), open_ends, limits)


def _ask(args: Namespace, selection: Selection) -> _Found:
    from msgspec import convert

    from sowatch.cli._agent_scan import Filter
    from sowatch.cli._client import Agent
    from sowatch.inventory.loaded import LoadedAnswer
    from sowatch.model.events import Origin
    from sowatch.model.lines import time_ns_from

    agent = Agent(args.agent)
    agent.ready()  # one that hangs is noticed within a few seconds
    wanted = Filter(agent, selection)
    own = sorted(wanted.own_pids)
    route = f"/sbom?since_start={int(args.since_start)}&without={','.join(map(str, own))}"
    if selection.pids:
        route += "&pid=" + ",".join(map(str, sorted(selection.pids)))
    answer = agent.read_as(lambda: convert(agent.get(route), LoadedAnswer))
    files = [one for one in answer.files if wanted.wants_file(one.container, one.path, one.kind)]
    if not files and selection.container is not None and not args.since_start:
        check_container(selection.container, (one.container for one in answer.files if one.container))
    limits = [
        *answer.limits,
        f"the agent answered by its rules: {', '.join(answer.rules)}",
        *(answer.rule_limits or ()),
    ]
    return _Found(
        files,
        Origin(answer.host, answer.host_id, answer.boot_id, answer.version),
        time_ns_from(answer.time),
        answer.open_ends,
        limits,
        time_ns_from(answer.since) // 10**9 if args.since_start else None,
        is_of_all=answer.rule_limits == (),
    )


def _sbom(args: Namespace, selection: Selection, found: _Found, time_s: int) -> Sbom:
    from sowatch.inventory.sbom import sbom_of
    from sowatch.model.version import VERSION

    container = None
    if selection.container is not None:
        ids = {one.container for one in found.files if one.container}
        container = ids.pop() if len(ids) == 1 else selection.container
    asked = [f"only paths with {rule.pattern}" for rule in selection.rules if rule.pattern]
    asked += [f"only processes {', '.join(map(str, sorted(selection.pids)))}"] if selection.pids else []
    kinds = sorted({kind for rule in selection.rules for kind in rule.kind})
    asked += [f"only files of kind {', '.join(kinds)}"] if args.kind else []
    is_complete = False if found.open_ends else None if asked or not found.is_of_all else True
    return sbom_of(
        found.files,
        host=found.origin.host,
        host_id=found.origin.host_id,
        container=container,
        version=VERSION,
        time_s=time_s,
        is_complete=is_complete,
        limits=[*found.open_ends, *asked, *found.limits],
        since_s=found.since_s,
        serial=args.serial_number,
    )


def _writer(name: str) -> Callable[[Sbom], str]:
    """What writes the format.

    Raises:
        UsageError: there is no such format.
        SowatchError: the library that writes it is not installed.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}. Use one of: {', '.join(FORMATS)}.")
    try:
        if name == "spdx3":
            from sowatch.inventory.sbom_spdx import to_spdx

            return to_spdx
        from sowatch.inventory.sbom_cyclonedx import to_cyclonedx
    except ImportError as error:
        raise SowatchError(
            f"{error.name} is not installed, and writing {name} needs it. Install it: pip install 'sowatch[sbom]'."
        ) from error
    return to_cyclonedx


def _source_date() -> int | None:
    """The time that SOURCE_DATE_EPOCH names.

    Raises:
        UsageError: it names none.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return None
    # The end of the year 9999.
    if not (text.isascii() and text.isdigit() and int(text[:13]) < 253_402_300_800 and len(text) < 13):
        raise UsageError(f"SOURCE_DATE_EPOCH={text!r} is no number of seconds since 1970. Give one, or unset it.")
    return int(text)


def _uuid(text: str) -> str:
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a UUID") from None


def _replace_file(path: str, text: str) -> None:
    """Writes a file as a whole: who has the old one open keeps that.

    Raises:
        SowatchError: it cannot be written.
    """
    made = None
    try:
        directory = os.path.dirname(path) or "."
        if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout, a FIFO
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=directory, prefix=".sbom-", delete=False) as file:
            made = file.name
            file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.replace(made, path)
    except OSError as error:
        if made is not None:
            with suppress(OSError):
                os.unlink(made)
        raise SowatchError(
            f"cannot write {path!r}: {error.strerror}. Name a file in a directory that this user may write to."
        ) from error
