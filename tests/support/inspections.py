"""An `Inspector` whose clock and whose hanging reads a test commands, and real files as a process has them mapped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sowatch.engine import file_inspector
from sowatch.engine.address_space import Change, MappedFile
from sowatch.engine.file_inspector import FileFacts, Inspection, Inspector
from sowatch.linux.proc import ProcFs
from sowatch.model.events import Process
from sowatch.model.identity import FileId
from sowatch.model.rules import RuleSet
from support.records import File, Proc

__all__ = ["BUILD_ID", "ME", "Clock", "Gate", "Reader", "count_parsed", "name_of"]

ME = os.getpid()
#: Of what `support.elf_files.Made` makes.
BUILD_ID = bytes(range(20)).hex()


class Clock:
    """The time as the inspector has it: two hours after now, so that no file is new, until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.file_age_s = 7200.0
        self.files: list[Path] = []

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        newest = max((one.stat().st_ctime_ns for one in self.files if one.exists()), default=0)
        return newest + int(self.file_age_s * 1e9)


class Gate:
    """Holds reads of some processes or files until a test lets them go on."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self._held: dict[str, threading.Event] = {}
        self.arrived = threading.Semaphore(0)
        self.calls: list[tuple[str, bool]] = []
        #: Names of files, by pid, whose reads wait for the file system and not for the process.
        self.at_file: set[str] = set()
        #: By which link everything is found; None: where it is.
        self.link: str | None = None

    def hold(self, name: str) -> threading.Event:
        self._held[name] = threading.Event()
        return self._held[name]

    def __call__(self, proc: ProcFs, pid: int, file_id: FileId, path: str, *args: Any, **options: Any) -> Any:
        name = os.path.basename(path)
        self.calls.append((name, options["skips_process"]))
        event = None if options["skips_process"] else self._held.get(name)
        if event is not None:
            if name in self.at_file:
                options["on_file"]()
            self.arrived.release()
            event.wait()
        found = self._real(proc, ME if pid else 0, file_id, path, *args, **options)
        return found._replace(place="link", link=self.link) if self.link else found

    def open_all(self) -> None:
        for event in self._held.values():
            event.set()


class Reader:
    """An inspector and what it has been asked for."""

    def __init__(self, gate: Gate, clock: Clock, wait_s: float) -> None:
        self._gate, self.clock, self._wait_s = gate, clock, wait_s
        self._inspectors: list[Inspector] = []
        self._done = threading.Semaphore(0)
        self.inspector = self.make()

    def make(self, *exports: str) -> Inspector:
        made = Inspector(proc=ProcFs(), exports=frozenset(exports), on_done=self._done.release)
        self._inspectors.append(made)
        self.inspector = made
        return made

    def ask(self, name: MappedFile, *, pid: int = ME, is_own_view: bool = True) -> Inspection:
        change = Change(True, "mmap", 1, Process(pid, 5), "library", name, ())
        return self.inspector.inspect(change, is_own_view=is_own_view, now_s=self.clock.now_s)

    def wait_done(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._done.acquire(timeout=self._wait_s)

    def wait_held(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._gate.arrived.acquire(timeout=self._wait_s)

    def read(self, name: MappedFile, **options: Any) -> FileFacts:
        inspection = self.ask(name, **options)
        self.wait_done()
        assert inspection.facts is not None
        return inspection.facts

    def end(self) -> None:
        self._gate.open_all()
        for inspector in self._inspectors:
            inspector.close(self._wait_s)


def name_of(path: Path, inode: int | None = None, changed_ns: int | None = None) -> MappedFile:
    status = path.stat()
    row = Proc().map(File(str(path)))
    row = row._replace(changed_ns=status.st_ctime_ns if changed_ns is None else changed_ns)
    file_id = FileId(os.major(status.st_dev), os.minor(status.st_dev), inode or status.st_ino)
    return MappedFile(row._replace(file_id=file_id), RuleSet([]))


def count_parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has one entry more for each file that is parsed from now on."""
    parsed: list[int] = []
    real = file_inspector.read_facts
    monkeypatch.setattr(file_inspector, "read_facts", lambda fd: (parsed.append(fd), real(fd))[1])
    return parsed
