"""Rules of the agent that carry actions: what they attach, what they count, and that nothing stays behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.bpf.probe_object import has_uprobe_multi
from sowatch.linux.capabilities import SYS_ADMIN, without
from sowatch.uprobes.features import try_attaching
from support.agent import Agent, NewAgent, ask
from support.callers import Caller
from support.programs import compile_bpf
from support.prometheus import samples
from support.receivers import free_port

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

NewLibrary = Callable[..., Path]
NewCaller = Callable[..., Caller]
NewAttached = Callable[..., Agent]


@pytest.fixture
def caller(spawn: Any, programs: Any) -> NewCaller:
    return lambda library=None: Caller(spawn, programs["caller"], library)


@pytest.fixture(scope="module")
def user_probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_bpf("user_probes", tmp_path_factory.mktemp("bpf"))


def rule(library: Path, more: str, *, name: str = "probed") -> str:
    return f"[[rules]]\nname = '{name}'\npattern = '^{re.escape(str(library))}$'\n{more}\n"


def replace(path: Path, text: str) -> None:
    new = path.with_name(".new")
    new.write_text(text, encoding="utf-8")
    new.rename(path)


def attachments(agent: Agent, rule: str = "probed") -> dict[str, float]:
    found = samples(agent.get("/metrics").text)
    return {
        kind: found.get((f"sowatch_attachments_{kind}", frozenset({("rule", rule)})), -1.0)
        for kind in ("expected", "attached", "failed")
    }


def is_attached(agent: Agent, probes: int, rule: str = "probed") -> bool:
    found = attachments(agent, rule)
    return (found["expected"], found["attached"]) == (probes, probes)


def calls(agent: Agent, symbol: str) -> float:
    """By all series of the symbol."""
    found = samples(agent.get("/metrics").text)
    return sum(
        value
        for (name, labels), value in found.items()
        if name == "sowatch_calls_total" and ("symbol", symbol) in labels
    )


@pytest.fixture
def new_attached(new_agent: NewAgent, wait_until: Any) -> NewAttached:
    """``new_attached(probes, config)`` is an agent that has so many probes of the rule `probed` attached."""

    def start(probes: int, config: str, **options: Any) -> Agent:
        agent = new_agent(config, **options).start()
        wait_until(lambda: is_attached(agent, probes), 20)
        return agent

    return start


def test_calls_are_metrics_by_library_build_symbol_and_container_and_nothing_else(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    first = caller(path)
    agent = new_attached(4, rule(path, "count = ['plain', 'nested']"))
    first.call("plain", times=7)
    second = caller(path)
    second.call("plain", times=5)
    wait_until(lambda: calls(agent, "plain") == 12)
    found = samples(agent.get("/metrics").text)
    ((_, labels),) = [key for key in found if key[0] == "sowatch_calls_total" and ("symbol", "plain") in key[1]]
    by_name = dict(labels)
    assert by_name.keys() == {"library", "build_id", "symbol", "container"}
    assert (by_name["library"], by_name["container"]) == ("libprobed.so", "")
    assert re.fullmatch("[0-9a-f]{40}", by_name["build_id"])
    assert found["sowatch_calls_duration_seconds_count", labels] == 12
    text = agent.get("/metrics").text
    assert str(path.parent) not in text
    assert not any("pid" in dict(key[1]) for key in found)


def test_calls_of_processes_that_are_gone_stay_in_the_sum(
    new_agent: NewAgent, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    agent = new_agent(rule(path, "count = ['plain']\nlinger_s = 60")).start()
    stays = caller(path)
    wait_until(lambda: is_attached(agent, 2), 20)
    for _ in range(20):
        short = caller(path)
        short.call("plain", times=3)
        short.end()
    stays.end()
    wait_until(lambda: calls(agent, "plain") == 60)


def test_a_changed_action_detaches_and_attaches_and_a_bad_one_leaves_the_old_in_force(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    running = caller(path)
    agent = new_attached(2, rule(path, "count = ['plain']\nlinger_s = 0"))
    replace(agent.config_path, rule(path, "count = ['plain', 'nested', 'recursive']\nlinger_s = 0"))
    wait_until(lambda: is_attached(agent, 6), 20)
    running.call("recursive", 2)
    wait_until(lambda: calls(agent, "recursive") == 3)
    broken = agent.directory / "broken.bpf.o"
    broken.write_bytes(b"\x7fELF and no more")
    for more, said in (
        (f"attach = {{ object = '{broken}' }}", "rules[1].attach"),
        ("attach = { object = '/nowhere/x.bpf.o' }", "No such file"),
        ("attach = { object = 'x.bpf.o' }", "no absolute path"),
        ("count = ['']", "rules[1].count"),
        ("count = ['plain']\nlinger_s = -1", "rules[1].linger_s"),
    ):
        replace(agent.config_path, rule(path, more))
        wait_until(lambda said=said: said in (agent.get("/readyz").json["config"]["error"] or ""), 20, said)
    assert is_attached(agent, 6)
    assert agent.get("/readyz").json["attachments"] == {"probed": {"expected": 6, "attached": 6, "failed": 0}}
    running.call("recursive", 0)
    wait_until(lambda: calls(agent, "recursive") == 4)


def test_a_function_that_is_not_there_blocks_its_file_until_the_rule_is_corrected(
    new_agent: NewAgent, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    running = caller(path)
    agent = new_agent(rule(path, "count = ['plian']")).start()
    wait_until(lambda: attachments(agent)["failed"] == 1, 20)
    ((blocked,),) = [group["PathIdentifiers"] for group in agent.get("/debug/blocked_processes").json]
    assert "near: plain" in blocked["Reason"]
    replace(agent.config_path, rule(path, "count = ['plain']"))
    wait_until(lambda: is_attached(agent, 2), 20)
    assert agent.get("/debug/blocked_processes").json is None
    running.call("plain")
    wait_until(lambda: calls(agent, "plain") == 1)


def test_a_hangup_under_load_loses_no_call_of_a_rule_that_stays(
    new_agent: NewAgent, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    stays, changes = library("libstays.so"), library("libchanges.so")
    agent = new_agent(rule(stays, "count = ['plain']", name="stays") + rule(changes, "count = ['plain']", name="a"))
    agent.start()
    busy, other = caller(stays), caller(changes)
    wait_until(lambda: is_attached(agent, 2, "stays") and is_attached(agent, 2, "a"), 20)
    made = 0
    is_over = threading.Event()

    def call() -> None:
        nonlocal made
        while not is_over.is_set():
            busy.call("plain", times=1000)
            made += 1000

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for name in ("b", "c", "d"):
            text = rule(stays, "count = ['plain']", name="stays") + rule(changes, "count = ['nested']", name=name)
            replace(agent.config_path, text)
            os.kill(agent.pid, signal.SIGHUP)
            wait_until(lambda name=name: is_attached(agent, 2, name), 20)
    finally:
        is_over.set()
        thread.join()
    other.call("nested")
    wait_until(lambda: calls(agent, "nested") == 1)
    assert made > 3000
    found = samples(agent.get("/metrics").text)
    (total,) = [
        value
        for (name, labels), value in found.items()
        if name == "sowatch_calls_total" and {("library", "libstays.so"), ("symbol", "plain")} <= labels
    ]
    assert total == made


def test_detach_and_attach_by_hand_act_on_the_probes(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    running = caller(path)
    agent = new_attached(2, rule(path, "count = ['plain']\nlinger_s = 0"))
    order = {"pid": running.pid, "type": "probed"}
    assert agent.post("/debug/detach-pid", order).status == 200
    wait_until(lambda: is_attached(agent, 0), 20)
    running.call("plain")
    assert agent.post("/debug/attach-pid", order).status == 200
    wait_until(lambda: is_attached(agent, 2), 20)
    running.call("plain", times=2)
    wait_until(lambda: calls(agent, "plain") == 2)


def test_programs_of_the_user_are_attached_and_counted_as_attachments(
    new_agent: NewAgent, library: NewLibrary, caller: NewCaller, wait_until: Any, user_probes: Path
) -> None:
    path = library()
    caller(path)
    agent = new_agent(rule(path, f"attach = {{ object = '{user_probes}' }}\ncount = ['nested']")).start()
    wait_until(lambda: attachments(agent)["attached"] >= 3, 20)
    found = attachments(agent)
    assert (found["attached"], found["failed"]) == (found["expected"], 0)


def test_a_program_that_the_verifier_refuses_is_refused_with_its_last_words_and_one_built_anew_is_taken_at_a_hangup(
    new_attached: NewAttached,
    library: NewLibrary,
    caller: NewCaller,
    wait_until: Any,
    user_probes: Path,
    place: Path,
    tmp_path: Path,
) -> None:
    path, program = library(), place / "mine.bpf.o"
    caller(path)
    shutil.copyfile(compile_bpf("refused_probes", tmp_path), program)
    agent = new_attached(2, rule(path, "count = ['plain']"))
    replace(agent.config_path, rule(path, f"attach = {{ object = '{program}' }}"))
    error = wait_until(lambda: agent.get("/readyz").json["config"]["error"], 20)
    assert "rules[1].attach" in error
    assert "R0 invalid mem access 'map_value_or_null'" in error
    assert is_attached(agent, 2)
    shutil.copyfile(user_probes, program)
    os.kill(agent.pid, signal.SIGHUP)
    wait_until(lambda: agent.get("/readyz").json["config"]["valid"], 20)
    wait_until(lambda: {one["program"] for one in probes_of(agent)} == {"by_section", "uretprobe__nested"}, 20)


def probes_of(agent: Agent) -> list[Any]:
    return [probe for file in agent.get("/explain?rule=probed").json["files"] for probe in file["probes"]]


@pytest.fixture
def without_multi(tmp_path: Path) -> dict[str, str]:
    """Environment of an agent that takes the kernel for one before 6.6, which has perf events only."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sowatch.bpf.probe_object\nsowatch.bpf.probe_object.has_uprobe_multi = lambda: False\n", encoding="utf-8"
    )
    return {"PYTHONPATH": os.fspath(tmp_path)}


