"""For tests of the BPF programs: a source read record by record, and a watch kept like a ledger.

`Tap` hands out the kernel's records as they are; `Ledger` follows a `Watcher` and checks what must
hold of every stream of events.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import select
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Self

from sowatch import Rule, Watcher
from sowatch.bpf.records import MapRecord, RangeRecord, Record, RecordType, file_id_of, path_of
from sowatch.model.config import Config
from sowatch.model.events import Event, LibraryEvent, Ready
from sowatch.model.identity import FileId, ProcessId
from sowatch.model.literals import KINDS
from sowatch.sources.base import ProcessScan, Report
from sowatch.sources.core import BpfSource
from sowatch.sources.select import CANDIDATES
from sowatch.watcher.watcher import ActiveFile
from support.programs import Mapper

__all__ = [
    "TAG",
    "WITHOUT_TRACEFS",
    "WITH_TRACEFS",
    "Ledger",
    "Tap",
    "executable_inodes",
    "host_pid",
    "id_by_stat",
    "standing_still",
    "with_prelude",
]

#: In the names of files that rules look for: two runs of the tests on one machine do not meet.
TAG = f"-{os.getpid()}"


class Tap:
    """A `BpfSource` whose records a test looks at one by one.

    Args:
        mapper: the compiled mapper, for a process of the tap's own: what it maps comes through the
            ring after all that happened before, so that "nothing was sent" needs no waiting.
        scratch: a directory of the test.
        timeout_s: how long to wait for a record.
        kind: of source, that of this kernel if it is not given.
        config: for `sowatch.model.config.Config`.
    """

    def __init__(
        self, mapper: Path, scratch: Path, timeout_s: float, kind: type[BpfSource] | None = None, **config: Any
    ) -> None:
        self._timeout_s = timeout_s
        kind = kind or type_of_core()
        self.source = kind(Config(**config))
        self.records: list[Record] = []
        try:
            self._marker_file = scratch / "marker"
            self._marker_file.write_bytes(bytes(4096))
            self._marker = Mapper(mapper, scratch)
        except BaseException:
            self.source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._marker.close()
        self.source.close()

    def reset(self) -> None:
        """As new, for the next test: no record, no verdict, nothing reported but followed processes."""
        self.source.reports.set(Report.NOTHING)
        self.source.new_epoch()
        self.source.drain()  # on a busy host the ring may be full of what the last test left
        self.flush()
        self.records.clear()

    def wait_for(self, wanted: Callable[[Record], bool], what: str, *, since: int = 0) -> Record:
        """The first record from ``since`` on that is wanted."""
        deadline = time.monotonic() + self._timeout_s
        looked = since
        while True:
            for record in self.records[looked:]:
                looked += 1
                if wanted(record):
                    return record
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"no record of {what} came; there are {Counter(r.type for r in self.records)}")
            select.select([self.source.fileno()], [], [], min(left, 0.1))
            self.records += self.source.drain()

    def flush(self) -> None:
        """Waits until everything that happened before has come through."""
        here = len(self.records)
        at, length = self._marker.map(self._marker_file)
        self.wait_for(
            lambda r: r.type == RecordType.MAP and r.tgid == self._marker.pid and r.start == at,  # type: ignore[union-attr]
            "the marker",
            since=here,
        )
        self._marker.unmap(at, length)

    def during(self, action: Callable[[], object], *pids: int) -> list[Record]:
        """What the kernel sent about these processes because of the action, and nothing else."""
        self.flush()
        here = len(self.records)
        action()
        self.flush()
        return [record for record in self.records[here:] if record.tgid in pids]

    def maps(self, pid: int, path: Path | str | None = None) -> list[MapRecord]:
        """The mapping records of a process so far, of one file if ``path`` is given."""
        found = [record for record in self.records if isinstance(record, MapRecord) and record.tgid == pid]
        return [record for record in found if path is None or path_of(record.text) == os.fspath(path)]

    def places_of(self, pid: int, path: Path | str) -> dict[Hashable, int]:
        """The same with its place, as a verdict on it is set by."""
        self.flush()
        last = self.maps(pid, path)[-1]
        return {last.key: last.place}

    def key_of(self, pid: int, path: Path | str) -> bytes:
        """What a verdict on this file is filed under, by the process's own mapping of it."""
        self.flush()
        key = self.maps(pid, path)[-1].key
        assert isinstance(key, bytes)
        return key


