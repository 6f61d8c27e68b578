"""The pod of the chart, run by containerd and runc as a kubelet has them run it, and what it sees of another pod.

The rendered manifest is the input, so that chart and test cannot differ. In the place of the image stands one that has
this checkout, unless scripts/image runs this; probes are asked by the test, and pods have the host's network.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sowatch.linux.capabilities import NEEDED
from support.agent import Answer, Stream, UnixConnection, ask, short_directory
from support.cgroups import memory_of
from support.chart import Rendered, rendered
from support.containerd import Containerd, agent_config, host_python, needs_containerd, static
from support.kernel import TAG
from support.programs import compile_library
from support.receivers import free_port

pytestmark = [
    # A whole image is unpacked three times.
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root runs containers"),
    pytest.mark.skipif(bool(needs_containerd), reason=f"not installed: {', '.join(needs_containerd)}"),
]

AGENT_UID, SHOP_UID = "11111111-2222-3333-4444-555555555555", "0f0e0d0c-1111-2222-3333-444455556666"
CONFIG = "[[rules]]\nname = 'shop'\npattern = '/libshop[^/]*\\.so$'\n"
#: An archive of OCI with the image localhost/sowatch:test, as scripts/image makes it.
IMAGE = os.environ.get("TEST_IMAGE_ARCHIVE")
#: Of a host's root, what is no directory of its own.
LINKS = {name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")}


class Node(NamedTuple):
    """A containerd with the pod of the chart."""

    containerd: Containerd
    found: Rendered
    port: int
    socket: Path
    pid: int
    container: str
    entrypoint: list[str]

    def asked(self, path: str) -> Answer:
        """Over the network, as Prometheus does."""
        return ask(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20), "GET", path, None, {})

    def probed(self, kind: str) -> tuple[int, str]:
        """Exit code and output of a probe, run in the container as a kubelet has it run."""
        _, *words = self.found.container[f"{kind}Probe"]["exec"]["command"]
        request = {"container_id": self.container, "cmd": [*self.entrypoint, *words], "timeout": 60}
        found = self.containerd.call("ExecSync", request)
        return found.exit_code, (found.stdout + found.stderr).decode()

    def get(self, path: str) -> Any:
        """Over the agent's own socket."""
        return ask(UnixConnection(self.socket, 20), "GET", path, None, {}).json


