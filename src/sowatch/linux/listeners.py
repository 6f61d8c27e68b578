"""On which TCP and UDP ports processes listen, from the socket tables of their network namespaces. Read-only.

The tables say nothing of processes: a socket is found in them by its inode, which is that of descriptors of one process
or of several (a manager that has opened it for a service, workers that were forked). A process listens on what it has
open, in whatever namespace that was made.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final, Literal, NamedTuple, TypeAlias

from sowatch.linux.descriptors import close_fd
from sowatch.linux.proc import Miss, ProcFs, ProcReadError

__all__ = ["MAX_FDS", "Listener", "Listeners", "Listening", "listening_from", "parse_listening", "ports_of"]

Protocol: TypeAlias = Literal["tcp", "udp"]

#: Descriptors of one process that are looked at; of one that has more, its answer is not complete.
MAX_FDS: Final = 65_536
#: Of one table. A line has 150 bytes.
_MAX_TABLE_BYTES: Final = 32 << 20
#: Namespaces whose tables are kept during a pass.
_MAX_NAMESPACES: Final = 1_024
#: Threads of one process that are tried, one after the other, as each ends while it is read.
_MOST_THREADS: Final = 4
_READ_BYTES: Final = 1 << 16
_SOCKET: Final = re.compile(r"socket:\[([0-9]{1,20})\]")
#: ``sl  local_address rem_address  st tx:rx tr:tm retrnsmt uid timeout inode`` (proc(5), /proc/net/tcp).
_ROW: Final = re.compile(
    rb" *[0-9]+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) ([0-9A-F]{2}) "
    rb"[0-9A-F]+:[0-9A-F]+ [0-9A-F]+:[0-9A-F]+ [0-9A-F]+ +[0-9]+ +[0-9]+ ([0-9]{1,20})(?: |$)"
)
#: States of include/net/tcp_states.h: TCP_LISTEN, and TCP_CLOSE of a datagram socket without a peer.
_LISTENING: Final = {"tcp": b"0A", "udp": b"07"}
_TEXT: Final = re.compile("(tcp|udp):([0-9]{1,5})")
#: What the kernel chooses for sockets that ask for no port, unless ip_local_port_range says otherwise.
_EPHEMERAL: Final = range(32_768, 61_000)


class Listener(NamedTuple):
    """A socket that takes connections or datagrams from anybody.

    Attributes:
        protocol: ``tcp`` or ``udp``, of IPv4 and IPv6 alike.
        port: its port.
        address: its address; ``0.0.0.0`` and ``::`` stand for all.
        inode: distinguishes it from every other socket of the host.
    """

    protocol: Protocol
    port: int
    address: str
    inode: int

    def __str__(self) -> str:
        return f"{self.protocol}:{self.port}"


class Listening(NamedTuple):
    """What one process listens on, by protocol, port and address; ``is_complete``: and nothing else."""

    sockets: tuple[Listener, ...]
    is_complete: bool = True

    def __str__(self) -> str:
        return ports_of(self.sockets)


class Listeners:
    """Finds the ports of processes and remembers the tables during one pass. One thread uses it.

    Datagram sockets count that have no peer and a port outside of the range of ephemeral ones: those of clients look
    alike there.

    Args:
        proc: the proc file system to read.

    >>> with socket.create_server(("127.0.0.1", 0)) as server:
    ...     port = server.getsockname()[1]
    ...     found = Listeners(ProcFs()).of(os.getpid())
    >>> f"tcp:{port}" in str(found).split(",")
    True
    """

    def __init__(self, proc: ProcFs) -> None:
        self._proc = proc
        self._tables: dict[str, _Table] = {}

    def begin_pass(self) -> None:
        """Forgets the tables, as all of them may have changed."""
        self._tables.clear()

    def of(self, pid: int) -> Listening | Miss:
        """What a process listens on.

        Reads the links of its descriptors, `MAX_FDS` at most, and the tables of its network namespace, once for all
        processes in it. A socket that was made in another namespace is known if that is ours, that of process 1,
        or that of a process that was asked for before in this pass.

        Returns:
            What it listens on. ``DENIED``: this user may not read its descriptors, which takes what ptrace(2) takes.
        """
        found: Listening | Miss = Miss.GONE
        for _ in range(_MOST_THREADS):
            thread = self._proc.live_thread(pid)
            if isinstance(thread, Miss):
                return thread
            found = self._of_thread(f"{self._proc.root}/{thread}")
            if found is not Miss.GONE:
                break
        return found

    def _of_thread(self, base: str) -> Listening | Miss:
        try:
            are_complete = self._read_tables(base)
            inodes, is_complete = _socket_inodes(f"{base}/fd")
        except OSError as error:
            return _miss(error, base)
        tables = [table.sockets for table in self._tables.values()]
        found = {sockets[inode] for sockets in tables for inode in inodes & sockets.keys()}
        return Listening(tuple(sorted(found)), is_complete and are_complete)

    def _read_tables(self, base: str) -> bool:
        """Whether all of them were read to their ends."""
        are_complete = True
        for one in (f"{self._proc.root}/1", f"{self._proc.root}/self"):
            # Where sockets of service managers were made. It may be out of reach, or another user's.
            with suppress(OSError):
                are_complete &= self._read_table(one)
        return self._read_table(base) and are_complete

    def _read_table(self, base: str) -> bool:
        namespace = os.readlink(f"{base}/ns/net")
        if namespace not in self._tables:
            while len(self._tables) >= _MAX_NAMESPACES:
                del self._tables[next(iter(self._tables))]
            self._tables[namespace] = _table_of(base)
        return self._tables[namespace].is_complete


def listening_from(texts: Iterable[str]) -> Listening:
    """What is listened on, of texts such as ``tcp:443``, without addresses; others are left out.

    >>> str(listening_from(["tcp:443", "what?"]))
    'tcp:443'
    """
    found = (_TEXT.fullmatch(text) for text in texts)
    return Listening(
        tuple(Listener("tcp" if one[1] == "tcp" else "udp", int(one[2]), "", 0) for one in found if one is not None)
    )


def ports_of(listeners: Iterable[Listener]) -> str:
    """Protocols and ports, each once, with commas: ``tcp:80,tcp:443,udp:53``; empty: none."""
    return ",".join(dict.fromkeys(map(str, listeners)))


# ---- what the kernel shows ----------------------------------------------------------------------


class _Table(NamedTuple):
    """The listening sockets of a network namespace by inode, and whether those are all."""

    sockets: Mapping[int, Listener]
    is_complete: bool


def _table_of(base: str) -> _Table:
    """That of the network namespace of a process.

    Raises:
        OSError: it may not be read, or the process has ended.
    """
    found: dict[int, Listener] = {}
    is_complete = True
    protocols: tuple[Protocol, ...] = ("tcp", "udp")
    for protocol in protocols:
        for version in ("", "6"):
            try:
                fd = os.open(f"{base}/net/{protocol}{version}", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # a kernel without IPv6, or the process has ended, which its descriptors show
                continue
            try:
                lines = _Lines(fd)
                found.update((one.inode, one) for one in parse_listening(protocol, lines))
            finally:
                close_fd(fd)
            is_complete = is_complete and not lines.is_cut
    return _Table(found, is_complete)


class _Lines:
    """The lines of a table, up to a bound; ``is_cut``: somebody wanted those beyond it, too."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.is_cut = False

    def __iter__(self) -> Iterator[bytes]:
        left_bytes, rest = _MAX_TABLE_BYTES, b""
        while piece := os.read(self._fd, _READ_BYTES):
            if left_bytes <= 0:
                self.is_cut = True
                return
            left_bytes -= len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines


