"""Limits and policy in one frozen value. Nothing here uses the kernel.

Every size has a default that fits a host of a few thousand processes; `Config.replace` gives a changed copy, checked
the same way.
"""

from __future__ import annotations

from typing import Any, Final, Self

from msgspec import Struct
from msgspec.structs import replace

from sowatch.model.errors import ConfigError
from sowatch.model.literals import HOOKS, STRATEGIES, HooksSetting, StrategySetting

__all__ = ["NO_GUARD", "Config"]

#: The most that a limit may be; as ``max_records_s`` no limit, which is not lowered either.
NO_GUARD: Final = 1 << 24


class Config(Struct, frozen=True, kw_only=True):
    """How to watch. All fields are keyword-only.

    Attributes:
        strategy: one of `sowatch.model.literals.STRATEGIES`.
        hooks: of the BPF strategies: ``trampoline``, ``syscall``, or ``auto`` for the best that works.
        proc_root: where the host's proc file system is mounted.
        enable_core: try the CO-RE object (kernel BTF, 5.10+).
        enable_runtime_compiler: try compiling on this machine even if ``core`` was not tried.
        allow_runtime_compiled_fallback: try compiling if ``core`` failed.
        allow_prebuilt_fallback: try the object without kernel types if the ones above failed.
        allow_procfs_fallback: poll ``/proc`` if no BPF program can be loaded.
        btf_path: a BTF file with this kernel's types, to relocate the programs against instead of its own.
        runtime_compiler_output_dir: where compiled programs are kept, a directory that only this user
            may write to. None: ``/var/cache/sowatch`` for root, else ``$XDG_CACHE_HOME/sowatch``.
        compile_timeout_s: seconds after which a compiler is taken to hang.
        ring_bytes: size of the ring buffer; a power of two, at least one page.
        max_processes: processes the kernel side can track at once.
        max_verdicts: files the kernel side remembers an answer for (least recently used go first).
        max_pending: system calls of interest that can be under way at once.
        max_records_s: changes one process may report in a second. What it does beyond that is counted
            as lost, and scans find what it has mapped; the other processes are not kept waiting.
            While the watch falls behind it is fewer, down to 1,000; not so if it is `NO_GUARD`.
        nice: added to the nice value of the thread that drains the ring, as far as the process may lower it
            (CAP_SYS_NICE or RLIMIT_NICE): on a host whose CPUs are all busy it then has its turn. 0: as the process.
        ignore_ttl_s: seconds after which an "ignore" verdict is asked again, because a renamed
            ancestor directory changes a path without any report of the kernel.
        queue_events: events a subscriber may be behind before it loses some.
        queue_bytes: what these may take in memory, each counted as if it shared nothing with another one; and
            what may wait for facts of files, without which the first of them are then reported.
        poll_interval_s: seconds between two polls of ``/proc`` by the strategy ``procfs``.
        poll_cpu_percent: what polls may take of one CPU; beyond that they become rarer.
        block_ttl_s: seconds a file stays blocked after its activation failed.
        max_blocked: files on the blocklist (least recently used go first).
        cri_socket: the unix socket of the container runtime that the kubelet uses, such as
            ``/run/containerd/containerd.sock``: events then have names of pods, namespaces and containers. None: only
            the uids of pods, which cgroups have.
    """

    strategy: StrategySetting = "auto"
    hooks: HooksSetting = "auto"
    proc_root: str = "/proc"
    enable_core: bool = True
    enable_runtime_compiler: bool = False
    allow_runtime_compiled_fallback: bool = True
    allow_prebuilt_fallback: bool = True
    allow_procfs_fallback: bool = True
    btf_path: str | None = None
    runtime_compiler_output_dir: str | None = None
    compile_timeout_s: float = 60.0
    ring_bytes: int = 8 << 20
    max_processes: int = 16_384
    max_verdicts: int = 65_536
    max_pending: int = 8_192
    max_records_s: int = 20_000
    nice: int = -5
    ignore_ttl_s: float = 60.0
    queue_events: int = 200_000
    queue_bytes: int = 64 << 20
    poll_interval_s: float = 1.0
    poll_cpu_percent: float = 10.0
    block_ttl_s: float = 3_600.0
    max_blocked: int = 2_000
    cri_socket: str | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError("strategy", f"unknown strategy {self.strategy!r}. Use one of: {', '.join(STRATEGIES)}.")
        if self.hooks not in HOOKS:
            raise ConfigError("hooks", f"unknown hooks {self.hooks!r}. Use one of: {', '.join(HOOKS)}.")
        ring = self.ring_bytes
        if ring < 4096 or ring > 1 << 30 or ring & (ring - 1):
            raise ConfigError("ring_bytes", f"{ring} is not a power of two from 4096 to {1 << 30}. Use 8388608.")
        sizes = ("max_processes", "max_verdicts", "max_pending", "max_records_s", "queue_events", "max_blocked")
        for name, least, most in (*((name, 1, NO_GUARD) for name in sizes), ("nice", -20, 19)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(name, f"{value} is out of range. Use a number from {least} to {most}.")
        if not 1 << 16 <= self.queue_bytes <= 1 << 40:
            raise ConfigError(
                "queue_bytes", f"{self.queue_bytes} is out of range. Use a number from 65536 to {1 << 40}."
            )
        if not 0 < self.poll_cpu_percent <= 100:
            raise ConfigError(
                "poll_cpu_percent", f"{self.poll_cpu_percent} is no share of one CPU. Use a number up to 100."
            )
        if not 0.01 <= self.poll_interval_s <= 3600:
            raise ConfigError(
                "poll_interval_s", f"{self.poll_interval_s} is out of range. Use seconds from 0.01 to 3600."
            )
        if self.cri_socket is not None and (not self.cri_socket.startswith("/") or "\0" in self.cri_socket):
            raise ConfigError(
                "cri_socket",
                f"{self.cri_socket!r} is no absolute path. Give one, such as /run/containerd/containerd.sock.",
            )
        for name in ("ignore_ttl_s", "block_ttl_s", "compile_timeout_s"):
            if not 0 < getattr(self, name) < 1e9:
                raise ConfigError(
                    name, f"{getattr(self, name)} is not a positive number of seconds (at most a billion)."
                )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed.

        Raises:
            ConfigError: a value is out of range, or the field does not exist.
        """
        known = self.__struct_fields__
        for name in changes:
            if name not in known:
                raise ConfigError(name, f"no such setting. Known ones: {', '.join(sorted(known))}.")
        return replace(self, **changes)
