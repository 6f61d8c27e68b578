"""Why a process or a file is, or is not, covered.

Seen how and when? Which rule wants it, or why none? What does the kernel side do with it? Can the
very file be opened, and what does it say of itself? Blocked why? Does the map agree with /proc?

A target that is all digits is a process, anything else the path of a file (write ./123 for a file
of that name). A name without a directory is searched for in all that is mapped, by base name and
soname, unless there is such a file in the current directory; each path that has it is explained.
A watch is started, the whole host read once, the target examined, and the watch ended. Each file
that a process has mapped is compared with the one on disk. A path may be one that only other
processes see, or whose file was deleted while it is mapped. Ends with 1 if there is no such
process, or no such path here or mapped.

--json gives one object for each target. Of a process:
  schema, event "explain", target "process"; process and library as in events; started, by the clock
  state running, zombie or kernel_thread; threads; leader_alive; bits 32, 64 or null
  kernel  null, or followed, touches, range_count, ranges, dirty, shares_vm
  map     null, or since, since_ns, files, announced, awaits_reading
  mappings, one for each file it has mapped executable:
    library, ranges, id_from map, verdict (the kernel's memory) or proc (which does not know
            the real device below overlayfs and btrfs)
    seen    null, or rule, cause, t_ns, time of the load event
    rule    the one that wants it, or null; rules: rule, wants, missing exports, and why not:
            pattern, kind, exports, exports_unknown, exports_given_up, earlier_rule
    untold  why no load was reported: no_rule, not_selected, passing (vfork), awaiting_facts,
            baseline, unresolved (exports could not be read), not_in_map
    verdict of the kernel: match, ignore (seconds_left), none or mixed
    file    opened_by map_files, root, own_view, layer or null; tries: by, path, error; exports found;
            elf: elf, partial, not_elf, not_regular, gone, not_permitted, unreadable, no_answer,
            skipped (there are too many files); reason
    activations: rule, state; blocked: rule, reason, seconds_left, path, since
    differences to the map: kind, path, inode, range
    stale   as in the lines of `sowatch list`; stale_reason, same_build
    unprobed why the kernel puts no uprobes into (some of) its mappings: shared, writable, hugetlb
    attachments (an agent's answer) of rules: rule, state attached, retrying or failed, reason, users, lingering,
            probes: symbol, program, return, state, reason, offset
  extra   what the map has and the process has not; notes: kernel_thread, zombie, no_permission,
          no_files, static, nothing_wanted, narrow, unread (the kernel does not answer who reads its
          mappings), unrepaired, published_only (an agent's answer over TCP: only what its load
          events name; withheld counts the other files)
Of a path: target "path", path, resolved, type or null, error, ids (dev, inode, generation, subvol,
id_from), kind, rule, rules, verdict, file, activations, blocked; mapped: process, path, inode,
ranges, in_map, seen, relation same, other_name, other_file, deleted or unknown; unreadable (number
of processes that may have it, too) and hidden (by hidepid); notes: not_mapped, mapped_unknown,
not_regular, nothing_wants, unrepaired, published_only.

Examples:
  sowatch explain 1234                          everything it has mapped, and what became of it
  sowatch explain --rule libssl 1234            why is there no event of its libssl?
  sowatch explain /usr/lib/x86_64-linux-gnu/libssl.so.3
  sowatch explain libssl.so.3                   wherever that is
  sowatch explain 1234 --agent                  as the running agent has it: its rules, and what they have attached
"""

# Heavy modules (the watcher) are imported only where they are used.

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from sowatch.cli._agent import add_agent, explanation_of, refuse_own_watch
from sowatch.cli._http_why import why_no_flows
from sowatch.cli._options import add_format, add_kinds, add_strategy, selection_of, wants_json
from sowatch.cli._out import Out
from sowatch.cli._parser import Parser
from sowatch.cli.watch import warn_of_fallback
from sowatch.linux.proc import ProcFs
from sowatch.model.encoding import dumps
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.escape import one_line, visible
from sowatch.model.plural import counted

if TYPE_CHECKING:
    from sowatch.cli._client import Agent
    from sowatch.model import wire_explain as wire
    from sowatch.model.wire import Library

_LABEL_WIDTH: Final = 10
_MOST_RANGES: Final = 4

