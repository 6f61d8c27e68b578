"""HTTP flows of the agent: real clients and servers on copies of TLS libraries, by the agent's own watch."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, NewAgent, ask
from support.prometheus import samples
from support.receivers import free_port
from support.silent_fs import SilentFileSystem
from support.tls import LIBRARIES, Server, Tls, find

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")


@pytest.fixture
def tls(tmp_path: Path, spawn: Any, wait_until: Any) -> Tls:
    made = Tls(tmp_path, spawn, wait_until)
    made.hold()
    return made


def section(tls: Tls, more: str = "") -> str:
    return f"[http]\nenabled = true\nlibraries = '^{re.escape(str(tls.libraries))}/'\n{more}\n"


def replace(path: Path, text: str) -> None:
    new = path.with_name(".new")
    new.write_text(text, encoding="utf-8")
    new.rename(path)


def is_tapped(agent: Agent, files: int = LIBRARIES) -> bool:
    state = agent.get("/readyz").json["http"]
    return state is not None and state["files"] >= files


def curl(tls: Tls, server: Server, *paths: str) -> None:
    urls = [f"https://127.0.0.1:{server.port}{path}" for path in paths]
    tls.run(find("curl"), "-sS", "-o", "/dev/null", "--cacert", str(tls.certificate), *urls)


def flows(path: Path, side: str = "server") -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last may be half written
    return [one for one in lines if one["event"] == "http" and one["side"] == side]


def requests_counted(agent: Agent, side: str) -> dict[tuple[str, str], float]:
    """By route and status."""
    found: dict[tuple[str, str], float] = {}
    for (name, labels), value in samples(agent.get("/metrics").text).items():
        if name == f"sowatch_http_{side}_request_duration_seconds_count":
            by_name = dict(labels)
            found[by_name["http_route"], by_name.get("http_response_status_code", "")] = value
    return found


def counter(agent: Agent, name: str, **labels: str) -> float:
    return samples(agent.get("/metrics").text).get((f"sowatch_http_{name}_total", frozenset(labels.items())), -1.0)


def test_flows_are_events_in_sinks_and_streams_and_metrics_by_route(
    tls: Tls, new_agent: NewAgent, wait_until: Any, tmp_path: Path, schema: Any
) -> None:
    events = tmp_path / "events.jsonl"
    sink = f"[[sinks]]\ntype = 'file'\npath = '{events}'\nevents = ['http']\n"
    agent = new_agent(section(tls) + sink).start()
    server = tls.python()
    wait_until(lambda: is_tapped(agent), 20, "tapped")
    stream = agent.events("?events=http&snapshot=0")
    curl(tls, server, "/users/1", "/users/2?secret=7", "/missing")
    for side in ("server", "client"):
        wait_until(lambda side=side: len(flows(events, side)) >= 3, 20, side)
        found = flows(events, side)
        assert [(one["path"], one["status"]) for one in found] == [
            ("/users/1", 200),
            ("/users/2", 200),
            ("/missing", 404),
        ]
        assert all(one["complete"] and one["peer"]["address"] == "127.0.0.1" for one in found)
        assert {one["library"]["path"] for one in found} == {str(tls.libraries / "libssl.so.3")}
    assert {one["process"]["pid"] for one in flows(events)} == {server.process.pid}
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        schema(line)
    assert not {one["event"] for one in lines} & {"load", "unload", "activate", "deactivate"}
    streamed = stream.until(lambda one: one["event"] == "http" and one["side"] == "client")
    assert streamed[-1]["path"] == "/users/1"
    stream.close()
    expected = {("/users/*", "200"): 2.0, ("/missing", "404"): 1.0}
    wait_until(lambda: requests_counted(agent, "server") == expected, 20, "metrics of the server")
    assert requests_counted(agent, "client") == expected
    assert counter(agent, "flows") == 6
    for name in ("incomplete", "undecoded", "truncated", "joined_late", "unknown_peers", "resyncs", "unknown_fields"):
        assert counter(agent, name) == 0, name
    for where in ("ring", "unreadable", "connections", "ends", "table", "stream"):
        assert counter(agent, "lost", where=where) == 0, where
    text = agent.get("/metrics").text
    by_name = next(
        dict(labels) for name, labels in samples(text) if name == "sowatch_http_server_request_duration_seconds_count"
    )
    assert (by_name["server_address"], by_name["server_port"]) == ("127.0.0.1", str(server.port))
    assert (by_name["url_scheme"], by_name["network_protocol_version"]) == ("https", "1.1")
    assert "secret" not in text


def test_a_rule_of_the_user_keeps_its_files_and_they_are_tapped_all_the_same(
    tls: Tls, new_agent: NewAgent, wait_until: Any, tmp_path: Path
) -> None:
    """The first rule that matches wins: here it is not the one of [http]."""
    events = tmp_path / "events.jsonl"
    rules = (
        f"[[rules]]\nname = 'mine'\npattern = '^{re.escape(str(tls.libraries))}/'\ncount = ['SSL_read']\n"
        f"[[sinks]]\ntype = 'file'\npath = '{events}'\n"
    )
    agent = new_agent(section(tls) + rules).start()
    server = tls.python()
    wait_until(lambda: is_tapped(agent), 20, "tapped")
    curl(tls, server, "/one")
    wait_until(lambda: len(flows(events)) == 1, 20, "a flow")
    lines = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    mine = [one for one in lines if one["event"] == "load" and str(tls.libraries) in one["library"]["path"]]
    assert {one["rule"] for one in mine} == {"mine"}
    wait_until(
        lambda: any(
            name == "sowatch_calls_total" and ("symbol", "SSL_read") in labels and value > 0
            for (name, labels), value in samples(agent.get("/metrics").text).items()
        ),
        20,
        "the calls that the rule counts",
    )


def test_a_hangup_changes_filters_and_loses_no_flow_of_a_connection_that_goes_on(
    tls: Tls, new_agent: NewAgent, wait_until: Any, tmp_path: Path
) -> None:
    events = tmp_path / "events.jsonl"
    sink = f"[[sinks]]\ntype = 'file'\npath = '{events}'\nevents = ['http']\n"
    agent = new_agent(section(tls) + sink).start()
    server = tls.python()
    client, request = tls.keep_alive(server)
    wait_until(lambda: is_tapped(agent), 20, "tapped")

    for number in range(40):
        request(f"/n/{number}")
        if number in (10, 20, 30):
            more = {10: "side = 'server'", 20: "max_endpoints = 3", 30: "keep_query = true"}[number]
            loaded = agent.get("/readyz").json["config"]["loaded"]
            replace(agent.config_path, section(tls, more) + sink)
            agent.process.send_signal(signal.SIGHUP)
            wait_until(lambda loaded=loaded: agent.get("/readyz").json["config"]["loaded"] != loaded, 20, "taken over")
    wait_until(lambda: len(flows(events)) == 40, 20, "all flows")
    assert [one["path"] for one in flows(events)] == [f"/n/{number}" for number in range(40)]
    assert len(flows(events, "client")) < 40
    assert counter(agent, "joined_late") == 0
    request("/n?kept=1")
    wait_until(lambda: flows(events)[-1]["path"] == "/n?kept=1", 20, "the query")
    loaded = agent.get("/readyz").json["config"]["loaded"]
    replace(agent.config_path, sink)
    wait_until(lambda: agent.get("/readyz").json["config"]["loaded"] != loaded, 20, "taken over")
    assert agent.get("/readyz").json["http"] is None
    request("/unseen")
    replace(agent.config_path, section(tls) + sink)
    wait_until(lambda: is_tapped(agent), 20, "tapped again")
    request("/late")  # on the server's side its request was being read when the probes came
    request("/seen")
    wait_until(lambda: flows(events)[-1]["path"] == "/seen", 20, "on again")
    assert "/unseen" not in events.read_text(encoding="utf-8")
    assert agent.get("/readyz").json["config"]["needs_restart"] == []
    client.stdin.close()
    client.wait(timeout=20)


def test_a_library_whose_file_system_hangs_keeps_no_other_from_being_tapped_nor_the_agent_from_ending(
    tls: Tls, new_agent: NewAgent, make_library: Any, wait_until: Any, tmp_path: Path, deadline: Any
) -> None:
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    with SilentFileSystem(mounted, make_library("libserved.so")) as silent:
        silent.fall_silent()
        both = f"^({re.escape(str(tls.libraries))}|{re.escape(str(mounted))})/"
        rule = f"[[rules]]\nname = 'mine'\npattern = '^{re.escape(str(mounted))}/'\n"
        agent = new_agent(f"{rule}[http]\nenabled = true\nlibraries = '{both}'\n").start()
        wait_until(lambda: is_tapped(agent), 20, "tapped")
        wait_until(lambda: agent.get("/readyz").json["http"]["not_tapped"], 20, "named")
        assert agent.get("/readyz").json["http"]["not_tapped"] == [
            {"path": str(silent.path), "reason": "its file system does not answer"}
        ]
        server = tls.python()
        curl(tls, server, "/one")
        wait_until(lambda: counter(agent, "flows") == 2, 20, "both sides")
        # Neither an explanation nor a change of the configuration waits for it.
        assert agent.get(f"/explain?pid={server.process.pid}").json["http"]["state"] == "flows"
        replace(agent.config_path, f"{rule}[http]\nenabled = true\nlibraries = '{both}'\nside = 'client'\n")
        wait_until(lambda: "took over" in agent.log, 20, "the configuration is in force")
        assert agent.process is not None
        agent.process.send_signal(signal.SIGTERM)
        # All of it has ended but the thread that the kernel keeps for the file system, and with it the pid.
        wait_until(lambda: stat_of(agent.pid)[0] == "Z", 5, "the end")
    assert agent.process.wait(deadline(5)) == 0


def stat_of(pid: int) -> list[str]:
    """The fields of its stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(") ")[2].split()


