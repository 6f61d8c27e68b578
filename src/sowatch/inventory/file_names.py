"""Names under which package managers, network file systems and people keep a file that gave its own name up. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

__all__ = ["GivenUp", "given_up_name"]

#: nfs(5), silly rename: the client keeps a file that was removed while it was open. Linux: fileid and counter in hex.
_SILLY: Final = re.compile(r"\.nfs[0-9a-f]{16,}\Z")
#: What an installer leaves of a file: dpkg and apk-tools by suffix, rpm by a semicolon and the transaction in hex.
_INSTALLER: Final = re.compile(
    r"(?P<base>.+?)(?:\.dpkg-(?:new|tmp|old|dist|bak|backup|remove|divert\.tmp)|\.apk-new|\.pacnew|\.pacsave"
    r"|\.rpmnew|\.rpmsave|\.rpmorig|;[0-9a-f]{6,16})\Z",
    re.DOTALL,
)
#: What people leave of one, as with ``mv lib.so lib.so.old``.
_BACKUP: Final = re.compile(r"(?P<base>.+?)(?:\.old|\.bak|\.orig|\.save|\.prev|\.backup|~)\Z", re.DOTALL)


class GivenUp(NamedTuple):
    """A name that says that its file had another one.

    ``base`` is that path, None if it cannot be determined. Only a file that an installer left is stale without a file
    under its base name: people may keep ``x.old`` and use it.
    """

    base: str | None
    is_certain: bool


def given_up_name(path: str) -> GivenUp | None:
    """What the last component of a path says of its file; None: nothing.

    >>> given_up_name("/usr/lib/libz.so.1.dpkg-new").base
    '/usr/lib/libz.so.1'
    >>> given_up_name("/usr/lib/libz.so.1;5f3a2b1c").base
    '/usr/lib/libz.so.1'
    >>> given_up_name("/usr/lib/.nfs0000000000a1b2c300000007")
    GivenUp(base=None, is_certain=True)
    """
    directory, slash, name = path.rpartition("/")
    if _SILLY.match(name):
        return GivenUp(None, is_certain=True)
    for pattern, is_certain in ((_INSTALLER, True), (_BACKUP, False)):
        found = pattern.match(name)
        if found:
            return GivenUp(directory + slash + found["base"], is_certain)
    return None
