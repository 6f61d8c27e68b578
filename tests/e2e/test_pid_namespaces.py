"""The command in, and for, another pid namespace than the host's: it refuses or says so, and mixes no numbers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.agent import SOWATCH, Agent, short_directory
from support.programs import Mapper

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace is made by root")

#: In a pid namespace with a proc file system of its own.
INSIDE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
#: In a pid namespace, with the host's proc file system.
BESIDE = ["unshare", "--pid", "--fork", "--kill-child"]
ELSEWHERE = "shows another pid namespace than the host's: processes outside it are not seen"


def run(*words: str | os.PathLike[str], prefix: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *SOWATCH, *words], capture_output=True, text=True, check=False)


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def gone(mapper: Mapper, make_library: Callable[..., Path]) -> Path:
    """A library that a process of the host has mapped and that is deleted."""
    library = make_library(f"libgone-{os.getpid()}.so")
    mapper.map(library)
    library.unlink()
    return library


@pytest.fixture
def inner_proc(spawn: Any) -> str:
    """The proc file system of another pid namespace, as the host reaches it."""
    process = spawn([*INSIDE, "sh", "-c", "echo; read line"], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"\n"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    return f"/proc/{child}/root/proc"


def test_in_another_pid_namespace_a_watch_falls_back_to_proc_and_says_so(schema: Any) -> None:
    done = run("watch", "--json", "--duration", "0.1", "--kind", "executable", prefix=INSIDE)
    (ready,) = [one for one in events(done) if one["event"] == "ready"]
    schema(ready)
    assert (done.returncode, ready["strategy"], ready["guarantee"]) == (0, "procfs", "sampled")
    assert f"/proc {ELSEWHERE}" in ready["limits"]
    tried = {one["strategy"]: one["error"] for one in ready["attempts"]}
    assert tried["core"] == tried["prebuilt"] == "/proc shows another pid namespace than the host's"
    # The process that waits for it, which has pid 1, is left out.
    assert {one["process"]["pid"] for one in events(done) if one["event"] == "load"} == {2}


@pytest.mark.parametrize("strategy", ["core", "runtime", "prebuilt"])
def test_in_another_pid_namespace_a_strategy_with_bpf_is_refused_with_the_remedy(strategy: str) -> None:
    done = run("watch", "--strategy", strategy, "--duration", "0.1", prefix=INSIDE)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{strategy}: /proc shows another pid namespace than the host's. Run it in the host's" in done.stderr


def test_in_another_pid_namespace_the_answer_about_stale_files_is_left_open(gone: Path) -> None:
    done = run("list", "--stale", prefix=INSIDE)
    assert done.returncode == 3
    assert f"but /proc {ELSEWHERE}" in done.stderr
    assert gone.name not in done.stdout
    assert gone.name in run("list", "--stale", prefix=[]).stdout


def test_in_another_pid_namespace_the_agent_does_not_start_unless_that_is_asked_for(
    wait_until: Any, spawn: Any
) -> None:
    with short_directory() as directory:
        done = run("serve", "--socket", directory / "s.sock", prefix=INSIDE)
        assert done.returncode == 1
        assert "cannot watch the whole host: /proc shows another pid namespace than the host's." in done.stderr
        assert "--pid=host" in done.stderr
        config = '[watch]\nstrategy = "procfs"\n'
        agent = Agent(spawn, wait_until, directory, config, prefix=INSIDE).start()
        assert f"/proc {ELSEWHERE}" in agent.get("/readyz").json["limits"]


def test_in_another_pid_namespace_with_the_hosts_proc_what_was_there_before_is_seen_by_the_hosts_numbers(
    gone: Path, mapper: Mapper
) -> None:
    """The kernel's iterators visit our own namespace only, so they are not used."""
    done = run("watch", "--json", "--duration", "0.1", "libgone-", prefix=BESIDE)
    (ready,) = [one for one in events(done) if one["event"] == "ready"]
    assert ready["attempts"][0] == {
        "strategy": "core",
        "ok": False,
        "error": "this process is not in the host's pid namespace",
    }
    loads = [one for one in events(done) if one["event"] == "load" and one["library"]["path"] == str(gone)]
    assert [one["process"]["pid"] for one in loads] == [mapper.pid]
    stale = run("list", "--stale", "--json", prefix=BESIDE)
    assert ELSEWHERE not in stale.stderr
    assert mapper.pid in [one["process"]["pid"] for one in events(stale) if one["event"] == "mapping"]


def test_the_proc_file_system_of_another_pid_namespace_is_read_by_its_own_numbers_alone(
    inner_proc: str, gone: Path
) -> None:
    done = run(*("watch", "--json", "--duration", "0.1", "--kind", "executable", "--proc-root", inner_proc), prefix=[])
    (ready,) = [one for one in events(done) if one["event"] == "ready"]
    assert ready["strategy"] == "procfs"
    assert f"{inner_proc} {ELSEWHERE}" in ready["limits"]
    assert {one["process"]["pid"] for one in events(done) if one["event"] == "load"} == {1}
    stale = run("list", "--stale", "--proc-root", inner_proc, prefix=[])
    assert stale.returncode == 3
    assert gone.name not in stale.stdout