def test_a_library_whose_file_system_answers_late_is_no_longer_named(
    tls: Tls, new_agent: NewAgent, make_library: Any, wait_until: Any, tmp_path: Path
) -> None:
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    with SilentFileSystem(mounted, make_library("libserved.so")) as silent:
        silent.fall_silent()
        rule = f"[[rules]]\nname = 'mine'\npattern = '^{re.escape(str(mounted))}/'\n"
        agent = new_agent(f"{rule}[http]\nenabled = true\nlibraries = '^{re.escape(str(mounted))}/'\n").start()
        wait_until(lambda: agent.get("/readyz").json["http"]["not_tapped"], 20, "named")
    wait_until(lambda: not agent.get("/readyz").json["http"]["not_tapped"], 20, "no longer named")


def test_processes_and_paths_are_filtered(tls: Tls, new_agent: NewAgent, wait_until: Any, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    sink = f"[[sinks]]\ntype = 'file'\npath = '{events}'\nevents = ['http']\n"
    agent = new_agent(section(tls, "process = '^curl$'\npath = '^/api/'") + sink).start()
    server = tls.python()
    wait_until(lambda: is_tapped(agent), 20, "tapped")

    def asked() -> bool:
        """A short process may have made its request before the load of its library was handled."""
        curl(tls, server, "/other", "/api/one", "/api/two")
        return bool(flows(events, "client"))

    wait_until(asked, 20, "a flow of curl")
    assert {one["path"] for one in flows(events, "client")} <= {"/api/one", "/api/two"}
    assert {one["process"]["comm"] for one in flows(events, "client")} == {"curl"}
    assert flows(events, "server") == []


def test_single_flows_are_not_shown_over_tcp_unless_that_is_asked_for(
    tls: Tls, new_agent: NewAgent, wait_until: Any
) -> None:
    port = free_port()
    agent = new_agent(section(tls), options=["--listen", f"127.0.0.1:{port}"]).start()

    def get(path: str) -> Any:
        return ask(http.client.HTTPConnection("127.0.0.1", port, timeout=20), "GET", path, None, {})

    wait_until(lambda: is_tapped(agent))
    curl(tls, tls.python(), "/users/7")
    wait_until(lambda: agent.get("/http").json["flows_seen"] == 2, 20, "both sides")
    here, over_tcp = agent.get("/http").json, get("/http").json
    assert {(one["side"], one["path"]) for one in here["flows"]} == {("client", "/users/7"), ("server", "/users/7")}
    assert {(one["side"], one["method"], one["path"], one["flows"]) for one in over_tcp["endpoints"]} == {
        ("client", "GET", "/users/*", 1),
        ("server", "GET", "/users/*", 1),
    }
    assert all(one["p50_ms"] > 0 for one in over_tcp["endpoints"])
    assert over_tcp["flows"] is None
    refused = get("/events?events=http")
    assert refused.status == 403
    assert "flows_over_tcp" in refused.json["error"]
    replace(agent.config_path, section(tls, "flows_over_tcp = true"))
    wait_until(
        lambda: (
            ask(
                http.client.HTTPConnection("127.0.0.1", port, timeout=20), "HEAD", "/events?events=http", None, {}
            ).status
            == 200
        ),
        20,
        "allowed",
    )
