"""Asks the container runtime of this host which pod and which name each of its containers has.

The runtime (containerd, CRI-O, and Docker by cri-dockerd) serves the kubelet by the Container Runtime Interface: gRPC
on a unix socket. It keeps the labels that the kubelet gave each container, so neither the API of the cluster nor any
right there is needed. Needs the extra ``sowatch[kubernetes]``.
"""

from __future__ import annotations

import importlib.util
import time
from functools import lru_cache
from typing import Any, Final

from sowatch.model.errors import SowatchError, UsageError
from sowatch.model.events import Pod

__all__ = ["Cri"]

_SERVICE: Final = "/runtime.v1.RuntimeService"
#: Labels that the kubelet gives what it has the runtime start (pkg/kubelet/types/labels.go).
_NAME: Final = "io.kubernetes.pod.name"
_NAMESPACE: Final = "io.kubernetes.pod.namespace"
_UID: Final = "io.kubernetes.pod.uid"
_CONTAINER: Final = "io.kubernetes.container.name"
#: As the kubelet has it.
_MAX_ANSWER_BYTES: Final = 16 << 20
#: The API has 63 bytes for a label and 253 for a name: what is longer is none.
_MAX_NAME: Final = 253


class Cri:
    """The runtime on one socket. One thread uses it; `close` may come from another one.

    Args:
        socket: path of the socket.
        host_root: where the host's root is, for the case that the path leads nowhere from here: a container that had
            the socket mounted has a dead one once the runtime was started again.

    Raises:
        UsageError: the packages that this takes are not installed.
    """

    def __init__(self, socket: str, host_root: str = "/proc/1/root") -> None:
        for module in ("grpc", "google.protobuf"):
            if not _is_installed(module):
                raise UsageError(
                    f"{module} is not installed, and names of pods need it. "
                    "Install it: pip install 'sowatch[kubernetes]'."
                )
        self.socket = socket
        self._places = (socket, f"{host_root}{socket}")
        self._channel: Any = None
        self._is_closed = False

    def pods(self, timeout_s: float) -> dict[str, Pod]:
        """By id of each container and of each pod's sandbox, running or not: the pod. Waits that long at most.

        Raises:
            SowatchError: the runtime did not answer, or not what a runtime answers.
        """
        import grpc  # type: ignore[import-untyped,unused-ignore]

        if self._channel is None:
            self._channel = grpc.insecure_channel(
                f"unix:{self._places[0]}",
                options=[
                    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
                    # Servers in Go refuse the path as an authority.
                    ("grpc.default_authority", "localhost"),
                    ("grpc.enable_http_proxy", 0),
                    # A runtime that was started again is found within so long.
                    ("grpc.initial_reconnect_backoff_ms", 200),
                    ("grpc.max_reconnect_backoff_ms", 5_000),
                ],
            )
        end_s = time.monotonic() + timeout_s
        requests, sandboxes, containers = _messages()
        found: dict[str, Pod] = {}
        try:
            for method, answer, field in (
                ("ListPodSandbox", sandboxes, "items"),
                ("ListContainers", containers, "containers"),
            ):
                ask = self._channel.unary_unary(
                    f"{_SERVICE}/{method}",
                    request_serializer=requests.SerializeToString,
                    response_deserializer=answer.FromString,
                )
                for one in getattr(ask(requests(), timeout=max(0.0, end_s - time.monotonic())), field):
                    if one.id and (pod := _pod_of(one.labels)) is not None:
                        found[one.id] = pod
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not self._is_closed:
                self._channel.close()
                self._channel, self._places = None, self._places[::-1]
            raise SowatchError(self._refusal(error)) from error
        except ValueError as error:  # the channel is closed
            raise SowatchError(f"the container runtime on {self.socket!r} is asked no more") from error
        return found

    def _refusal(self, error: Any) -> str:
        code, details = error.code(), error.details() or ""
        return f"the container runtime on {self.socket!r} did not answer: {code.name.lower()}: {details[:200]}"

    def close(self) -> None:
        """Ends a question that is under way. Safe to call again."""
        self._is_closed = True
        channel = self._channel
        if channel is not None:
            channel.close()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _pod_of(labels: Any) -> Pod | None:
    """What the kubelet's labels say; None: it has not started this."""
    known = {one.key: one.value for one in labels}
    uid = known.get(_UID)
    if not uid:
        return None
    name, namespace, container = (known.get(one) for one in (_NAME, _NAMESPACE, _CONTAINER))
    return Pod(uid[:_MAX_NAME], _cut(name), _cut(namespace), _cut(container))


def _cut(name: str | None) -> str | None:
    return name[:_MAX_NAME] if name else None


@lru_cache(1)
def _messages() -> tuple[Any, Any, Any]:
    """The messages that are needed, with the fields that are needed: numbers as in CRI's api.proto, version v1.

    What others there are is skipped. A map is a list of pairs on the wire.
    """
    from google.protobuf import (  # type: ignore[import-untyped,unused-ignore]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="sowatch/cri.proto", package="sowatch.cri", syntax="proto3")

    def message(name: str, **fields: tuple[int, str]) -> None:
        made = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            is_text = kind == "string"
            made.field.add(
                name=field,
                number=number,
                type=kinds.TYPE_STRING if is_text else kinds.TYPE_MESSAGE,
                type_name=None if is_text else f".sowatch.cri.{kind}",
                label=kinds.LABEL_OPTIONAL if is_text else kinds.LABEL_REPEATED,
            )

    message("Request")
    message("Label", key=(1, "string"), value=(2, "string"))
    message("PodSandbox", id=(1, "string"), labels=(5, "Label"))
    message("ListPodSandboxResponse", items=(1, "PodSandbox"))
    message("Container", id=(1, "string"), labels=(8, "Label"))
    message("ListContainersResponse", containers=(1, "Container"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)

    def made(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"sowatch.cri.{name}"))

    return made("Request"), made("ListPodSandboxResponse"), made("ListContainersResponse")
