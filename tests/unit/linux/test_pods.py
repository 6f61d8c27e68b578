"""pod_in: every way in which kubelets and runtimes name the cgroups of pods, and what only looks like one."""

from __future__ import annotations

import pytest

from sowatch.linux.pods import PodCgroup, pod_in

UID = "0f0e0d0c-1111-2222-3333-444455556666"
SLICE_UID = UID.replace("-", "_")
STATIC = "0123456789abcdef0123456789abcdef"
OTHER_UID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
ID = "0123456789abcdef" * 4
NODE = "f" * 64

SYSTEMD = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE_UID}.slice"
KIND_SYSTEMD = (
    f"/system.slice/docker-{NODE}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/"
    f"kubelet-kubepods-besteffort-pod{SLICE_UID}.slice"
)


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        # cgroupfs driver, versions 1 and 2 alike: containerd, docker, CRI-O.
        (f"/kubepods/pod{UID}/{ID}", ID),
        (f"/kubepods/burstable/pod{UID}/{ID}", ID),
        (f"/kubepods/besteffort/pod{UID}/{ID}", ID),
        (f"/kubepods/besteffort/pod{UID}/crio-{ID}", ID),
        # systemd driver.
        (f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope", ID),
        (f"{SYSTEMD}/cri-containerd-{ID}.scope", ID),
        (f"{SYSTEMD}/crio-{ID}.scope", ID),
        (f"{SYSTEMD}/crio-{ID}.scope/container", ID),
        (f"{SYSTEMD}/docker-{ID}.scope", ID),
        (f"{SYSTEMD}/docker-{ID}.scope/init.scope (deleted)", ID),
        (f"/system.slice/containerd.service/kubepods-burstable-pod{SLICE_UID}.slice:cri-containerd:{ID}", ID),
        # A root that the kubelet was given, as k3s, kind and GKE do.
        (f"/k8s.slice/k8s-kubepods.slice/k8s-kubepods-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope", ID),
        (f"/docker/{NODE}/kubelet/kubepods/besteffort/pod{UID}/{ID}", ID),
        (f"{KIND_SYSTEMD}/cri-containerd-{ID}.scope", ID),
        # As a process sees it whose cgroup namespace begins elsewhere.
        (f"/../../pod{UID}/{ID}", ID),
        (f"/../../kubepods-besteffort-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope", ID),
        # A container that a container runs is none of the runtime's.
        (f"/kubepods/pod{UID}/{ID}/docker/{NODE}", ID),
        # What only serves a container.
        (SYSTEMD, None),
        (f"{SYSTEMD}/crio-conmon-{ID}.scope", None),
    ],
)
def test_the_uid_of_the_pod_and_the_id_of_its_container_are_in_the_path(cgroup: str, container: str | None) -> None:
    assert pod_in(cgroup) == PodCgroup(UID, container)


def test_a_pod_of_a_file_on_the_node_has_a_hash_for_a_uid() -> None:
    assert pod_in(f"/kubepods/burstable/pod{STATIC}/{ID}") == PodCgroup(STATIC, ID)
    path = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/crio-{ID}.scope"
    assert pod_in(path) == PodCgroup(STATIC, ID)


def test_of_a_cluster_inside_a_pod_the_outer_pod_is_reported() -> None:
    inner = f"/kubelet/kubepods/pod{OTHER_UID}/{NODE}"
    assert pod_in(f"{SYSTEMD}/cri-containerd-{ID}.scope{inner}") == PodCgroup(UID, ID)


@pytest.mark.parametrize(
    "cgroup",
    [
        None,
        "",
        "/",
        "/kubepods.slice",
        "/kubepods/burstable",
        f"/docker/{ID}",
        f"/kubepods/pod/{ID}",
        f"/kubepods/podman/{ID}",
        f"/kubepods/pod{UID}0/{ID}",
        f"/kubepods/pod{UID.upper()}/{ID}",
        f"/kubepods/pod{UID.replace('-', '_', 1)}/{ID}",
        f"/kubepods/xpod{UID}/{ID}",
        f"/machine.slice/libpod_pod_{ID}.slice/libpod-{ID}.scope",
        f"/system.slice/app-pod{SLICE_UID}.slice",
        f"/kubepods.slice/kubepods-pod{SLICE_UID}.service",
    ],
)
def test_what_only_looks_like_a_pod_is_none(cgroup: str | None) -> None:
    assert pod_in(cgroup) is None
