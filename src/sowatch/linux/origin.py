"""Which host this is, which boot of it, and which version of sowatch: what every output says of itself."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from typing import Final

from sowatch.linux.proc import ProcFs
from sowatch.model.events import Origin
from sowatch.model.version import VERSION

__all__ = ["origin_of"]

#: machine-id(5), and where D-Bus keeps the same where there is no systemd.
_PLACES: Final = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_MACHINE_ID: Final = re.compile("[0-9a-f]{32}")


def origin_of(proc: ProcFs) -> Origin:
    """Reads it; ``proc`` is the host's."""
    return Origin(socket.gethostname(), host_id(proc), proc.boot_id(), VERSION)


def host_id(proc: ProcFs) -> str | None:
    """The id of machine-id(5) of the host whose ``proc`` it is; None where there is none that this user may read.

    The host's is in the root of its process 1, which it takes rights to read. Our own root has the same unless the
    host's proc was mounted into a container.
    """
    roots = [f"{proc.root}/1/root"] + [""] * (proc.root == "/proc")
    for path in (root + place for root in roots for place in _PLACES):
        with suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
            text = file.read(64).strip()
            if _MACHINE_ID.fullmatch(text):
                return text
    return None
