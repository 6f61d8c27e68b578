"""What of the fleet's records is read from files and ``/proc``: packages, hashes of files without a build id, ports.

On a thread of its own, so that a file system that does not answer delays no record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from sowatch.fleet.lookups import Question
from sowatch.fleet.records import Package
from sowatch.inventory.packages import PackageIdentity, Packages
from sowatch.linux.listeners import Listeners
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Library
from sowatch.model.identity import ProcessId

__all__ = ["FleetFacts", "HasQuestions"]

LOG = logging.getLogger("sowatch.agent")

#: Questions that are answered together: a database is searched once for all of them.
_BATCH: Final = 512
#: After so many faults in one of them what is left of it is not asked again.
_MAX_FAULTS: Final = 32
#: Ports are read this often: soon after something new is mapped, and else.
_PORTS_SOON_S: Final = 60.0
_PORTS_LATER_S: Final = 300.0
#: The first time so long after the start.
_PORTS_FIRST_S: Final = 2.0
#: Ports of all processes together take this share of one CPU at most.
_PORTS_SHARE: Final = 0.002
_END_S: Final = 1.0


class HasQuestions(Protocol):
    """What is asked, and takes the answers; called by the thread of `FleetFacts`."""

    def take_questions(self, limit: int) -> list[Question]:
        """Those that were not asked before."""

    def answer(
        self,
        packages: Sequence[tuple[Question, Package | None]],
        hashes: Sequence[tuple[Library, str | None]],
        ports: Mapping[int, str],
    ) -> None:
        """Takes what was found."""

    def shown_processes(self) -> list[ProcessId]:
        """Whose ports are wanted."""


class FleetFacts:
    """Answers questions, from `start` on.

    Args:
        source: asks them; see `wake`.
        packages: the agent's.
        proc: the host's.
    """

    def __init__(self, source: HasQuestions, packages: Packages, proc: ProcFs) -> None:
        self._source = source
        self._packages = packages
        self._listeners = Listeners(proc)
        self._ports_s = time.monotonic() + _PORTS_FIRST_S
        self._faults = 0
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sowatch-fleet-facts", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There are questions; any thread, at once."""
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, unless it hangs. Safe to call again."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(max(0.0, self._ports_s - time.monotonic()))
            self._wake.clear()
            try:
                self._turn()
            except Exception:
                LOG.exception("what is mapped was not identified for the fleet")
                self._closing.wait(1.0)

    def _turn(self) -> None:
        while questions := self._source.take_questions(_BATCH):
            wanted = [one for one in questions if one.identity is not None]
            packages: list[PackageIdentity | None] = []
            hashes: list[tuple[Library, str | None]] = []
            self._faults = 0
            try:
                hashes += [(one.library, self._content_name(one)) for one in questions if one.identity is None]
                packages += self._identify(wanted)
            finally:
                # Whatever happens, each is answered: none stays open.
                named = {(library.id, library.changed_ns) for library, _ in hashes}
                rest = [one.library for one in questions if one.identity is None]
                hashes += [(one, None) for one in rest if (one.id, one.changed_ns) not in named]
                packages += [None] * (len(wanted) - len(packages))
                found = [(one, _package(package)) for one, package in zip(wanted, packages, strict=True)]
                self._source.answer(found, hashes, {})
            self._ports_s = min(self._ports_s, time.monotonic() + _PORTS_SOON_S)
            if self._closing.is_set():
                return
        if time.monotonic() >= self._ports_s:
            begun_s = time.thread_time()
            self._source.answer([], [], self._ports(self._source.shown_processes()))
            spent_s = time.thread_time() - begun_s
            self._ports_s = time.monotonic() + max(_PORTS_LATER_S, spent_s / _PORTS_SHARE)

    def _content_name(self, one: Question) -> str | None:
        try:
            return self._packages.content_name(one)
        except Exception as error:  # noqa: BLE001 - one file keeps no other from being answered
            self._note_fault(error)
            return None

    def _identify(self, wanted: Sequence[Question]) -> list[PackageIdentity | None]:
        """A fault leaves the others of its batch their answers: it is asked again by halves."""
        try:
            return self._packages.identify(wanted)
        except Exception as error:  # noqa: BLE001 - the same
            self._note_fault(error)
            if len(wanted) == 1 or self._faults > _MAX_FAULTS or self._closing.is_set():
                return [None] * len(wanted)
        half = len(wanted) // 2
        return [*self._identify(wanted[:half]), *self._identify(wanted[half:])]

    def _note_fault(self, error: Exception) -> None:
        """The first of a batch is logged."""
        self._faults += 1
        if self._faults == 1:
            LOG.error("what is mapped was not identified for the fleet", exc_info=error)

    def _ports(self, processes: Sequence[ProcessId]) -> dict[int, str]:
        self._listeners.begin_pass()
        found = {}
        for one in processes:
            if self._closing.is_set():
                break
            listening = self._listeners.of(one.pid)
            if not isinstance(listening, Miss):
                found[one.pid] = str(listening)
        self._listeners.begin_pass()
        return found


def _package(found: PackageIdentity | None) -> Package | None:
    if found is None:
        return None
    return Package(found.name, found.version, found.source or "", found.purl, found.identified_by)
