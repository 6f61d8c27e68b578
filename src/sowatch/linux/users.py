"""Names of users, as the host's ``/etc/passwd`` has them.

Not by NSS: a directory service may not answer, and what it answers is not for the agent to ask once a second.
"""

from __future__ import annotations

import os
from typing import Final

from sowatch.model.events import Process

__all__ = ["user_name"]

_USERS: Final = "/etc/passwd"
#: The file's inode, size and change time, and what was in it.
_known: tuple[tuple[int, ...], dict[int, str]] = ((), {})


def user_name(process: Process) -> str | None:
    """The name of the user that a process runs as; None if the host has none for it. Any thread.

    A container has users of its own: there the number is all that is known.
    """
    if process.uid is None or process.container is not None:
        return None
    return _names().get(process.uid)


def _names() -> dict[int, str]:
    global _known  # noqa: PLW0603  (one tuple, so that any thread sees a whole one)
    try:
        stat = os.stat(_USERS)
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if _known[0] != state:
            with open(_USERS, encoding="utf-8", errors="surrogateescape") as lines:
                _known = (state, _parsed(lines.read()))
    except OSError:
        return {}
    return _known[1]


def _parsed(text: str) -> dict[int, str]:
    """Names by uid: passwd(5). Of several lines of one user the first counts, as for getpwuid(3)."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        name, *rest = line.split(":")
        if name and len(rest) >= 2 and rest[1].isascii() and rest[1].isdigit():
            found.setdefault(int(rest[1]), name)
    return found