@functools.cache
def type_of_core() -> type[BpfSource]:
    """The class that strategy core uses on this kernel."""
    source = CANDIDATES["core"].open(Config())
    source.close()
    assert isinstance(source, BpfSource)
    return type(source)


def kinds_of(records: Sequence[Record]) -> list[int]:
    """Their types, in order."""
    return [record.type for record in records]


def pages(length: int) -> int:
    """A length, rounded up to whole pages."""
    return (length + 4095) // 4096 * 4096


def only(records: list[Record]) -> Any:
    """The one record that there is."""
    assert len(records) == 1, records
    return records[0]


def spans(records: list[Record]) -> list[tuple[int, int, int]]:
    """Type and range of the records that have one."""
    return [(r.type, r.start, r.end) for r in records if isinstance(r, RangeRecord | MapRecord)]


def scan_of(tap: Tap, pid: int) -> ProcessScan:
    """A reading of one process, which also clears its dirty bit."""
    tap.source.reports.set(Report.RANGES)
    scan = tap.source.scan_process(pid)
    tap.source.reports.set(Report.NOTHING)
    assert scan is not None
    return scan


def id_by_stat(path: Path | str) -> FileId:
    """Device and inode as stat gives them; generation and subvolume are 0."""
    about = os.stat(path)
    return FileId(os.major(about.st_dev), os.minor(about.st_dev), about.st_ino)


def id_of(record: Record) -> FileId:
    """The file of a mapping record."""
    assert isinstance(record, MapRecord)
    assert isinstance(record.key, bytes)
    return file_id_of(record.key)


def executable_inodes(pid: int | str) -> set[int]:
    """Inodes of the files that a process or thread has mapped executable, by its ``maps``."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        columns = line.split(None, 5)
        if b"x" in columns[1] and int(columns[4]):
            found.add(int(columns[4]))
    return found


def executable_ranges(pid: int | str, inode: int) -> set[tuple[int, int]]:
    """Where a process has one file mapped executable."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        columns = line.split(None, 5)
        if b"x" in columns[1] and int(columns[4]) == inode:
            start, _, end = columns[0].partition(b"-")
            found.add((int(start, 16), int(end, 16)))
    return found


def host_pid(mapper: Mapper) -> int:
    """The mapper's pid here, if it runs in a pid namespace below a process that made it."""
    assert mapper._process
    pid = mapper._process.pid
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        if not children:
            return pid
        pid = int(children[0])


def with_prelude(scratch: Path, program: Path, commands: str, *, launcher: str = "sh -c") -> Path:
    """A script that runs shell commands and then becomes ``program``; a program for `Mapper`.

    Args:
        scratch: where the script goes.
        program: what runs at the end.
        commands: ended by what executes ``"$0"``; the default is just that.
        launcher: runs the commands, for instance ``unshare --mount sh -c``.
    """
    script = scratch / f"run-{os.urandom(4).hex()}"
    if '"$0"' not in commands:
        commands += '\nexec "$0"'
    quoted = commands.replace("'", "'\\''")
    script.write_text(f"#!/bin/sh\nexec {launcher} 'set -e\n{quoted}' {program}\n", encoding="utf-8")
    script.chmod(0o755)
    return script


#: Runs commands in a mount namespace of their own: what they mount goes with the process.
IN_OWN_MOUNTS = "unshare --mount --propagation private sh -c"


@contextlib.contextmanager
def standing_still(watcher: Watcher) -> Iterator[None]:
    """Nothing is taken from the kernel meanwhile: a small ring overflows for certain, however fast the machine is."""
    engine = watcher._engine
    assert engine is not None
    stands, over = threading.Event(), threading.Event()

    def stand(answer: Future[None]) -> None:
        stands.set()
        over.wait()
        answer.set_result(None)

    answer = engine.request(stand, synced=False)
    stands.wait()
    try:
        yield
    finally:
        over.set()
        wait([answer])


