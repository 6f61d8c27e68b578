"""A server that speaks the Container Runtime Interface, version v1, as a runtime does: gRPC on a unix socket.

``python -m support.cri_server SOCKET FILE`` answers ListPodSandbox and ListContainers with what the JSON file holds at
that moment. ``{"hangs": true}`` in it: no answer comes. ``{"refuses": true}``: the answer is an error. Each question is
a line in FILE.log.

The messages have the names, numbers and types of the published api.proto (package runtime.v1), with fields that the
client does not know.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["CriServer", "labels", "message_classes"]

_TYPES = {"string": 9, "int64": 3, "int32": 5, "uint32": 13, "bool": 8, "bytes": 12}
#: By message: by field its number and type; ``map`` is map<string, string>, ``*`` repeated.
Messages = Mapping[str, Mapping[str, tuple[int, str]]]
_MESSAGES: Messages = {
    "PodSandboxMetadata": {
        "name": (1, "string"),
        "uid": (2, "string"),
        "namespace": (3, "string"),
        "attempt": (4, "uint32"),
    },
    "PodSandbox": {
        "id": (1, "string"),
        "metadata": (2, "PodSandboxMetadata"),
        "state": (3, "enum PodSandboxState"),
        "created_at": (4, "int64"),
        "labels": (5, "map"),
        "annotations": (6, "map"),
        "runtime_handler": (7, "string"),
    },
    "ListPodSandboxRequest": {"filter": (1, "PodSandboxFilter")},
    "PodSandboxFilter": {"id": (1, "string")},
    "ListPodSandboxResponse": {"items": (1, "*PodSandbox")},
    "ContainerMetadata": {"name": (1, "string"), "attempt": (2, "uint32")},
    "ImageSpec": {"image": (1, "string"), "annotations": (2, "map")},
    "Container": {
        "id": (1, "string"),
        "pod_sandbox_id": (2, "string"),
        "metadata": (3, "ContainerMetadata"),
        "image": (4, "ImageSpec"),
        "image_ref": (5, "string"),
        "state": (6, "enum ContainerState"),
        "created_at": (7, "int64"),
        "labels": (8, "map"),
        "annotations": (9, "map"),
        "image_id": (10, "string"),
    },
    "ContainerFilter": {"id": (1, "string")},
    "ListContainersRequest": {"filter": (1, "ContainerFilter")},
    "ListContainersResponse": {"containers": (1, "*Container")},
}
_ENUMS = {
    "PodSandboxState": ("SANDBOX_READY", "SANDBOX_NOTREADY"),
    "ContainerState": ("CONTAINER_CREATED", "CONTAINER_RUNNING", "CONTAINER_EXITED", "CONTAINER_UNKNOWN"),
}


def message_classes(messages: Messages, enums: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Classes of these messages, as protoc would make them."""
    file = descriptor_pb2.FileDescriptorProto(name="api.proto", package="runtime.v1", syntax="proto3")
    for enum, values in enums.items():
        made = file.enum_type.add(name=enum)
        for number, value in enumerate(values):
            made.value.add(name=value, number=number)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            added = message.field.add(name=field, number=number, label=1)
            if kind == "map":
                entry = message.nested_type.add(name=f"{field.title().replace('_', '')}Entry")
                entry.field.add(name="key", number=1, label=1, type=9)
                entry.field.add(name="value", number=2, label=1, type=9)
                entry.options.map_entry = True
                added.label, added.type, added.type_name = 3, 11, f".runtime.v1.{name}.{entry.name}"
            elif kind.startswith("enum "):
                added.type, added.type_name = 14, f".runtime.v1.{kind[5:]}"
            elif (plain := kind.removeprefix("*")) in _TYPES:
                added.label, added.type = 3 if kind.startswith("*") else 1, _TYPES[plain]
            else:
                added.label = 3 if kind.startswith("*") else 1
                added.type, added.type_name = 11, f".runtime.v1.{kind.removeprefix('*')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {one: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"runtime.v1.{one}")) for one in messages}


def labels(uid: str, name: str, namespace: str, container: str | None = None) -> dict[str, str]:
    """As the kubelet has them."""
    found = {
        "io.kubernetes.pod.uid": uid,
        "io.kubernetes.pod.name": name,
        "io.kubernetes.pod.namespace": namespace,
        "app": "shop",
    }
    return found if container is None else found | {"io.kubernetes.container.name": container}


class CriServer:
    """The server, in this process.

    Args:
        socket: where it listens.
        read: what it answers: ``sandboxes`` and ``containers``, by id their labels; ``hangs``, ``refuses``.
    """

    def __init__(
        self, socket: str, read: Callable[[], Mapping[str, Any]], note: Callable[[str], None] = lambda _: None
    ) -> None:
        self._read = read
        self._note = note
        self._closing = threading.Event()
        classes = message_classes(_MESSAGES, _ENUMS)
        handlers = {
            "ListPodSandbox": grpc.unary_unary_rpc_method_handler(
                self._sandboxes(classes),
                request_deserializer=classes["ListPodSandboxRequest"].FromString,
                response_serializer=classes["ListPodSandboxResponse"].SerializeToString,
            ),
            "ListContainers": grpc.unary_unary_rpc_method_handler(
                self._containers(classes),
                request_deserializer=classes["ListContainersRequest"].FromString,
                response_serializer=classes["ListContainersResponse"].SerializeToString,
            ),
        }
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", handlers),)
        )
        assert self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    def _answer(self, method: str, context: Any) -> Mapping[str, Any]:
        self._note(method)
        found = self._read()
        if found.get("hangs"):
            self._closing.wait(60)
        if found.get("refuses"):
            context.abort(grpc.StatusCode.UNKNOWN, "the runtime is not ready")
        return found

    def _sandboxes(self, classes: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
        def answer(_: Any, context: Any) -> Any:
            answer = classes["ListPodSandboxResponse"]()
            for key, found in self._answer("ListPodSandbox", context).get("sandboxes", {}).items():
                name, uid = found.get("io.kubernetes.pod.name", ""), found.get("io.kubernetes.pod.uid", "")
                metadata = {"name": name, "uid": uid, "namespace": "default", "attempt": 1}
                answer.items.add(
                    id=key, metadata=metadata, state=0, created_at=1 << 60, labels=found, annotations={"a": "b"}
                )
            return answer

        return answer

    def _containers(self, classes: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
        def answer(_: Any, context: Any) -> Any:
            answer = classes["ListContainersResponse"]()
            for key, found in self._answer("ListContainers", context).get("containers", {}).items():
                answer.containers.add(
                    id=key,
                    pod_sandbox_id="5" * 64,
                    metadata={"name": "a name of the runtime's", "attempt": 2},
                    image={"image": "shop:1", "annotations": {"c": "d"}},
                    image_ref="sha256:0",
                    state=1,
                    created_at=1 << 60,
                    labels=found,
                    annotations={"io.kubernetes.container.hash": "0"},
                    image_id="sha256:1",
                )
            return answer

        return answer

    def wait(self) -> None:
        """Serves for ever."""
        self._server.wait_for_termination()

    def close(self) -> None:
        """Ends it."""
        self._closing.set()
        self._server.stop(0).wait(10)
        # gRPC holds its descriptors and threads as long as the server is there, and its handlers are methods of this.
        del self._server


def main() -> None:
    """The command."""
    path, log = Path(sys.argv[2]), Path(f"{sys.argv[2]}.log")

    def note(method: str) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{method}\n")

    CriServer(sys.argv[1], lambda: json.loads(path.read_text(encoding="utf-8")), note).wait()


if __name__ == "__main__":
    main()
