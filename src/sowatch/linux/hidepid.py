"""Whether a proc file system hides processes from this one: its mount option ``hidepid`` (proc(5))."""

from __future__ import annotations

import os
import re
from typing import Final

from sowatch.linux.capabilities import effective_capabilities
from sowatch.linux.proc import ProcFs

__all__ = ["hidepid_of", "hides_processes"]

#: hidepid=2 as kernels from 5.8 on show it, and 4, which takes no notice of the option gid.
_HIDING: Final = frozenset({b"2", b"invisible", b"4", b"ptraceable"})
_GROUPLESS: Final = frozenset({b"4", b"ptraceable"})
_CAP_SYS_PTRACE: Final = 19  # linux/capability.h
_OPTION: Final = re.compile(rb"(?:\A|,)(hidepid|gid)=([^,]+)")


def hidepid_of(mountinfo: bytes, device: int) -> tuple[bytes | None, int]:
    """The options ``hidepid`` and ``gid`` of the proc file system on a device, from our mount table.

    Returns:
        None and 0 where they are not given.
    """
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    for line in mountinfo.split(b"\n"):
        mount, _, rest = line.partition(b" - ")
        if mount.split(b" ")[2:3] == [wanted] and rest.startswith(b"proc "):
            options = dict(_OPTION.findall(rest.rpartition(b" ")[2]))
            return options.get(b"hidepid"), int(options.get(b"gid", b"0"))
    return None, 0


def hides_processes(proc: ProcFs) -> bool:
    """Whether processes may be there that ``proc`` does not show us.

    Those are all that we must not trace, unless we are in the group that the mount names.
    """
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            hidepid, group = hidepid_of(file.read(), os.stat(proc.root).st_dev)
    except (OSError, ValueError):
        hidepid, group = None, 0
    if hidepid not in _HIDING:
        # There always is a first process. Where our mount table does not show it, it may be missing nevertheless.
        return not os.path.exists(f"{proc.root}/1")
    if hidepid not in _GROUPLESS and group in {os.getegid(), *os.getgroups()}:
        return False
    if not effective_capabilities() >> _CAP_SYS_PTRACE & 1:
        return True
    try:
        os.readlink(f"{proc.root}/1/exe")  # whether the capability counts there: not in a user namespace of our own
    except OSError:
        return True
    return False