def parse_listening(protocol: Protocol, lines: Iterable[bytes]) -> Iterator[Listener]:
    """The listening sockets in the lines of ``/proc/net/tcp``, ``udp`` and those of IPv6; other lines are left out.

    >>> row = b"   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0"
    >>> list(parse_listening("tcp", [row]))
    [Listener(protocol='tcp', port=80, address='127.0.0.1', inode=4711)]
    """
    state = _LISTENING[protocol]
    for line in lines:
        row = _ROW.match(line)
        if row is None:
            continue
        address, port, peer, peer_port, shown, inode = row.groups()
        if shown != state:
            if protocol == "tcp":
                return  # the kernel shows those that listen first (tcp_seq_start), and a host may have a million others
            continue
        number = int(port, 16)
        if protocol == "udp" and (peer_port != b"0000" or peer.strip(b"0") or number in _EPHEMERAL):
            continue
        if number and int(inode):
            yield Listener(protocol, number, _address(address), int(inode))


def _address(digits: bytes) -> str:
    """The kernel shows each 32 bits of an address as a number in its own byte order."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _socket_inodes(path: str) -> tuple[set[int], bool]:
    """The inodes of the sockets that a process has open, and whether those are all."""
    found: set[int] = set()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_FDS:
                    return found, False
                try:
                    link = _SOCKET.fullmatch(os.readlink(entry.name, dir_fd=fd))
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                        continue  # closed since, or a path that is longer than the kernel shows
                    raise
                if link is not None:
                    found.add(int(link[1]))
    finally:
        close_fd(fd)
    return found, True


def _miss(error: OSError, base: str) -> Miss:
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return Miss.GONE
    if error.errno in (errno.EACCES, errno.EPERM):
        return Miss.DENIED
    raise ProcReadError(base, error.errno or errno.EIO) from error
