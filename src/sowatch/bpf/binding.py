"""`BpfObject`: the one class that talks to libbpf. A context manager; every handle is closed once.

Nothing here knows what the programs are for. One thread at a time may use an object, but for `BpfMap`, which any may
use.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sowatch.model.errors import BpfError, LibbpfMissing, TracefsNotMounted

__all__ = ["PROGRAMS", "BpfMap", "BpfObject", "Tracefs", "Variable", "libbpf", "libbpf_version"]

#: Where the programs are, sources and objects.
PROGRAMS: Final = Path(__file__).with_name("programs")
#: Space for what one drain of the ring brings; 128 KiB is some hundred records.
DRAIN_BYTES: Final = 1 << 17


@functools.cache
def libbpf() -> Any:
    """The compiled binding, imported on first use.

    Raises:
        LibbpfMissing: it was not built, or the libbpf it was built for is not on this machine.
    """
    try:
        return importlib.import_module("sowatch.bpf._libbpf")
    except ImportError as error:
        raise LibbpfMissing(str(error)) from error


def libbpf_version() -> tuple[int, int]:
    """Version of the libbpf in use.

    Raises:
        LibbpfMissing: see `BpfObject`.
    """
    lib = libbpf().lib
    return lib.sow_libbpf_major(), lib.sow_libbpf_minor()


class BpfMap:
    """One map, by its file descriptor, which the object owns.

    Its sizes are the kernel's. Keys and values of other sizes are refused: the kernel would read and write beyond
    them, as it does not know how long a buffer is.

    Attributes:
        key_bytes: of a key.
        value_bytes: of a value as it is looked up: of a per-CPU map, that of all CPUs together.
    """

    __slots__ = ("_lib", "fd", "key_bytes", "name", "value_bytes")

    def __init__(self, lib: Any, name: str, fd: int) -> None:
        self._lib = lib
        self.name = name
        self.fd = fd
        sizes = lib.ffi.new("unsigned int[2]")
        self._check("examining", lib.lib.sow_map_sizes(fd, sizes, sizes + 1))
        self.key_bytes: int = sizes[0]
        self.value_bytes: int = sizes[1]

    def update(self, key: bytes, value: bytes) -> None:
        """Puts one element.

        Raises:
            BpfError: the map is full (E2BIG), or a size is wrong (EMSGSIZE).
        """
        self._check_size("update", key, self.key_bytes)
        self._check_size("update", value, self.value_bytes)
        self._check("update", self._lib.lib.sow_map_update(self.fd, key, value))

    def update_many(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Puts a value under each of many keys, all of one size, in one call."""
        if keys:
            for key, value in zip(keys, values, strict=True):
                self._check_size("update", key, self.key_bytes)
                self._check_size("update", value, self.value_bytes)
            self._check(
                "update",
                self._lib.lib.sow_map_update_many(
                    self.fd, b"".join(keys), len(keys[0]), b"".join(values), len(values[0]), len(keys)
                ),
            )

    def lookup(self, key: bytes) -> bytes | None:
        """The value, of a per-CPU map those of all CPUs one after the other; None if it is not there.

        Raises:
            BpfError: EMSGSIZE: keys have another size.
        """
        self._check_size("look-up", key, self.key_bytes)
        value = self._lib.ffi.new("char[]", self.value_bytes)
        if self._lib.lib.sow_map_lookup(self.fd, key, value) < 0:
            return None
        return bytes(self._lib.ffi.buffer(value))

    def delete(self, key: bytes) -> None:
        """Removes one element; one that is not there is no error."""
        self._check_size("deletion", key, self.key_bytes)
        self._lib.lib.sow_map_delete(self.fd, key)

    def all_keys(self) -> list[bytes]:
        """All keys, as far as they can be read while others change the map."""
        found: list[bytes] = []
        key: Any = self._lib.ffi.NULL
        following = self._lib.ffi.new("char[]", self.key_bytes)
        while self._lib.lib.sow_map_next_key(self.fd, key, following) == 0:
            found.append(bytes(self._lib.ffi.buffer(following)))
            key = found[-1]
        return found

    def _check_size(self, what: str, data: bytes, size: int) -> None:
        if len(data) != size:
            raise BpfError(f"{what} of map {self.name}: {len(data)} bytes where it has {size}", errno.EMSGSIZE, "")

    def _check(self, what: str, result: int) -> None:
        if result < 0:
            raise BpfError(f"{what} of map {self.name}", -result, "")


