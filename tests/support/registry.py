"""What the tests of the registry share: files, processes, callbacks that write down their calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sowatch.engine.activation import FileRegistry
from sowatch.linux.proc import Miss, ProcFs
from sowatch.model.events import Library
from sowatch.model.identity import TICK_NS, FileId, ProcessId

P1 = ProcessId(101, 1 * TICK_NS)
P2 = ProcessId(102, 2 * TICK_NS)
P3 = ProcessId(103, 3 * TICK_NS)


def library(inode: int = 1, *, generation: int = 0, path: str | None = None) -> Library:
    return Library(path or f"/usr/lib/lib{inode}.so", FileId(8, 1, inode, generation))


A = library(1)
B = library(2)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Hooks:
    """Callbacks that write down their calls, and fail or block when told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Library]] = []
        self.fail_with: BaseException | None = None
        self.fail_off_with: BaseException | None = None
        self.on_activate: Callable[[], Any] = lambda: None

    def activate(self, file: Library) -> None:
        self.calls.append(("on", file))
        self.on_activate()
        if self.fail_with is not None:
            raise self.fail_with

    def deactivate(self, file: Library) -> None:
        self.calls.append(("off", file))
        if self.fail_off_with is not None:
            raise self.fail_off_with

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Gate:
    """Holds a callback up until it is opened, and says when it got there."""

    def __init__(self, timeout_s: float) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._timeout_s = timeout_s

    def __call__(self) -> None:
        self.reached.set()
        assert self._open.wait(self._timeout_s)

    def open(self) -> None:
        self._open.set()


def register(registry: FileRegistry, file: Library, process: ProcessId, hooks: Hooks, rule: str = "default") -> bool:
    """What publisher and worker do of a load: count it and, if it is the first, activate. Whether that succeeded."""
    return registry.acquire(rule, file, process) and registry.activate(
        rule, file, hooks.activate, deactivate=hooks.deactivate, process=process
    )


def unregister(registry: FileRegistry, file: Library, process: ProcessId, hooks: Hooks, rule: str = "default") -> bool:
    """What they do of an unload. Whether the file was deactivated."""
    return registry.release(rule, file.id, process) and registry.deactivate(rule, file.id, hooks.deactivate)


def id_of(pid: int) -> ProcessId:
    stat = ProcFs().stat(pid)
    assert not isinstance(stat, Miss)
    return ProcessId(pid, stat.start_ns)