_WHY: Final = {
    "pattern": "its pattern is not found in the path",
    "kind": "it takes other kinds of files",
    "exports": "the file does not export",
    "exports_unknown": "what the file exports cannot be read",
    "exports_given_up": "the search of its symbols was given up before it found",
    "earlier_rule": "an earlier rule has it",
}
_UNTOLD: Final = {
    "no_rule": "no: no rule wants it",
    "not_selected": "no: this watch was narrowed down to other processes",
    "passing": "no: a child that shares its parent's memory and may exec at any moment",
    "awaiting_facts": "not yet: its file is still being read",
    "baseline": "no: it was there before the watch, which leaves that out",
    "unresolved": "no: what the file exports could not be read when it was mapped",
    "not_in_map": "no: the map does not have it",
}
_ELF: Final = {
    "elf": "an ELF file",
    "partial": "an ELF file, readable in part only",
    "not_elf": "not an ELF file",
    "not_regular": "not a regular file, so it is not opened",
    "gone": "cannot be read: there is no way to the file any more",
    "not_permitted": "cannot be read: not permitted",
    "unreadable": "cannot be read",
    "no_answer": "cannot be read: its file system does not answer",
    "skipped": "not tried",
}
_RELATION: Final = {
    "same": "this file",
    "other_name": "this file, by another name",
    "other_file": "another file, by the same name",
    "deleted": "a deleted file that had this name",
    "unknown": "this file or another: it cannot be determined",
}
_UNPROBED: Final = {
    "shared": "none in a mapping that is MAP_SHARED",
    "writable": "none in a mapping that is writable, too",
    "hugetlb": "none in a file of huge pages",
}
_STALE: Final = {
    "deleted": "deleted: its path leads to nothing any more",
    "replaced": "replaced: its path leads to another file now",
    "modified": "modified",
    "unknown": "it cannot be determined whether it is stale",
}
_ID_FROM: Final = {
    "map": "by the map",
    "verdict": "by the kernel's memory of it",
    "proc": "by /proc",
}
_NOTES: Final = {
    "kernel_thread": "it is a kernel thread, which has no program and maps no library.",
    "zombie": "it has ended and was not collected by its parent yet; nothing is mapped any more.",
    "no_permission": "its mappings may not be read by this user.",
    "no_files": "it has no file mapped executable.",
    "static": "it has no dynamic loader: what it is linked with is part of its executable and no library.",
    "nothing_wanted": "no rule wants anything that it has mapped. What is linked in statically is no library.",
    "narrow": "it is a 32-bit process: its calls are not seen, so it is read again and again.",
    "unread": "the kernel does not answer who reads its mappings, as a page fault of it waits for a file system: "
    "what is known of it may be old. It is read as soon as that is over.",
    "unrepaired": "records were lost and the map is not repaired yet, so it may be wrong for a moment.",
    "not_mapped": "no process has this file mapped executable. A program that has the library linked in "
    "statically does not map it.",
    "mapped_unknown": "no process that could be read has this file mapped executable, as far as it can be determined.",
    "not_regular": "only regular files and memfds can be libraries.",
    "nothing_wants": "no rule would want it.",
    "published_only": "only what load events name is shown; `sowatch debug explain`, on the host, shows the rest.",
}


def configure(parser: Parser) -> None:
    """Add the command's options."""
    # By this name, so that what comes after `--` is taken as well.
    parser.add_argument("patterns", nargs="*", metavar="PID|PATH", help="the process or file to explain")
    add_format(parser)
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Python regular expression, searched in the path as the process sees it; may be repeated. "
        "Default: every file of the kinds asked for",
    )
    add_kinds(parser, default="library")
    add_agent(parser)
    add_strategy(parser)
    parser.add_argument(
        "--proc-root", default="/proc", metavar="DIR", help="where the host's proc is mounted. Default: /proc"
    )


def run(args: Namespace, *, out: Out, warn: Callable[[str], None]) -> int:
    """Watch for a moment, explain, print; returns the exit code."""
    if len(args.patterns) != 1:
        raise UsageError("give one PID or PATH. See `sowatch explain --help`.")
    (target,) = args.patterns
    as_json = wants_json(args)
    if args.agent is None:
        for number, found in enumerate(_examine(args, target, warn)):
            if number and not as_json:
                out.write("\n")
            show_explanation(replace(found, seq=number + 1), out, as_json=as_json)
    else:
        _ask_agent(args, target, out, as_json=as_json)
    return 0


