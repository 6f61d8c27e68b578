"""What an agent has mapped now, and what of it is stale: for `list --agent`, in the place of a watcher and of the disk.

The agent answers whether files are stale and of which packages they are, as this user may not read the processes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Final, Self

from msgspec import UNSET
from msgspec.structs import replace

from sowatch.cli._client import ANSWER_TIMEOUT_S, Agent
from sowatch.cli._front import front_pid
from sowatch.cli._options import Selection
from sowatch.inventory.coverage import Coverage
from sowatch.inventory.mapping_lines import answer_from, mapped_from, package_from
from sowatch.inventory.packages import PackageIdentity
from sowatch.inventory.stale_watch import ASKED_EVERY_S, FileKey
from sowatch.inventory.staleness import FRESH, StaleAnswer
from sowatch.linux.listeners import Listening, listening_from
from sowatch.model import wire
from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import Library, Process, Ready
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.lines import decode_as, process_from, time_ns_from
from sowatch.model.literals import Kind
from sowatch.model.stats import Mapped

__all__ = ["AgentDisk", "AgentScan", "AgentStale", "Filter", "ready_from"]

_HEAD: Final = '{"schema":1,"event":"head"'
_MAPPING: Final = '{"schema":1,"event":"mapping"'

_Key = tuple[ProcessId, FileId, str]


class Filter:
    """What of an agent's answers a command line asks for.

    Args:
        agent: that answers; it and this process are left out where the selection leaves out sowatch itself.
        selection: of the command line.

    Raises:
        UsageError: files are chosen by what they export, which no answer says.
        SowatchError: the agent knows no such process, or does not answer.
    """

    def __init__(self, agent: Agent, selection: Selection) -> None:
        self._rules = selection.rules
        self._pids = selection.pids
        self._container = selection.container
        self._own: frozenset[int] = frozenset()
        if any(rule.exports for rule in selection.rules):
            raise UsageError("an agent does not say what files export. Leave that out, or --agent.")
        for pid in sorted(selection.pids):
            agent.explain("pid", str(pid))  # is there such a process, and no thread?
        # An agent that is not in our pid namespace has other numbers for us, which may be those of others.
        if selection.exclude_self and (theirs := agent.peer_pid()) is not None:
            self._own = frozenset(pid for pid in (os.getpid(), front_pid(), theirs) if pid is not None)

    @property
    def own_pids(self) -> frozenset[int]:
        """Of the agent and of this command, where they are left out."""
        return self._own

    def wants_file(self, container: str | None, path: str, kind: Kind) -> bool:
        """Whether it is asked for what a container, or the host, has loaded."""
        if self._container is not None and not (container or "").startswith(self._container):
            return False
        return any(kind in rule.kind and rule.matches_path(path) for rule in self._rules)

    def wants_process(self, process: Process) -> bool:
        """Whether it is asked for what this process has."""
        if process.pid in self._own or (self._pids and process.pid not in self._pids):
            return False
        return self._container is None or (process.container or "").startswith(self._container)

    def wants(self, process: Process, library: Library) -> bool:
        """Whether it is asked for that this process has this file."""
        if not self.wants_process(process):
            return False
        return any(library.kind in rule.kind and rule.matches_path(library.path) for rule in self._rules)


def ready_from(head: wire.Head, agent: Agent) -> Ready:
    """The agent's `Ready`, as far as its answer has it; the limits say who answered."""
    rules = ", ".join(head.rule_names or ())
    limits = head.limits or []
    return Ready(
        time_ns=time_ns_from(head.time),
        host=head.host,
        boot_id=head.boot_id,
        strategy=head.strategy or "core",
        guarantee=head.guarantee or "unknown",
        hooks=None,
        limits=(*limits, f"the agent on {agent.path} answered, by its rules: {rules}"),
        attempts=(),
        processes=0,
        mappings=0,
        seconds=head.seconds or 0.0,
        host_id=head.host_id,
        version=head.version,
    )