class Ledger:
    """A `Watcher` and all that it told, checked as it comes.

    Every event must fit the schema, loads and unloads of a (process, file) alternate, activations
    and deactivations of a (rule, file) alternate and bracket its loads.

    Args:
        timeout_s: how long to wait for something.
        check: raises if an event is not of the schema.
        rules: default: every mapped file of every kind.
        unwanted: inodes of files that processes have mapped and no rule wants.
        options: for `Watcher`.
    """

    def __init__(
        self,
        *rules: Rule,
        timeout_s: float,
        check: Callable[[Event], object],
        unwanted: frozenset[int] = frozenset(),
        **options: Any,
    ) -> None:
        self._timeout_s = timeout_s
        self._check = check
        self._unwanted = unwanted
        self.watcher = Watcher(*(rules or [Rule(None, name="everything", kind=KINDS)]), **options)
        self.subscription = self.watcher.subscribe()
        self.events: list[Event] = []
        #: Of library events, by process; and the others. The host may send very many.
        self._by_pid: dict[int, list[LibraryEvent]] = defaultdict(list)
        self._controls: list[str] = []
        self._held: dict[ProcessId, dict[FileId, LibraryEvent]] = defaultdict(dict)
        self._active: dict[tuple[str, FileId], int] = {}
        self._checked: set[object] = set()

    def __enter__(self) -> Self:
        self.ready: Ready = self.watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.watcher.stop()

    def stop(self) -> None:
        """Ends the watch and takes its last events."""
        self.watcher.stop()
        for event in self.subscription:
            self._take(event)

    def wait_for(self, condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = 0) -> Any:
        """Takes events until the condition gives something; that."""
        deadline = time.monotonic() + (timeout_s or self._timeout_s)
        while True:
            self.catch_up()
            value = condition()
            if value:
                return value
            if time.monotonic() >= deadline:
                raise AssertionError(what if isinstance(what, str) else what())
            event = self.subscription.get(0.02)
            if event is not None:
                self._take(event)

    def catch_up(self) -> None:
        """Takes what is there."""
        while (event := self.subscription.get(0)) is not None:
            self._take(event)

    def of(self, pid: int, *kinds: str) -> list[LibraryEvent]:
        """The library events of a process so far."""
        self.catch_up()
        return [event for event in self._by_pid.get(pid, ()) if event.event in (kinds or ("load", "unload"))]

    def story(self, pid: int, inode: int) -> list[tuple[str, str | None]]:
        """(event, cause) of one file in one process, in order."""
        return [(event.event, event.cause) for event in self.of(pid) if event.library.id.inode == inode]

    def controls(self) -> list[str]:
        """The control events so far, by name."""
        self.catch_up()
        return list(self._controls)

    def inodes(self, pid: int) -> set[int]:
        """What a process has mapped, by the events so far."""
        return {file.inode for process, files in self._held.items() if process.pid == pid for file in files}

    def wait_load(self, pid: int, inode: int) -> LibraryEvent:
        """The load of a file in a process that holds now."""

        def find() -> LibraryEvent | None:
            for process, files in self._held.items():
                for file, event in files.items():
                    if process.pid == pid and file.inode == inode:
                        return event
            return None

        found = self.wait_for(find, lambda: f"no load of inode {inode} in {pid}; it has {self.inodes(pid)}")
        assert isinstance(found, LibraryEvent)
        return found

    def wait_unload(self, pid: int, inode: int) -> None:
        self.wait_for(lambda: inode not in self.inodes(pid), f"no unload of inode {inode} in {pid}")

    def wait_equal(self, *pids: int, via: dict[int, int] | None = None) -> None:
        """Waits until the map equals what the processes' ``maps`` say; they must hold still.

        Args:
            pids: the processes.
            via: where the leader of a process is dead, the thread to ask instead.
        """
        truth = {pid: executable_inodes((via or {}).get(pid, pid)) - self._unwanted for pid in pids}

        def differences() -> dict[int, dict[str, set[int]]]:
            return {
                pid: {"missing": truth[pid] - self.inodes(pid), "false": self.inodes(pid) - truth[pid]}
                for pid in pids
                if self.inodes(pid) != truth[pid]
            }

        self.wait_for(lambda: not differences(), lambda: f"the map differs from /proc: {differences()}")

    def wait_equal_of(self, pid: int, inode: int) -> None:
        """`wait_equal` for one file of one process."""
        truth = inode in executable_inodes(pid)
        self.wait_for(lambda: (inode in self.inodes(pid)) == truth, f"proc says {truth} of {inode} in {pid}")

    def _check_once(self, event: LibraryEvent) -> None:
        """Each library and process under each kind of event: a busy host sends the same ones again and again."""
        parts = {
            (event.event, event.cause, event.library),
            (event.event, event.process),
            (event.event, len(event.ranges)),
        }
        if not parts <= self._checked:
            self._check(event)
            self._checked |= parts

    def _reported(self, event: LibraryEvent) -> str:
        """All that was told of the file of an event, in its process, for a message."""
        lines = [
            f"{one.t_ns} {one.event} {one.cause}"
            for one in self.events
            if isinstance(one, LibraryEvent)
            and one.library.id == event.library.id
            and (one.process is None or event.process is None or one.process.id == event.process.id)
        ]
        return f"{event.library.path} in {event.process}:\n  " + "\n  ".join(lines[-20:])

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, LibraryEvent):
            self._check_once(event)
            if event.process is not None:
                self._by_pid[event.process.pid].append(event)
        else:
            self._check(event)
            self._controls.append(event.event)
            assert event.event in ("ready", "lost", "repaired", "stopped")
            return
        file = event.library.id
        key = (event.rule, file)
        if event.event == "activate":
            assert key not in self._active, f"a second activation: {self._reported(event)}"
            self._active[key] = 0
        elif event.event == "deactivate":
            held = self._active.pop(key, None)
            assert held is not None, f"a deactivation without an activation: {self._reported(event)}"
            assert held == 0 or event.cause == "stop", (
                f"deactivated while {held} processes hold it: {self._reported(event)}"
            )
        else:
            assert event.process is not None
            files = self._held[event.process.id]
            assert key in self._active, f"not between activation and deactivation: {self._reported(event)}"
            if event.event == "load":
                assert file not in files, f"a second load without an unload: {self._reported(event)}"
                files[file] = event
                self._active[key] += 1
            else:
                assert file in files, f"an unload without a load: {self._reported(event)}"
                del files[file]
                self._active[key] -= 1


