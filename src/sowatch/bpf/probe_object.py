"""`ProbeObject`: a BPF object whose programs are attached to functions in files, one link at a time.

What a watch does not need and a probe does: the object's programs and maps by name, constants set before loading, rings
with records of any size, and links that end one by one.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from sowatch.bpf.binding import BpfMap, BpfObject, libbpf, probe
from sowatch.model.errors import BpfError

__all__ = [
    "Link",
    "MapSpec",
    "ProbeObject",
    "ProgramSpec",
    "Ring",
    "Table",
    "has_attach_cookie",
    "has_uprobe_by_fd",
    "has_uprobe_multi",
    "may_return_probe_kill",
    "run_self_test",
    "self_test_address",
    "set_probe_constants",
    "uprobe_perf_type",
]

#: Where the kernel says which number perf_event_open takes for a uprobe.
_PERF_TYPE: Final = Path("/sys/bus/event_source/devices/uprobe/type")
#: Before each record in a ring's buffer (shim.h): u32 length, 4 bytes of 0.
_FRAME: Final = struct.Struct("=II")
#: enum bpf_map_type.
_RINGBUF: Final = 27
#: Arrays per CPU, hashes per CPU (plain and LRU).
_PER_CPU: Final = frozenset({5, 6, 10})
#: linux/bpf.h
_PROGRAM_KPROBE: Final = 2
_PATH_BYTES: Final = 4096
_HELPER_ATTACH_COOKIE: Final = 174
_HELPER_CURRENT_TASK_BTF: Final = 158


class ProgramSpec(NamedTuple):
    """A program of an object: its name and the ELF section that it stands in."""

    name: str
    section: str


class MapSpec(NamedTuple):
    """A map of an object, as the object file declares it; sizes in bytes, ``kind`` of enum bpf_map_type."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    max_entries: int

    @property
    def is_ring(self) -> bool:
        """Whether it is a BPF ring buffer."""
        return self.kind == _RINGBUF

    @property
    def is_per_cpu(self) -> bool:
        """Whether it has a value for each CPU."""
        return self.kind in _PER_CPU


class LinkPlace(NamedTuple):
    """Where the kernel has a link: ``path`` of the file as it sees it (None for a perf event), ``offsets`` of it.

    ``total`` is how many offsets there are; there may be more than fit into ``offsets``.
    """

    path: str | None
    total: int
    offsets: tuple[int, ...]


