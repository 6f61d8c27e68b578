r"""Which of a process's cgroups is shown, and which systemd unit it lies in. Pure.

A process has one cgroup in each hierarchy. On hosts with one hierarchy, of version 2, there is no choice. On hosts
with hierarchies of version 1, or of both versions (hybrid), a runtime may have placed a container in some of them only,
while the others still have the cgroup of the runtime itself.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

from sowatch.linux.containers import container_levels, containers_in

__all__ = ["Unit", "choose_cgroup", "parse_cgroup", "parse_cgroups", "unit_of", "units_in", "user_of_manager"]

_UNIT_SUFFIXES: Final = (".service", ".scope", ".socket", ".mount", ".swap")
_USER_MANAGER: Final = re.compile(r"user@([0-9]{1,10})\.service")
#: A runtime's process for one container, such as ``libpod-conmon-ID.scope``: no unit that an administrator knows.
_RUNTIME_SCOPE: Final = re.compile(r".*[0-9a-f]{64}\.scope")


@lru_cache(8192)
def choose_cgroup(paths: tuple[str, ...]) -> str:
    """The one path that says most, of one process.

    The path that names the most containers, one within the other; of several, that of version 2. If none names a
    container: that of version 2 unless it is the root, else the longest. Of paths that are as good as each other, the
    first in alphabetical order, so that every strategy chooses the same.

    Args:
        paths: at least one. The first is that of version 2, ``/`` if there is none; the others in any order.

    >>> choose_cgroup(("/system.slice/containerd.service", "/docker/" + "0" * 64))[:12]
    '/docker/0000'
    """
    unified = paths[0]

    def rank(path: str) -> tuple[int, bool, int, str]:
        levels = container_levels(path)
        is_unified = path == unified and path != "/"
        return -levels, not is_unified, 0 if path == "/" else -len(path), path

    return min(paths, key=rank)


def parse_cgroups(data: bytes) -> tuple[str, ...]:
    """The paths of a cgroup file as `choose_cgroup` takes them; empty without cgroups.

    They are seen from our cgroup namespace (``/../..`` leads out of it).
    """
    unified = b"/"
    others: dict[bytes, None] = {}
    is_empty = True
    for line in data.split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        path = rest.partition(b":")[2]
        if not path:
            continue
        is_empty = False
        if hierarchy == b"0":
            unified = path
        else:
            others[path] = None
    return () if is_empty else tuple(map(_text, (unified, *others)))


def parse_cgroup(data: bytes) -> str | None:
    """The path that `choose_cgroup` takes of a cgroup file; ``None`` without cgroups."""
    paths = parse_cgroups(data)
    return choose_cgroup(paths) if paths else None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


class Unit(NamedTuple):
    """A systemd unit: its ``name``, and which service manager has it.

    ``manager`` is None for the system's own, and for that of a container. Else it is the unit, of the manager one level
    out, that runs the manager: ``user@1000.service``. ``uid`` is that of a user's manager.
    """

    name: str
    manager: str | None = None
    uid: int | None = None


def unit_of(cgroup: str | None) -> Unit | None:
    """The systemd unit that a cgroup path lies in, the innermost if units are nested.

    Of a container it is a unit inside it: the scope or the service under which a runtime runs containers is none that
    an administrator restarts for the sake of one of them.

    >>> unit_of("/system.slice/nginx.service/workers")
    Unit(name='nginx.service', manager=None, uid=None)
    >>> unit_of("/user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service")
    Unit(name='dbus.service', manager='user@1000.service', uid=1000)
    >>> unit_of("/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:" + "0" * 64)
    """
    units = units_in(cgroup)
    if not units or _lies_in_runtime_scope(cgroup):
        return None
    manager = units[-2] if len(units) > 1 else None
    return Unit(units[-1], manager, None if manager is None else user_of_manager(manager))


def units_in(cgroup: str | None) -> list[str]:
    """The systemd units of a cgroup path, each inside the one before it; of a container only those inside it.

    They end at the scope of a runtime. Below its own manager, or a service with ``Delegate=``, a user makes any path:
    what stands there never takes the place of what stands before it.

    >>> units_in("/user.slice/user-1000.slice/user@1000.service/app.slice/dbus.service")
    ['user@1000.service', 'dbus.service']
    """
    found: list[str] = []
    for name in _names_in(cgroup):
        if _RUNTIME_SCOPE.fullmatch(name):
            break
        if name.endswith(_UNIT_SUFFIXES) and not name.startswith("."):
            found.append(name)
    return found


def _names_in(cgroup: str | None) -> list[str]:
    """The components of a path; of a container's, those inside it."""
    path = (cgroup or "").removesuffix(" (deleted)")
    containers = containers_in(path)
    # systemd puts "_" before a name that the kernel could take for a control file.
    return [one.removeprefix("_") for one in path[containers[-1].end if containers else 0 :].split("/")]


def _lies_in_runtime_scope(cgroup: str | None) -> bool:
    return any(_RUNTIME_SCOPE.fullmatch(name) for name in _names_in(cgroup))


def user_of_manager(unit: str) -> int | None:
    """The uid of the user whose service manager a unit runs; None: it runs none.

    >>> user_of_manager("user@1000.service")
    1000
    """
    user = _USER_MANAGER.fullmatch(unit)
    return None if user is None else int(user[1])
