"""A containerd of the test's own, asked by CRI as a kubelet asks it: real images, pods and containers, no cluster.

It runs in a mount namespace of its own, where tracefs is mounted, and keeps everything in memory that goes with it.
Pods use the host's network, as there is no CNI plugin.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from support.chart import Rendered
from support.cri_server import labels, message_classes
from support.programs import build

__all__ = ["Containerd", "agent_config", "archive", "needs_containerd"]

TOOLS = ("containerd", "ctr", "runc", "unshare")
needs_containerd = [one for one in TOOLS if shutil.which(one) is None]

_CLASSES = message_classes(
    {
        "PodSandboxMetadata": {"name": (1, "string"), "uid": (2, "string"), "namespace": (3, "string")},
        "NamespaceOption": {"network": (1, "enum NamespaceMode"), "pid": (2, "enum NamespaceMode")},
        "LinuxSandboxSecurityContext": {"namespace_options": (1, "NamespaceOption")},
        "LinuxPodSandboxConfig": {
            "cgroup_parent": (1, "string"),
            "security_context": (2, "LinuxSandboxSecurityContext"),
        },
        "PodSandboxConfig": {
            "metadata": (1, "PodSandboxMetadata"),
            "log_directory": (3, "string"),
            "labels": (6, "map"),
            "linux": (8, "LinuxPodSandboxConfig"),
        },
        "RunPodSandboxRequest": {"config": (1, "PodSandboxConfig")},
        "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
        "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
        "StopPodSandboxResponse": {},
        "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
        "RemovePodSandboxResponse": {},
        "ContainerMetadata": {"name": (1, "string")},
        "ImageSpec": {"image": (1, "string")},
        "KeyValue": {"key": (1, "string"), "value": (2, "string")},
        "Mount": {"container_path": (1, "string"), "host_path": (2, "string"), "readonly": (3, "bool")},
        "Capability": {"add_capabilities": (1, "*string"), "drop_capabilities": (2, "*string")},
        "Int64Value": {"value": (1, "int64")},
        "SecurityProfile": {"profile_type": (1, "enum ProfileType")},
        "LinuxContainerSecurityContext": {
            "capabilities": (1, "Capability"),
            "privileged": (2, "bool"),
            "namespace_options": (3, "NamespaceOption"),
            "run_as_user": (5, "Int64Value"),
            "readonly_rootfs": (7, "bool"),
            "no_new_privs": (11, "bool"),
            "run_as_group": (12, "Int64Value"),
            "masked_paths": (13, "*string"),
            "readonly_paths": (14, "*string"),
            "seccomp": (15, "SecurityProfile"),
            "apparmor": (16, "SecurityProfile"),
        },
        "LinuxContainerResources": {"memory_limit_in_bytes": (4, "int64")},
        "LinuxContainerConfig": {
            "resources": (1, "LinuxContainerResources"),
            "security_context": (2, "LinuxContainerSecurityContext"),
        },
        "ContainerConfig": {
            "metadata": (1, "ContainerMetadata"),
            "image": (2, "ImageSpec"),
            "args": (4, "*string"),
            "envs": (6, "*KeyValue"),
            "mounts": (7, "*Mount"),
            "labels": (9, "map"),
            "log_path": (11, "string"),
            "linux": (15, "LinuxContainerConfig"),
        },
        "CreateContainerRequest": {
            "pod_sandbox_id": (1, "string"),
            "config": (2, "ContainerConfig"),
            "sandbox_config": (3, "PodSandboxConfig"),
        },
        "CreateContainerResponse": {"container_id": (1, "string")},
        "StartContainerRequest": {"container_id": (1, "string")},
        "StartContainerResponse": {},
        "StopContainerRequest": {"container_id": (1, "string"), "timeout": (2, "int64")},
        "StopContainerResponse": {},
        "ExecSyncRequest": {"container_id": (1, "string"), "cmd": (2, "*string"), "timeout": (3, "int64")},
        "ExecSyncResponse": {"stdout": (1, "bytes"), "stderr": (2, "bytes"), "exit_code": (3, "int32")},
        "VersionRequest": {},
        "VersionResponse": {"runtime_name": (2, "string")},
    },
    {
        "NamespaceMode": ("POD", "CONTAINER", "NODE", "TARGET"),
        "ProfileType": ("RuntimeDefault", "Unconfined", "Localhost"),
    },
)
NODE = 2

_CONFIG = """
version = 2
root = "{at}/root"
state = "{at}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{at}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""
#: Shims have their sockets in /run/containerd. tracefs may be mounted already.
_BEGIN = """
set -e
mkdir -p "$0/root" "$0/state" /run/containerd
for one in "$0/root" "$0/state" /run/containerd; do mount -t tmpfs tmpfs "$one"; done
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
exec containerd -c "$0/config.toml"
"""
#: Of a kubelet (pkg/securitycontext): what the default procMount hides.
_MASKED = (
    *("/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"),
    *("/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def archive(name: str, files: Mapping[str, bytes | str | None], entrypoint: Sequence[str]) -> bytes:
    """An image as `ctr images import` takes it (OCI): of one layer.

    Args:
        name: with its tag.
        files: by path the content of a program, what a link leads to, or None for a directory.
        entrypoint: its command.
    """

    def packed(entries: Mapping[str, bytes | str | None]) -> bytes:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            for path, content in entries.items():
                info = tarfile.TarInfo(path)
                info.mode = 0o755
                if isinstance(content, bytes):
                    info.size = len(content)
                else:
                    info.type = tarfile.DIRTYPE if content is None else tarfile.SYMTYPE
                    info.linkname = content or ""
                tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
        return made.getvalue()

    def described(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data), **more}

    layer = packed(files)
    layer_id = described("layer.v1.tar", layer)
    config = json.dumps(
        {
            "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
            "os": "linux",
            "config": {"Entrypoint": list(entrypoint)},
            "rootfs": {"type": "layers", "diff_ids": [layer_id["digest"]]},
        }
    ).encode()
    kind = "manifest.v1+json"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"application/vnd.oci.image.{kind}",
            "config": described("config.v1+json", config),
            "layers": [layer_id],
        }
    ).encode()
    named = described(kind, manifest, annotations={"io.containerd.image.name": name})
    blobs = {f"blobs/sha256/{hashlib.sha256(one).hexdigest()}": one for one in (layer, config, manifest)}
    index = json.dumps({"schemaVersion": 2, "manifests": [named]}).encode()
    return packed({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index, **blobs})


