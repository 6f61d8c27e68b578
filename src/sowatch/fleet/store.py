"""The store of a small fleet: chdb, ClickHouse's engine embedded, with the tables of ``sql/`` in a directory.

One process has a directory at a time. While a receiver has it, others ask that one through its socket: `connect` gives
what answers. Needs the extra ``sowatch[fleet]``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, Self

from sowatch.fleet.asks import Asks, parameter
from sowatch.fleet.schema import schema_sql
from sowatch.fleet.store_client import SOCKET_NAME, StoreClient
from sowatch.model.errors import NotPermitted, SowatchError, UsageError

__all__ = ["COLUMNS", "SCHEMA_VERSION", "SOCKET_NAME", "OpenAsks", "Store", "StoreBusy", "StoreFull", "connect"]

#: Of the tables. A store of a later version is refused; one of an earlier version is changed when it is opened.
SCHEMA_VERSION: Final = 1
#: Of `otel_logs`, in the order in which `Store.insert` takes their values: what many records share comes first.
COLUMNS: Final = (
    "ResourceSchemaUrl",
    "ResourceAttributes",
    "ServiceName",
    "ScopeSchemaUrl",
    "ScopeName",
    "ScopeVersion",
    "ScopeAttributes",
    "Timestamp",
    "TraceId",
    "SpanId",
    "TraceFlags",
    "SeverityText",
    "SeverityNumber",
    "Body",
    "EventName",
    "LogAttributes",
)
#: What the engine may take. Merges, inserts and questions share it.
MEMORY_BYTES: Final = 2 << 30
#: One question may take this of it.
QUESTION_BYTES: Final = 1 << 30
#: A question that takes longer is ended.
QUESTION_S: Final = 120
#: Texts of questions that are not checked again.
_QUESTIONS: Final = 256
#: So long a process that has the directory is waited for: a question is answered in less.
_WAIT_S: Final = 5.0
_TURN_S: Final = 0.05
#: Tables that keep rows: what was inserted into them is on the disk when `Store.insert` returns.
_KEPT: Final = re.compile(r"MergeTree")
#: By these. Merges, too: chdb removes what was merged at once, while a server keeps it for eight minutes.
_ON_DISK: Final = (
    "fsync_after_insert = 1, fsync_part_directory = 1, min_rows_to_fsync_after_merge = 1, "
    "min_compressed_bytes_to_fsync_after_merge = 1"
)
#: What ClickHouse says of a disk that is full or a quota that is used up: its own code, or the error of the system.
_FULL: Final = re.compile(
    r"\(NOT_ENOUGH_SPACE\)|No space left on device|errno: (?:28|122|27)\b|Disk quota exceeded|File too large"
)


class StoreBusy(SowatchError):
    """Another process has the directory; ``pid`` is its process, None if that is not known."""

    def __init__(self, directory: str, pid: int | None, who: str) -> None:
        self.directory = directory
        self.pid = pid
        by = "another process" if pid is None else f"process {pid}{who}"
        super().__init__(f"the store {directory!r} is in use by {by}. Wait until it ends, or end it.")


class StoreFull(SowatchError):
    """The disk of the store is full, or its quota is used up."""

    def __init__(self, directory: str, reason: str) -> None:
        self.directory = directory
        self.reason = reason
        super().__init__(
            f"the disk of the store {directory!r} is full: {reason}. Free some space, or give it another disk."
        )


class OpenAsks(Asks, Protocol):
    """What answers questions to a directory, until it is closed."""

    def close(self) -> None:
        """Safe to call again."""
        ...


def connect(directory: str | os.PathLike[str]) -> OpenAsks:
    """What answers questions to a directory: the receiver that has it, else the store itself.

    Raises:
        SowatchError: there is no store in it, it cannot be opened, or another process has it.
    """
    place = Path(os.path.abspath(directory))
    try:
        is_there = (place / _VERSION).exists()
    except PermissionError as error:
        raise NotPermitted(
            f"cannot use the store in {os.fspath(directory)!r}",
            "its directory is for the user that filled it",
            "Run this command as that user, or as root.",
        ) from error
    if not is_there:
        raise UsageError(
            f"there is no store in {os.fspath(directory)!r}. Name the one that `sowatch fleet receive` fills: --store."
        )
    end_s = time.monotonic() + _WAIT_S
    while True:
        client = StoreClient.reach(place / SOCKET_NAME)
        if client is not None:
            return client
        try:
            return Store(place, wait_s=0.0)
        except StoreBusy:
            # It may begin to listen in a moment, or be a question as this one.
            if time.monotonic() >= end_s:
                raise
        time.sleep(_TURN_S)


class Store:
    """The store of a directory, which this process has until `close`.

    One connection inserts, one at a time; another one, which can only read, answers questions. Any thread may call.

    Args:
        directory: made, with mode 0700, if only that is missing.
        wait_s: how long a process that has it is waited for.

    Raises:
        UsageError: chdb is not installed.
        NotPermitted: it is of another user.
        StoreBusy: another process has the directory.
        SowatchError: it cannot be used, or the store in it is of a later version.
    """

    def __init__(self, directory: str | os.PathLike[str], *, wait_s: float = _WAIT_S) -> None:
        self.directory = os.path.abspath(directory)
        self._lock_fd = -1
        self._writer: Any = None
        self._types = ""
        self._reader: Any = None
        self._inserting = threading.Lock()
        self._asking = threading.Lock()
        self._is_ending = False
        #: That were asked before, and are SELECTs.
        self._questions: set[str] = set()
        try:
            self._take(wait_s)
            self._check_version()
            self._open()
        except OSError as error:
            self.close()
            raise self._failed(error.strerror or str(error), error.errno) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the directory back, once the insert and the question under way have ended. Safe to call again."""
        self._is_ending = True
        with self._inserting, self._asking:
            reader, self._reader = self._reader, None
            writer, self._writer = self._writer, None
            for connection in (reader, writer):
                if connection is not None:
                    connection.close()
            fd, self._lock_fd = self._lock_fd, -1
            if fd >= 0:
                os.close(fd)

    @property
    def is_open(self) -> bool:
        """Whether this process has the directory."""
        return self._lock_fd >= 0

    def end_questions(self, wait_s: float) -> bool:
        """Refuses every question from now on, those that wait for their turn among them. Safe to call again.

        Args:
            wait_s: how long the one under way is waited for.

        Returns:
            Whether none is under way any more. It stays so.
        """
        self._is_ending = True
        if not self._asking.acquire(timeout=wait_s):
            return False
        self._asking.release()
        return True

    def ask(self, sql: str, parameters: Mapping[str, str] | None = None) -> Iterable[bytes]:
        """The rows as JSONEachRow of one SELECT, which may have parameters: see `sowatch.fleet.asks`.

        Raises:
            SowatchError: it cannot be answered.
        """
        with self._asking:
            reader = self._reader
            if reader is None or self._is_ending:
                raise SowatchError(f"the store {self.directory!r} is closed. Open it again.")
            try:
                self._check_question(sql)
                result = reader.query(sql, "JSONEachRow", params=dict(parameters or {}))
            except SowatchError:
                raise
            except Exception as error:
                raise self._refused("a question to", error) from error
            return (bytes(result.bytes() or b""),)

    def _check_question(self, sql: str) -> None:
        """Whether it is one SELECT, by the engine's parser: ``readonly`` refuses neither SYSTEM nor INTO OUTFILE."""
        if sql in self._questions:
            return
        written = parameter(sql)
        line = self._reader.query("SELECT formatQuerySingleLine({q:String})", "TSVRaw", params={"q": written}).bytes()
        if not line.startswith((b"SELECT ", b"WITH ")) or b"INTO OUTFILE" in line:
            raise SowatchError(f"a question to the store {self.directory!r} failed: it is no SELECT. Ask with one.")
        if len(self._questions) >= _QUESTIONS:
            self._questions.clear()
        self._questions.add(sql)

    def insert(self, rows: Iterable[bytes]) -> None:
        """Inserts rows of `otel_logs`, and what follows from them; they are on the disk when this returns.

        Args:
            rows: in the format RowBinary, with the columns `COLUMNS`; in pieces of any size.

        Raises:
            StoreFull: the disk is full. Some of the rows may be there: inserting them again does no harm.
            SowatchError: the rows are none.
        """
        with self._inserting:
            writer = self._writer
            if writer is None:
                raise SowatchError(f"the store {self.directory!r} is closed. Open it again.")
            # Not the inserter of chdb, whose `finish` returns although the disk was full (26.9).
            fd = os.memfd_create("sowatch-rows", os.MFD_CLOEXEC)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.writelines(rows)
                source = f"file('/proc/self/fd/{fd}', 'RowBinary', {_quoted(self._types)})"
                writer.query(f"INSERT INTO otel_logs ({', '.join(COLUMNS)}) SELECT * FROM {source}")  # noqa: S608
            except Exception as error:
                raise self._refused("an insert into", error) from error
            finally:
                os.close(fd)

    # ---- opening ------------------------------------------------------------------------------

    def _take(self, wait_s: float) -> None:
        """Takes the lock, and notes in it who has it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.directory, 0o700)
        owner = os.stat(self.directory).st_uid
        if owner != os.geteuid():
            # Root could, and its files would keep the owner out.
            raise NotPermitted(
                f"cannot open the store {self.directory!r}",
                f"it is of user {owner}, and this is user {os.geteuid()}",
                "Start its receiver, which answers while it runs, or run this command as that user.",
            )
        path = os.path.join(self.directory, "lock")
        self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        end_s = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end_s:
                    raise self._busy() from error
                time.sleep(_TURN_S)
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def _busy(self) -> StoreBusy:
        text = os.pread(self._lock_fd, 32, 0).strip()
        pid = int(text) if text.isdigit() else None
        who = ""
        with contextlib.suppress(OSError):
            who = f" ({Path(f'/proc/{pid}/comm').read_text(encoding='utf-8', errors='replace').strip()})"
        return StoreBusy(self.directory, pid, who)

    def _check_version(self) -> None:
        path = Path(self.directory) / _VERSION
        try:
            text = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return
        if not text.isdigit() or int(text) > SCHEMA_VERSION:
            raise SowatchError(
                f"the store {self.directory!r} has tables of version {text[:20]!r}, and this sowatch knows "
                f"{SCHEMA_VERSION}. Use the sowatch that made it, or another directory."
            )

    def _note_version(self) -> None:
        path = os.path.join(self.directory, _VERSION)
        if os.path.exists(path):
            return
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{SCHEMA_VERSION}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(f"{path}.new", path)

    def _open(self) -> None:
        connect_to = _engine()
        place = os.path.join(self.directory, "data")
        options = f"max_server_memory_usage={MEMORY_BYTES}&background_pool_size=2&background_schedule_pool_size=2"
        try:
            self._writer = connect_to(f"{place}?{options}")
            self._do("SET max_partitions_per_insert_block = 0, max_insert_threads = 1, max_threads = 2")
            self._do(schema_sql())
            tables = self._writer.query(
                "SELECT name, engine FROM system.tables WHERE database = 'default'", "TSV"
            ).bytes()
            for line in tables.decode().splitlines():
                name, engine = line.split("\t")
                if _KEPT.search(engine):
                    self._do(f"ALTER TABLE {name} MODIFY SETTING {_ON_DISK}")
            self._types = self._types_of_rows()
            self._note_version()
            self._reader = connect_to(place)
            self._reader.query(f"SET max_memory_usage = {QUESTION_BYTES}, max_execution_time = {QUESTION_S}")
            self._reader.query("SET readonly = 1")
        except OSError:
            raise
        except Exception as error:
            raise self._refused("the tables of", error) from error

    def _types_of_rows(self) -> str:
        """The columns of a row with their types, which a table of a Collector's making has a little different."""
        wanted = f"DESCRIBE TABLE (SELECT {', '.join(COLUMNS)} FROM otel_logs)"  # noqa: S608
        lines = self._writer.query(wanted, "TSVRaw").bytes().decode().splitlines()
        return ", ".join(" ".join(line.split("\t")[:2]) for line in lines if line)

    def _do(self, sql: str) -> None:
        self._writer.query(sql)

    # ---- errors -------------------------------------------------------------------------------

    def _refused(self, what: str, error: Exception) -> SowatchError:
        text = " ".join(str(error).split())
        if _FULL.search(text):
            return StoreFull(self.directory, "no space left on it")
        return SowatchError(f"{what} the store {self.directory!r} failed: {_in_short(text)}.")

    def _failed(self, reason: str, number: int | None) -> SowatchError:
        if number in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(self.directory, reason)
        return SowatchError(
            f"cannot use {self.directory!r} for a store: {reason}. Give one that this user may write to: --store."
        )


#: The file with `SCHEMA_VERSION`.
_VERSION: Final = "schema"


def _engine() -> Any:
    """What connects to a directory.

    Raises:
        UsageError: chdb is not installed.
    """
    try:
        from chdb.state.sqlitelike import Connection
    except ImportError as error:
        raise UsageError(
            f"{error.name or 'chdb'} is not installed, and a store needs it. Install it: pip install 'sowatch[fleet]'."
        ) from error
    return Connection


def _quoted(text: str) -> str:
    """A text of ours in SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _in_short(text: str) -> str:
    """The sentence of an error of ClickHouse, without its code and version."""
    found = re.search(r"DB::Exception: (.*)", text)
    text = re.sub(r" \(version [^)]*\)", "", found[1] if found else text)
    return text[:500].rstrip(". ")
