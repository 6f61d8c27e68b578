"""`OldKernelSource`: strategies ``core`` and ``runtime`` on kernels from 5.10 to 5.16.

The events are those of `BpfSource`. Such kernels cannot show a process's mappings to a program (``iter/task_vma``,
5.12) nor look one up for it (``bpf_find_vma``, 5.17), so a scan has three steps: the kernel reports who the process
is, ``/proc`` shows what it has mapped where, and the kernel identifies each file, by a descriptor of our own.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from errno import EXDEV
from typing import Final, NamedTuple

from sowatch.bpf.binding import PROGRAMS
from sowatch.bpf.record_log import RecordLog
from sowatch.bpf.records import (
    FLAG_IMAGE,
    MapRecord,
    ProcessRecord,
    Record,
    RecordType,
    key_of_file,
    parse,
    parse_answer,
    root_numbers,
    shown_as,
)
from sowatch.linux.proc import Miss
from sowatch.linux.proc_parse import MapRow, as_maps_shows
from sowatch.model.config import Config
from sowatch.model.errors import BpfError
from sowatch.model.identity import FileId
from sowatch.model.literals import Strategy
from sowatch.sources.base import TrackedEntry
from sowatch.sources.core import PROCESS_HEAD, BpfSource
from sowatch.sources.proc_scan import Listed, listed, with_unlisted
from sowatch.sources.scan_rows import ProcessScan, RowPool, group
from sowatch.sources.unread import PatientProcFs, ScanTimeout

__all__ = ["OLD_OBJECT", "READERS", "OldKernelSource"]

LOG = logging.getLogger("sowatch")

OLD_OBJECT: Final = "watch_old.bpf.o"
INTRODUCER: Final = "visit_processes"
#: Programs that only scans need.
READERS: Final = (INTRODUCER, "look_up_file", "cover")

#: enum lookup_result of lookup.bpf.h.
LOOKUP_TO_OPEN: Final = 1
LOOKUP_DONE: Final = 2
LOOKUP_IGNORED: Final = 3
#: How struct process ends here, 1036 bytes: covered_count, MAX_RANGES pairs, reserved, activity, as many
#: pairs; and where first_activity is in it.
PROCESS_TAIL: Final = struct.Struct("=I64Q4xI64Q")
FIRST_ACTIVITY: Final = struct.Struct("=72xI")
#: So many reads of a process whose mappings come and go while they are looked up; then it is scanned again later.
LOOKS: Final = 8
MAX_FILES: Final = 65_536


class _Answer(NamedTuple):
    """The kernel's answer on one file under one name; ``record`` lacks process and range. None: no file."""

    record: MapRecord | None
    is_ignored: bool


