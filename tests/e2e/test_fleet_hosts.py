"""Two real agents, each in a network namespace of its own, and one receiver in a third: one is killed in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.agent import SOWATCH, Agent, short_directory
from support.fleet_store import Receiving, store_rows
from support.programs import Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and BPF programs need root")

TOKEN = "6f1c7f4a"
HOSTS = ("host-a", "host-b")


class Network:
    """Network namespaces, each kept by a process: one of the receiver, with a link to one of each host."""

    def __init__(self, spawn: Any, wait_until: Any) -> None:
        own = os.stat("/proc/self/ns/net").st_ino
        self._keepers = {name: spawn(["unshare", "--net", "sleep", "infinity"]).pid for name in ("receiver", *HOSTS)}
        for pid in self._keepers.values():
            wait_until(lambda pid=pid: os.stat(f"/proc/{pid}/ns/net").st_ino != own, 20, "a network namespace")
        for number, host in enumerate(HOSTS):
            pid = str(self._keepers[host])
            # Made in the namespace of the receiver, with the other end in that of the host.
            made = ["link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", pid]
            self._ip("receiver", *made)
            self._ip("receiver", "address", "add", f"{self.address(host)}/30", "dev", f"to{number}")
            self._ip("receiver", "link", "set", f"to{number}", "up")
            self._ip(host, "address", "add", f"10.231.{number}.2/30", "dev", "eth0")
            self._ip(host, "link", "set", "eth0", "up")

    def address(self, host: str) -> str:
        """That the receiver has for a host."""
        return f"10.231.{HOSTS.index(host)}.1"

    def prefix(self, name: str) -> list[str]:
        """Runs a command there."""
        return ["nsenter", f"--net=/proc/{self._keepers[name]}/ns/net"]

    def _ip(self, name: str, *words: str) -> None:
        subprocess.run([*self.prefix(name), "ip", *words], check=True)


@pytest.fixture
def network(spawn: Any, wait_until: Any) -> Network:
    return Network(spawn, wait_until)


@pytest.fixture
def directories() -> Iterator[Callable[[], Path]]:
    """Gives one directory after the other, with short names; gone afterwards."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(short_directory())


def test_two_hosts_are_asked_for_a_build_while_one_of_them_is_killed_and_comes_back(
    spawn: Any, wait_until: Any, deadline: Any, network: Network, mapper: Mapper, make_library: Any, directories: Any
) -> None:
    place = directories()
    (place / "token").write_text(TOKEN, encoding="ascii")
    options = ["--token-file", os.fspath(place / "token")]
    receiver = Receiving(spawn, wait_until, place, options, listen="0.0.0.0:4318", prefix=network.prefix("receiver"))
    receiver.start()
    library = make_library("libasked.so")
    mapping = mapper.map(library)

    def asked(action: str, *words: str) -> tuple[int, list[dict[str, Any]]]:
        command = [*SOWATCH, "fleet", action, *words, "--store", os.fspath(receiver.store), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline(60))
        assert done.stdout, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def states() -> dict[str, int]:
        return dict(asked("coverage")[1][0]["hosts"])

    def answer() -> str:
        return str(asked("who", os.fspath(library))[1][0]["answer"])

    agents = {host: agent_of(host, network, spawn, wait_until, directories(), deadline) for host in HOSTS}
    for agent in agents.values():
        agent.start()
    both = {"answered": 2, "silent": 0, "lossy": 0, "unsupported": 0}
    wait_until(lambda: states() == both, 90, "both hosts answer")
    _, (head, *rows) = asked("who", os.fspath(library))
    assert head["answer"] == "mapped"
    mapped = [(row["host_name"], row["answer"], row["path"]) for row in rows if row["event"] == "fleet_mapping"]
    assert sorted(mapped) == [(host, "mapped", os.fspath(library)) for host in HOSTS]
    assert asked("remediated", os.fspath(library))[0] == 1

    assert agents["host-b"].stop(signal.SIGKILL) == -signal.SIGKILL
    mapper.unmap(*mapping)
    # What the dead one reported last does not hold any more, and is not taken for gone.
    wait_until(lambda: states() == both | {"answered": 1, "silent": 1}, 90, "one host is silent")
    wait_until(lambda: answer() == "not observed", 60, "the other one has it no more")
    assert asked("remediated", os.fspath(library))[0] == 3

    agents["host-b"].start()
    wait_until(lambda: states() == both, 90, "both hosts answer again")
    wait_until(lambda: answer() == "not mapped", 60, "nobody has it mapped")
    # On a busy machine a heartbeat may be late.
    wait_until(lambda: asked("remediated", os.fspath(library))[0] == 0, 60, "it is remediated")
    assert receiver.stop() == 0
    # The same of the store, which nobody has open now.
    (rows,) = store_rows(receiver.store, "SELECT uniqExact(host_id) AS n FROM fleet_state", timeout_s=deadline(60))
    assert rows == [{"n": 2}]


def agent_of(host: str, network: Network, spawn: Any, wait_until: Any, place: Path, deadline: Any) -> Agent:
    (place / "token").write_text(TOKEN, encoding="ascii")
    config = "\n".join(
        [
            "[fleet]",
            "enabled = true",
            f"endpoint = 'http://{network.address(host)}:4318'",
            f"token_file = '{place / 'token'}'",
            "interval_s = 3",
            "",
        ]
    )
    # Both are on this machine, which has one machine-id.
    own = {"OTEL_RESOURCE_ATTRIBUTES": f"host.id={host},host.name={host}"}
    return Agent(spawn, wait_until, place, config, environment=own, prefix=network.prefix(host), timeout_s=deadline(20))
