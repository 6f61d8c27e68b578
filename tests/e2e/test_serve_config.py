"""The agent's configuration while it runs: however the file is changed, and whatever stands in it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.agent import Agent, NewAgent, ask
from support.kernel import TAG, WITH_TRACEFS, WITHOUT_TRACEFS
from support.programs import Mapper
from support.receivers import free_port, grpc_collector, http_collector

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")


def rule(name: str) -> str:
    return f"[[rules]]\nname = '{name}'\npattern = '/sow-[^/]*/lib{name}\\.so$'\n"


def rules(agent: Agent) -> list[str]:
    found: list[str] = agent.get("/readyz").json["rules"]
    return found


def replace(path: Path, text: str) -> None:
    new = path.with_name(".new")
    new.write_text(text, encoding="utf-8")
    new.rename(path)


def test_a_file_written_in_place_takes_effect_without_a_restart(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, place: Path, wait_until: Any
) -> None:
    one, two = (shutil.copyfile(make_library(), place / f"lib{name}.so") for name in ("one", "two"))
    mapper.map(one)
    mapper.map(two)
    agent = new_agent(rule("one")).start()
    stream = agent.events()
    stream.until(lambda event: event["event"] == "ready")
    agent.config_path.write_text(rule("two"), encoding="utf-8")
    found = stream.until(lambda event: event["event"] == "load")
    stream.close()
    assert [(event["event"], event.get("cause"), event["rule"]) for event in found] == [
        ("unload", "rules", "one"),
        ("deactivate", None, "one"),
        ("activate", None, "two"),
        ("load", "snapshot", "two"),
    ]
    wait_until(lambda: agent.get("/readyz").json["config"]["valid"] and rules(agent) == ["two"])
    # Counted when all of it is in force, not just the rules.
    wait_until(lambda: 'sowatch_config_loads_total{result="ok"} 2.0' in agent.get("/metrics").text, what="the count")


def test_a_name_of_this_host_is_served_as_long_as_it_is_in_the_file(new_agent: NewAgent, wait_until: Any) -> None:
    port = free_port()

    def status_under(name: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        return ask(connection, "GET", "/healthz", None, {"Host": name}).status

    agent = new_agent(rule("a"), options=["--listen", f"127.0.0.1:{port}"]).start()
    assert (status_under("one.example"), status_under("localhost")) == (421, 200)
    replace(agent.config_path, f"allowed_hosts = ['one.example']\n{rule('a')}")
    wait_until(lambda: status_under("one.example") == 200)
    replace(agent.config_path, f"allowed_hosts = ['two.example']\n{rule('a')}")
    wait_until(lambda: status_under("one.example") == 421)
    assert (status_under("two.example"), status_under("localhost"), status_under("127.0.0.1")) == (200, 200, 200)


def test_a_file_replaced_by_a_rename_takes_effect_again_and_again(new_agent: NewAgent, wait_until: Any) -> None:
    agent = new_agent(rule("a")).start()
    for name in ("b", "c", "d"):
        replace(agent.config_path, rule(name))
        wait_until(lambda name=name: rules(agent) == [name])


def test_a_file_replaced_through_links_as_kubernetes_does_takes_effect(
    new_agent: NewAgent, place: Path, wait_until: Any
) -> None:
    volume = place / "volume"

    def publish(version: str, text: str) -> None:
        directory = volume / f"..{version}"
        directory.mkdir(parents=True)
        (directory / "config.toml").write_text(text, encoding="utf-8")
        (volume / "..data_tmp").symlink_to(directory.name)
        (volume / "..data_tmp").rename(volume / "..data")

    publish("1", rule("a"))
    (volume / "config.toml").symlink_to("..data/config.toml")
    agent = new_agent(options=["--config", os.fspath(volume / "config.toml")]).start()
    assert rules(agent) == ["a"]
    for version, name in (("2", "b"), ("3", "c")):
        publish(version, rule(name))
        wait_until(lambda name=name: rules(agent) == [name])
        shutil.rmtree(volume / f"..{int(version) - 1}")
    replace(volume / "..3" / "config.toml", rule("d"))
    wait_until(lambda: rules(agent) == ["d"])


def test_a_hangup_reads_the_file_where_it_is_not_watched(new_agent: NewAgent, wait_until: Any) -> None:
    agent = new_agent("reload = false\n" + rule("a")).start()
    agent.config_path.write_text("reload = false\n" + rule("b"), encoding="utf-8")
    assert agent.process is not None
    agent.process.send_signal(signal.SIGHUP)
    wait_until(lambda: rules(agent) == ["b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rules]]\npattern = '('\n", ["config.toml:2", "rules[1].pattern", "bad pattern"]),
        ("log_level = 'info'\nnonsense = 1\n", ["config.toml:2", "nonsense", "no such key"]),
        ("audit_interval_s = 'often'\n", ["config.toml:1", "audit_interval_s", "is not a number"]),
        ("[[rules]\n", ["config.toml:1", "not valid TOML"]),
        ("[[sinks]]\ntype = 'file'\npath = '/nothing/here'\n", ["file sink", "No such file or directory"]),
    ],
)
def test_a_file_that_cannot_be_used_leaves_the_old_in_force_and_is_told(
    text: str, said: list[str], new_agent: NewAgent, wait_until: Any
) -> None:
    agent = new_agent(rule("a")).start()
    # In one step: between the two of a write in place a busy machine may leave the agent time for an empty file.
    replace(agent.config_path, text)
    wait_until(lambda: not agent.get("/readyz").json["config"]["valid"], 30)
    ready = agent.get("/readyz")
    assert (ready.status, ready.json["rules"]) == (200, ["a"])
    for word in said:
        assert word in ready.json["config"]["error"]
        assert word in agent.log
    metrics = agent.get("/metrics").text
    assert 'sowatch_config_loads_total{result="invalid"} 1.0' in metrics
    assert "sowatch_config_valid 0.0" in metrics
    replace(agent.config_path, rule("b"))
    wait_until(lambda: rules(agent) == ["b"] and agent.get("/readyz").json["config"]["valid"], 30)


def test_a_file_that_goes_away_or_may_not_be_read_leaves_the_old_in_force(new_agent: NewAgent, wait_until: Any) -> None:
    agent = new_agent(rule("a")).start()
    agent.config_path.unlink()
    wait_until(lambda: "does not exist" in (agent.get("/readyz").json["config"]["error"] or ""))
    agent.config_path.mkdir()
    wait_until(lambda: "cannot read" in (agent.get("/readyz").json["config"]["error"] or ""))
    agent.config_path.rmdir()
    agent.config_path.write_text(rule("b"), encoding="utf-8")
    wait_until(lambda: rules(agent) == ["b"])


def test_what_needs_a_restart_is_named_and_everything_else_takes_effect(new_agent: NewAgent, wait_until: Any) -> None:
    agent = new_agent(rule("a")).start()
    replace(agent.config_path, f'listen = "127.0.0.1:{free_port()}"\n[watch]\nring_bytes = 4096\n{rule("b")}')
    wait_until(lambda: rules(agent) == ["b"])
    wait_until(lambda: agent.get("/readyz").json["config"]["needs_restart"] == ["listen", "watch.ring_bytes"])
    replace(agent.config_path, rule("c"))
    wait_until(lambda: agent.get("/readyz").json["config"]["needs_restart"] == [])


def test_a_sink_of_a_changed_file_gets_events_and_one_that_is_gone_is_closed(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, place: Path, wait_until: Any
) -> None:
    library = shutil.copyfile(make_library(), place / "liba.so")
    agent = new_agent(rule("a")).start()
    path = place / "events.jsonl"
    replace(agent.config_path, f"{rule('a')}[[sinks]]\ntype = 'file'\npath = '{path}'\n")
    wait_until(path.exists)
    at = mapper.map(library)
    wait_until(lambda: path.read_text(encoding="utf-8").count('"event":"load"') == 1)
    path.rename(place / "rotated")
    assert agent.process is not None
    agent.process.send_signal(signal.SIGHUP)
    # The next event is what has the file opened anew.
    wait_until(lambda: agent.log.count("took over") >= 2)
    mapper.unmap(*at)
    wait_until(lambda: path.exists() and '"event":"unload"' in path.read_text(encoding="utf-8"))
    replace(agent.config_path, rule("a"))
    wait_until(lambda: str(path) not in open_files(agent.pid))


def open_files(pid: int) -> list[str]:
    """What its descriptors lead to."""
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(one))
    return found


def test_wrong_settings_end_the_command_with_the_place_of_the_fault(place: Path) -> None:
    path = place / "c.toml"
    path.write_text("socket = '/x'\nsokcet = 1\n", encoding="utf-8")
    words = [os.sys.executable, "-m", "sowatch", "serve", "--config", path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"sokcet (from {path}:2): there is no such key." in done.stderr
    path.write_text("audit_interval_s = 5\n", encoding="utf-8")
    done = subprocess.run([*words, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the settings are right\n", "")


def test_what_check_refuses_serve_refuses_in_the_same_words(place: Path) -> None:
    path = place / "config.toml"
    path.write_text("[[sinks]]\ntype = 'file'\npath = '/no/such/directory/x'\n", encoding="utf-8")
    words = [sys.executable, "-m", "sowatch", "serve", "--config", str(path), "--socket", str(place / "s.sock")]
    checked, served = (
        subprocess.run([*words, *more], capture_output=True, text=True, check=False) for more in (["--check"], [])
    )
    assert (checked.returncode, served.returncode) == (2, 2)
    assert "sinks[1].path: cannot write '/no/such/directory/x'" in checked.stderr
    assert checked.stderr == served.stderr


def test_systemd_is_told_of_readiness_reloads_life_and_the_end(
    new_agent: NewAgent, place: Path, wait_until: Any
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(os.fspath(place / "notify"))
        systemd.settimeout(20)
        environment = {"NOTIFY_SOCKET": os.fspath(place / "notify"), "WATCHDOG_USEC": "600000"}
        agent = new_agent(rule("a"), environment=environment).start()
        assert systemd.recv(4096) == b"READY=1\nSTATUS=watching by core (exact)"
        assert systemd.recv(4096) == b"WATCHDOG=1"
        replace(agent.config_path, rule("b"))
        said = [b""]
        while not said[-1].startswith(b"READY=1"):
            said.append(systemd.recv(4096))
        assert any(one.startswith(b"RELOADING=1\nMONOTONIC_USEC=") for one in said)
        assert agent.stop() == 0
        while (last := systemd.recv(4096)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


def _as_nobody() -> list[str]:
    """Runs a command as nobody with the capabilities that the agent says it needs."""
    from sowatch.linux.capabilities import NEEDED

    capabilities = ",".join("+" + name.removeprefix("CAP_").lower() for name in NEEDED)
    sets = [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"]
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *sets]


@pytest.mark.fresh
def test_without_tracefs_the_error_names_the_command_that_mounts_it(place: Path) -> None:
    os.chown(place, 65534, 65534)
    # Always by tracepoints, which hooks on functions do without.
    words = [sys.executable, "-m", "sowatch", "watch", "--strategy", "prebuilt", "--duration", "0", "--json", TAG]
    refused = _run([*WITHOUT_TRACEFS, *_as_nobody(), *words], place)
    assert (refused.returncode, refused.stdout) == (3, "")
    command = refused.stderr.strip().rpartition("As root: ")[2]
    assert "tracefs is not mounted" in refused.stderr
    assert command == "mount -t tracefs tracefs /sys/kernel/tracing"
    # As root in the same place, and then the same words again.
    mounted = [*WITHOUT_TRACEFS, "sh", "-c", f'{command} && exec "$@"', "sh"]
    accepted = _run([*mounted, *_as_nobody(), *words], place)
    assert accepted.returncode == 0, accepted.stderr
    assert '"strategy":"prebuilt"' in accepted.stdout


def _run(words: Sequence[str], home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": os.fspath(home)}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.fresh
def test_an_agent_that_is_not_root_works_with_the_capabilities_that_are_named(
    new_agent: NewAgent, mapper: Mapper, make_library: Any, place: Path, wait_until: Any
) -> None:
    from sowatch.linux.capabilities import NEEDED

    library = shutil.copyfile(make_library(), place / "liba.so")
    mapper.map(library)
    os.chown(place, 65534, 65534)
    agent = new_agent(rule("a"), prefix=[*WITH_TRACEFS, *_as_nobody()]).start()
    status = Path(f"/proc/{agent.pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    mask = sum(1 << bit for bit, _ in NEEDED.values())
    assert fields["Uid"].split() == ["65534"] * 4
    assert (int(fields["CapEff"], 16), int(fields["CapInh"], 16), int(fields["CapAmb"], 16)) == (mask, 0, 0)
    assert agent.get("/readyz").json["strategy"] == "core"
    found = agent.get("/inventory").json
    assert [(one["path"], bool(one["build_id"])) for one in found["libraries"]] == [(str(library), True)]
    assert agent.get("/audit").json["differences"] == []
    mapped = agent.get(f"/explain?pid={mapper.pid}").json["mappings"]
    assert [one["rule"] for one in mapped if one["library"]["path"] == str(library)] == ["a"]
    assert agent.get(f"/explain?path={library}").json["file"]["opened_by"] is not None


@pytest.mark.fresh
def test_an_agent_of_root_gives_up_what_it_does_not_need_in_every_thread(
    new_agent: NewAgent, place: Path, mapper: Mapper, make_library: Any, wait_until: Any
) -> None:
    from sowatch.linux.capabilities import NEEDED

    with grpc_collector() as grpc_side, http_collector() as http_side:
        outputs = f"""
            [[sinks]]
            type = "file"
            path = "{place}/events.jsonl"
            [[sinks]]
            type = "stdout"
            [[sinks]]
            type = "otlp"
            name = "by grpc"
            protocol = "grpc"
            endpoint = "{grpc_side.url}"
            [[sinks]]
            type = "otlp"
            name = "by http"
            endpoint = "{http_side.url}"
            [[exporters]]
            type = "statsd"
            address = "udp://127.0.0.1:{free_port()}"
            [[exporters]]
            type = "otlp"
            protocol = "grpc"
            interval_s = 0.1
            endpoint = "{grpc_side.url}"
            [[exporters]]
            type = "otlp"
            interval_s = 0.1
            endpoint = "{http_side.url}"
        """
        agent = new_agent(rule("a") + textwrap.dedent(outputs)).start()
        mapper.map(shutil.copyfile(make_library(), place / "liba.so"))
        # Each has sent something, so each has the threads that it ever has.
        wait_until(lambda: (place / "events.jsonl").stat().st_size > 0, what="the file")
        wait_until(lambda: grpc_side.logs and grpc_side.metrics, what="what comes by gRPC")
        wait_until(lambda: http_side.logs and http_side.metrics, what="what comes by HTTP")
        mask = sum(1 << bit for bit, _ in NEEDED.values())
        threads = list(Path(f"/proc/{agent.pid}/task").iterdir())
        for thread in threads:
            try:
                fields = dict(
                    line.split(":\t", 1) for line in (thread / "status").read_text(encoding="ascii").splitlines()
                )
            except OSError:
                continue  # it has ended
            sets = {name: int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
            assert sets == {"CapEff": mask, "CapPrm": mask, "CapBnd": mask, "CapInh": 0, "CapAmb": 0}, fields["Name"]
            assert fields["NoNewPrivs"] == "1"
        assert len(threads) > 10
        ready = agent.get("/readyz").json
        assert ready["outputs"] == []
        origin = {"host.name": ready["host"], "host.id": ready["host_id"], "service.version": ready["version"]}
        for side in (grpc_side, http_side):
            for one in (side.logs[0].resource_logs[0], side.metrics[0].resource_metrics[0]):
                found = {each.key: each.value.string_value for each in one.resource.attributes}
                assert {key: value for key, value in origin.items() if value}.items() <= found.items()
        head = json.loads((place / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert head["event"] == "head"
        assert {key: head[key] for key in ("host", "host_id", "boot_id", "version")} == {
            key: ready[key] for key in ("host", "host_id", "boot_id", "version")
        }
        assert agent.stop() == 0


def test_a_file_sink_is_opened_by_the_user_that_is_left(new_agent: NewAgent, place: Path) -> None:
    """Root without its capabilities may not write what belongs to others."""
    other = place / "others.jsonl"
    other.touch(mode=0o600)
    os.chown(other, 65534, 65534)
    agent = new_agent(f'{rule("a")}\n[[sinks]]\ntype = "file"\npath = "{other}"\n').start(wait=False)
    assert agent.process is not None
    assert agent.process.wait(agent.timeout_s) == 2
    assert f"{other}" in agent.log
    assert "Permission denied" in agent.log
    assert other.stat().st_size == 0


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_collector_that_never_answers_does_not_keep_the_agent_from_ending(new_agent: NewAgent, protocol: str) -> None:
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        where = f'endpoint = "http://127.0.0.1:{silent.getsockname()[1]}"\nprotocol = "{protocol}"\n'
        agent = new_agent(
            f'[[sinks]]\ntype = "otlp"\n{where}'
            f'[[sinks]]\ntype = "stdout"\n'
            f'[[exporters]]\ntype = "otlp"\ninterval_s = 1\n{where}'
        ).start()
        silent.settimeout(20)
        for _ in range(2):  # the sink and the exporter have called
            stack.enter_context(silent.accept()[0])
        states = {one["name"]: one for one in agent.get("/readyz").json["output_states"] if one["kind"] == "sink"}
        assert states["stdout"]["up"] is True
        assert (states["otlp"]["type"], states["otlp"]["events"]) == ("otlp", 0)
        # Exit status 1 is that of the last resort, which ends what hangs.
        assert agent.stop() == 0, agent.log
        assert "something hangs" not in agent.log


def test_readyz_shows_each_output_with_its_state(new_agent: NewAgent, wait_until: Any) -> None:
    port = free_port()
    agent = new_agent(
        f'[[sinks]]\ntype = "otlp"\nname = "gone"\nendpoint = "http://127.0.0.1:{port}"\n'
        '[[exporters]]\ntype = "statsd"\n'
    ).start()

    def states() -> dict[str, Any]:
        return {one["name"]: one for one in agent.get("/readyz").json["output_states"]}

    wait_until(lambda: states()["gone"]["up"] is False)
    wait_until(lambda: states()["statsd"]["pushes"] + states()["statsd"]["errors"] > 0)
    assert (states()["gone"]["kind"], states()["gone"]["type"], states()["gone"]["events"]) == ("sink", "otlp", 0)
    assert str(port) in states()["gone"]["error"]
    assert states()["statsd"]["kind"] == "exporter"
    assert len(agent.get("/readyz").json["outputs"]) >= 1


def test_log_lines_are_json_if_asked_for(new_agent: NewAgent) -> None:
    agent = new_agent('log_format = "json"\nlog_level = "debug"\n').start()
    assert agent.stop() == 0
    lines = [json.loads(line) for line in agent.log.splitlines()]
    assert {"ready", "stopped"} <= {line["msg"] for line in lines}
    assert all({"time", "level", "logger", "msg"} <= line.keys() for line in lines)