class Link:
    """One attachment in the kernel: it lasts until `close`, or until this process ends. A context manager."""

    __slots__ = ("_fd", "id")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: The kernel's number of the link; None where it is a perf event without one (before 5.15).
        self.id: int | None = None
        info = self._info()
        if info is not None:
            self.id = int(info.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor that the kernel knows it by; -1 when closed."""
        return self._fd

    @property
    def is_attached(self) -> bool:
        """Whether the kernel still has this very link; for a bare perf event: whether it is open."""
        if self._fd < 0:
            return False
        if self.id is None:
            return True
        info = self._info()
        return info is not None and int(info.id) == self.id

    def place(self, capacity: int) -> LinkPlace | None:
        """Where the kernel has it; None where the kernel does not say (multi before 6.8, perf events before 6.6).

        Args:
            capacity: of so many offsets at most.
        """
        if self._fd < 0 or self.id is None:
            return None
        shim = libbpf()
        offsets = shim.ffi.new("unsigned long[]", max(capacity, 1))
        path = shim.ffi.new("char[]", _PATH_BYTES)
        count = shim.lib.sow_link_place(self._fd, offsets, capacity, path, _PATH_BYTES)
        if count <= 0:
            return None
        text = os.fsdecode(shim.ffi.string(path))
        return LinkPlace(text or None, count, tuple(offsets[index] for index in range(min(count, capacity))))

    @property
    def program_id(self) -> int | None:
        """The kernel's number of the program that is attached."""
        info = self._info()
        return None if info is None else int(info.program_id)

    def close(self) -> None:
        """Detaches; waits for the kernel to do it, some milliseconds. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _info(self) -> Any | None:
        shim = libbpf()
        info = shim.ffi.new("struct sow_link_info *")
        return info if self._fd >= 0 and shim.lib.sow_link_info(self._fd, info) == 0 else None


class Table(BpfMap):
    """A map of an object that knows its sizes; a Python mapping in all but name.

    Keys and values are bytes, as the C side declares them; of a map per CPU a value is one for each possible CPU, each
    padded to 8 bytes. Iterating while programs write may miss or repeat keys, as the kernel's own walk does.

    >>> for key, value in attacher.map("counts").items():  # doctest: +SKIP
    ...     print(int.from_bytes(key, "little"), int.from_bytes(value, "little"))
    """

    __slots__ = ("spec",)

    def __init__(self, table: BpfMap, spec: MapSpec) -> None:
        super().__init__(libbpf(), table.name, table.fd)
        self.spec = spec

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.all_keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.update(key, value)

    def __delitem__(self, key: bytes) -> None:
        self.delete(key)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None if it is not there."""
        return self.lookup(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every key with its value; without those that are deleted meanwhile."""
        for key in self:
            value = self.get(key)
            if value is not None:
                yield key, value

    def unpacked(self, key: str, value: str) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Every key with its value as the fields of a ``struct`` format each.

        Raises:
            BpfError: EMSGSIZE: a format has another size than the map's keys or values.
        """
        keys, values = struct.Struct(key), struct.Struct(value)
        if (keys.size, values.size) != (self.spec.key_bytes, self.spec.value_bytes) or self.spec.is_per_cpu:
            raise BpfError(
                f"unpacking map {self.name}, whose keys have {self.spec.key_bytes} and values "
                f"{self.spec.value_bytes} bytes, as {keys.size} and {values.size} bytes",
                errno.EMSGSIZE,
            )
        for raw_key, raw_value in self.items():
            yield keys.unpack(raw_key), values.unpack(raw_value)


class Ring:
    """A BPF ring buffer of an object. One thread at a time may take from it.

    Args:
        table: the map.
        size_bytes: of the ring.
    """

    def __init__(self, table: BpfMap, size_bytes: int) -> None:
        self._shim = libbpf()
        error = self._shim.ffi.new("int *")
        self._ring = self._shim.lib.sow_ring_new(table.fd, error)
        if self._ring == self._shim.ffi.NULL:
            raise BpfError(f"opening ring {table.name}", -error[0], "")
        self._name = table.name
        self._capacity = 2 * size_bytes
        self._buffer = self._shim.ffi.new("char[]", self._capacity)

    def fileno(self) -> int:
        """A descriptor that polls readable while there are records."""
        self._check_open()
        return int(self._shim.lib.sow_ring_epoll_fd(self._ring))

    def take(self) -> Iterator[bytes]:
        """The records that are there now, in order; never waits."""
        self._check_open()
        used = self._shim.lib.sow_ring_take(self._ring, self._buffer, self._capacity)
        if used < 0:
            raise BpfError(f"draining ring {self._name}", -used, "")
        data = bytes(self._shim.ffi.buffer(self._buffer, used)) if used else b""
        at = 0
        while at < len(data):
            size, _ = _FRAME.unpack_from(data, at)
            at += _FRAME.size
            yield data[at : at + size]
            at += (size + 7) & ~7

    def records(self, format: str) -> Iterator[tuple[Any, ...]]:  # noqa: A002 - as struct calls it
        """The records that are there now, each as the fields of a ``struct`` format; longer ones are cut.

        Raises:
            BpfError: EMSGSIZE: a record is shorter than the format.
        """
        layout = struct.Struct(format)
        for record in self.take():
            if len(record) < layout.size:
                raise BpfError(
                    f"unpacking a record of {len(record)} bytes of ring {self._name} as {layout.size} bytes",
                    errno.EMSGSIZE,
                )
            yield layout.unpack_from(record)

    def close(self) -> None:
        """Gives the ring's memory back. Safe to call again."""
        ring, self._ring = self._ring, None
        if ring is not None:
            self._shim.lib.sow_ring_free(ring)

    def _check_open(self) -> None:
        if self._ring is None:
            raise BpfError(f"draining ring {self._name}", 9, "the ring is closed")


class ProbeObject(BpfObject):
    """A BPF object for uprobes: see `sowatch.bpf.binding.BpfObject` for its life.

    ``load`` and what comes before it belong to one thread; links may be made by any thread, one at a time.
    """

    def programs(self) -> list[ProgramSpec]:
        """Its programs, in the order of the file."""
        info = self._lib.ffi.new("struct sow_program_info *")
        return [ProgramSpec(self._text(info.name), self._text(info.section)) for _ in self._each("program", info)]

    def maps(self) -> list[MapSpec]:
        """Its maps, in the order of the file, without data sections."""
        info = self._lib.ffi.new("struct sow_map_info *")
        return [
            MapSpec(self._text(info.name), info.type, info.key_bytes, info.value_bytes, info.max_entries)
            for _ in self._each("map", info)
            if not info.is_internal
        ]

    def set_constant(self, name: str, value: bytes) -> None:
        """Sets a ``const volatile`` variable; before `load`.

        Raises:
            BpfError: ENOENT: there is none of this name; EMSGSIZE: it has another size.
        """
        self._call(f"setting constant {name}", self._lib.lib.sow_set_constant, os.fsencode(name), value, len(value))

    def use_uprobe(self, program: str, *, multi: bool) -> None:
        """Says that a program is for uprobes, of the given kind of link; before `load`."""
        self._call(f"preparing {program}", self._lib.lib.sow_set_uprobe, os.fsencode(program), int(multi))

    def link_multi(
        self, program: str, fd: int, offsets: Sequence[int], cookies: Sequence[int], *, is_return: bool
    ) -> Link:
        """One link for many functions of a file (6.6+).

        Args:
            program: its name; prepared with ``multi=True``.
            fd: open on the file. The link binds to the inode; the descriptor may be closed then.
            offsets: in the file, in bytes; each once.
            cookies: what bpf_get_attach_cookie gives, one for each offset.
            is_return: probe the return, not the entry.

        Raises:
            BpfError: EINVAL: an offset that is none of code; EBADF: no regular file; EPERM.
        """
        ffi = self._lib.ffi
        return Link(
            self._call(
                f"attaching {program}",
                self._lib.lib.sow_link_uprobe_multi,
                os.fsencode(program),
                fd,
                has_uprobe_by_fd(),
                int(is_return),
                ffi.new("unsigned long[]", list(offsets)),
                ffi.new("unsigned long long[]", list(cookies)),
                len(offsets),
            )
        )

    def link_one(self, program: str, fd: int, offset: int, cookie: int | None, *, is_return: bool) -> Link:
        """A perf-event uprobe: one function of a file, on every kernel.

        Args:
            program: its name; prepared with ``multi=False``.
            fd: as in `link_multi`.
            offset: in the file, in bytes.
            cookie: what bpf_get_attach_cookie gives (5.15+); None: the program does not ask for it.
            is_return: probe the return, not the entry.

        Raises:
            BpfError: EPERM or EACCES: some stable kernels want CAP_SYS_ADMIN for it; else as `link_multi`.
        """
        return Link(
            self._call(
                f"attaching {program}",
                self._lib.lib.sow_link_uprobe,
                os.fsencode(program),
                fd,
                uprobe_perf_type(),
                int(is_return),
                offset,
                int(cookie is not None),
                cookie or 0,
            )
        )

    def table(self, name: str) -> Table:
        """A map by name, with its sizes.

        Raises:
            BpfError: ENOENT: there is none of that name.
        """
        found = self.map(name)
        return Table(found, next(spec for spec in self.maps() if spec.name == name))

    def ring(self, name: str) -> Ring:
        """A ring buffer by name; the caller closes it before the object.

        Raises:
            BpfError: there is no ring of that name.
        """
        for spec in self.maps():
            if spec.name == name and spec.is_ring:
                return Ring(self.map(name), spec.max_entries)
        raise BpfError(f"opening ring {name}", 2, "")

    def _each(self, kind: str, info: Any) -> Iterator[None]:
        index = 0
        function = getattr(self._lib.lib, f"sow_{kind}_info")
        while function(self._open_handle(f"listing {kind}s"), index, info) == 0:
            yield
            index += 1

    def _text(self, pointer: Any) -> str:
        text: bytes = self._lib.ffi.string(pointer)
        return text.decode("utf-8", "surrogateescape")


@functools.cache
def uprobe_perf_type() -> int:
    """The number that perf_event_open takes for uprobes.

    Raises:
        BpfError: ENOENT: this kernel has no uprobes.
    """
    try:
        return int(_PERF_TYPE.read_text(encoding="ascii"))
    except OSError as error:
        raise BpfError("finding the uprobe event source", error.errno or 2, "") from error


def has_uprobe_multi() -> bool | None:
    """Whether the kernel has uprobe.multi links (6.6+); None: this user may not try."""
    found: int = libbpf().lib.sow_probe_uprobe_multi()
    return None if found < 0 else bool(found)


@functools.cache
def has_uprobe_by_fd() -> bool:
    """Whether a uprobe.multi link takes a descriptor instead of a path (7.2+); found out by trying."""
    return bool(libbpf().lib.sow_probe_uprobe_fd() == 1)


def may_return_probe_kill() -> bool | None:
    """Whether a return probe can end a process that is below a seccomp filter.

    On x86-64 the kernel implements them by a system call of their own since 6.11, and a filter that does not know it
    refuses it or ends the process; later kernels (6.14, and stable ones before) do not ask the filter (cf6cb56ef244).
    A child of ours tries that call below a filter.

    Returns:
        None if it cannot be determined: this process is below a filter itself.
    """
    found: int = libbpf().lib.sow_probe_return_call()
    return None if found < 0 else bool(found)


def self_test_address() -> int:
    """Where the function is that `run_self_test` calls, in this process."""
    return int(libbpf().lib.sow_self_test_address())


def run_self_test() -> None:
    """Calls a function of sowatch's own that does nothing, to see whether a probe on it runs."""
    libbpf().lib.sow_self_test()


def has_attach_cookie() -> bool | None:
    """Whether a program can ask which of its links runs it (bpf_get_attach_cookie, 5.15+); None: no answer."""
    return probe("helper", _PROGRAM_KPROBE, _HELPER_ATTACH_COOKIE)


def set_probe_constants(loaded: ProbeObject, *, is_filtered: bool) -> None:
    """Sets what every program with probe.bpf.h asks of the kernel, and whether only processes in `wanted` count."""
    loaded.set_constant("has_cookies", bytes([has_attach_cookie() is not False]))
    has_task_btf = probe("helper", _PROGRAM_KPROBE, _HELPER_CURRENT_TASK_BTF) is True
    loaded.set_constant("has_task_btf", bytes([has_task_btf]))
    loaded.set_constant("is_filtered", bytes([is_filtered]))