def _examine(args: Namespace, target: str, warn: Callable[[str], None]) -> list[wire.ProcessReport | wire.PathReport]:
    words = vars(args) | {"patterns": args.rule, "pid": [], "container": None}
    selection = selection_of(Namespace(**words, no_snapshot=False, exclude_self=False))
    from sowatch.explain import check_process, explanation, paths_named
    from sowatch.inventory.explained import with_staleness
    from sowatch.watcher.watcher import Watcher

    proc = ProcFs(selection.config.proc_root)
    pid = _pid(target, selection.config.proc_root)
    if pid is not None:
        check_process(proc, pid)
    with Watcher(*selection.rules, config=selection.config) as watcher:
        if watcher.ready is not None:
            warn_of_fallback(watcher.ready, warn)
        if pid is not None:
            return [explanation(with_staleness(watcher.explain(pid), proc))]
        if "/" in target or os.path.lexists(target):
            return [explanation(watcher.explain(target))]
        by_soname = {one.library.path for one in watcher.snapshot() if one.library.soname == target}
        return [explanation(watcher.explain(path)) for path in paths_named(proc, target, by_soname)]


def _ask_agent(args: Namespace, target: str, out: Out, *, as_json: bool) -> None:
    if args.rule or args.kind:
        raise UsageError("--rule and --kind are for a watch of its own. Leave them out, or --agent.")
    refuse_own_watch(args)
    from sowatch.cli._client import Agent

    agent = Agent(args.agent)
    if target.isascii() and target.isdigit():
        show_answer(agent, agent.explain("pid", target), out, as_json=as_json)
        return
    is_path = "/" in target or os.path.lexists(target)
    for number, path in enumerate([os.path.abspath(target)] if is_path else agent.paths_named(target)):
        if number and not as_json:
            out.write("\n")
        show_answer(agent, agent.explain("path", path) | {"seq": number + 1}, out, as_json=as_json)


def show_answer(agent: Agent, found: Any, out: Out, *, as_json: bool) -> None:
    """Write an agent's explanation: for programs as it came, for people as if it were made here."""
    show_explanation(found if as_json else explanation_of(agent, found), out, as_json=as_json)


def show_explanation(found: wire.ProcessReport | wire.PathReport | wire.RuleReport, out: Out, *, as_json: bool) -> None:
    """Write it for programs or for people."""
    if as_json:
        lines: Iterable[str] = [dumps(found)]
    elif found.target == "process":
        lines = _process(found)
    elif found.target == "path":
        lines = _path(found)
    else:
        lines = _rule_report(found)
    out.write("".join(f"{line.rstrip()}\n" for line in lines))
    out.flush()


def _pid(target: str, proc_root: str) -> int | None:
    """The process id that a target is, None if it is a path."""
    if not (target.isascii() and target.isdigit()):
        return None
    if len(target.lstrip("0")) > 10:
        raise SowatchError(f"there is no process {target} in {proc_root}. Find the right one with `ps -e`.")
    return int(target)


# ---- text ---------------------------------------------------------------------------------------


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}} {text}"


def _process(report: wire.ProcessReport) -> Iterator[str]:
    process, kernel, known = report.process, report.kernel, report.map
    about = [
        f"{process.pid} {visible(process.comm or '-')}",
        *([] if process.uid is None else [f"uid {process.uid}"]),
        *([] if process.ppid is None else [f"parent {process.ppid}"]),
        *([f"pid {process.ns_pid} in its own namespace"] if process.ns_pid not in (None, process.pid) else []),
    ]
    yield _line("process", ", ".join(about))
    since_boot = f"{process.start_ns / 1e9:.9f} s after boot"
    yield _line("start", since_boot if report.started is UNSET else f"{report.started}, {since_boot}")
    yield _line("exe", visible(process.exe or "-"))
    # Not doubled: backslashes are part of the names of units, which are made to be copied from here.
    yield _line("cgroup", one_line(process.cgroup or "-"))
    if process.container:
        yield _line("container", visible(process.container))
    state = [report.state.replace("_", " "), f"{report.threads} thread{'s' * (report.threads != 1)}"]
    if report.bits is not None:
        state.append(f"{report.bits}-bit")
    if report.state == "running":
        state.append("leader alive" if report.leader_alive else "its leader has ended, other threads go on")
    yield _line("state", ", ".join(state))
    if kernel is None or not kernel.followed:
        is_settled = kernel is not None
        yield _line("kernel", "does not track it" + (": it did, and nothing of it was wanted" if is_settled else ""))
    else:
        rescan = "it needs a rescan" if kernel.dirty else "no rescan is needed"
        known_ranges = f"{counted(kernel.range_count, 'range')} known"
        yield _line("kernel", f"tracks it: activity generation {kernel.touches}, {known_ranges}, {rescan}")
    if known is None or known.since is None:
        yield _line("map", "does not know it")
    else:
        yield _line("map", f"knows it since {known.since}, {counted(known.files, 'file')}")
    for one in report.mappings:
        yield ""
        yield from _mapping(one)
    if report.extra:
        yield ""
    for extra in report.extra:
        what = "the map has" if extra.kind == "extra" else "the map has not"
        yield _line("difference", f"{what} {'-'.join(extra.range)} {visible(extra.path)}")
    if report.http is not None:
        yield ""
        yield _line("http", why_no_flows(report.http))
    yield from _notes(report.notes)