class AgentScan:
    """One answer of an agent, narrowed down to what a command line asks for. One thread uses it.

    Args:
        agent: is asked.
        selection: of the command line.
        with_packages: the packages of stale files, too.
    """

    def __init__(self, agent: Agent, selection: Selection, *, with_packages: bool) -> None:
        self.agent = agent
        self._selection = selection
        self._with_packages = with_packages
        self._filter: Filter | None = None
        self._head: wire.Head | None = None
        #: Of every process that the agent knows something of.
        self.containers: set[str] = set()
        self.coverage = Coverage(0, 0, is_hidden=False)
        self._unreadable: list[Process] = []
        self._mapped: list[Mapped] = []
        self.disk = AgentDisk({}, {})
        #: The packages that stale files were of, and what their processes listen on.
        self.running: Mapping[_Key, PackageIdentity | None] = {}
        self.listening: Mapping[int, Listening | None] = {}

    def start(self) -> Ready:
        """Asks; returns what the agent says of its watch.

        Raises:
            SowatchError: it does not answer, or not what this version understands.
        """
        self.agent.ready()  # one that hangs is noticed within a few seconds
        self._filter = Filter(self.agent, self._selection)
        self._ask()
        return ready_from(self.head, self.agent)

    @property
    def head(self) -> wire.Head:
        """Once started: the first line of its answer, with who answered."""
        assert self._head is not None
        return self._head

    def wait(self, timeout_s: float | None = None) -> bool:
        """Asks again after that time."""
        threading.Event().wait(timeout_s)
        self._ask()
        return False

    def snapshot(self) -> Sequence[Mapped]:
        """What it had mapped."""
        return self._mapped

    def coverage_of(self, is_wanted: Callable[[Process], bool]) -> Coverage:
        """How many processes could be read, without those unreadable ones that are not asked for."""
        assert self._filter is not None
        left_out = sum(not (self._filter.wants_process(one) and is_wanted(one)) for one in self._unreadable)
        return self.coverage._replace(unreadable=self.coverage.unreadable - left_out)

    def stop(self) -> None:
        """Nothing runs."""

    def _ask(self) -> None:
        route = f"/mappings?owners={int(self._with_packages)}"
        if self._selection.pids:
            route += "&pid=" + ",".join(map(str, sorted(self._selection.pids)))
        assert self._filter is not None
        mapped, answers, packages = [], {}, {}
        running: dict[_Key, PackageIdentity | None] = {}
        listening: dict[int, Listening | None] = {}
        self._head, self.coverage, self._unreadable = None, Coverage(0, 0, is_hidden=False), []
        for line in self._lines(route):
            if isinstance(line, wire.Head):
                self._head = replace(line, agent=wire.AskedAgent(self.agent.path, line.version))
            elif isinstance(line, wire.Coverage):
                read = line.processes
                self.coverage = Coverage(read.read, read.unreadable, read.hidden)
                if line.unreadable_processes is not UNSET:
                    self._unreadable = [process_from(one) for one in line.unreadable_processes]
                    self.containers.update(one.container for one in self._unreadable if one.container)
            else:
                one, answer = mapped_from(line), answer_from(line)
                self.containers.update(filter(None, [one.process.container]))
                if self._filter.wants(one.process, one.library):
                    mapped.append(one)
                    answers[one.process.id, one.library.id, one.library.path] = answer
                    if line.package is not UNSET:
                        packages[one.process.pid, answer.path or one.library.path] = line.package
                    running[one.process.id, one.library.id, one.library.path] = package_from(line.mapped_package)
                    if line.listen is not UNSET:
                        listening[one.process.pid] = None if line.listen is None else listening_from(line.listen)
        if self._head is None:
            raise self.agent.is_older("answers in another form (no head)")
        self._mapped, self.disk = mapped, AgentDisk(answers, packages)
        self.running, self.listening = running, listening

    def _lines(self, route: str) -> Iterator[wire.Head | wire.Mapping | wire.Coverage]:
        stream = self.agent.open(route, ANSWER_TIMEOUT_S)
        try:
            for data in stream:
                yield self.agent.read_as(partial(_line_of, data.decode("ascii", "replace")))
        finally:
            stream.release()


def _line_of(text: str) -> wire.Head | wire.Mapping | wire.Coverage:
    if text.startswith(_MAPPING):
        return decode_as(text, wire.Mapping)
    return decode_as(text, wire.Head) if text.startswith(_HEAD) else decode_as(text, wire.Coverage)


class AgentDisk:
    """What an agent answers of files, in the place of `sowatch.inventory.staleness.Disk`. A context manager."""

    def __init__(self, answers: dict[_Key, StaleAnswer], packages: dict[tuple[int, str], str | None]) -> None:
        self.answers = answers
        self._packages = packages

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""

    def staleness(
        self,
        process: Process,
        library: Library,
        ranges: Sequence[tuple[int, int]] = (),  # noqa: ARG002 - as that of `Disk`
        *,
        loaded_ns: int | None = None,  # noqa: ARG002
    ) -> StaleAnswer:
        """As that of `Disk`; what was mapped since the agent was asked is not stale."""
        return self.answers.get((process.id, library.id, library.path), FRESH)

    def owners(self, wanted: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str | None]:
        """As that of `Disk`."""
        return {one: self._packages.get(one) for one in wanted}


class AgentStale:
    """What an agent says is stale, for an inventory in the place of `sowatch.inventory.stale_watch.StaleWatch`.

    Attributes:
        answers: for each process and file that is stale or unknown; replaced as a whole.
    """

    def __init__(self, agent: Agent, selection: Selection) -> None:
        self._scan = AgentScan(agent, selection, with_packages=False)
        self.answers: Mapping[tuple[ProcessId, FileKey], StaleAnswer] = {}
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sowatch-stale", daemon=True)

    def ask(self) -> None:
        """Somebody wants the answers; returns at once."""
        self._asked.set()
        if not self._thread.is_alive() and self._thread.ident is None:
            self._thread.start()

    def compare(self) -> None:
        """Asks the agent, now and in this thread.

        Raises:
            SowatchError: it does not answer.
        """
        self._scan.start()
        found = self._scan.disk.answers.items()
        self.answers = {(process, (file, path)): one for (process, file, path), one in found if one.stale is not None}

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            # An agent that is gone is reported by its stream, which is read all the time.
            with suppress(SowatchError):
                self.compare()
            threading.Event().wait(ASKED_EVERY_S)
