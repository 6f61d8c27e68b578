"""The same work under sowatch and under other tools that see files mapped or opened: what it costs, what each one sees.

Beside sowatch: bpftrace with a filter on mmap that counts; bpftrace that prints each load, and the end of who had it;
opensnoop (of libbpf-tools, else of bcc); `perf record` of mmap events; `perf trace` of mmap. A round runs each tool
once, in an order that turns with each round: a storm of short processes that load a library, then calls of one pinned
process. A tool is up once its output has an event of a marker process. One that is not installed, or does not run here,
is shown as such. Debian has them in the packages bpftrace, libbpf-tools (or bpfcc-tools) and linux-perf.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, NamedTuple, Self

from benchmarks.common import Figure, build, main, make_libraries, median, pin, quantile, short, spread
from benchmarks.hooks import OTHER_CPU, loop
from benchmarks.storm import cpu_of, run_storm

#: What the short processes, and the marker, are called; each loads one library of that name.
STORM, MARKER = "peerstorm", "peermarker"
STARTED_S: Final = 60.0
ENDED_S: Final = 30.0

_IS_LOAD: Final = "(args->prot & 4) && !(args->flags & 0x20)"
_COUNT: Final = f"tracepoint:syscalls:sys_enter_mmap /{_IS_LOAD}/ {{ @[comm] = count(); }} interval:s:1 {{ print(@); }}"
_PRINT: Final = f"""
tracepoint:syscalls:sys_enter_mmap /{_IS_LOAD}/ {{
    $task = (struct task_struct *)curtask;
    $file = *($task->files->fdt->fd + args->fd);
    $name = str($file->f_path.dentry->d_name.name);
    if (strncmp($name, "libpeer", 7) == 0) {{ @has[pid] = 1; printf("load %d %s\\n", pid, $name); }}
}}
tracepoint:sched:sched_process_exit /@has[pid] && pid == tid/ {{ printf("end %d\\n", pid); delete(@has[pid]); }}
"""


class NotRunning(Exception):
    """A tool is not installed, or does not run here."""


class Seen(NamedTuple):
    """What a tool has reported of the storm. None: it has no word for that."""

    loads: int | None
    unloads: int | None
    lost: int


class Tool:
    """One run of a tool, with its output in a file; a context manager that waits until it is up.

    Args:
        directory: for what it writes.
        marker: a program whose events are called `MARKER`.

    Attributes:
        name: its column.
        rows: those in which it can do what sowatch does.

    Raises:
        NotRunning: when entered.
    """

    name: ClassVar[str]
    rows: ClassVar[frozenset[str]]

    def __init__(self, directory: Path, marker: Path) -> None:
        self.output = directory / f"{type(self).__name__}.out"
        self.messages = directory / f"{type(self).__name__}.err"
        self._marker = marker
        self._settled = (0, 0)

    def words(self) -> list[str]:
        """Its command line."""
        raise NotImplementedError

    def seen(self, text: str) -> Seen:
        """What its output says of the storm."""
        raise NotImplementedError

    def start(self) -> subprocess.Popen[bytes]:
        words = with_tracefs(self.words())
        with self.output.open("wb") as output, self.messages.open("wb") as messages:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=messages)

    def push(self) -> None:
        """Makes it write what it has, if it can be asked to."""

    def text(self) -> str:
        """What it had written and said when it was settled; to be read after its end."""
        parts = zip((self.output, self.messages), self._settled, strict=True)
        return "\n".join(file.read_bytes()[:size].decode(errors="replace") for file, size in parts)

    def __enter__(self) -> Self:
        self.process = self.start()
        try:
            self.await_marker()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def await_marker(self) -> None:
        """Runs marker processes until an event of one more stands in the output: so does what came before."""
        before = self._markers()
        until = time.monotonic() + STARTED_S
        while True:
            subprocess.run([self._marker], check=True)
            self.push()
            if self._markers() > before:
                return
            if self.process.poll() is not None or time.monotonic() > until:
                raise NotRunning(self._reason())
            time.sleep(0.05)

    def _reason(self) -> str:
        said = self.messages.read_text(errors="replace") or self.output.read_text(errors="replace")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if re.search("error|fail|cannot|not ", line, re.IGNORECASE)]
        return f"does not run here: {(errors or lines or ['it reports nothing'])[-1]}"

    def _markers(self) -> int:
        return self.output.read_bytes().count(MARKER.encode()) if self.output.exists() else 0

    def settle(self) -> None:
        """Waits until its output has everything so far; what comes later does not count."""
        self.await_marker()
        self.await_marker()  # each CPU has a buffer of its own, and they are read by turns
        self._settled = self.output.stat().st_size, self.messages.stat().st_size

    def cpu_s(self) -> float:
        """CPU seconds of all its processes."""
        # The clock of a process: clock_getcpuclockid(3), CPUCLOCK_SCHED of the kernel.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._pids())

    def peak_mb(self) -> float:
        """The most that was resident of all its processes."""
        lines = [line for pid in self._pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    def _pids(self) -> list[int]:
        found = [self.process.pid]
        for pid in found:
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found


def installed(*names: str, package: str) -> str:
    """The first of these programs.

    Raises:
        NotRunning: there is none.
    """
    for name in names:
        if found := shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/share/bcc/tools"):
            return found
    raise NotRunning(f"not installed ({package})")


def with_tracefs(words: Sequence[str]) -> list[str]:
    """The same command where tracefs is mounted, which some tools need and do not see to."""
    mount = "mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing"
    debug = "mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug"
    return ["unshare", "--mount", "sh", "-c", f'{mount}; {debug}; exec "$@"', "sh", *words]


def lost_in(text: str) -> int:
    """All of them say "lost N events" in some spelling."""
    return sum(int(one) for one in re.findall(r"\blost (\d+) ", text, re.IGNORECASE))


_CALLS: Final = frozenset({"exec", "file", "open", "getppid"})
_ALWAYS: Final = frozenset({"lost", "resident"})
_EACH_LOAD: Final = frozenset({"own CPU", "loads"})


class Sowatch(Tool):
    name = "sowatch"
    rows = _CALLS | _ALWAYS | _EACH_LOAD | {"unloads"}

    def words(self) -> list[str]:
        return [sys.executable, "-m", "sowatch", "watch", "--json", r"/libpeer(storm|marker)\.so$"]

    def seen(self, text: str) -> Seen:
        events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        ours = [one["event"] for one in events if one.get("library", {}).get("path", "").endswith(f"lib{STORM}.so")]
        lost = sum(one["count"] for one in events if one["event"] == "lost")
        return Seen(ours.count("load"), ours.count("unload"), lost)


class BpftraceCount(Tool):
    name = "bpftrace, a count"
    rows = _CALLS | _ALWAYS

    script: ClassVar[str] = _COUNT

    def words(self) -> list[str]:
        return [installed("bpftrace", package="bpftrace"), "-e", self.script]

    def seen(self, text: str) -> Seen:
        return Seen(None, None, lost_in(text))


class BpftracePrint(BpftraceCount):
    name = "bpftrace, loads and ends"
    rows = Sowatch.rows

    script = _PRINT

    def seen(self, text: str) -> Seen:
        loads = ends = 0
        having = set()
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["load"] and words[2:] == [f"lib{STORM}.so"]:
                loads += 1
                having.add(words[1])
            elif words[:1] == ["end"] and words[1] in having:
                ends += 1
                having.discard(words[1])
        return Seen(loads, ends, lost_in(text))


class Opensnoop(Tool):
    name = "opensnoop"
    rows = frozenset({"open", "getppid"}) | _ALWAYS | _EACH_LOAD

    def words(self) -> list[str]:
        return [installed("opensnoop", "opensnoop-bpfcc", package="libbpf-tools or bpfcc-tools")]

    def seen(self, text: str) -> Seen:
        opened = re.findall(rf"^\s*\d+ +\S+ +\d+ +0 +\S*/lib{STORM}\.so$", text, re.MULTILINE)
        return Seen(len(opened), None, lost_in(text))


class PerfRecord(Tool):
    name = "perf record"
    rows = Sowatch.rows

    _LINE: Final = re.compile(r" (\d+\.\d+): PERF_RECORD_(MMAP2|EXIT|LOST)\b(.*)")

    def start(self) -> subprocess.Popen[bytes]:
        words = [installed("perf", package="linux-perf"), "record", "--all-cpus", "--event=dummy:u", "--synth=no"]
        words += ["--no-buildid", "--no-buildid-cache", "--clockid=mono", f"--output={self.output}"]
        to_perf, self._control = os.pipe()
        self._answers, from_perf = os.pipe()
        words += [f"--control=fd:{to_perf},{from_perf}"]
        with self.messages.open("wb") as messages:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, pass_fds=(to_perf, from_perf)
            )
        os.close(to_perf)
        os.close(from_perf)
        return process

    def push(self) -> None:
        """It writes when half of a ring is full, or when it is spoken to."""
        with suppress(BrokenPipeError):
            os.write(self._control, b"ping\n")
            os.read(self._answers, 16)

    def settle(self) -> None:
        super().settle()
        self._until_s = time.monotonic()

    def text(self) -> str:
        words = ["perf", "script", "--ns", "--show-mmap-events", "--show-task-events", "--show-lost-events"]
        return subprocess.run([*words, f"--input={self.output}"], capture_output=True, text=True, check=True).stdout

    def seen(self, text: str) -> Seen:
        loads = ends = lost = 0
        having = set()
        for line in text.splitlines():
            found = self._LINE.search(line)
            if found is None or float(found[1]) > self._until_s:
                continue
            kind, rest = found[2], found[3]
            pid = rest.lstrip(" (").partition(":")[0].partition("/")[0]
            if kind == "MMAP2" and rest.endswith(f"/lib{STORM}.so") and re.search(r"\]: \S*x\S* ", rest):
                loads += 1
                having.add(pid)
            elif kind == "EXIT" and pid in having:
                ends += 1
                having.discard(pid)
            elif kind == "LOST":
                lost += int(rest.split("lost")[-1].strip(" :"))
        return Seen(loads, ends, lost)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        os.close(self._control)
        os.close(self._answers)


class PerfTrace(Tool):
    name = "perf trace"
    rows = _CALLS | _ALWAYS | _EACH_LOAD

    def words(self) -> list[str]:
        perf = installed("perf", package="linux-perf")
        return [perf, "trace", "--all-cpus", "-e", "mmap", "-o", str(self.output)]

    def start(self) -> subprocess.Popen[bytes]:
        words = with_tracefs(self.words())
        self.output.unlink(missing_ok=True)
        with self.messages.open("wb") as messages:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)

    def seen(self, text: str) -> Seen:
        # Of a process that has ended meanwhile it finds no name for the descriptor.
        loads = re.findall(rf"mmap\(.*\bprot: \S*EXEC.*/lib{STORM}\.so>", text)
        return Seen(len(loads), None, lost_in(text))


TOOLS: Final[tuple[type[Tool], ...]] = (Sowatch, BpftraceCount, BpftracePrint, Opensnoop, PerfRecord, PerfTrace)


class Row(NamedTuple):
    """One row of the table; ``base`` says of what without any tool a value is added to."""

    key: str
    what: str
    unit: str
    is_more_better: bool = False


MODES: Final = ("exec", "file", "open", "getppid")


def rows(count: int) -> list[Row]:
    return [
        Row("exec", "executable mmap+munmap, added", "ns"),
        Row("file", "other mmap+munmap of a file, added", "ns"),
        Row("open", "open+close, added", "ns"),
        Row("getppid", "getppid, added", "ns"),
        Row("own CPU", "1,000 process starts: CPU of the tool", "ms"),
        Row("added CPU", "... CPU added to the processes", "ms"),
        Row("loads", f"loads of {count} short processes seen, with the file", "", is_more_better=True),
        Row("unloads", "... their unloads seen", "", is_more_better=True),
        Row("lost", "... lost, as it says", ""),
        Row("resident", "resident memory, at most", "MB"),
    ]


@dataclass
class Cell(Figure):
    """A figure of the table: that of a tool, of ``alone``, or the comparison in the last column."""

    row: str = ""
    column: str = ""


ALONE, AGAINST = "without", "sowatch to the best"
#: By (tool or "without", row): the values, one a round.
Taken = dict[tuple[str, str], list[float]]


def measure(is_quick: bool, directory: Path) -> list[Figure]:
    rounds, count, batches = (1, 300, 3) if is_quick else (7, 5000, 20)
    pin(OTHER_CPU)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where it is ignored the tools would ignore it, too
    work = Work(directory, count, batches)
    taken: Taken = defaultdict(list)
    failed: dict[str, str] = {}
    for number in range(rounds):
        turn = number % len(TOOLS)
        with loop(build("loadloop", directory), work.mapped) as run:
            alone, cpu_alone = work.calls(run), work.storm()
            note(taken, ALONE, alone | {"added CPU": cpu_alone})
            for tool in TOOLS[turn:] + TOOLS[:turn]:
                print(f"\rround {number + 1} of {rounds}: {tool.name:30}", end="", file=sys.stderr, flush=True)
                if tool.name not in failed:
                    try:
                        found = work.under(tool, run)
                    except NotRunning as error:
                        failed[tool.name] = str(error)
                    else:
                        for key, value in [*alone.items(), ("added CPU", cpu_alone)]:
                            found[key] -= value
                        note(taken, tool.name, found)
            again = work.calls(run)
        note(taken, "again", {key: again[key] - alone[key] for key in again})
    print(file=sys.stderr)
    return figures(taken, failed, rows(count))


def note(taken: Taken, who: str, found: dict[str, float]) -> None:
    for key, value in found.items():
        taken[who, key].append(value)


class Work:
    """What is done under each tool.

    Args:
        directory: for programs and libraries.
        count: of short processes.
        batches: of system calls.
    """

    def __init__(self, directory: Path, count: int, batches: int) -> None:
        self._directory, self._count, self._batches = directory, count, batches
        (self.mapped,) = make_libraries(directory, 1)
        self._storm = self._linked(STORM)
        self._marker = self._linked(MARKER)
        self.storm()  # warms the page cache

    def _linked(self, name: str) -> Path:
        library = Path(shutil.copyfile(self.mapped, self._directory / f"lib{name}.so"))
        flags = ["-DLINKED", str(library), f"-Wl,-rpath,{self._directory}"]
        return build("loader", self._directory, flags=flags, output=name)

    def storm(self) -> float:
        """CPU of 1,000 process starts, in ms."""
        command = [build("storm", self._directory), str(os.cpu_count() or 1), str(self._count), self._storm]
        return 1e6 * cpu_of(run_storm(command)) / self._count

    def calls(self, run: Callable[[str, int, int], float]) -> dict[str, float]:
        """Nanoseconds of each call."""
        return {mode: run(mode, self._batches, 20_000 if mode == "getppid" else 500) for mode in MODES}

    def under(self, kind: type[Tool], run: Callable[[str, int, int], float]) -> dict[str, float]:
        """The value of each row.

        Raises:
            NotRunning: not here.
        """
        with kind(self._directory, self._marker) as tool:
            before = tool.cpu_s()
            found = {"added CPU": self.storm()}
            tool.settle()
            found["own CPU"] = 1e6 * (tool.cpu_s() - before) / self._count
            found["resident"] = tool.peak_mb()
            found |= self.calls(run)
        seen = tool.seen(tool.text())
        return found | {key: value for key, value in seen._asdict().items() if value is not None}


def figures(taken: Taken, failed: dict[str, str], wanted: Sequence[Row]) -> list[Figure]:
    """The cells of the table."""
    cells: list[Figure] = []
    for row in wanted:
        key = row.key
        for column in (ALONE, *(tool.name for tool in TOOLS)):
            values = taken.get((column, key))
            if values:
                what = f"{row.what}: {column}"
                cells.append(Cell(what, median(values), row.unit, spread(values), row=row.what, column=column))
        if comparison := compared(taken, row):
            cells.append(comparison)
    for tool, why in failed.items():
        cells.append(Cell(f"{tool}: {why}", 0, "", row=why, column=tool))
    return cells


def compared(taken: Taken, row: Row) -> Cell | None:
    """Sowatch against the best of those that can do the same; calls by the differences within a round."""
    own = taken[Sowatch.name, row.key]
    peers = {
        tool.name: values
        for tool in TOOLS
        if tool is not Sowatch and row.key in tool.rows and (values := taken.get((tool.name, row.key)))
    }
    if not peers:
        return None
    best = (max if row.is_more_better else min)(peers, key=lambda name: median(peers[name]))
    more = [mine - theirs for mine, theirs in zip(own, peers[best], strict=True)]
    if row.is_more_better:
        is_met = median(more) >= 0
    else:
        # No more than the other, as far as nothing agrees with nothing.
        noise = taken.get(("again", row.key), [])
        is_met = median(more) <= (max(0.0, quantile(noise, 0.75)) if noise else 0.0)
    what = f"{row.what}: sowatch against {best}"
    return Cell(what, median(more), row.unit, spread(more), aim=0, met=is_met, row=row.what, column=AGAINST)


def matrix(cells: Sequence[Figure]) -> str:
    """A row for each thing that is measured, a column for each tool."""
    columns = [ALONE, *(tool.name for tool in TOOLS), AGAINST]
    by_row: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    for cell in cells:
        assert isinstance(cell, Cell)
        if cell.what == f"{cell.column}: {cell.row}":
            failed[cell.column] = cell.row
            continue
        text = f"{short(cell.value)} {cell.unit}".rstrip()
        if cell.column == AGAINST:
            best = cell.what.rpartition(" against ")[2]
            text = f"{best}: {cell.value:+.3g} {cell.unit}".rstrip() + (", met" if cell.met else ", MISSED")
        elif cell.spread:
            text += f" ({cell.spread.partition(', n=')[0]})"
        by_row.setdefault(cell.row, {})[cell.column] = text
    lines = ["| " + " | ".join(["figure", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for row, texts in by_row.items():
        shown = [texts.get(column, failed.get(column, "-" if column != ALONE else "")) for column in columns]
        lines.append("| " + " | ".join([row, *shown]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main("peers", measure, show=matrix)