@pytest.fixture(scope="module")
def node(deadline: Any) -> Iterator[Node]:
    with short_directory() as directory, contextlib.ExitStack() as ends:
        containerd = Containerd(directory, f"/kubepods{TAG}", deadline.wait_until)
        ends.callback(containerd.close)
        entrypoint, volumes, mounts = host_python()
        if IMAGE is not None:
            volumes = mounts = []
        port = free_port()
        found = rendered(
            {
                "image": {"repository": "localhost/sowatch", "tag": "test"},
                "config": CONFIG,
                "criSocket": os.fspath(containerd.socket),
                "metricsPort": port,
                "extraVolumes": volumes,
                "extraVolumeMounts": mounts,
                "extraEnv": [{"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}],
            }
        )
        if IMAGE is None:
            containerd.add_image("localhost/sowatch:test", {**LINKS, "etc": None, "run": None}, entrypoint)
        else:
            containerd.import_image(Path(IMAGE))
        library = compile_library(directory / "libshop.so")
        program = static("pause_forever", directory)
        files = {"load": program, "lib": None, "lib/libshop.so": library.read_bytes()}
        containerd.add_image("localhost/shop:1", files, ["/load", "/lib/libshop.so"])
        (directory / "volumes").mkdir()
        sandbox = containerd.run_pod(AGENT_UID, "watch-sowatch-abcde", "nodes", has_host_pids=True)
        made = containerd.run_container(sandbox, "sowatch", agent_config(found, directory / "volumes"))
        pid = deadline.wait_until(lambda: pid_in(made), 30, "the agent's process")
        if IMAGE is not None:
            entrypoint = found.container["startupProbe"]["exec"]["command"][:1]
        node = Node(containerd, found, port, directory / "volumes" / "run" / "sowatch.sock", pid, made, entrypoint)

        def is_ready() -> bool:
            assert Path(f"/proc/{pid}").exists(), containerd.log_of("watch-sowatch-abcde", "sowatch")
            with contextlib.suppress(OSError):
                return node.asked("/readyz").status == 200
            return False

        deadline.wait_until(is_ready, 60, "an agent that is ready")
        yield node


def pid_in(container: str) -> int | None:
    """The process of a container."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and container in (place / "cgroup").read_text(encoding="utf-8"):
                return int(place.name)
    return None


def status_of(pid: int, key: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(rf"^{key}:\s*(\S+)", text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_it_has_the_five_capabilities_and_no_way_to_more(node: Node) -> None:
    wanted = sum(1 << bit for bit, _ in NEEDED.values())
    for key in ("CapPrm", "CapEff", "CapBnd"):
        assert int(status_of(node.pid, key), 16) == wanted, key
    assert (status_of(node.pid, "NoNewPrivs"), status_of(node.pid, "Seccomp")) == ("1", "2")


def test_its_root_is_read_only_and_little_is_mounted_for_writing(node: Node) -> None:
    text = Path(f"/proc/{node.pid}/mountinfo").read_text(encoding="utf-8")
    mounts = {line.split()[4]: line.split()[5].split(",") for line in text.splitlines()}
    assert "ro" in mounts["/"]
    for path in ("/etc/sowatch", "/sys", "/sys/kernel/tracing"):
        assert "ro" in mounts[path], path
    writable = {path for path, options in mounts.items() if "rw" in options}
    # The rest is made by the runtime, for every container: nothing of it is the node's.
    own = {"/proc", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert {one for one in writable if not one.startswith(("/proc/", "/sys/fs/cgroup"))} - own == {"/run/sowatch"}


def test_it_watches_the_whole_node_exactly(node: Node, wait_until: Any) -> None:
    ready = node.get("/readyz")
    assert (ready["ready"], ready["strategy"], ready["guarantee"]) == (True, "core", "exact")
    wait_until(lambda: node.get("/readyz")["pod_names"]["error"] is None, 60, "a runtime that answers")
    audit = node.get("/audit")
    assert audit["differences"] == []
    # Others may have a process here that hangs, or ends at that moment.
    assert audit["processes"] > 10 * audit["unreadable"]


def test_it_sees_what_another_pod_loads_with_its_names(node: Node, schema: Any, wait_until: Any) -> None:
    connection = UnixConnection(node.socket, 60)
    connection.request("GET", "/events?snapshot=0")
    stream = Stream(connection, connection.getresponse())
    sandbox = node.containerd.run_pod(SHOP_UID, "web-0", "shop")
    made = node.containerd.run_container(sandbox, "nginx", {"image": {"image": "localhost/shop:1"}})
    load = stream.until(lambda event: event["event"] == "load")[-1]
    stream.close()
    schema(load)
    process, library = load["process"], load["library"]
    assert (process["container"], process["comm"]) == (made, "load")
    assert process["ns_pid"] < process["pid"], "it has pids of its pod's"
    assert process["pod"]["pod_uid"] == SHOP_UID

    # A runtime that takes more than a second, on a busy machine, is asked again.
    def named() -> bool:
        (found,) = [one for one in node.get("/inventory")["processes"] if one["pid"] == process["pid"]]
        return found["pod"] == {
            "pod_uid": SHOP_UID,
            "name": "web-0",
            "namespace": "shop",
            "container_name": "nginx",
        }

    wait_until(named, 60, "the names of the pod")
    assert (library["path"], library["soname"]) == ("/lib/libshop.so", "libshop.so")
    assert library["build_id"]
    node.containerd.call("StopContainer", {"container_id": made, "timeout": 0})


def test_probes_and_prometheus_get_their_answers(node: Node) -> None:
    for kind in ("startup", "liveness", "readiness"):
        assert node.probed(kind) == (0, "ok\n"), kind
    text = node.asked("/metrics").text
    assert "sowatch_strategy_info{" in text
    assert re.search(r"^sowatch_bpf_map_bytes [1-9]", text, re.MULTILINE)


def test_its_memory_with_that_of_its_maps_is_half_of_what_the_chart_allows(node: Node) -> None:
    used, limit = memory_of(node.pid)
    assert limit == 512 << 20
    assert used < limit / 2
    (maps,) = re.findall(r"^sowatch_bpf_map_bytes (\S+)", node.asked("/metrics").text, re.MULTILINE)
    assert used > float(maps), "the kernel charges the maps to the pod"


def test_who_fills_the_listener_of_the_metrics_fails_no_probe(node: Node, wait_until: Any) -> None:
    with contextlib.ExitStack() as ends:
        # More than it takes of one user (256). Those that send nothing are closed after ten seconds.
        for _ in range(600):
            one = ends.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", node.port))
        wait_until(lambda: not answers(node), 30, "a listener that takes nobody else")
        for kind in ("liveness", "readiness"):
            assert node.probed(kind) == (0, "ok\n"), kind
    wait_until(lambda: answers(node), 60, "a listener that is free again")


def answers(node: Node) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=3)
        return ask(connection, "GET", "/healthz", None, {}).status == 200
    return False
