"""Pods: processes in cgroups as the kubelet names them, and a server that speaks CRI as container runtimes do."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, NewAgent, short_directory
from support.cgroups import Cgroups
from support.cri_server import labels
from support.kernel import TAG
from support.programs import Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes cgroups")

UID = "0f0e0d0c-1111-2222-3333-444455556666"
HEX = os.urandom(32).hex()
CGROUP = f"kubepods{TAG}.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice/cri-containerd-{HEX}.scope"
NAMES = {"pod_uid": UID, "name": "web-0", "namespace": "shop", "container_name": "nginx"}
NAMELESS = {"pod_uid": UID, "name": None, "namespace": None, "container_name": None}


class Runtime:
    """A container runtime of its own process; ``answers`` are as `support.cri_server` has them."""

    def __init__(self, directory: Path, spawn: Any, wait_until: Any) -> None:
        self.socket, self._file = directory / "cri.sock", directory / "cri.json"
        self._log = directory / "cri.json.log"
        self.answer(containers={HEX: labels(UID, "web-0", "shop", "nginx")})
        tests = Path(__file__).resolve().parents[1]
        self.process = spawn(
            [sys.executable, "-m", "support.cri_server", self.socket, self._file],
            env={**os.environ, "PYTHONPATH": os.fspath(tests)},
        )

        def is_up() -> bool:
            with socket.socket(socket.AF_UNIX) as caller:
                return caller.connect_ex(os.fspath(self.socket)) == 0

        wait_until(is_up, 30, "the runtime")

    def answer(self, **answers: Any) -> None:
        """From the next question on."""
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(answers), encoding="utf-8")
        new.rename(self._file)

    @property
    def questions(self) -> int:
        return self._log.read_text(encoding="utf-8").count("ListContainers\n") if self._log.exists() else 0


@pytest.fixture
def runtime(spawn: Any, wait_until: Any) -> Iterator[Runtime]:
    with short_directory() as directory:
        yield Runtime(directory, spawn, wait_until)


@pytest.fixture
def cgroups(tmp_path: Path, wait_until: Any) -> Iterator[Cgroups]:
    made = Cgroups(tmp_path / "cgroups")
    yield made
    made.close(wait_until)


@pytest.fixture
def pod(cgroups: Cgroups, programs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapper]:
    """A process in a container of a pod; it ends before its cgroup does."""
    with Mapper(programs["mapper"], tmp_path_factory.mktemp("p")) as running:
        cgroups.put(running.pid, CGROUP)
        yield running


@pytest.fixture
def agent(new_agent: NewAgent, place: Path, runtime: Runtime) -> Iterator[Agent]:
    made = new_agent(f"[watch]\ncri_socket = '{runtime.socket}'\n[[rules]]\nname = 'ours'\npattern = '^{place}/'\n")
    yield made.start()
    assert made.stop() == 0, made.log


def sowatch(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sowatch", *words], capture_output=True, text=True, check=False)


def loads_of(pid: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "load" and event["process"]["pid"] == pid


def unloads_of(pid: int) -> Callable[[dict[str, Any]], bool]:
    return lambda event: event["event"] == "unload" and event["process"]["pid"] == pid


def test_every_event_of_a_pod_has_its_names_and_keeps_them_when_it_is_gone(
    agent: Agent, pod: Mapper, runtime: Runtime, library: Callable[..., Path], schema: Any
) -> None:
    path = library()
    stream = agent.events("?snapshot=0")
    at = pod.map(path)
    load = stream.until(loads_of(pod.pid))[-1]
    assert (load["process"]["pod"], load["process"]["container"]) == (NAMES, HEX)
    runtime.answer(containers={})
    pod.unmap(*at)
    unload = stream.until(unloads_of(pod.pid))[-1]
    assert unload["process"]["pod"] == NAMES
    for event in (load, unload):
        schema(event)
    stream.close()


def test_a_container_that_is_started_later_is_asked_for_once(
    agent: Agent, cgroups: Cgroups, mapper: Mapper, runtime: Runtime, library: Callable[..., Path], wait_until: Any
) -> None:
    other, uid = os.urandom(32).hex(), "0" * 32
    wait_until(lambda: runtime.questions, what="the question at the start")
    before = runtime.questions
    runtime.answer(containers={other: labels(uid, "job-1", "batch", "main")})
    cgroups.put(mapper.pid, f"kubepods{TAG}/besteffort/pod{uid}/{other}")
    stream = agent.events("?snapshot=0")
    for name in ("liba.so", "libb.so", "libc.so"):
        mapper.map(library(name))
        found = stream.until(loads_of(mapper.pid))[-1]["process"]
        assert found["pod"] == {"pod_uid": uid, "name": "job-1", "namespace": "batch", "container_name": "main"}
    assert runtime.questions == before + 1
    stream.close()


def test_inventory_list_and_watch_show_the_names(
    agent: Agent, pod: Mapper, mapper: Mapper, library: Callable[..., Path], runtime: Runtime, wait_until: Any
) -> None:
    path = library()
    pod.map(path)
    mapper.map(path)

    def processes() -> dict[int, dict[str, Any]]:
        return {one["pid"]: one for one in agent.get("/inventory").json["processes"]}

    wait_until(lambda: {pod.pid, mapper.pid} <= processes().keys(), what="both processes in the inventory")
    assert processes()[pod.pid]["pod"] == NAMES
    assert "pod" not in processes()[mapper.pid]
    columns = ("-o", "pid,pod,namespace,container_name,pod_uid,pods", "--no-headers")
    row = [str(pod.pid), "web-0", "shop", "nginx", UID, "1"]
    by_agent = sowatch("list", "--agent", os.fspath(agent.socket), *columns, "--pod", "^web-", "--namespace", "shop")
    by_scan = sowatch("list", f"^{path}$", "--cri-socket", os.fspath(runtime.socket), *columns, "--pod", "web-0")
    for done in (by_agent, by_scan):
        assert ([line.split() for line in done.stdout.splitlines()], done.returncode) == ([row], 0), done.stderr
    others = sowatch("list", f"^{path}$", "--cri-socket", os.fspath(runtime.socket), "-o", "pid", "--pod", "!web-0")
    assert others.stdout.split() == ["PID", str(mapper.pid)]
    text = sowatch("watch", f"^{path}$", "--cri-socket", os.fspath(runtime.socket), "--duration", "0")
    assert f"[shop/web-0/nginx] {path}" in text.stdout


def test_without_a_socket_there_are_uids_alone(pod: Mapper, library: Callable[..., Path]) -> None:
    path = library()
    pod.map(path)
    done = sowatch("list", f"^{path}$", "--json")
    (mapping,) = [one for one in map(json.loads, done.stdout.splitlines()) if one["event"] == "mapping"]
    assert mapping["process"]["pod"] == NAMELESS
    row = sowatch("list", f"^{path}$", "-o", "pod,namespace,container_name", "--no-headers", "--pod", UID[:8])
    assert row.stdout.split() == [UID, "-", "-"]


def test_a_runtime_that_hangs_delays_no_other_process_and_is_reported(
    agent: Agent,
    pod: Mapper,
    mapper: Mapper,
    cgroups: Cgroups,
    library: Callable[..., Path],
    runtime: Runtime,
    wait_until: Any,
) -> None:
    wait_until(lambda: agent.get("/readyz").json["pod_names"]["lookups"], what="the first answer")
    # A container that nobody has asked for so far.
    cgroups.put(pod.pid, f"kubepods{TAG}/pod{'0' * 32}/{os.urandom(32).hex()}")
    runtime.answer(hangs=True)
    stream = agent.events("?snapshot=0")
    pod.map(library("liba.so"))
    mapper.map(library("libb.so"))
    order = [one["process"]["pid"] for one in stream.until(loads_of(pod.pid)) if one["event"] == "load"]
    assert order == [mapper.pid, pod.pid]
    state = agent.get("/readyz").json["pod_names"]
    assert (state["failures"] >= 1, "deadline_exceeded" in state["error"]) == (True, True)
    assert re.search(r"^sowatch_pods_lookup_failures_total [1-9]", agent.get("/metrics").text, re.MULTILINE)
    assert "pods have no names, as the container runtime on" in agent.log
    stream.close()


def test_a_socket_that_is_not_there_is_no_reason_not_to_watch(
    new_agent: NewAgent, place: Path, pod: Mapper, library: Callable[..., Path]
) -> None:
    agent = new_agent("[watch]\ncri_socket = '/nowhere/cri.sock'\n").start()
    stream = agent.events("?snapshot=0")
    pod.map(library())
    load = stream.until(loads_of(pod.pid))[-1]
    assert load["process"]["pod"] == NAMELESS
    stream.close()
    assert agent.stop() == 0


def test_a_socket_that_is_no_path_is_refused(new_agent: NewAgent) -> None:
    done = sowatch("watch", "--cri-socket", "containerd.sock", "--duration", "0")
    assert done.returncode == 2
    assert "cri_socket: 'containerd.sock' is no absolute path. Give one, such as /run/containerd/" in done.stderr
