"""What the agent answers to Prometheus and to probes on other interfaces, and the memory of its maps."""

from __future__ import annotations

import http.client
import os
import re
from pathlib import Path

import pytest

from support.agent import Agent, Answer, NewAgent, ask
from support.receivers import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

#: Little to do, on a machine that others keep busy.
RULE = "[[rules]]\nname = 'ours'\npattern = '/sow-none-of-these/'\n"
#: Of the loopback interface, which answers to all of 127.0.0.0/8, and not the address that `listen` takes.
ADDRESS = "127.0.0.7"


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def agent(new_agent: NewAgent, port: int) -> Agent:
    return new_agent(f"listen_metrics = '0.0.0.0:{port}'\nallowed_hosts = ['node.example']\n{RULE}").start()


def asked(port: int, path: str, method: str = "GET", **headers: str) -> Answer:
    return ask(http.client.HTTPConnection(ADDRESS, port, timeout=20), method, path, None, headers)


def test_metrics_health_and_readiness_are_answered_by_any_address_and_nothing_else(agent: Agent, port: int) -> None:
    agent.wait_until(lambda: asked(port, "/healthz").text == "ok\n", 60, "a draining thread that gets its turn")
    assert "sowatch_watcher_processes " in asked(port, "/metrics").text
    ready = asked(port, "/readyz")
    assert (ready.status, ready.json) == (200, {"ready": True, "problems": []})
    for path in ("/", "/inventory", "/events", "/explain?pid=1", "/audit", "/http", "/mappings", "/debug/telemetry"):
        assert asked(port, path).status == 404, path
    assert asked(port, "/debug/attach-pid", "POST").status == 404
    assert agent.stop() == 0


def test_a_name_that_a_web_page_could_point_here_is_refused(agent: Agent, port: int) -> None:
    assert asked(port, "/metrics", Host="rebound.example").status == 421
    for name in ("node.example", "localhost", f"10.1.2.3:{port}", "[::1]"):
        assert asked(port, "/metrics", Host=name).status == 200, name
    assert agent.stop() == 0


def test_an_agent_whose_collector_is_down_is_ready(new_agent: NewAgent, port: int) -> None:
    dead = free_port()
    agent = new_agent(
        f"listen_metrics = '0.0.0.0:{port}'\n{RULE}[[sinks]]\ntype = 'otlp'\nendpoint = 'http://127.0.0.1:{dead}'\n"
    ).start()
    agent.wait_until(
        lambda: 'sowatch_sink_up{sink="otlp"} 0' in asked(port, "/metrics").text, 30, "a sink that is down"
    )
    for path in ("/readyz", "/healthz"):
        agent.wait_until(lambda path=path: asked(port, path).status == 200, 60, f"200 of {path}")
    assert agent.stop() == 0


@pytest.mark.parametrize("listen", ["9400", "host.example:9400", "0.0.0.0:99999"])
def test_an_address_that_cannot_be_is_refused(new_agent: NewAgent, listen: str) -> None:
    agent = new_agent(f"listen_metrics = '{listen}'\n").start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(30) == 2
    assert f"listen_metrics: '{listen}' is no address with a port" in agent.log


def test_the_memory_of_maps_is_what_the_kernel_says_of_the_agents_descriptors(agent: Agent) -> None:
    found = {}
    for fd in Path(f"/proc/{agent.pid}/fd").iterdir():
        try:
            if os.readlink(fd) != "anon_inode:bpf-map":
                continue
            text = Path(f"/proc/{agent.pid}/fdinfo/{fd.name}").read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        number, size = (re.search(rf"^{key}:\s*(\d+)", text, re.MULTILINE) for key in ("map_id", "memlock"))
        assert number is not None
        assert size is not None
        found[number[1]] = int(size[1])
    (shown,) = re.findall(r"^sowatch_bpf_map_bytes (\S+)", agent.get("/metrics").text, re.MULTILINE)
    assert float(shown) == sum(found.values())
    # The ring alone has 8 MiB, mapped twice.
    assert sum(found.values()) > 8 << 20
    assert agent.stop() == 0
