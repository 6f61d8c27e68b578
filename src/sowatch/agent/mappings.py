"""``GET /mappings``: the lines of ``sowatch list --json``, made by the agent, with its rights.

So who may use the socket learns what is stale, and of which package, without any right to read processes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from sowatch.inventory.coverage import Coverage, coverage_line, coverage_of_answers
from sowatch.inventory.mapping_lines import mapping_line, package_line
from sowatch.inventory.packages import Packages
from sowatch.inventory.staleness import NOT_PERMITTED, Disk
from sowatch.linux.containers import container_id
from sowatch.linux.disk_calls import HangingCalls
from sowatch.linux.listeners import Listeners, Listening
from sowatch.linux.proc import Miss, ProcFs, ProcReadError
from sowatch.model import wire
from sowatch.model.encoding import dumps
from sowatch.model.events import Process, Ready
from sowatch.model.lines import head_line
from sowatch.model.stats import Mapped
from sowatch.watcher.watcher import Watcher

__all__ = ["mapping_lines"]

#: Lines that are sent together.
_CHUNK_LINES: Final = 200
#: Processes that could not be read and are named.
_MOST_UNREADABLE: Final = 1_000


def mapping_lines(
    watcher: Watcher,
    ready: Ready,
    proc: ProcFs,
    pids: Collection[int],
    hanging: HangingCalls,
    *,
    with_owners: bool,
    packages: Packages | None = None,
) -> Iterator[bytes]:
    """The answer, some lines at a time: `head`, `mapping` s, and `coverage` where processes could not be read.

    Args:
        watcher: whose map is shown.
        ready: what it reported.
        proc: the host's.
        pids: only these processes; empty: all.
        hanging: what does not answer, from one request to the next.
        with_owners: the package of what is stale, and how that is restarted, too, which takes longer.
        packages: which packages stale files were of; with owners only.
    """
    begun_s = time.monotonic()
    found = [one for one in watcher.snapshot() if not pids or one.process.pid in pids]
    hung = {pid for pid in watcher.unread if not pids or pid in pids}
    head = replace(
        head_line(ready.origin, time.time_ns(), 1),
        source="agent",
        strategy=ready.strategy,
        guarantee=ready.guarantee,
        hooks=ready.hooks,
        limits=list(ready.limits),
        rule_names=[rule.name for rule in watcher.rules],
    )
    closed: set[int] = set()
    lines: list[wire.Head | wire.Mapping | wire.Coverage] = []
    with Disk(proc, hanging) as disk:
        answers = disk.staleness_of_all(found)
        pairs = zip(found, answers, strict=True)
        stale = [(one.process.pid, answer.path or one.library.path) for one, answer in pairs if answer.stale]
        owners = disk.owners(stale) if with_owners else {}
    stale_files = [one for one, answer in zip(found, answers, strict=True) if answer.stale]
    was = _stale_facts(stale_files if with_owners else [], proc, packages)
    lines.append(replace(head, seconds=round(time.monotonic() - begun_s, 6)))
    for seq, (one, answer) in enumerate(zip(found, answers, strict=True), 2):
        if answer.reason == NOT_PERMITTED:
            closed.add(one.process.pid)
        is_owned = with_owners and answer.stale is not None
        package = owners.get((one.process.pid, answer.path or one.library.path)) if is_owned else None
        more = was.get((one.process.id, one.library.id, one.library.path), {}) if is_owned else {}
        lines.append(mapping_line(one, answer, package, seq, with_owner=is_owned, **more))
        if len(lines) >= _CHUNK_LINES:
            yield _text(lines)
            lines.clear()
    read = {one.process.pid for one in found}
    coverage = coverage_of_answers(proc, ready.strategy, read, closed | hung, pids, hanging=hanging)
    if not coverage.is_complete:
        known = {one.process.pid: one.process for one in found}
        lines.append(coverage_line(coverage, len(found) + 2, _unreadable(coverage, known, proc)))
    yield _text(lines)


def _stale_facts(
    stale: Sequence[Mapped], proc: ProcFs, packages: Packages | None
) -> dict[tuple[object, ...], dict[str, Any]]:
    """By process and file, the package that it was of, and what its process listens on."""
    if packages is None or not stale:
        return {}
    listeners = Listeners(proc)
    ports: dict[int, list[str] | None] = {}
    for pid in {one.process.pid for one in stale}:
        try:
            found = listeners.of(pid)
        except ProcReadError:
            found = Miss.DENIED
        ports[pid] = list(dict.fromkeys(map(str, found.sockets))) if isinstance(found, Listening) else None
    return {
        (one.process.id, one.library.id, one.library.path): {
            "mapped_package": package_line(package),
            "listen": ports[one.process.pid],
        }
        for one, package in zip(stale, packages.identify(stale), strict=True)
    }


def _unreadable(coverage: Coverage, known: Mapping[int, Process], proc: ProcFs) -> list[Process]:
    """Who could not be read, so that who asks can leave out those that his filters do."""
    pids = coverage.unreadable_pids[:_MOST_UNREADABLE]
    processes = (known.get(pid) or proc.process(pid, container_of=container_id) for pid in pids)
    return [one for one in processes if one is not None]


def _text(lines: Collection[wire.Head | wire.Mapping | wire.Coverage]) -> bytes:
    return "".join(f"{dumps(line)}\n" for line in lines).encode("ascii")
