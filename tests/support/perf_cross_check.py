"""An independent witness of every executable mapping in the system: ``perf record``.

perf's dummy event makes the kernel write an MMAP2 record for each executable mapping (exec-time
ones and those made by mprotect included), with the real inode, and records of fork, exec and
exit, for all processes, through code that has nothing to do with BPF.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

__all__ = ["Account", "CrossCheck", "CrossCheckLostRecords", "Life", "Seen", "perf_is_missing"]


class Seen(NamedTuple):
    """One executable mapping of a file. ``after_exec``: the process had executed something."""

    pid: int
    time_ns: int
    major: int
    minor: int
    inode: int
    generation: int
    path: str
    after_exec: bool

    @property
    def file(self) -> tuple[int, int, int, int]:
        """(major, minor, inode, generation)."""
        return (self.major, self.minor, self.inode, self.generation)


@dataclass
class Life:
    """A process that began while the witness looked."""

    pid: int
    parent: int
    begin_ns: int
    end_ns: int | None = None
    execs: int = 0
    threads: set[int] = field(default_factory=set)


@dataclass
class Account:
    """What the witness saw. Times are CLOCK_MONOTONIC, in ns."""

    mappings: list[Seen] = field(default_factory=list)
    lives: dict[int, Life] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def descendants(self, pid: int) -> set[int]:
        """The process and all that came from it, however far down, whoever adopted them later."""
        found = {pid}
        for life in sorted(self.lives.values(), key=lambda life: life.begin_ns):
            if life.parent in found:
                found.add(life.pid)
        return found

    def about(self, pid: int) -> list[str]:
        """What perf wrote about a process, for messages."""
        names = (f" {pid}/", f":{pid}/", f"({pid}:")
        return [line for line in self.lines if any(name in line for name in names)]


class CrossCheckLostRecords(Exception):
    """perf itself lost records, so its word is worth nothing."""


def perf_is_missing() -> str | None:
    """Why perf cannot be used here, or ``None`` if it can."""
    if shutil.which("perf") is None:
        return "perf is not installed (package linux-perf, or linux-tools of the running kernel)"
    if os.geteuid() != 0:
        return "perf record -a needs root"
    return None


class CrossCheck:
    """Records while the block runs; `account` gives what it saw once the block is left.

    Args:
        buffer: size of perf's ring for each CPU. 16 MB hold some 150,000 records.
    """

    def __init__(self, *, buffer: str = "16M") -> None:
        self._buffer = buffer

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="witness-")
        self._data = Path(self._directory.name, "perf.data")
        to_perf, self._control = os.pipe()
        self._answers, from_perf = os.pipe()
        os.set_inheritable(to_perf, True)
        os.set_inheritable(from_perf, True)
        # --synth=no: no records made up from /proc. -D -1: off until told, so that "ack" to
        # "enable" means that recording is on from here, on every CPU.
        command = ["perf", "record", "--all-cpus", "--event=dummy:u", "--synth=no", "--no-buildid", "--clockid=mono"]
        command += ["--no-buildid-cache", f"--mmap-pages={self._buffer}", "--delay=-1", f"--output={self._data}"]
        command += [f"--control=fd:{to_perf},{from_perf}"]
        self._messages = tempfile.TemporaryFile()
        self._perf = subprocess.Popen(
            command, stdout=self._messages, stderr=subprocess.STDOUT, pass_fds=(to_perf, from_perf)
        )
        os.close(to_perf)
        os.close(from_perf)
        self._emit("enable")
        self._markers = [_run_marker()]
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._markers.append(_run_marker())
            if self._perf.poll() is None:
                self._perf.send_signal(signal.SIGINT)  # perf then drains its rings and writes the file
            self._perf.wait()
            if exc[0] is None:
                self._read()
        finally:
            os.close(self._control)
            os.close(self._answers)
            self._messages.close()
            self._directory.cleanup()

    @property
    def perf_pid(self) -> int:
        """The recording process."""
        return self._perf.pid

    @property
    def account(self) -> Account:
        """What was seen; there once the block is left."""
        return self._account

    def _emit(self, command: str) -> None:
        os.write(self._control, f"{command}\n".encode())
        answer = b""
        while not answer.startswith(b"ack\n"):
            more = os.read(self._answers, 16)
            if not more:
                raise RuntimeError(f"perf did not start to record:\n{self._said()}")
            answer += more

    def _said(self) -> str:
        self._messages.seek(0)
        return self._messages.read().decode(errors="replace")

    def _read(self) -> None:
        command = ["perf", "script", "--ns", "--show-mmap-events", "--show-task-events", "--show-lost-events"]
        command += [f"--input={self._data}"]
        result = subprocess.run(command, capture_output=True, check=True)
        self._account = _parse(os.fsdecode(result.stdout), self._said())
        seen = {mapping.pid for mapping in self._account.mappings}
        if not seen.issuperset(self._markers):
            raise CrossCheckLostRecords("perf did not see the processes that mark the begin and the end of its work")


def _run_marker() -> int:
    marker = subprocess.Popen(["true"])
    marker.wait()
    return marker.pid


_MMAP2 = re.compile(
    r"(\d+)/\d+: \[0x[0-9a-f]+\(0x[0-9a-f]+\) @ (?:0x)?[0-9a-f]+ "
    r"([0-9a-f]+):([0-9a-f]+) (\d+) (\d+)\]: (\S+) (.*)"
)
_LINE = re.compile(r" (\d+)\.(\d{9}): PERF_RECORD_(MMAP2|FORK|EXIT|COMM|LOST|LOST_SAMPLES)\b(.*)")
_TASK = re.compile(r"\((\d+):(\d+)\):\((\d+):(\d+)\)")
_COMM_EXEC = re.compile(r" exec: .*:(\d+)/\d+$")


def _parse(text: str, messages: str) -> Account:
    if re.search(r"\blost\b", messages, re.IGNORECASE):
        raise CrossCheckLostRecords(messages)
    found = Account()
    for line in text.splitlines():
        parts = _LINE.search(line)
        if not parts:
            raise ValueError(f"perf wrote a line nobody here understands: {line!r}")
        time_ns = int(parts[1]) * 1_000_000_000 + int(parts[2])
        found.lines.append(line)
        _take(found, parts[3], parts[4], time_ns, line)
    return found


def _take(found: Account, kind: str, rest: str, time_ns: int, line: str) -> None:
    if kind.startswith("LOST"):
        raise CrossCheckLostRecords(line)
    if kind == "MMAP2":
        _take_mapping(found, rest, time_ns, line)
    elif kind == "COMM":
        by_exec = _COMM_EXEC.search(rest)
        if by_exec and int(by_exec[1]) in found.lives:
            life = found.lives[int(by_exec[1])]
            life.execs += 1
            life.threads = {life.pid}  # the thread that executed took the leader's id
    else:
        task = _TASK.search(rest)
        if not task:
            raise ValueError(f"perf wrote a task nobody here understands: {line!r}")
        pid, thread, parent = int(task[1]), int(task[2]), int(task[3])
        if kind == "FORK":
            if pid == thread:
                found.lives[pid] = Life(pid, parent, time_ns)
            if pid in found.lives:
                found.lives[pid].threads.add(thread)
        elif pid in found.lives:
            life = found.lives[pid]
            life.threads.discard(thread)
            if not life.threads:
                life.end_ns = time_ns


def _take_mapping(found: Account, rest: str, time_ns: int, line: str) -> None:
    parts = _MMAP2.search(rest)
    if not parts:
        raise ValueError(f"perf wrote a mapping nobody here understands: {line!r}")
    pid, inode = int(parts[1]), int(parts[4])
    # [vdso], [stack] and anonymous memory have no inode. Not executable: perf tells only of
    # those that are, but a mapping that mprotect split is told with what is left of it.
    if inode and "x" in parts[6]:
        life = found.lives.get(pid)
        file = (int(parts[2], 16), int(parts[3], 16), inode, int(parts[5]))
        found.mappings.append(Seen(pid, time_ns, *file, parts[7], after_exec=bool(life and life.execs)))