def _mapping(one: wire.MappingReport) -> Iterator[str]:
    library = one.library
    stale = one.stale or ("deleted" if library.deleted and one.stale is UNSET else None)
    yield visible(library.path) + ("" if stale in (None, "unknown") else f" ({stale})")
    yield _line("  ranges", _ranges(one.ranges, one.range_count))
    yield _line("  file", f"{_id(library)} {_ID_FROM[one.id_from]}; to this process: {library.kind}")
    if stale is not None:
        why = f": {one_line(one.stale_reason)}" if one.stale_reason else ""
        same = ", by a file with the same build id" if one.same_build is True else ""
        yield _line("  on disk", _STALE[stale] + same + why)
    yield _line("  seen", _seen(one.seen) if one.seen else _UNTOLD[one.untold or "not_in_map"])
    yield from _rules(one.rules, "  ")
    yield _line("  verdict", _verdict(one.verdict))
    yield from _look(one.file, "  ", library.build_id, library.soname)
    yield from _activations(one.activations, "  ")
    yield from _attachments(one.attachments, "  ")
    yield from _blocked(one.blocked, "  ")
    for why in one.unprobed:
        yield _line("  uprobes", f"the kernel puts {_UNPROBED[why]}")
    for difference in one.differences:
        yield _line("  differs", f"the map has not {'-'.join(difference.range)}")


def _path(report: wire.PathReport) -> Iterator[str]:
    yield _line("path", visible(report.path))
    if report.resolved != report.path:
        yield _line("leads to", visible(report.resolved))
    yield _line("type", _type_of(report))
    for one in report.ids:
        yield _line("file", f"{_id(one)} {_ID_FROM[one.id_from]}")
    yield from _rules(report.rules, "")
    if report.type is not None:
        yield _line("verdict", _verdict(report.verdict))
        yield from _look(report.file, "", report.file.build_id or None, report.file.soname or None)
    yield from _activations(report.activations, "")
    yield from _attachments(report.attachments, "")
    yield from _blocked(report.blocked, "")
    if report.mapped:
        yield ""
        yield from _mapped(report.mapped)
    yield from _notes(report.notes)
    if report.unreadable:
        yield _line("note", f"{report.unreadable} process{'es' * (report.unreadable != 1)} could not be read.")
    if report.hidden:
        yield _line("note", "/proc hides processes of other users (hidepid), nobody knows how many.")


def _rule_report(report: wire.RuleReport) -> Iterator[str]:
    yield _line("rule", visible(report.rule))
    if report.pattern is not None:
        yield _line("pattern", visible(report.pattern))
    yield _line("kinds", ", ".join(report.kind))
    if report.exports:
        yield _line("exports", ", ".join(map(visible, report.exports)))
    yield from _outline(report.action or {}, "action")
    for file in report.files:
        yield ""
        yield visible(file.library.path)
        yield _line("  file", _id(file.library))
        yield from _attachments([file], "  ", with_rule=False)
    if report.calls:
        yield ""
    for call in report.calls:
        yield _line("calls", ", ".join(f"{key} {visible(str(value))}" for key, value in call.items()))
    for block in report.blocked:
        yield _line("blocked", f"{visible(block.path)} for {block.seconds_left:.0f} s more: {one_line(block.reason)}")


def _outline(value: dict[str, Any], label: str) -> Iterator[str]:
    """Nested facts, a line each; what is null or empty is left out."""
    for key, one in value.items():
        if isinstance(one, dict):
            yield from _outline(one, f"{label} {key}")
        elif one not in (None, [], ""):
            words = ", ".join(map(str, one)) if isinstance(one, list) else str(one).lower()
            yield _line(label, f"{key.replace('_', ' ')} {visible(words)}")


def _id(one: wire.FileIdentity | Library) -> str:
    """As `sowatch.model.identity.FileId` shows it."""
    generation = f".{one.generation}" if one.generation else ""
    return f"{one.dev}/{one.inode}{generation}" + (f"@{one.subvol}" if one.subvol else "")


