r"""Which container a cgroup belongs to. Pure; imports nothing of the package.

Runtimes name cgroups after containers; the table below has the forms. Where containers are nested
(docker in docker, kind), the innermost one is reported. A process that only serves a container
(conmon, lxc's monitor, nspawn's supervisor) has a cgroup of its own and is not in it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

__all__ = ["CONTAINER_FORMS", "ContainerForm", "NamedContainer", "container_id", "container_levels", "containers_in"]


class ContainerForm(NamedTuple):
    """One way of naming a cgroup: ``pattern`` is one or more whole path components; ``id`` is its group."""

    runtime: str
    pattern: str
    example: str


_HEX: Final = "(?P<id>[0-9a-f]{64})"
#: As containerd has it (identifiers.Validate).
_NAME: Final = "(?P<id>[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*)"
_EXAMPLE: Final = "0123456789abcdef" * 4

#: Every form that is known. Add a line and its test; order does not matter.
CONTAINER_FORMS: Final = (
    # The cgroupfs driver of docker, containerd and CRI-O: the id only, below a parent that names no runtime.
    ContainerForm("cgroupfs", _HEX, f"/docker/{_EXAMPLE}"),
    # systemd drivers: one scope for each container.
    ContainerForm("docker", rf"docker-{_HEX}\.scope", f"/system.slice/docker-{_EXAMPLE}.scope"),
    ContainerForm(
        "containerd",
        rf"(?:cri-containerd|containerd|nerdctl)-{_HEX}\.scope",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12345678_1234_1234_1234_123456789abc.slice"
        f"/cri-containerd-{_EXAMPLE}.scope",
    ),
    # A path meant for the systemd driver (slice:prefix:name), taken literally by a runtime without it.
    ContainerForm(
        "containerd, systemd path taken literally",
        rf"[^/:]*:[^/:]+:{_HEX}",
        f"/system.slice/containerd.service/kubepods-pod1.slice:cri-containerd:{_EXAMPLE}",
    ),
    ContainerForm("cri-o", rf"crio-{_HEX}(?:\.scope)?", f"/kubepods.slice/kubepods-pod1.slice/crio-{_EXAMPLE}.scope"),
    ContainerForm(
        "podman", rf"libpod-(?:payload-)?{_HEX}(?:\.scope)?", f"/machine.slice/libpod-{_EXAMPLE}.scope/container"
    ),
    ContainerForm(
        "fargate",
        r"ecs/[0-9a-f]{32}/(?P<id>[0-9a-f]{32}-[0-9]{1,10})",
        f"/ecs/{_EXAMPLE[:32]}/{_EXAMPLE[:32]}-1234567890",
    ),
    # Garden (Cloud Foundry): applications have handles of 8-4-4-4-4, tasks UUIDs.
    ContainerForm(
        "garden",
        r"(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){4})",
        "/system.slice/garden.service/garden/01234567-89ab-cdef-0123-4567",
    ),
    ContainerForm(
        "garden, tasks",
        r"garden/(?:(?:good|bad)/)?(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})",
        "/garden/good/01234567-89ab-cdef-0123-456789abcdef",
    ),
    # containerd's ctr: /NAMESPACE/NAME at the top. Only its default namespace can be distinguished from any other
    # group.
    ContainerForm("ctr", rf"(?<=^/)default/{_NAME}", "/default/web"),
    ContainerForm("ctr, systemd", rf"ctr-{_NAME}\.scope", "/system.slice/ctr-web.scope"),
    ContainerForm("ctr, systemd path taken literally", rf"[^/:]*:ctr:{_NAME}", "/system.slice:ctr:web"),
    # LXC, LXD and Incus: since 4.0 lxc.payload.NAME, before that lxc.payload/NAME and lxc/NAME.
    ContainerForm("lxc", r"lxc(?:\.payload[./]|/)(?P<id>[^/]+)", "/lxc.payload.web/system.slice/nginx.service"),
    # systemd-machined: names are escaped as in unit names. Virtual machines are no containers.
    ContainerForm(
        "systemd-machined",
        r"machine-(?!qemu\\x2d)(?P<id>[^/]+)\.scope(?!/supervisor(?:/|$))",
        r"/machine.slice/machine-web\x2d1.scope/payload",
    ),
    ContainerForm(
        "systemd-nspawn",
        r"systemd-nspawn@(?P<id>[^/]+)\.service/payload",
        r"/machine.slice/systemd-nspawn@web\x2d1.service/payload/init.scope",
    ),
)

_COMPILED: Final = tuple(re.compile(rf"(?:^|/){form.pattern}(?=/|$)") for form in CONTAINER_FORMS)
_UNIT_ESCAPE: Final = re.compile(r"\\x([0-9a-f]{2})")


class NamedContainer(NamedTuple):
    """A container that a cgroup path names: by which form of `CONTAINER_FORMS`, and the components that name it."""

    runtime: str
    id: str
    begin: int
    end: int


def containers_in(cgroup: str | None) -> list[NamedContainer]:
    """The containers that a cgroup path names, each inside the one before it.

    >>> [one.id for one in containers_in("/lxc.payload.web/lxc.payload.inner")]
    ['web', 'inner']
    """
    path = (cgroup or "").removesuffix(" (deleted)")
    found: dict[int, NamedContainer] = {}
    for form, pattern in zip(CONTAINER_FORMS, _COMPILED, strict=True) if path else ():
        for match in pattern.finditer(path):
            # Only machine names can hold a backslash; hexadecimal ids never do.
            name = _UNIT_ESCAPE.sub(lambda code: chr(int(code[1], 16)), match["id"])
            begin = match.start() + match[0].startswith("/")
            found.setdefault(match.end(), NamedContainer(form.runtime, name, begin, match.end()))
    return [found[end] for end in sorted(found)]


def container_id(cgroup: str | None) -> str | None:
    r"""The id of the container whose cgroup this is, ``None`` if it is none's.

    For docker, containerd, CRI-O and podman the 64 hexadecimal digits; for LXC and
    systemd-nspawn the name.

    Args:
        cgroup: the path of a cgroup below the root of its hierarchy, or only the end of it.

    >>> container_id(r"/machine.slice/machine-web\x2d1.scope/payload")
    'web-1'
    """
    found = containers_in(cgroup)
    return found[-1].id if found else None


def container_levels(cgroup: str | None) -> int:
    """How many containers, one within the other, a cgroup path names.

    >>> container_levels("/lxc.payload.web/lxc.payload.inner")
    2
    """
    return len(containers_in(cgroup))
