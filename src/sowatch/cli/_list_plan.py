"""``list --stale --plan``: the commands, what each is for, and what is not served meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from sowatch.model.wire import SCHEMA

if TYPE_CHECKING:
    from sowatch.cli._agent_scan import AgentScan
    from sowatch.cli._list_entries import ListEntry
    from sowatch.cli._out import Out
    from sowatch.inventory.restart_plan import PlannedProcess, PlannedRestart
    from sowatch.linux.proc import ProcFs
    from sowatch.model import wire, wire_lists

__all__ = ["plan_of", "write_plan", "write_plan_lines"]


def plan_of(entries: Sequence[ListEntry], proc: ProcFs, asked: AgentScan | None) -> list[PlannedRestart]:
    """Puts the plan together, of what an agent has answered, or else of the packages and the sockets that it reads."""
    from sowatch.inventory.packages import Packages
    from sowatch.inventory.restart_plan import planned
    from sowatch.inventory.restarts import restart_groups
    from sowatch.linux.listeners import Listeners, Listening
    from sowatch.linux.proc import ProcReadError

    files = [entry.stale_file for entry in entries]
    if asked is not None:
        return planned(restart_groups(files), asked.running, asked.listening)
    with closing(Packages(proc)) as packages:
        identities = packages.identify(entry.mapped for entry in entries)
    listeners = Listeners(proc)
    listening: dict[int, Listening | None] = {}
    for pid in {one.process.pid for one in files}:
        try:
            found = listeners.of(pid)
        except ProcReadError:
            continue
        listening[pid] = found if isinstance(found, Listening) else None
    running = {one.key: identity for one, identity in zip(files, identities, strict=True)}
    return planned(restart_groups(files), running, listening)


def write_plan(out: Out, restarts: Sequence[PlannedRestart]) -> None:
    """Lines for a shell."""
    from sowatch.inventory.restart_plan import shell_lines

    out.write("".join(f"{line}\n" for line in shell_lines(restarts)))
    out.flush()


def write_plan_lines(out: Out, head: wire.Head, restarts: Sequence[PlannedRestart]) -> int:
    """As JSON, one line a restart; returns the number of the last one."""
    from sowatch.model.encoding import dumps

    out.write(dumps(head) + "\n")
    now = head.time
    for seq, one in enumerate(restarts, 2):
        out.write(dumps(_line(one, seq, now)) + "\n")
    return len(restarts) + 1


def _line(one: PlannedRestart, seq: int, now: str) -> wire_lists.Restart:
    from sowatch.model import wire, wire_lists

    target = one.group.target
    return wire_lists.Restart(
        SCHEMA,
        "restart",
        seq,
        now,
        target.kind,
        target.name,
        target.unit,
        target.uid,
        target.container,
        [wire.Pod(pod.uid, pod.name, pod.namespace, pod.container) for pod in one.pods],
        target.command,
        one.advice,
        one.group.why_not,
        list(dict.fromkeys(map(str, one.listeners))),
        [_process(process) for process in one.processes],
    )


def _process(one: PlannedProcess) -> wire_lists.RestartProcess:
    from sowatch.inventory.mapping_lines import package_line
    from sowatch.inventory.staleness import Staleness
    from sowatch.model import wire_lists
    from sowatch.model.lines import library_line, process_line

    listening = one.listening
    return wire_lists.RestartProcess(
        process_line(one.process),
        None if listening is None else list(dict.fromkeys(map(str, listening.sockets))),
        listening is not None and listening.is_complete,
        [
            wire_lists.RestartFile(
                used.file.answer.stale or Staleness.UNKNOWN,
                used.file.answer.reason,
                used.file.answer.is_same_build,
                used.file.package,
                package_line(used.package),
                library_line(used.file.library),
            )
            for used in one.files
        ],
    )