def _type_of(report: wire.PathReport) -> str:
    if report.type is not None:
        return "memory, which no directory has" if report.type == "memory" else report.type
    is_absent = report.file.elf == "gone"
    return f"{'nothing is there' if is_absent else 'cannot be determined'}: {report.error}"


def _mapped(found: Sequence[wire.MappedIn]) -> Iterator[str]:
    rows = [
        (
            str(one.process.pid),
            visible(one.process.comm or "-"),
            _RELATION[one.relation],
            _seen(one.seen) if one.seen else "in the map, not reported" if one.in_map else "not in the map",
            visible(one.path) + "".join(f" (uprobes: {_UNPROBED[why]})" for why in one.unprobed),
        )
        for one in found
    ]
    head = ("PID", "COMM", "WHAT", "SEEN", "PATH")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        pid, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([pid.strip().rjust(widths[0]), *rest])


def _seen(seen: wire.Seen) -> str:
    return f"{seen.cause} at {seen.time}"


def _ranges(ranges: Sequence[Sequence[str]], count: int | UnsetType) -> str:
    shown = ["-".join(one) for one in ranges[:_MOST_RANGES]]
    if count is not UNSET:
        return f"{shown[0]}, and {count - 1:,} more within {shown[1]}"
    return " ".join(shown) + (f" and {len(ranges) - _MOST_RANGES} more" if len(ranges) > _MOST_RANGES else "")


def _rules(found: Sequence[wire.RuleAnswer], indent: str) -> Iterator[str]:
    for answer in found:
        name = visible(answer.rule)
        if answer.wants:
            yield _line(f"{indent}rule", f"{name} wants it")
        else:
            missing = " " + ", ".join(map(visible, answer.missing)) if answer.missing else ""
            yield _line(f"{indent}rule", f"{name} does not: {_WHY[answer.why or 'pattern']}{missing}")


def _verdict(verdict: wire.VerdictAnswer) -> str:
    if verdict.verdict == "match":
        return "match: the kernel side reports it"
    if verdict.verdict == "ignore" and not verdict.seconds_left:
        return "ignore: no rule wanted it when it was seen first"
    if verdict.verdict == "ignore":
        return f"ignore: the kernel side drops it for {verdict.seconds_left} s more"
    if verdict.verdict == "mixed":
        return "mixed: several names, or files that it may be, have different answers"
    return "none: the kernel side asks when it is mapped next"


def _look(look: wire.FileLook, indent: str, build_id: str | None, soname: str | None) -> Iterator[str]:
    if look.opened_by is not None:
        yield _line(f"{indent}open", f"yes, by {look.opened_by}: {visible(look.tries[-1].path)}")
    else:
        for one in look.tries:
            yield _line(f"{indent}open", f"not by {one.by}: {visible(one.path)}: {one.error}")
    facts = [_ELF[look.elf]]
    if look.reason and look.elf not in ("gone", "not_regular"):
        facts[0] += f" ({one_line(look.reason)})"
    if build_id:
        facts.append(f"build id {build_id}")
    if soname:
        facts.append(f"soname {visible(soname)}")
    yield _line(f"{indent}elf", ", ".join(facts))


def _activations(found: Sequence[wire.Active], indent: str) -> Iterator[str]:
    for one in found:
        if one.state != "held":  # so is every file of a rule without callbacks
            yield _line(f"{indent}active", f"{one.state} for rule {visible(one.rule)}")


def _attachments(
    found: Sequence[wire.Attachment | wire.RuleFile], indent: str, *, with_rule: bool = True
) -> Iterator[str]:
    for one in found:
        of_rule = f" by rule {visible(one.rule)}" * with_rule
        users = f", {one.users} user{'s' * (one.users != 1)}" + ", lingering" * one.lingering
        why = f": {one_line(one.reason)}" if one.reason else ""
        yield _line(f"{indent}probes", f"{one.state}{of_rule}{users}{why}")
        for probe in one.probes:
            at = "" if probe.offset is None else f" at {probe.offset:#x}"
            reason = f": {one_line(probe.reason)}" if probe.reason else ""
            end = " (return)" * probe.is_return
            yield _line(
                f"{indent}probe", f"{visible(probe.symbol)}{end}{at}: {visible(probe.program)} {probe.state}{reason}"
            )


def _blocked(found: Sequence[wire.Blocked], indent: str) -> Iterator[str]:
    for block in found:
        left = f"{block.seconds_left:.0f} s more"
        yield _line(f"{indent}blocked", f"by rule {visible(block.rule)} for {left}: {one_line(block.reason)}")


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield ""
    for note in notes:
        yield _line("note", _NOTES[note])
