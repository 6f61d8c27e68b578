"""Which pod of Kubernetes a cgroup belongs to. Pure: no API is asked.

The kubelet names the cgroup of a pod after the pod's uid, and the container runtime puts the cgroups of its containers
below that. Both ways of naming are known, with and without a root of the kubelet's own before them, in hierarchies of
version 1 and 2 alike:

* cgroupfs driver: ``/kubepods/burstable/podUID/ID``, whatever the runtime;
* systemd driver: ``/kubepods.slice/.../kubepods-burstable-podUID.slice/cri-containerd-ID.scope``, with ``_`` for each
  ``-`` of the uid; a runtime without systemd takes ``SLICE:PREFIX:ID`` literally.

Of a cluster inside a pod the outer pod is reported: what stands below its own cgroup a container may name as it likes.
A node that is a container itself (kind) is no pod, so its pods are reported.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, NamedTuple

from sowatch.linux.containers import containers_in

__all__ = ["PodCgroup", "pod_in"]

#: Of the API server a UUID, of a pod in a file on the node the 32 digits of a hash.
_UID: Final = (
    r"(?P<{}>[0-9a-f]{{8}}(?P<{}>[-_])[0-9a-f]{{4}}(?:(?P={})[0-9a-f]{{4}}){{2}}(?P={})[0-9a-f]{{12}}|[0-9a-f]{{32}})"
)
_POD: Final = re.compile(
    r"(?:^|/)(?:"
    rf"pod{_UID.format('plain', 'p', 'p', 'p')}(?=/|$)"
    rf"|(?:[^/:]+-)?kubepods(?:-burstable|-besteffort)?-pod{_UID.format('slice', 's', 's', 's')}\.slice(?=[/:]|$)"
    r")"
)


class PodCgroup(NamedTuple):
    """What a cgroup path says of a pod.

    Attributes:
        uid: of the pod, as Kubernetes has it.
        container: the id of the container that lies in the pod directly, as its runtime has it; None: of none, as of
            the process that serves one. A container within that one is not known to the runtime.
    """

    uid: str
    container: str | None


@lru_cache(8192)
def pod_in(cgroup: str | None) -> PodCgroup | None:
    """The pod that a cgroup path lies in; None: in none.

    Args:
        cgroup: the path of a cgroup below the root of its hierarchy, or only the end of it.

    >>> pod_in("/kubepods/besteffort/pod0f0e0d0c-1111-2222-3333-444455556666/" + "a" * 64).uid
    '0f0e0d0c-1111-2222-3333-444455556666'
    >>> pod_in("/kubepods.slice/kubepods-pod0f0e0d0c_1111_2222_3333_444455556666.slice/crio-" + "a" * 64 + ".scope").uid
    '0f0e0d0c-1111-2222-3333-444455556666'
    """
    path = (cgroup or "").removesuffix(" (deleted)")
    found = _POD.search(path) if "pod" in path else None
    if found is None:
        return None
    inside = (one.id for one in containers_in(path) if one.end > found.end())
    return PodCgroup((found["plain"] or found["slice"]).replace("_", "-"), next(inside, None))