class OldKernelSource(BpfSource):
    """See the module, and `BpfSource`, whose arguments it takes. ``config.proc_root`` must be the host's.

    Raises:
        LibbpfMissing: no libbpf.
        BpfError: the kernel refused, or ``proc_root`` does not show our own mappings as the kernel does.
    """

    guarantee: str = "exact, but for what only a scan can find"

    def __init__(self, config: Config, *, strategy: Strategy = "core", objects: Sequence[str] = ()) -> None:
        #: The identity of each file that was reported, by its inode and device.
        self._files: dict[tuple[int, int], FileId] = {}
        super().__init__(config, strategy=strategy, objects=objects)
        self._proc = self._patient = PatientProcFs(config.proc_root, self.unread)
        self.limits += (
            "what mprotect makes executable, and interpreters, are not seen in a process that ends at once",
            "a file of overlayfs that was copied up before it was reported has no inode generation",
        )
        self._reading_tgid = self._object.variable(".bss", "reading_tgid")
        self._answer_map = self._object.map("reader_scratch")
        try:
            self._check_proc()
        except BaseException:
            self.close()
            raise

    def _shipped(self) -> Sequence[str]:
        return [str(PROGRAMS / OLD_OBJECT)]

    def _check_proc(self) -> None:
        own = self.scan_process(os.getpid())
        if own is None or own.is_void:
            root = self._proc.root
            raise BpfError(
                f"looking up our own mappings in {root}, which has to be of the host's pid namespace,", EXDEV, ""
            )
        self.untrack(own.tgid, own.start_ns, own.activity)

    def drain(self) -> list[Record]:
        records = super().drain()
        for record in records:
            if record.type == RecordType.MAP:
                self._remember(record.file_id)  # type: ignore[union-attr]
        return records

    def _remember(self, file_id: FileId) -> None:
        if len(self._files) >= MAX_FILES:
            self._files.clear()
        self._files[shown_as(file_id)] = file_id

    # ---- scans --------------------------------------------------------------------------------

    def scan_all(self, meanwhile: Callable[[], None] | None = None) -> tuple[list[ProcessScan], RecordLog]:
        scans: list[ProcessScan] = []
        drained = RecordLog()
        take = meanwhile or (lambda: drained.extend(self.drain()))
        known: dict[Hashable, _Answer] = {}
        pool = RowPool()
        self._reading_tgid.value = 0
        # A chunk has whole processes, and the kernel waits with the next while we scan these.
        for chunk in self._iterate(INTRODUCER):
            for scanned in group(parse(chunk), pool):
                try:
                    scan = self._look(scanned, known)
                except ScanTimeout:
                    continue
                if scan is not None:
                    scans.append(scan)
            take()
        return scans, drained

    def scan_process(self, pid: int, meanwhile: Callable[[], None] = lambda: None) -> ProcessScan | None:
        del meanwhile  # a drain may read processes itself, so it cannot come within a scan
        if self.unread.hangs(pid):
            raise ScanTimeout(pid)
        self._reading_tgid.value = pid
        rows = [row for chunk in self._iterate(INTRODUCER) for row in parse(chunk)]
        scanned = group(rows)
        return self._look(scanned[0], {}) if scanned else None

    def _iterate(self, program: str) -> Iterator[bytes]:
        """What an iterator over tasks writes; unlike one over their mappings it takes no lock of theirs."""
        self._run.value += 1
        fd = self._object.iterate(program)
        try:
            while chunk := os.read(fd, 1 << 16):
                yield chunk
        except OSError as error:
            raise BpfError("reading the iterator", error.errno or 5, "") from error
        finally:
            os.close(fd)

    def _look(self, scan: ProcessScan, known: dict[Hashable, _Answer]) -> ProcessScan | None:
        """Completes a scan that the iterator began; None if the process has ended since."""
        if scan.is_void or scan.intro is None:
            return scan
        found: dict[MapRow, _Answer] = {}
        all_rows = self._rows(scan.tgid)
        if all_rows is None:
            return None
        many = {one.row: one for one in listed(all_rows)}
        rows = list(many)
        for _ in range(LOOKS):
            directory = self._proc.map_files_dir(scan.tgid)
            for row in rows:
                if row not in found and not isinstance(directory, Miss):
                    answer = self._identify(directory, scan.intro, row, known)
                    if answer is not None:
                        found[row] = answer
            if len(found) == len(rows):
                break
            # The unmapping of what has gone is reported: the iterator has made its process tracked.
            there = {(row.start, row.inode) for row in self._rows(scan.tgid) or ()}
            rows = [row for row in rows if row in found or (row.start, row.inode) in there]
        else:
            scan.is_void = len(found) < len(rows)
        if not scan.is_void:
            self._take(scan, [(many[row], answer) for row, answer in found.items()])
        scan.end_ns = max(scan.end_ns, time.monotonic_ns())
        return scan

    def _rows(self, pid: int) -> list[MapRow] | None:
        rows = self._proc.executable_maps(pid)
        return None if isinstance(rows, Miss) else rows

    def _take(self, scan: ProcessScan, found: Sequence[tuple[Listed, _Answer]]) -> None:
        """Turns what was found into the records of the scan; the kernel side tracks the ranges from now on."""
        intro = scan.intro
        assert intro is not None
        for one, answer in found:
            row, record = one.row, answer.record
            if record is None or answer.is_ignored:
                continue
            flags = record.flags
            if record.file_id == intro.exe or (
                intro.interpreter_base and row.start - row.offset_bytes == intro.interpreter_base
            ):
                flags |= FLAG_IMAGE  # the process can choose this address, so the publisher checks it
            self._object.run("cover", scan.tgid, scan.start_ns, row.start, one.end)
            record = record._replace(
                flags=flags,
                tgid=intro.tgid,
                tid=intro.tid,
                start_ns=intro.start_ns,
                t_ns=intro.t_ns,
                exec_id=intro.exec_id,
                activity=scan.activity,
                start=row.start,
                end=row.end,
                offset_bytes=row.offset_bytes,
                comm=intro.comm,
            )
            scan.maps.append(with_unlisted(record, one))
        if scan.has_untracked_sharers:
            self._object.run("cover", scan.tgid, scan.start_ns, 0, 0)
        elif not scan.maps:
            scan.intro = None  # not needed now, and `cover` did not mark the process as introduced

    def _identify(
        self, directory: str, intro: ProcessRecord, row: MapRow, known: dict[Hashable, _Answer]
    ) -> _Answer | None:
        """The file of a row; None if it is unmapped by now. ``known`` keeps answers for one full scan."""
        name = (intro.root, row.major, row.minor, row.inode, row.path)
        if not row.is_deleted and name in known:
            return known[name]
        try:
            # O_PATH calls neither the file system, which may hang, nor a device.
            fd = self._open_patiently(intro.tgid, f"{directory}/{row.start:x}-{row.end:x}", os.O_PATH)
        except OSError:
            return None
        try:
            answer = self._ask(fd, intro.tgid, intro.root, row)
        except OSError as error:
            LOG.debug("cannot look up %r of process %d: %s", row.path, intro.tgid, error)
            return None
        finally:
            os.close(fd)
        if answer is not None and not row.is_deleted:
            known[name] = answer
        return answer

    def _open_patiently(self, pid: int, path: str, flags: int) -> int:
        """An open that needs the lock of an address space, or calls its file system.

        Raises:
            ScanTimeout: it hangs. What it opens after that is closed.
            OSError: of the open.
        """
        given_up: list[int] = []

        def open_it() -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            if given_up:
                os.close(fd)
            return fd

        try:
            return self.unread.run(pid, open_it)
        except ScanTimeout:
            given_up.append(pid)
            raise

    def _ask(self, fd: int, tgid: int, root: Hashable, row: MapRow) -> _Answer | None:
        result = self._object.run("look_up_file", fd, *root_numbers(root))
        is_stacked = result == LOOKUP_TO_OPEN
        if is_stacked:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return _Answer(None, True)  # a device node in a container's own /dev is no library
            opened = self._open_patiently(tgid, f"{self._proc.root}/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
            try:
                result = self._object.run("look_up_file", opened, *root_numbers(root))
            finally:
                os.close(opened)
        if result not in (LOOKUP_DONE, LOOKUP_IGNORED):
            return None
        value = self._answer_map.lookup(bytes(4))
        assert value is not None  # an array has all its elements
        record, may_be_shown_as = parse_answer(value)
        shown = (row.major << 20 | row.minor, row.inode)
        # maps shows the real file, from 6.8 on the one of overlayfs.
        if shown not in may_be_shown_as:
            if not is_stacked or as_maps_shows(os.readlink(f"{self._proc.root}/self/fd/{fd}".encode())) != row.raw:
                return None  # another mapping has taken its place
            # It was copied up: what is mapped is the file of a layer below.
            file_id = self._files.get(shown, FileId(row.major, row.minor, row.inode))
            assert isinstance(record.key, bytes)
            record = record._replace(key=key_of_file(record.key, file_id), file_id=file_id)
        self._remember(record.file_id)
        return _Answer(record, result == LOOKUP_IGNORED)

    def close(self) -> None:
        self._patient.close()
        super().close()

    def tracked(self, pid: int) -> TrackedEntry | None:
        value = self._processes.lookup(struct.pack("=I", pid))
        if value is None:
            return None
        start_ns, _, _, count, needs_rescan, introduced, shares_vm = PROCESS_HEAD.unpack_from(value)
        covered_count, *numbers = PROCESS_TAIL.unpack_from(value, len(value) - PROCESS_TAIL.size)
        covered, activity, own = numbers[:64], numbers[64], numbers[65:]
        if activity == FIRST_ACTIVITY.unpack_from(value)[0]:
            activity = 0
        ranges = [
            *zip(covered[: 2 * covered_count : 2], covered[1 : 2 * covered_count : 2], strict=True),
            *zip(own[: 2 * count : 2], own[1 : 2 * count : 2], strict=True),
        ]
        return TrackedEntry(
            start_ns,
            count + covered_count,
            bool(needs_rescan),
            bool(introduced),
            bool(shares_vm),
            activity,
            tuple(dict.fromkeys(ranges)),
        )
