"""For tests of hostile input: who opens a file, an open that hangs, small C programs, the installed command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

__all__ = ["SOWATCH", "Command", "Held", "Opens", "compile_c", "deep_path", "is_shown_safely"]

#: The command as it was installed, beside the interpreter of its environment.
SOWATCH = Path(sysconfig.get_path("scripts")) / "sowatch"

#: linux/fanotify.h
_FAN_CLASS_CONTENT = 0x04
_FAN_CLOEXEC = 0x01
_FAN_NONBLOCK = 0x02
_FAN_MARK_ADD = 0x01
_FAN_MARK_DONT_FOLLOW = 0x04
_FAN_REPORT_FID = 0x200
_FAN_OPEN = 0x20
_FAN_OPEN_PERM = 0x10000
_FAN_ALLOW = 1
_AT_FDCWD = -100
_FANOTIFY_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata, 24 bytes
_FANOTIFY_RESPONSE = struct.Struct("=iI")  # struct fanotify_response, 8 bytes


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fanotify_mark.argtypes = (
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    return libc


def _checked(value: int, what: str) -> int:
    if value < 0:
        raise OSError(ctypes.get_errno(), what)
    return value


class Opens:
    """Tells which processes open some inodes from now on, by fanotify: baits that nobody has a reason to open.

    An open with O_PATH does not count, for it opens nothing. Needs Linux 5.1.
    """

    def __init__(self, *paths: Path) -> None:
        libc = _libc()
        self._names: dict[int, str] = {}
        # A group for each bait: with FAN_REPORT_FID, which opens nothing itself, events name no path.
        for path in paths:
            flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_REPORT_FID
            fd = _checked(libc.fanotify_init(flags, os.O_RDONLY), "fanotify_init")
            self._names[fd] = path.name
            add = _FAN_MARK_ADD | _FAN_MARK_DONT_FOLLOW
            _checked(libc.fanotify_mark(fd, add, _FAN_OPEN, _AT_FDCWD, os.fsencode(path)), f"fanotify_mark {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._names:
            os.close(fd)

    def by(self, pid: int | None) -> list[str]:
        """Names of the baits that a process (None: anybody) opened since the last call, one for each open."""
        found = []
        for fd, name in self._names.items():
            while True:
                try:
                    data = os.read(fd, 65536)
                except BlockingIOError:
                    break
                while data:
                    length, *_, opener = _FANOTIFY_EVENT.unpack_from(data)
                    data = data[length:]
                    if pid in (None, opener):
                        found.append(name)
        return found


class Held:
    """Keeps every open of a file by one process waiting, as a file system does that has hung.

    Opens by others go through. What still waits goes on when the block is left.
    """

    def __init__(self, path: Path, pid: int) -> None:
        libc = _libc()
        flags = _FAN_CLASS_CONTENT | _FAN_CLOEXEC | _FAN_NONBLOCK
        self._fd = _checked(libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC), "fanotify_init")
        self._pid = pid
        self._kept: list[int] = []
        self.is_holding = threading.Event()
        mark = libc.fanotify_mark(self._fd, _FAN_MARK_ADD, _FAN_OPEN_PERM, _AT_FDCWD, os.fsencode(path))
        _checked(mark, "fanotify_mark")
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.eventfd_write(self._over, 1)
        self._thread.join()
        for fd in self._kept:
            self._allow(fd)
        os.close(self._fd)
        os.close(self._over)

    def _answer(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._over], [], [])
            if self._over in ready:
                return
            data = os.read(self._fd, 65536)
            while data:
                length, _, _, _, _, fd, pid = _FANOTIFY_EVENT.unpack_from(data)
                data = data[length:]
                if pid == self._pid:
                    self._kept.append(fd)
                    self.is_holding.set()
                else:
                    self._allow(fd)

    def _allow(self, fd: int) -> None:
        os.write(self._fd, _FANOTIFY_RESPONSE.pack(fd, _FAN_ALLOW))
        os.close(fd)


class Command:
    """A running ``sowatch watch --json``, with every line it printed, each checked as it is taken.

    Args:
        words: further arguments.
        check: takes a line, raises if it is no event of the schema, returns it as a dict.
        timeout_s: how long to wait for something.
    """

    def __init__(self, words: Sequence[str], *, check: Callable[[bytes], dict[str, Any]], timeout_s: float) -> None:
        self._check = check
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [SOWATCH, "watch", "--json", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert self._process.stdout
        os.set_blocking(self._process.stdout.fileno(), False)
        self._unread = b""
        self.pid = self._process.pid
        self.lines: list[bytes] = []
        self.events: list[dict[str, Any]] = []
        try:
            self.wait_for(lambda event: event["event"] == "ready", "ready")
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> int:
        """Ends it as ctrl-C does; its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=self._timeout_s)
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        return self._process.returncode

    def freeze(self) -> None:
        """Keeps it from doing anything; the kernel goes on filling its ring."""
        self._process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.pid}/stat")
        while status.read_bytes().rpartition(b")")[2].split()[0] != b"T":
            os.sched_yield()

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait_for(self, wanted: Callable[[dict[str, Any]], Any], what: str, *, since: int = 0) -> dict[str, Any]:
        """The first event from ``since`` on that is wanted."""
        end = time.monotonic() + self._timeout_s
        looked = since
        while True:
            for event in self.events[looked:]:
                looked += 1
                if wanted(event):
                    return event
            left = end - time.monotonic()
            assert left > 0, f"no {what} was told; the last events: {self.lines[-5:]}"
            assert self._process.poll() is None, f"sowatch ended: {self._error()}"
            self._take(min(left, 0.2))

    def load_of(self, pid: int, inode: int) -> dict[str, Any]:
        return self._of("load", pid, inode)

    def unload_of(self, pid: int, inode: int) -> dict[str, Any]:
        return self._of("unload", pid, inode)

    def about(self, pid: int) -> list[dict[str, Any]]:
        """Loads and unloads of a process so far."""
        return [one for one in self.events if one["event"] in ("load", "unload") and one["process"]["pid"] == pid]

    def _of(self, kind: str, pid: int, inode: int) -> dict[str, Any]:
        return self.wait_for(
            lambda event: (
                event["event"] == kind and event["process"]["pid"] == pid and event["library"]["inode"] == inode
            ),
            f"{kind} of inode {inode} in {pid}",
        )

    def _take(self, timeout_s: float) -> None:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            return
        data = self._process.stdout.read(1 << 20) or b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self.lines.append(line)
            self.events.append(self._check(line))

    def _error(self) -> str:
        assert self._process.stderr
        return self._process.stderr.read().decode("utf-8", "replace")


def compile_c(source: str, made: Path, *flags: str) -> Path:
    """Compiles C text to the program or library ``made``.

    Raises:
        subprocess.CalledProcessError: the compiler refused; ``stderr`` says why.
    """
    made.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-x", "c", "-", "-o", os.fspath(made), *flags]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True)
    return made


def deep_path(directory: Path, length: int, name: str) -> str:
    """Directories below ``directory`` and a file name, so that the whole path has just ``length`` bytes.

    The file is not made; the directories are, one by one, as no call takes their path at once.
    """
    path = os.fspath(directory)
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    while (left := length - len(path) - len(name) - 1) > 0:
        # Never 1 left over: a component has at least one byte and its slash.
        size = left - 1 if left <= 200 else 198
        component = "d" * size
        os.mkdir(component, dir_fd=fd)
        deeper = os.open(component, os.O_PATH | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = deeper
        path += f"/{component}"
    os.close(fd)
    assert len(path) + 1 + len(name) == length
    return f"{path}/{name}"


def is_shown_safely(output: bytes) -> bool:
    """Whether text for people has nothing in it that steers a terminal: printable lines of UTF-8."""
    return all(line.isprintable() for line in output.decode("utf-8").split("\n"))
