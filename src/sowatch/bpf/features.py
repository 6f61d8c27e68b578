"""What this kernel and this user can do, found out by trying, never by comparing versions.

Everything tried is taken down again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from sowatch.bpf.binding import PROGRAMS, BpfObject, Tracefs, libbpf_version, probe
from sowatch.model.config import Config
from sowatch.model.errors import BpfError, LibbpfMissing, TracefsNotMounted

__all__ = ["UNTRIED", "Answer", "Probe", "run_probes"]

Answer = Literal["yes", "no", "unknown"]
#: The detail of what is not known because it could not be tried.
UNTRIED: Final = "this user may not try it, or the kernel gave no clear answer"

# linux/bpf.h
_MAP_RINGBUF: Final = 27
_MAP_LRU_HASH: Final = 9
_PROGRAM_SOCKET_FILTER: Final = 1
_PROGRAM_TRACEPOINT: Final = 5
_HELPER_FIND_VMA: Final = 180
_HELPER_LOOP: Final = 181


class Probe(NamedTuple):
    """One question put to the kernel. ``needed_for`` says what is lost without it, ``feature`` of what."""

    name: str
    answer: Answer
    detail: str
    needed_for: str
    feature: Literal["watching", "probing"] = "watching"


def run_probes(config: Config) -> list[Probe]:
    """Asks all questions, cheapest first. Takes some tenths of a second."""
    try:
        major, minor = libbpf_version()
    except LibbpfMissing as error:
        return [Probe("libbpf", "no", str(error), "everything but procfs")]
    found = [Probe("libbpf", "yes", f"version {major}.{minor}", "loading BPF programs")]
    btf = "/sys/kernel/btf/vmlinux"
    found.append(
        Probe(
            "kernel BTF",
            "yes" if os.access(btf, os.R_OK) else "no",
            btf if os.path.exists(btf) else "the kernel was built without CONFIG_DEBUG_INFO_BTF",
            "strategy core",
        )
    )
    found.append(
        _ask("BPF programs on tracepoints", "every BPF strategy", lambda: probe("program", _PROGRAM_TRACEPOINT))
    )
    found.append(_ask("ring buffer (5.8)", "every BPF strategy", lambda: probe("map", _MAP_RINGBUF)))
    found.append(_ask("LRU map", "every BPF strategy", lambda: probe("map", _MAP_LRU_HASH)))
    found.append(_tracefs())
    found.append(
        _ask(
            "bpf_find_vma (5.17)",
            "confirming a file while other threads may swap it; without it the process is read again",
            lambda: probe("helper", _PROGRAM_TRACEPOINT, _HELPER_FIND_VMA),
        )
    )
    found.append(
        _ask(
            "bpf_loop (5.17)",
            "paths deeper than 128 directories",
            lambda: probe("helper", _PROGRAM_TRACEPOINT, _HELPER_LOOP),
        )
    )
    found.append(_program("typed tracepoints (5.5)", "strategy core", "typed_tracepoint"))
    found.append(
        _program("mapping iterator (5.12)", "snapshots and repairs by the kernel", "mapping_iterator", is_iterator=True)
    )
    found.append(_program("trampolines (fentry, 5.5)", "hook set trampoline", "trampoline"))
    found.append(_limits(config))
    return found


def _answer(value: bool | None) -> Answer:
    return "unknown" if value is None else "yes" if value else "no"


def _ask(name: str, needed_for: str, ask: Callable[[], bool | None]) -> Probe:
    value = None if _is_refused() else ask()
    return Probe(
        name,
        _answer(value),
        "" if value is not None else UNTRIED,
        needed_for,
    )


@functools.cache
def _is_refused() -> bool:
    """Whether this user may load nothing at all; then libbpf's small tries say nothing of the kernel."""
    return probe("program", _PROGRAM_SOCKET_FILTER) is not True


def _tracefs() -> Probe:
    name, needed_for = "tracefs with system call tracepoints", "hook set syscall"
    try:
        with Tracefs() as tracefs:
            missing = [
                f"sys_{side}_{call}"
                for call in ("mmap", "munmap", "mprotect", "mremap")
                for side in ("enter", "exit")
                if tracefs.tracepoint_id("syscalls", f"sys_{side}_{call}") is None
            ]
    except BpfError as error:
        detail = str(error) if isinstance(error, TracefsNotMounted) else os.strerror(error.errno)
        return Probe(name, "no" if error.errno != 1 else "unknown", detail, needed_for)
    detail = f"missing: {', '.join(missing)}" if missing else ""
    return Probe(name, "no" if missing else "yes", detail, needed_for)


def _program(name: str, needed_for: str, program: str, *, is_iterator: bool = False) -> Probe:
    try:
        with BpfObject(str(PROGRAMS / "probes.bpf.o")) as bpf:
            for other in {"trampoline", "typed_tracepoint", "mapping_iterator"} - {program}:
                bpf.skip(other)
            bpf.load()
            if is_iterator:
                os.close(bpf.iterate(program))
            else:
                bpf.attach(program)
    except BpfError as error:
        return Probe(name, "no", f"{error.operation}: {os.strerror(error.errno)}", needed_for)
    return Probe(name, "yes", "", needed_for)


def _limits(config: Config) -> Probe:
    """The pid namespace: in one of our own, the kernel's pids and ours differ."""
    try:
        inode = os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        return Probe("initial pid namespace", "unknown", str(error.strerror), "reading one process at a time")
    # PROC_PID_INIT_INO, include/linux/proc_ns.h
    is_initial = inode == 0xEFFFFFFC
    detail = "" if is_initial else f"pids are the host's, which {config.proc_root} here may not show"
    return Probe("initial pid namespace", _answer(is_initial), detail, "reading one process at a time")
