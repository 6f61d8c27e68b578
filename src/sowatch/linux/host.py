"""What ``doctor`` reads off this machine: facts, each from the place named beside it.

Nothing is concluded from a kernel version; `KNOWN_RISKS` compares versions, but only to say for which kernels others
have reported something.
"""

from __future__ import annotations

import os
import pwd
import re
import resource
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct

from sowatch.linux.proc import ProcFs

__all__ = ["KNOWN_RISKS", "Host", "Risk", "capability_names", "read_host", "release_number", "risk_here"]

#: By bit number (include/uapi/linux/capability.h).
_CAPABILITIES: Final = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""".split()  # noqa: SIM905  (a list of 41 strings would be 41 lines)

#: Inodes of the initial namespaces (include/linux/proc_ns.h).
_INITIAL_NAMESPACES: Final = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}

_SECCOMP_MODES: Final = {"0": "none", "1": "strict", "2": "filter"}


class Host(Struct, frozen=True):
    """This user on this kernel. ``None`` means that it could not be determined."""

    release: str
    version: str
    machine: str
    uid: int
    user: str | None
    capabilities: tuple[str, ...] | None
    in_initial_user_namespace: bool | None
    in_initial_pid_namespace: bool | None
    seccomp: str | None
    memlock_bytes: int | None
    btf: str | None
    tracefs: str | None
    lockdown: str | None
    lsms: tuple[str, ...] | None
    unprivileged_bpf_disabled: int | None

    @property
    def may_load(self) -> bool | None:
        """Whether this user has what loading tracing programs takes: CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN."""
        if self.capabilities is None:
            return None
        held = set(self.capabilities)
        return "CAP_SYS_ADMIN" in held or {"CAP_BPF", "CAP_PERFMON"} <= held


def read_host(proc: ProcFs) -> Host:
    """Read the facts, through the proc file system given and ``/sys``."""
    uname = os.uname()
    status = _fields(_text(f"{proc.root}/self/status") or "")
    effective = status.get("CapEff")
    lsms = _text("/sys/kernel/security/lsm")
    lockdown = re.search(r"\[(\w+)\]", _text("/sys/kernel/security/lockdown") or "")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    disabled = _text(f"{proc.root}/sys/kernel/unprivileged_bpf_disabled")
    btf = "/sys/kernel/btf/vmlinux"
    return Host(
        release=uname.release,
        version=uname.version,
        machine=uname.machine,
        uid=os.geteuid(),
        user=_user_name(os.geteuid()),
        capabilities=None if effective is None else capability_names(int(effective, 16)),
        in_initial_user_namespace=_is_initial("user", proc),
        in_initial_pid_namespace=_is_initial("pid", proc),
        seccomp=_SECCOMP_MODES.get(status.get("Seccomp", "")),
        memlock_bytes=None if limit == resource.RLIM_INFINITY else limit,
        btf=btf if os.access(btf, os.R_OK) else None,
        tracefs=_tracefs(_text(f"{proc.root}/self/mountinfo") or ""),
        lockdown=None if lockdown is None else lockdown[1],
        lsms=None if lsms is None else tuple(lsms.split(",")),
        unprivileged_bpf_disabled=int(disabled) if disabled is not None and disabled.isdigit() else None,
    )


def capability_names(mask: int) -> tuple[str, ...]:
    """The capabilities in a mask like ``CapEff``, by name; those newer than this list by number.

    >>> capability_names(1 << 39 | 1)
    ('CAP_CHOWN', 'CAP_BPF')
    """
    return tuple(
        f"CAP_{_CAPABILITIES[bit] if bit < len(_CAPABILITIES) else bit}"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    )


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return None


def _fields(status: str) -> Mapping[str, str]:
    pairs = (line.partition(":") for line in status.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _is_initial(kind: str, proc: ProcFs) -> bool | None:
    try:
        return os.readlink(f"{proc.root}/self/ns/{kind}") == f"{kind}:[{_INITIAL_NAMESPACES[kind]}]"
    except OSError:
        return None


def _tracefs(mountinfo: str) -> str | None:
    for line in mountinfo.splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("tracefs "):
            return mount.split(" ")[4]
    return None


# --- known risks --------------------------------------------------------------------------------


class Risk(Struct, frozen=True):
    """Something that others reported of kernels; not seen here, and never acted upon.

    ``first_release`` is the first kernel it is reported for, ``fixed_release`` the first that has an answer to it (a
    stable kernel before may have it, too), ``machine`` the only architecture,
    ``concerns`` the commands that use what it is about, ``feature`` what doctor shows it with.
    """

    name: str
    text: str
    concerns: str
    sources: tuple[str, ...]
    first_release: tuple[int, int] | None = None
    fixed_release: tuple[int, int] | None = None
    machine: str | None = None
    only_preemptible: bool = False
    feature: Literal["watching", "probing"] = "probing"


KNOWN_RISKS: Final[Sequence[Risk]] = (
    Risk(
        name="uretprobe-seccomp",
        text="a return probe makes the probed process call uretprobe(2); a seccomp filter that does not know the "
        "call kills the process (seen with sandboxed system services); from 6.14 on seccomp passes the call through, "
        "and where it does not, as the probe above says, sowatch probes the return instructions instead",
        concerns="return probes: trace, rules that count or attach, http",
        sources=("systemd/systemd#34615", "seccomp/libseccomp#438", "evilsocket/opensnitch#1205"),
        first_release=(6, 11),
        fixed_release=(6, 14),
        machine="x86_64",
    ),
    Risk(
        name="uprobe-preempt-panic",
        text="BPF programs on uprobes can be preempted while they use a private stack; kernel panics under load",
        concerns="uprobes: trace, http",
        sources=("open-telemetry/opentelemetry-ebpf-instrumentation#3056",),
        first_release=(6, 13),
        only_preemptible=True,
    ),
    Risk(
        name="uprobe-slow-detach",
        text="detaching uprobes one by one waits for RCU each time (0.04 s each on 6.8, 0.25 s on 6.12), so the end "
        "of a program with many takes minutes; uprobe_multi (6.6) pays once",
        concerns="uprobes: trace, http",
        sources=("open-telemetry/opentelemetry-ebpf-instrumentation#3418", "DataDog/datadog-agent#55730"),
        first_release=(6, 8),
    ),
    Risk(
        name="uprobe-static-pie-go",
        text="uprobes on Go programs linked as static PIE crash them at start",
        concerns="uprobes: trace, http",
        sources=("open-telemetry/opentelemetry-ebpf-instrumentation#2104",),
    ),
)


def release_number(release: str) -> tuple[int, int] | None:
    """Major and minor number of a kernel release.

    >>> release_number("6.18.44-generic")
    (6, 18)
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    return None if found is None else (int(found[1]), int(found[2]))


def risk_here(risk: Risk, host: Host) -> bool | None:
    """Whether the reports are about kernels like this one; ``None`` where that cannot be determined."""
    if risk.machine not in (None, host.machine):
        return False
    if risk.first_release is not None:
        number = release_number(host.release)
        if number is None:
            return None
        if number < risk.first_release or (risk.fixed_release is not None and number >= risk.fixed_release):
            return False
    # A kernel built without preemption says nothing here; PREEMPT_DYNAMIC may be set either way.
    return not (risk.only_preemptible and "PREEMPT" not in host.version)