class Calls:
    """Callbacks that write down how they were called."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []
        self.contents: list[str] = []
        self.files: list[ActiveFile] = []

    def rule(self, pattern: str, name: str = "rule") -> Rule:
        return Rule(
            pattern,
            name=name,
            on_load=lambda event: self.made.append(("load", Path(event.library.path).name)),
            on_unload=lambda event: self.made.append(("unload", Path(event.library.path).name)),
            on_activate=self._activate,
            on_deactivate=lambda file: self.made.append(("deactivate", Path(file.library.path).name)),
        )

    def _activate(self, file: ActiveFile) -> None:
        self.files.append(file)
        self.contents.append(hashlib.sha256(os.pread(file.fileno(), 1 << 20, 0)).hexdigest())
        self.made.append(("activate", Path(file.library.path).name))


def digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def different(path: Path) -> Path:
    """The same library with other bytes at its end."""
    path.write_bytes(path.read_bytes() + os.urandom(16))
    return path


_NO_TRACEFS = (
    "for at in $(awk '/ - (tracefs|debugfs) / { print $5 }' /proc/self/mountinfo | sort -r); do umount -l $at; done; "
)
#: Runs a command in a mount namespace of its own in which tracefs is mounted nowhere.
WITHOUT_TRACEFS = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _NO_TRACEFS + 'exec "$@"', "sh")
#: The same where tracefs is mounted, whatever this machine has.
WITH_TRACEFS = (
    *WITHOUT_TRACEFS[:-2],
    _NO_TRACEFS + 'mount -t tracefs tracefs /sys/kernel/tracing; exec "$@"',
    "sh",
)
