"""`IteratorScan`: what sessions of a BPF iterator write, read on a helper thread that may be left behind."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from errno import ESRCH

from sowatch.bpf.records import Record, parse
from sowatch.model.errors import BpfError

__all__ = ["IteratorScan"]

_READ_BYTES = 1 << 16


class IteratorScan:
    """A call for `UnreadProcesses.run`. After it was given up it uses nothing but its own descriptor.

    Args:
        open_session: a new descriptor of the iterator for one process, or for all (0).
        targets: pids, one session each, or just 0.

    Attributes:
        current: the target that is read.
        progress: changes as long as the scan gets on.
        is_given_up: set by the caller that does not wait any more.
        begun_ns: CLOCK_MONOTONIC of when each session began, by target.
    """

    def __init__(self, open_session: Callable[[int], int], targets: Sequence[int]) -> None:
        self._open_session = open_session
        self._targets = targets
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._read_bytes = 0
        self._parsed_bytes = 0
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
            except (InterruptedError, BlockingIOError):
                # EAGAIN: the kernel has gone past 1,000,000 objects without a row, and goes on with the next read.
                if self.is_given_up:
                    return
                self.progress += 1
                continue
            except OSError as error:
                raise BpfError("reading the iterator", error.errno or 5, "") from error
            if not chunk or self.is_given_up:
                return
            self._chunks.append((target, chunk))
            self._read_bytes += len(chunk)
            self.progress += 1

    def left_after(self) -> Sequence[int]:
        """The targets after the current one."""
        return self._targets[self._targets.index(self.current) + 1 :]

    @property
    def unparsed_bytes(self) -> int:
        """What was read and not given by `rows`."""
        return self._read_bytes - self._parsed_bytes

    def rows(self, *, but: int = -1) -> Iterator[Record]:
        """What was read since the last call, but of one target; it is kept no longer."""
        # Those that are there now: a thread that was left behind may add one more.
        for _ in range(len(self._chunks)):
            target, chunk = self._chunks.popleft()
            self._parsed_bytes += len(chunk)
            if target != but:
                yield from parse(chunk)
