"""`IteratorScan`: what sessions of a BPF iterator write, read on a helper thread that may be left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from errno import ESRCH

from sowatch.bpf.records import Record, parse
from sowatch.model.errors import BpfError

__all__ = ["IteratorScan"]

_READ_BYTES = 1 << 16


class IteratorScan:
    """A call for `UnreadProcesses.run`. After it was given up it touches nothing but its own descriptor.

    Args:
        open_session: a new descriptor of the iterator for one process, or for all (0).
        targets: pids, one session each, or just 0.

    Attributes:
        current: the target that is read.
        progress: changes as long as the scan gets on.
        is_given_up: set by whoever does not wait any more.
        begun_ns: CLOCK_MONOTONIC of when each session began, by target.
    """

    def __init__(self, open_session: Callable[[int], int], targets: Sequence[int]) -> None:
        self._open_session = open_session
        self._targets = targets
        self._chunks: list[tuple[int, bytes]] = []
        self._taken = 0
        self.current = 0
        self.progress = 0
        self.is_given_up = False
        self.begun_ns: dict[int, int] = {}

    def __call__(self) -> None:
        for target in self._targets:
            if self.is_given_up:
                return
            self.current = target
            self.progress += 1
            self.begun_ns[target] = time.monotonic_ns()
            try:
                fd = self._open_session(target)
            except BpfError as error:
                if target and error.errno == ESRCH:
                    continue  # it is gone
                raise
            try:
                self._read(fd, target)
            finally:
                os.close(fd)

    def _read(self, fd: int, target: int) -> None:
        while True:
            try:
                chunk = os.read(fd, _READ_BYTES)
            except InterruptedError:
                continue
            except OSError as error:
                raise BpfError("reading the iterator", error.errno or 5, "") from error
            if not chunk or self.is_given_up:
                return
            self._chunks.append((target, chunk))
            self.progress += 1

    def left_after(self) -> Sequence[int]:
        """The targets after the current one."""
        return self._targets[self._targets.index(self.current) + 1 :]

    def rows(self, *, but: int = -1) -> list[Record]:
        """What was read so far, but of one target."""
        return [row for target, chunk in list(self._chunks) if target != but for row in parse(chunk)]
