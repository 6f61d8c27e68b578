"""What the BPF maps of this process take, as the kernel counts it.

Since Linux 5.11 the kernel charges them to the memory cgroup of the process that made them, so a limit of memory has to
hold them beside the process itself. Maps that the kernel keeps for others (pinned ones) are not among them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

__all__ = ["map_bytes"]

_MAP: Final = "anon_inode:bpf-map"


def map_bytes(fd_directory: str = "/proc/self/fd") -> int:
    """Bytes of all maps that this process has a descriptor of, each once (``memlock`` of fdinfo).

    The kernel's own figure since 6.4; before that what it computes from the sizes of keys, values and entries.
    """
    found: dict[bytes, int] = {}
    for fd in os.listdir(fd_directory):
        with suppress(OSError):  # it was closed meanwhile
            if os.readlink(f"{fd_directory}/{fd}") != _MAP:
                continue
            with open(f"{fd_directory}info/{fd}", "rb") as file:
                facts = dict(line.split(b":", 1) for line in file if b":" in line)
            found[facts.get(b"map_id", fd.encode())] = int(facts.get(b"memlock", b"0"))
    return sum(found.values())