class Containerd:
    """The daemon. `close` removes every pod, and ends it.

    Args:
        directory: with a short name.
        parent: cgroup of its pods.
    """

    def __init__(self, directory: Path, parent: str, wait_until: Callable[..., Any]) -> None:
        self.directory, self.socket = directory, directory / "containerd.sock"
        self._parent, self._wait_until = parent, wait_until
        self._pods: dict[str, dict[str, Any]] = {}
        (directory / "config.toml").write_text(_CONFIG.format(at=directory), encoding="utf-8")
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BEGIN, directory],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        options = [("grpc.default_authority", "localhost")]
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=options)
        try:
            self._wait_until(self._answers, 60, "a containerd that answers")
            self.add_image("localhost/pause:1", {"pause": static("pause_forever", directory)}, ["/pause"])
        except BaseException:
            self.close()
            raise

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log
        with contextlib.suppress(grpc.RpcError):
            return bool(self.call("Version", {}).runtime_name)
        return False

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")[-4000:]

    def call(self, method: str, request: Mapping[str, Any]) -> Any:
        """One call of its RuntimeService."""
        return self._channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}",
            request_serializer=_CLASSES[f"{method}Request"].SerializeToString,
            response_deserializer=_CLASSES[f"{method}Response"].FromString,
        )(_CLASSES[f"{method}Request"](**request), timeout=60)

    def add_image(self, name: str, files: Mapping[str, bytes | str | None], entrypoint: Sequence[str]) -> None:
        """Puts an image where it would be pulled to."""
        path = self.directory / "image.tar"
        path.write_bytes(archive(name, files, entrypoint))
        self.import_image(path)
        path.unlink()

    def import_image(self, path: Path) -> None:
        """Takes an archive of OCI, which names its image."""
        words = ["ctr", "-a", self.socket, "-n", "k8s.io", "images", "import", path]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run_pod(self, uid: str, name: str, namespace: str, *, has_host_pids: bool = False) -> str:
        """A pod's sandbox; its id."""
        options = {"network": NODE, "pid": NODE if has_host_pids else 0}
        config = {
            "metadata": {"name": name, "uid": uid, "namespace": namespace},
            "log_directory": os.fspath(self.directory / "logs" / name),
            "labels": labels(uid, name, namespace),
            "linux": {
                "cgroup_parent": f"{self._parent}/burstable/pod{uid}",
                "security_context": {"namespace_options": options},
            },
        }
        sandbox = str(self.call("RunPodSandbox", {"config": config}).pod_sandbox_id)
        self._pods[sandbox] = config
        return sandbox

    def run_container(self, sandbox: str, name: str, config: Mapping[str, Any]) -> str:
        """A container of a pod, started; its id."""
        pod = self._pods[sandbox]
        meta = pod["metadata"]
        whole = {
            "metadata": {"name": name},
            "labels": labels(meta["uid"], meta["name"], meta["namespace"], name),
            "log_path": f"{name}.log",
            **config,
        }
        request = {"pod_sandbox_id": sandbox, "config": whole, "sandbox_config": pod}
        made = str(self.call("CreateContainer", request).container_id)
        self.call("StartContainer", {"container_id": made})
        return made

    def log_of(self, pod: str, container: str) -> str:
        """What a container has written, as the kubelet keeps it."""
        return (self.directory / "logs" / pod / f"{container}.log").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Removes every pod and ends the daemon."""
        for sandbox in self._pods:
            for method in ("StopPodSandbox", "RemovePodSandbox"):
                with contextlib.suppress(grpc.RpcError):
                    self.call(method, {"pod_sandbox_id": sandbox})
        self._channel.close()
        self._process.terminate()
        self._process.wait(30)
        for hierarchy in Path("/sys/fs/cgroup").glob(f"*{self._parent}"):
            for place in sorted(hierarchy.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    place.rmdir()
            with contextlib.suppress(OSError):
                hierarchy.rmdir()


def static(name: str, directory: Path) -> bytes:
    """A program of tests/programs that needs no library."""
    return build(name, directory, flags=["-static", "-O1", "-g0"]).read_bytes()


def agent_config(found: Rendered, volumes: Path) -> dict[str, Any]:
    """What a kubelet asks of the runtime for the container of the chart's pod, but for probes and the network."""
    container, context = found.container, found.container["securityContext"]
    sources: dict[str, str] = {}
    for volume in found.pod["volumes"]:
        if "hostPath" in volume:
            sources[volume["name"]] = volume["hostPath"]["path"]
            continue
        place = volumes / volume["name"]
        place.mkdir()
        sources[volume["name"]] = os.fspath(place)
        if "configMap" in volume:
            (place / "config.toml").write_text(found.config, encoding="utf-8")
    kinds = {"RuntimeDefault": 0, "Unconfined": 1}
    limit = container["resources"]["limits"]["memory"]
    return {
        "image": {"image": container["image"]},
        "args": container["args"],
        "envs": [{"key": key, "value": value} for key, value in found.environment.items()],
        "mounts": [
            {
                "container_path": one["mountPath"],
                "host_path": sources[one["name"]],
                "readonly": one.get("readOnly", False),
            }
            for one in container["volumeMounts"]
        ],
        "linux": {
            "resources": {"memory_limit_in_bytes": int(limit[:-2]) * _UNITS[limit[-2:]]},
            "security_context": {
                "capabilities": {
                    "add_capabilities": context["capabilities"]["add"],
                    "drop_capabilities": context["capabilities"]["drop"],
                },
                "privileged": context["privileged"],
                "namespace_options": {"network": NODE, "pid": NODE if found.pod["hostPID"] else 0},
                "run_as_user": {"value": context["runAsUser"]},
                "run_as_group": {"value": context["runAsGroup"]},
                "readonly_rootfs": context["readOnlyRootFilesystem"],
                "no_new_privs": not context["allowPrivilegeEscalation"],
                "masked_paths": _MASKED,
                "readonly_paths": _READ_ONLY,
                "seccomp": {"profile_type": kinds[context["seccompProfile"]["type"]]},
                "apparmor": {"profile_type": kinds[context["appArmorProfile"]["type"]]},
            },
        },
    }


def host_python() -> tuple[list[str], list[dict[str, Any]], list[dict[str, Any]]]:
    """This Python with sowatch for a container without either: entry point, volumes and mounts."""
    root = Path(__file__).resolve().parents[2]
    places = {"usr": Path("/usr"), "checkout": root, "python": Path(sys.base_prefix), "venv": Path(sys.prefix)}
    kept = {name: path for name, path in places.items() if name == "usr" or not path.is_relative_to("/usr")}
    kept = {
        name: path
        for name, path in kept.items()
        if not any(path != other and path.is_relative_to(other) for other in kept.values())
    }
    volumes = [{"name": name, "hostPath": {"path": os.fspath(path)}} for name, path in kept.items()]
    mounts = [{"name": name, "mountPath": os.fspath(path), "readOnly": True} for name, path in kept.items()]
    return [sys.executable, "-m", "sowatch"], volumes, mounts
