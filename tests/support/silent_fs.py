"""A file system (FUSE) with one library that answers until it is told to fall silent, and a process that maps it.

It is mounted in the mount namespace of that process alone. Nothing waits for it longer than the block lasts: the kernel
aborts a FUSE file system when the last descriptor of its /dev/fuse is closed.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

__all__ = ["SilentFileSystem"]

#: struct fuse_in_header, 40 bytes, and fuse_out_header, 16 (include/uapi/linux/fuse.h, like the opcodes).
_IN: Final = struct.Struct("=IIQQIIIHH")
_OUT: Final = struct.Struct("=IiQ")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
_ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 1, 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 18, 25, 26, 27, 29, 36, 42
_ROOT, _FILE = 1, 2
_FATTR_SIZE: Final = 1 << 3
NAME: Final = "libsilent.so"

#: Maps argv[2] from a mount namespace that has the file system on argv[3], then says so.
_HOLDER: Final = """
import ctypes, os, sys
fd, where = int(sys.argv[1]), os.fsencode(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
user = 0x10000000 if os.geteuid() else 0
assert not libc.unshare(0x00020000 | user), os.strerror(ctypes.get_errno())
assert not libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None), os.strerror(ctypes.get_errno())
options = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other" % (fd, os.geteuid(), os.getegid())
assert not libc.mount(b"silent", where, b"fuse", 0, options), os.strerror(ctypes.get_errno())
os.close(fd)
print(flush=True)
ctypes.CDLL(os.path.join(sys.argv[2], sys.argv[3]))
for path in sys.argv[4:]:
    ctypes.CDLL(path)
print(flush=True)
sys.stdin.read()
"""


class SilentFileSystem:
    """Serves ``libsilent.so`` on a directory, to a process that has it mapped. A context manager.

    Args:
        where: an empty directory.
        library: whose bytes it serves.
        others: further libraries that the process maps, in this order.

    Attributes:
        pid: of the process.
        path: of the library, as that process sees it.
    """

    def __init__(self, where: Path, library: Path, *others: Path) -> None:
        self._content = library.read_bytes()
        self.path = where / NAME
        self._is_silent = False
        self.asked = threading.Event()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve)
        self._holder: subprocess.Popen[bytes] | None = None
        words = [sys.executable, "-c", _HOLDER, str(self._fd), where, NAME, *others]
        try:
            self._holder = subprocess.Popen(words, stdin=-1, stdout=-1, pass_fds=[self._fd])
            assert self._holder.stdout is not None
            assert self._holder.stdout.readline() == b"\n"  # it is mounted, without which its device says EPERM
            self._thread.start()
            assert self._holder.stdout.readline() == b"\n"
        except BaseException:
            self.close()
            raise
        self.pid = self._holder.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fall_silent(self) -> None:
        """From now on requests are taken and none is answered."""
        self._is_silent = True

    def close(self) -> None:
        """Aborts the file system, so that whoever waits goes on, and ends the process."""
        os.eventfd_write(self._over, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._fd)
        os.close(self._over)
        if self._holder is not None:
            with self._holder:
                self._holder.kill()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._over], [], [])
            if self._over in ready:
                return
            try:
                request = os.read(self._fd, (1 << 17) + 4096)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # its asker went meanwhile
                    continue
                return  # ENODEV: it was unmounted with its namespace
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            if self._is_silent:
                self.asked.set()
                continue
            error, data = self._answer(opcode, node, request[_IN.size :])
            os.write(self._fd, _OUT.pack(_OUT.size + len(data), error, unique) + data)

    def _answer(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        if opcode == _INIT:
            major, minor, readahead = struct.unpack_from("=III", body)
            return 0, _INIT_OUT.pack(major, minor, readahead, 0, 12, 9, 1 << 17, 1, 0, 0, 0)
        if opcode == _LOOKUP:
            if node != _ROOT or body.rstrip(b"\0") != NAME.encode():
                return -errno.ENOENT, b""
            # Valid for no time at all: each look asks again.
            return 0, struct.pack("=QQQQII", _FILE, 0, 0, 0, 0, 0) + self._attr(_FILE)
        if opcode == _READ:
            offset, size = struct.unpack_from("=8xQI", body)
            return 0, self._content[offset : offset + size]
        if opcode == _WRITE:
            _, offset, size = struct.unpack_from("=QQI", body)
            data = body[-size:]
            self._content = self._content[:offset].ljust(offset, b"\0") + data + self._content[offset + size :]
            return 0, struct.pack("=II", size, 0)
        if opcode == _SETATTR:
            valid, size = struct.unpack_from("=I12xQ", body)
            if valid & _FATTR_SIZE:
                self._content = self._content[:size].ljust(size, b"\0")
        answers: dict[int, Callable[[], bytes]] = {
            _GETATTR: lambda: struct.pack("=QII", 0, 0, 0) + self._attr(node),
            _SETATTR: lambda: struct.pack("=QII", 0, 0, 0) + self._attr(node),
            _OPEN: lambda: struct.pack("=QII", 0, 0, 0),
            _OPENDIR: lambda: struct.pack("=QII", 0, 0, 0),
            _STATFS: lambda: struct.pack("=QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0),
            _RELEASE: bytes,
            _RELEASEDIR: bytes,
            _FLUSH: bytes,
        }
        return (0, answers[opcode]()) if opcode in answers else (-errno.ENOSYS, b"")

    def _attr(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o755
        size = 0 if node == _ROOT else len(self._content)
        return _ATTR.pack(
            node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0
        )
