"""Commands that ask a running agent, as typed: as root, and as nobody in the group of its socket."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sowatch.cli._schema import load_schema
from support.agent import Agent, NewAgent, short_directory
from support.printed import printed
from support.programs import Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

SOWATCH = os.fspath(Path(sys.executable).parent / "sowatch")
#: In the group of the socket, with no capability and no right to read processes of others.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
STRANGER = [word.replace("--regid=65534", "--regid=65533") for word in NOBODY]
CONFIG = """
socket_group = "65534"
[[rules]]
name = "mine"
pattern = '/sow-[^/]*/lib[^/]*\\.so$'
kind = ["library", "executable"]
"""
OURS = r"/sow-[^/]*/libours-"
#: Runs commands in one process and says which modules that took.
MODULES = """
import json, sys
from sowatch.cli._main import main
commands = [["list"], ["list", "--stale"], ["watch", "--duration", "0"], ["top", "--once"], ["audit"], ["explain", "1"]]
codes = [main([*words, "--agent", sys.argv[1]]) for words in commands]
print(json.dumps([codes, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def long_place() -> Iterator[Path]:
    with short_directory() as made:
        yield made


@pytest.fixture(scope="module")
def agent(long_place: Path, deadline: Any) -> Iterator[Agent]:
    """An agent for all tests that leave it as it is."""
    running = Agent(subprocess.Popen, deadline.wait_until, long_place, CONFIG, timeout_s=deadline(20)).start()
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def library(make_library: Any, long_place: Path) -> Iterator[Path]:
    made = long_place / f"libours-{os.urandom(4).hex()}.so"
    shutil.copyfile(make_library(), made)
    yield made
    made.unlink(missing_ok=True)


@pytest.fixture
def mapped(agent: Agent, mapper: Mapper, library: Path, wait_until: Any) -> Path:
    """A library that the mapper has, as the agent knows."""
    mapper.map(library)
    wait_until(lambda: str(library) in agent.get("/inventory").text)
    return library


def run(*words: str | Path, prefix: list[str] = NOBODY) -> subprocess.CompletedProcess[str]:
    command = [*prefix, SOWATCH, *map(os.fspath, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=100)


def answered(agent: Agent) -> str:
    return f"sowatch: the agent on {agent.socket} answered, by its rules: mine.\n"


# ---- what they show ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["library", "process"])
def test_nobody_lists_by_an_agent_what_root_lists_by_a_scan(agent: Agent, mapped: Path, by: str) -> None:
    asked = run("list", mapped.name, "--by", by, "--agent", agent.socket)
    scanned = run("list", mapped.name, "--by", by, prefix=[])

    assert (asked.returncode, asked.stderr) == (0, answered(agent))
    assert asked.stdout == scanned.stdout
    assert str(mapped) in asked.stdout


def test_an_agent_explains_what_of_a_process_is_stale(agent: Agent, mapped: Path, mapper: Mapper) -> None:
    mapped.unlink()

    process = run("explain", str(mapper.pid), "--agent", agent.socket)

    assert f"{mapped} (deleted)" in process.stdout.splitlines()
    assert "  on disk  deleted: its path leads to nothing any more" in process.stdout.splitlines()


def test_the_lines_of_a_list_are_the_same_and_its_head_says_who_answered(
    agent: Agent, mapped: Path, mapper: Mapper, schema: Any
) -> None:
    asked = run("list", mapped.name, "--json", "--agent", agent.socket)
    head, line = [schema(one) for one in asked.stdout.splitlines()]
    own_head, own = [schema(one) for one in run("list", mapped.name, "--json", prefix=[]).stdout.splitlines()]

    assert asked.stderr == ""
    assert (own_head["event"], own_head["source"], own_head["guarantee"]) == ("head", "scan", "one scan")
    assert (head["event"], head["source"], head["guarantee"]) == ("head", "agent", "exact")
    assert head["agent"] == {"socket": str(agent.socket), "version": own_head["version"]}
    assert head["rule_names"] == ["mine"]
    assert {key: head[key] for key in ("host", "host_id", "boot_id", "version")} == {
        key: own_head[key] for key in ("host", "host_id", "boot_id", "version")
    }
    assert (line["rule"], line["process"]["pid"]) == ("mine", mapper.pid)
    assert line | {"rule": mapped.name} == own


def test_filters_narrow_down_what_an_agent_answers(agent: Agent, mapped: Path, mapper: Mapper) -> None:
    def rows(*words: str) -> int:
        done = run("list", *words, "--agent", agent.socket)
        assert done.returncode == 0, done.stderr
        return done.stdout.count(str(mapped))

    assert rows() == rows("--pid", str(mapper.pid)) == rows("--kind", "all", mapped.name) == 1
    assert rows("--pid", str(os.getpid())) == rows("--kind", "executable") == rows("libnone") == 0
    assert rows("--comm", "^mapper$", "--user", "root") == 1
    assert rows("--comm", "!^mapper$") == 0
    chosen = ["-o", "pid,comm,path", "--format", "csv", "--no-headers", mapped.name]
    assert run("list", *chosen, "--agent", agent.socket).stdout == f"{mapper.pid},mapper,{mapped}\n"
    none = run("list", "--container", "0123456789ab", "--agent", agent.socket)
    assert (none.returncode, none.stdout) == (1, "")
    assert "there is no container whose id begins with '0123456789ab'" in none.stderr
    exports = run("list", "--exports", "ours", "--agent", agent.socket)
    assert (exports.returncode, exports.stdout) == (2, "")
    assert "an agent does not say what files export. Leave that out, or --agent." in exports.stderr


def test_nobody_learns_from_an_agent_what_is_stale(agent: Agent, mapped: Path, mapper: Mapper, schema: Any) -> None:
    shutil.copyfile(mapped, f"{mapped}.new")
    os.replace(f"{mapped}.new", mapped)
    asked = run("list", "--stale", mapped.name, "--agent", agent.socket)
    lines = run("list", "--stale", "--json", mapped.name, "--agent", agent.socket).stdout.splitlines()

    assert asked.returncode == 0
    assert asked.stdout == run("list", "--stale", mapped.name, prefix=[]).stdout
    assert "replaced" in asked.stdout
    _, line = [schema(one) for one in lines]
    assert (line["process"]["pid"], line["stale"], line["package"]) == (mapper.pid, "replaced", None)
    assert "unit" in line
    none = run("list", "--stale", "libnone", "--agent", agent.socket)
    assert (none.returncode, none.stderr) == (
        0,
        f"{answered(agent)}sowatch: nothing runs on deleted or replaced files.\n",
    )


def test_nobody_watches_by_an_agent_until_it_is_interrupted(
    agent: Agent, mapped: Path, mapper: Mapper, spawn: Any, schema: Any, library: Path
) -> None:
    words = [*NOBODY, SOWATCH, "watch", library.name, "--json", "--agent", os.fspath(agent.socket)]
    watch = spawn(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    begin = [schema(watch.stdout.readline()) for _ in range(3)]
    assert [(one["event"], one.get("cause")) for one in begin] == [
        ("activate", "snapshot"),
        ("load", "snapshot"),
        ("ready", None),
    ]
    assert begin[2]["limits"][-1] == answered(agent)[len("sowatch: ") : -2]
    assert begin[2]["snapshot"]["process_count"] == begin[2]["snapshot"]["mapping_count"] == 1
    child = mapper.fork()
    live = schema(watch.stdout.readline())
    assert (live["event"], live["cause"], live["process"]["pid"]) == ("load", "fork", child.pid)
    child.close()
    gone = schema(watch.stdout.readline())
    assert (gone["event"], gone["cause"], gone["process"]["pid"]) == ("unload", "exit", child.pid)
    watch.send_signal(signal.SIGINT)
    rest = [schema(line) for line in watch.stdout.read().splitlines()]
    assert [(one["event"], one.get("cause")) for one in rest] == [("deactivate", "stop"), ("stopped", None)]
    assert (rest[1]["loads"], rest[1]["unloads"], rest[1]["lost"]) == (2, 1, 0)
    assert (watch.wait(20), watch.stderr.read()) == (0, b"")


def test_a_watch_without_a_snapshot_reports_what_is_new_only(
    agent: Agent, mapped: Path, mapper: Mapper, spawn: Any
) -> None:
    words = [*NOBODY, SOWATCH, "watch", mapped.name, "--json", "--no-snapshot", "--agent", os.fspath(agent.socket)]
    watch = spawn(words, stdout=subprocess.PIPE)
    assert json.loads(watch.stdout.readline())["event"] == "ready"
    child = mapper.fork()
    found = [json.loads(watch.stdout.readline()) for _ in range(2)]
    assert [(one["event"], one["process"]["pid"]) for one in found] == [("activate", child.pid), ("load", child.pid)]
    child.close()
    assert [json.loads(watch.stdout.readline())["event"] for _ in range(2)] == ["unload", "deactivate"]
    watch.terminate()
    assert [json.loads(line)["event"] for line in watch.stdout] == ["stopped"]


def test_nobody_sees_by_an_agent_who_shares_a_library(agent: Agent, mapped: Path, mapper: Mapper, schema: Any) -> None:
    table = run("top", "--once", mapped.name, "--agent", agent.socket)
    assert (table.returncode, table.stderr) == (0, "")
    assert re.search(rf"^ +1 .*{re.escape(str(mapped))}$", table.stdout, re.MULTILINE)
    done = run("top", "--json", "--by", "process", mapped.name, "--agent", agent.socket)
    (line,) = [schema(one) for one in done.stdout.splitlines()]
    assert (line["process"]["pid"], line["library_count"], line["stale_libraries"]) == (mapper.pid, 1, 0)
    os.unlink(mapped)
    (line,) = [schema(one) for one in run("top", "--json", mapped.name, "--agent", agent.socket).stdout.splitlines()]
    assert (line["pids"], line["stale"]) == ([mapper.pid], "deleted")


def test_an_audit_by_an_agent_and_by_its_debugger_is_one_line_of_the_same_words(agent: Agent, mapped: Path) -> None:
    asked = run("audit", "--agent", agent.socket)
    debugged = run("debug", "audit", "--socket", agent.socket)
    line = r"0 differences; \d+ processes?, \d+ mappings?, \d+ unreadable, \d+ lost, \d+ repairs?\n"

    for done in (asked, debugged):
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(line, done.stdout)
    found = json.loads(run("audit", "--json", "--agent", agent.socket).stdout)
    assert found["mapping_count"] == found["mappings"] > 0


def test_an_explanation_by_an_agent_and_by_its_debugger_reads_as_one_of_a_watch(
    agent: Agent, mapped: Path, mapper: Mapper
) -> None:
    for target in (str(mapper.pid), os.fspath(mapped)):
        asked = run("explain", target, "--agent", agent.socket)
        own = run("explain", target, "--rule", OURS, prefix=[])
        assert (asked.returncode, asked.stderr) == (0, "")
        assert _moments(run("debug", "explain", target, "--socket", agent.socket).stdout) == _moments(asked.stdout)
        labels = [line.split()[0] for line in asked.stdout.splitlines() if line]
        assert labels == [line.split()[0] for line in own.stdout.splitlines() if line]
        assert (
            f"rule {'':<4} mine wants it" in re.sub(r" +rule", "rule", asked.stdout) or "mine wants it" in asked.stdout
        )


def test_a_file_is_explained_by_its_base_name(agent: Agent, mapped: Path, mapper: Mapper) -> None:
    by_name = run("explain", mapped.name, "--agent", agent.socket)
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout.startswith(f"path       {mapped}\n")
    assert f"{mapper.pid}  mapper  this file" in by_name.stdout
    nobody = run("explain", "libsowatch-none.so", "--agent", agent.socket)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "has a file named 'libsowatch-none.so' mapped" in nobody.stderr


def _moments(text: str) -> str:
    """Without what differs from one moment to the next: seconds that are left, and microseconds of another clock."""
    return re.sub(r"since \S+", "since then", re.sub(r"\d+ s more", "N s more", text))


def test_the_debugger_has_the_columns_of_a_list_and_the_rule(agent: Agent, mapped: Path) -> None:
    shown = run("debug", "inventory", "--socket", agent.socket).stdout.splitlines()
    listed = run("list", "--agent", agent.socket).stdout.splitlines()

    (ours,) = [line.split() for line in shown if line.endswith(str(mapped))]
    (same,) = [line.split() for line in listed if line.endswith(str(mapped))]
    assert [word for word in shown[0].split() if word != "RULE"] == listed[0].split()
    assert ours.pop(-2) == "mine"
    assert ours == same


# ---- how they fail -------------------------------------------------------------------------------


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of a command that failed."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_who_may_not_use_the_socket_learns_which_group_may(agent: Agent) -> None:
    said = failed(run("list", "--agent", agent.socket, prefix=STRANGER), 3)
    assert "it is for user root and group nogroup. Join the group, `sudo usermod -aG nogroup $USER`" in said


def test_a_socket_without_a_group_says_which_setting_gives_it_one(new_agent: NewAgent) -> None:
    lonely = new_agent(CONFIG.replace('socket_group = "65534"', "")).start()
    said = failed(run("list", "--agent", lonely.socket), 3)
    assert "it is for user root only. Set socket_group in the agent's configuration" in said


def test_an_agent_that_hangs_is_given_up_after_a_deadline(new_agent: NewAgent) -> None:
    stopped = new_agent(CONFIG).start()
    assert stopped.process is not None
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        said = failed(run("list", "--agent", stopped.socket), 1)
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    assert re.search(r"has not answered for \d+ s: it hangs, or was stopped\. See its log, and restart it: ", said)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_watch_whose_agent_ends_says_so_and_ends_with_1(
    new_agent: NewAgent, spawn: Any, number: signal.Signals
) -> None:
    ending = new_agent(CONFIG).start()
    words = [*NOBODY, SOWATCH, "watch", OURS, "--json", "--agent", os.fspath(ending.socket)]
    watch = spawn(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while json.loads(watch.stdout.readline())["event"] != "ready":
        pass
    ending.stop(number)
    assert watch.wait(30) == 1
    said = watch.stderr.read().decode()
    assert said.count("\n") == 1
    assert said.endswith("start it again with `sowatch serve`.\n")


def test_a_process_that_is_not_there_is_refused_as_without_an_agent(agent: Agent) -> None:
    assert "there is no process 4194303" in failed(run("list", "--pid", "4194303", "--agent", agent.socket), 1)


# ---- what they take ------------------------------------------------------------------------------


def test_clients_load_nothing_of_the_kernel_side(agent: Agent) -> None:
    command = [*NOBODY, sys.executable, "-c", MODULES, os.fspath(agent.socket)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/", timeout=100)
    codes, modules = json.loads(done.stderr.splitlines()[-1])
    assert codes == [0] * 6
    parts = ("bpf", "sources", "engine", "explain", "watcher", "uprobes", "http", "agent")
    heavy = [f"sowatch.{part}" for part in parts] + ["_cffi_backend", "cffi", "asyncio", "starlette", "rich"]
    assert [one for one in modules if one in heavy] == []


def test_every_command_prints_what_the_schema_has(agent: Agent, mapped: Path, mapper: Mapper) -> None:
    """Those of the agent, which print the same types; `doctor`, `trace` and `http` have tests of their own."""
    by_socket, pid = ("--socket", os.fspath(agent.socket)), str(mapper.pid)
    ask = ("--json", "--agent", os.fspath(agent.socket))
    asked: list[tuple[set[str], tuple[str, ...]]] = [
        ({"head", "mapping"}, ("list", mapped.name, *ask)),
        ({"head"}, ("list", "--stale", mapped.name, *ask)),
        ({"activate", "load", "ready", "deactivate", "stopped"}, ("watch", mapped.name, "--duration", "0", *ask)),
        ({"library"}, ("top", mapped.name, *ask)),
        ({"process"}, ("top", mapped.name, "--by", "process", *ask)),
        ({"audit"}, ("audit", *ask)),
        ({"explain"}, ("explain", pid, *ask)),
        ({"explain"}, ("explain", os.fspath(mapped), *ask)),
        ({"audit"}, ("debug", "audit", "--json", *by_socket)),
        ({"inventory"}, ("debug", "inventory", "--json", *by_socket)),
        ({"explain"}, ("debug", "explain", "--rule", "mine", "--json", *by_socket)),
    ]
    for events, words in asked:
        done = run(*words)
        assert done.returncode == 0, done.stderr
        lines = [printed(line) for line in done.stdout.splitlines()]
        assert {one["event"] for one in lines} == events, words
        assert [one["seq"] for one in lines] == list(range(1, len(lines) + 1))


def test_the_schema_is_printed_whole_and_of_one_command() -> None:
    whole, of_list = (json.loads(run("schema", *words).stdout) for words in ([], ["list"]))
    assert whole["$id"] == "urn:sowatch:schema:1"
    assert whole == load_schema()
    events = ["head", "mapping", "coverage", "vulnerable", "vulnerability_data", "restart"]
    assert of_list["properties"]["event"]["enum"] == events
    unknown = run("schema", "lst")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "no schema has the name 'lst'. Did you mean" in unknown.stderr