class Variable:
    """A global variable of the programs, in memory shared with them: reading and writing costs nothing."""

    __slots__ = ("_view",)

    def __init__(self, view: memoryview) -> None:
        self._view: memoryview | None = view.cast("I" if len(view) == 4 else "Q")

    @property
    def value(self) -> int:
        return self._view[0] if self._view is not None else 0

    @value.setter
    def value(self, number: int) -> None:
        if self._view is not None:
            self._view[0] = number

    def close(self) -> None:
        """The memory goes away with its object; afterwards the variable reads 0 and writes are dropped."""
        self._view = None


class BpfObject:
    """A BPF object file: parsed on construction, in the kernel after `load`, gone after `close`.

    Args:
        path: the ``.bpf.o`` file.
        btf_path: a BTF file to relocate against instead of the running kernel's.

    Raises:
        LibbpfMissing: the binding or libbpf is not there.
        BpfError: the file is not a BPF object; ``log`` has libbpf's words.
    """

    def __init__(self, path: str | os.PathLike[str], *, btf_path: str | None = None) -> None:
        self._lib = libbpf()
        self._variables: list[Variable] = []
        self._per_cpu: dict[str, BpfMap] = {}
        self._handle: Any = None
        error = self._lib.ffi.new("int *")
        handle = self._lib.lib.sow_open(
            os.fsencode(path), self._lib.ffi.NULL if btf_path is None else os.fsencode(btf_path), error
        )
        if handle == self._lib.ffi.NULL:
            raise BpfError(f"opening {Path(path).name}", -error[0], self._log())
        self._handle = handle
        self._buffer = self._lib.ffi.new("char[]", DRAIN_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detaches every program and frees everything. Safe to call again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            for variable in self._variables:
                variable.close()
            self._lib.lib.sow_close(handle)

    @property
    def is_open(self) -> bool:
        return self._handle is not None

    def set_max_entries(self, map_name: str, entries: int) -> None:
        """Sizes a map (bytes, for a ring buffer); before `load`."""
        self._call(f"sizing map {map_name}", self._lib.lib.sow_set_max_entries, os.fsencode(map_name), entries)

    def skip(self, program: str) -> None:
        """Leaves a program out; before `load`."""
        self._call(f"leaving out {program}", self._lib.lib.sow_set_autoload, os.fsencode(program), 0)

    def want(self, program: str) -> None:
        """Loads a program whose section begins with ``?``, which is left out otherwise; before `load`."""
        self._call(f"choosing {program}", self._lib.lib.sow_set_autoload, os.fsencode(program), 1)

    def has_function(self, name: str) -> bool:
        """Whether the kernel's BTF has a function of this name.

        Raises:
            BpfError: there is no BTF.
        """
        return self._call("reading the kernel's BTF", self._lib.lib.sow_has_function, os.fsencode(name)) == 1

    def load(self) -> None:
        """Relocates, verifies and loads all programs.

        Raises:
            BpfError: ``log`` has the verifier's words.
        """
        self._call("loading the BPF programs", self._lib.lib.sow_load)

    def trim(self) -> None:
        """Gives memory back that only loading and attaching needed; when both are over."""
        self._lib.lib.sow_trim(self._open_handle("giving back memory"))

    def attach(self, program: str) -> None:
        """Attaches a program where its section says; it stays until `close`."""
        self._call(f"attaching {program}", self._lib.lib.sow_attach, os.fsencode(program))

    def attach_tracepoint(self, program: str, tracepoint_id: int) -> None:
        """Attaches a program to the tracepoint with this id; see `tracepoint_id`."""
        self._call(f"attaching {program}", self._lib.lib.sow_attach_tracepoint, os.fsencode(program), tracepoint_id)

    def map(self, name: str) -> BpfMap:
        """One of the loaded object's maps."""
        return BpfMap(self._lib, name, self._call(f"finding map {name}", self._lib.lib.sow_map_fd, os.fsencode(name)))

    def variable(self, section: str, name: str) -> Variable:
        """A global variable (u32 or u64) in ``.data``, ``.bss`` or ``.rodata``; after `load`."""
        size = self._lib.ffi.new("unsigned int *")
        self._open_handle("variable")
        address = self._lib.lib.sow_variable(self._handle, os.fsencode(section), os.fsencode(name), size)
        if address == self._lib.ffi.NULL:
            raise BpfError(f"finding variable {name}", 2, "")
        variable = Variable(memoryview(self._lib.ffi.buffer(address, size[0])))
        self._variables.append(variable)
        return variable

    def open_ring(self, map_name: str) -> int:
        """Opens the ring buffer; gives a descriptor to poll, which the object owns."""
        self._call(f"opening ring {map_name}", self._lib.lib.sow_ring_open, os.fsencode(map_name))
        return self._call("polling the ring", self._lib.lib.sow_ring_fd)

    def drain(self) -> bytes:
        """Takes what is in the ring, at most about `DRAIN_BYTES`; empty when there is nothing."""
        used = self._call("draining the ring", self._lib.lib.sow_ring_drain, self._buffer, DRAIN_BYTES)
        return bytes(self._lib.ffi.buffer(self._buffer, used)) if used else b""

    def per_cpu_sum(self, map_name: str, index: int) -> int:
        """The sum over all CPUs of one u64 of a per-CPU array."""
        if map_name not in self._per_cpu:
            self._per_cpu[map_name] = self.map(map_name)
        value = self._per_cpu[map_name].lookup(index.to_bytes(4, sys.byteorder))
        return sum(memoryview(value).cast("Q")) if value else 0

    def skipped_runs(self) -> int:
        """How often the kernel left out a program because another was under way on that CPU."""
        return int(self._lib.lib.sow_skipped_runs(self._open_handle("counting skipped runs")))

    def run(self, program: str, *arguments: int) -> int:
        """Runs a ``raw_tp`` program once, here and now; gives what it returns (0 or more)."""
        block = self._lib.ffi.new("unsigned long long[]", arguments)
        return self._call(f"running {program}", self._lib.lib.sow_run, os.fsencode(program), block, len(arguments))

    def iterate(self, program: str, tgid: int = 0) -> int:
        """A descriptor to read an iterator program's output from; the caller closes it.

        Args:
            program: its name.
            tgid: only this process, in the caller's pid namespace (6.1+); 0: all of them.

        Raises:
            BpfError: ESRCH: the process is gone.
        """
        return self._call(f"iterating with {program}", self._lib.lib.sow_iterate, os.fsencode(program), tgid)

    def _open_handle(self, what: str) -> Any:
        if self._handle is None:
            raise BpfError(what, 9, "the object is closed")
        return self._handle

    def _call(self, what: str, function: Any, *args: Any) -> int:
        result: int = function(self._open_handle(what), *args)
        if result < 0:
            raise BpfError(what, -result, self._log())
        return result

    def _log(self) -> str:
        text: bytes = self._lib.ffi.string(self._lib.lib.sow_take_log())
        return text.decode("utf-8", "replace")


def _is_tracefs_mounted() -> bool:
    """Whether this process sees a tracefs, which it may then lack the right to open."""
    with open("/proc/self/mountinfo", "rb") as table:
        return any(line.partition(b" - ")[2].startswith(b"tracefs ") for line in table)


class Tracefs:
    """tracefs, also where nobody mounted it: a mount that only this object can see. A context manager.

    Raises:
        TracefsNotMounted: it is mounted nowhere, and this user may not mount it.
        BpfError: no tracefs in this kernel, or it may not be opened.
    """

    def __init__(self) -> None:
        self._lib = libbpf()
        self._fd = self._lib.lib.sow_tracefs()
        if self._fd < 0:
            if -self._fd == errno.EPERM and not _is_tracefs_mounted():
                raise TracefsNotMounted(-self._fd)
            raise BpfError("opening tracefs", -self._fd, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def tracepoint_id(self, category: str, name: str) -> int | None:
        """The id perf_event_open wants, or None if this kernel has no such tracepoint.

        Raises:
            BpfError: it may not be read.
        """
        text = self._read(category, name, "id")
        return None if text is None else int(text)

    def field_offset(self, category: str, name: str, field: str) -> int | None:
        """Where a field of a tracepoint's record begins, in bytes; None without such a tracepoint or field.

        Raises:
            BpfError: it may not be read.
        """
        for line in (self._read(category, name, "format") or "").splitlines():
            # field:pid_t child_pid;	offset:20;	size:4;	signed:1;
            parts = line.strip().split(";")
            if parts[0].startswith("field:") and parts[0].split()[-1] == field:
                return int(parts[1].split(":")[1])
        return None

    def _read(self, category: str, name: str, file: str) -> str | None:
        try:
            fd = os.open(f"events/{category}/{name}/{file}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BpfError(f"reading the {file} of tracepoint {category}/{name}", error.errno or 1, "") from error
        try:
            return os.read(fd, 1 << 14).decode("ascii", "replace")
        finally:
            os.close(fd)


def probe(what: str, *numbers: int) -> bool | None:
    """Tries something small in the kernel: ``helper`` (program type, helper), ``map`` or ``program`` (type).

    ``trampoline`` (no number): programs on functions.

    Returns:
        Whether it works, None if it could not be determined.
    """
    function = getattr(libbpf().lib, f"sow_probe_{what}")
    result: int = function(*numbers)
    return None if result < 0 else bool(result)


if sys.byteorder != "little":  # pragma: no cover - the records are read as the kernel wrote them
    raise ImportError("sowatch's BPF objects are built for little-endian machines")