def keeps_admin(agent: Agent) -> bool:
    (line,) = re.findall(r"capabilities=(0x[0-9a-f]+)", agent.log)
    return bool(int(line, 16) >> SYS_ADMIN & 1)


def test_cap_sys_admin_is_kept_only_where_a_rule_attaches_and_perf_events_ask_for_it(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any, without_multi: dict[str, str]
) -> None:
    needs_admin = without(1 << SYS_ADMIN, lambda: try_attaching(multi=False)) is not None
    path = library()
    running = caller(path)
    agent = new_attached(2, rule(path, "count = ['plain']"), environment=without_multi)
    running.call("plain", times=3)
    wait_until(lambda: calls(agent, "plain") == 3)
    assert keeps_admin(agent) is needs_admin
    assert agent.stop() == 0
    agent.log_path.unlink()
    replace(agent.config_path, rule(path, ""))
    agent.start()
    assert not keeps_admin(agent)
    replace(agent.config_path, rule(path, "count = ['plain']"))
    if needs_admin:
        error = wait_until(lambda: agent.get("/readyz").json["config"]["error"], 20)
        assert "CAP_SYS_ADMIN" in error
    else:
        wait_until(lambda: is_attached(agent, 2), 20)


def test_an_agent_with_uprobe_multi_attaches_without_cap_sys_admin(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller
) -> None:
    needs_admin = without(1 << SYS_ADMIN, lambda: try_attaching(multi=False)) is not None
    path = library()
    caller(path)
    agent = new_attached(2, rule(path, "count = ['plain']"))
    assert keeps_admin(agent) is (needs_admin and not has_uprobe_multi())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_agent_leaves_nothing_attached(
    number: signal.Signals, new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    running = caller(path)
    agent = new_attached(6, rule(path, "count = ['plain', 'nested', 'recursive']\nlinger_s = 3600"))
    assert running.is_probed(path, "plain")
    agent.stop(number)
    wait_until(lambda: not running.is_probed(path, "plain"), 20)
    running.call("plain")


def test_a_file_that_is_armed_has_every_call_of_short_processes_counted(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any
) -> None:
    path = library()
    agent = new_attached(2, rule(path, f"count = ['plain']\nprearm = ['{path.parent}/*.so']"))
    for _ in range(5):
        short = caller(path)
        short.call("plain", times=2)
        short.end()
    wait_until(lambda: calls(agent, "plain") == 10)
    found = samples(agent.get("/metrics").text)
    (labels,) = [dict(key[1]) for key in found if key[0] == "sowatch_calls_total"]
    assert re.fullmatch("[0-9a-f]{40}", labels["build_id"])


@pytest.fixture
def in_container(place: Path, spawn: Any, programs: Any) -> Iterator[Callable[[str, Path], Caller]]:
    """``in_container(id, directory)`` is a caller in a cgroup as of Docker, with an overlay over the directory."""
    cgroups = place / "cgroups"
    cgroups.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", cgroups], check=True)
    made: list[tuple[Caller, Path]] = []

    def start(number: str, lower: Path) -> Caller:
        home, group = place / number, cgroups / f"docker-{number}.scope"
        for part in ("upper", "work", "merged"):
            (home / part).mkdir(parents=True)
        group.mkdir()
        layers = f"lowerdir={lower},upperdir={home}/upper,workdir={home}/work"
        program = home / "program"
        program.write_text(
            f"#!/bin/sh -e\necho $$ > {group}/cgroup.procs\nexec unshare --mount sh -ec '\n"
            f"mount -t overlay none -o {layers} {home}/merged\nexec {programs['caller']}'\n",
            encoding="utf-8",
        )
        program.chmod(0o755)
        caller = Caller(spawn, program, home / "merged" / "libprobed.so")
        made.append((caller, group))
        return caller

    yield start
    for caller, group in made:
        caller.end()
        group.rmdir()
    subprocess.run(["umount", cgroups], check=True)


def test_of_containers_that_share_a_file_each_has_its_own_count_and_all_have_one_probe(
    new_agent: NewAgent, library: NewLibrary, in_container: Any, place: Path, wait_until: Any
) -> None:
    lower = place / "lower"
    lower.mkdir()
    library().rename(lower / "libprobed.so")
    text = "[[rules]]\nname = 'probed'\npattern = '/sow-[^/]*/[0-9a-f]{64}/merged/'\ncount = ['plain']\n"
    agent = new_agent(text).start()
    numbers = ["a" * 64, "b" * 64]
    first, second = (in_container(number, lower) for number in numbers)
    wait_until(lambda: is_attached(agent, 2), 20)
    wait_until(lambda: len(agent.get("/debug/traced_programs").json[0]["PIDs"]) == 2, 20)
    first.call("plain", times=3)
    second.call("plain", times=4)
    wait_until(lambda: calls(agent, "plain") == 7)
    found = samples(agent.get("/metrics").text)
    by_container = {dict(key[1])["container"]: value for key, value in found.items() if key[0] == "sowatch_calls_total"}
    assert by_container == {numbers[0]: 3, numbers[1]: 4}
    assert is_attached(agent, 2)


def attached_to(report: dict[str, Any], path: Path) -> list[Any]:
    (found,) = [one["attachments"] for one in report["mappings"] if one["library"]["path"] == str(path)]
    return list(found)


def test_an_explanation_of_a_process_a_path_and_a_rule_has_the_attachments_over_both_sockets(
    new_attached: NewAttached, library: NewLibrary, caller: NewCaller, wait_until: Any, deadline: Any
) -> None:
    path, port = library(), free_port()
    running = caller(path)
    config = rule(path, "count = ['plain', 'nestde']\nlinger_s = 30")
    agent = new_attached(2, config, options=["--listen", f"127.0.0.1:{port}"])
    running.call("plain", times=3)
    wait_until(lambda: calls(agent, "plain") == 3)

    def over_tcp(route: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=deadline(20))
        return ask(connection, "GET", route, None, {}).json

    for get in (lambda route: agent.get(route).json, over_tcp):
        of_process = attached_to(get(f"/explain?pid={running.pid}"), path)
        assert get(f"/explain?path={path}")["attachments"] == of_process
        of_rule = get("/explain?rule=probed")
        (file,) = of_rule["files"]
        assert file.pop("library")["path"] == str(path)
        assert [file] == of_process
        assert (file["rule"], file["state"], file["users"], file["lingering"]) == ("probed", "attached", 1, False)
        assert [(one["symbol"], one["return"], one["state"]) for one in file["probes"] if one["symbol"] == "plain"] == [
            ("plain", False, "attached"),
            ("plain", True, "attached"),
        ]
        missing = [one for one in file["probes"] if one["symbol"] == "nestde"]
        assert {one["state"] for one in missing} == {"failed"}
        assert "near: nested" in missing[0]["reason"]
        assert (of_rule["action"]["count"], of_rule["action"]["attached"]) == (["plain", "nestde"], 2)
        assert [(one["symbol"], one["calls"]) for one in of_rule["calls"]] == [("plain", 3)]
    assert agent.get("/explain?rule=other").status == 404
    done = subprocess.run(
        [sys.executable, "-m", "sowatch", "debug", "explain", "--rule", "probed", "--socket", agent.socket],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("rule       probed\n")
    assert re.search(r"^  probe    nestde: \S+ failed: .*near: nested", done.stdout, re.MULTILINE)
    words = ["explain", str(running.pid), "--agent", agent.socket, "--json"]
    done = subprocess.run([sys.executable, "-m", "sowatch", *words], capture_output=True, text=True, check=True)
    assert attached_to(json.loads(done.stdout), path) == of_process
    running.end()
    wait_until(lambda: agent.get("/explain?rule=probed").json["files"][0]["lingering"], 20)
