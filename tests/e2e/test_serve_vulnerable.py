"""The agent and data of vulnerabilities: an upgrade under a running process, as Prometheus and `/readyz` show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import strict
from support.advisories import advisory, write_tree
from support.agent import NewAgent
from support.package_roots import DEBIAN, Jailed, add_dpkg, dpkg_status, elf

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="BPF programs need root")

LIBRARY = "/usr/lib/liblamp-of-a-test.so.1"


def install(root: Path, version: str, number: int) -> None:
    add_dpkg(root, dpkg_status(liblamp1=(version, "Source: lamp\n")), {"liblamp1": {LIBRARY: elf(number)}})


def test_after_an_upgrade_the_agent_still_knows_what_goes_on_running(
    new_agent: NewAgent, spawn: Any, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text(DEBIAN)
    install(root, "1.0-1", 1)
    flaw = advisory("DSA-1", ranges="introduced 0, fixed 1.0-2", upstream=["CVE-1900-0001"])
    data = write_tree(tmp_path / "osv", [flaw])
    agent = new_agent(
        f"[[rules]]\npattern = 'liblamp-of-a-test'\n[vulnerabilities]\nosv = ['{data}']\ninterval_s = 1.0\n"
    ).start()

    def affected() -> str:
        lines = agent.get("/metrics").text.splitlines()
        return "".join(line for line in lines if line.startswith("sowatch_vulnerable_processes{"))

    series = 'sowatch_vulnerable_processes{id="CVE-1900-0001",package="liblamp1"} 1.0'
    old = Jailed(spawn, root)
    old.map(LIBRARY)
    agent.wait_until(lambda: affected() == series, 60, "the process to be affected")

    install(root, "1.0-2", 2)
    new = Jailed(spawn, root)
    new.map(LIBRARY)
    agent.wait_until(lambda: agent.get("/readyz").json["vulnerabilities"]["files"] == 2, 60, "both files to be judged")
    assert affected() == series
    found = agent.get("/readyz").json["vulnerabilities"]
    assert {name: found[name] for name in ("error", "advisories", "files_without_package", "affected_processes")} == {
        "error": None,
        "advisories": 1,
        "files_without_package": 0,
        "affected_processes": 1,
    }
    os.kill(old.pid, 9)
    agent.wait_until(lambda: affected() == "", 60, "nobody to be affected")
    assert agent.stop() == 0


def test_a_plan_of_the_agents_has_the_version_that_an_upgrade_has_replaced(
    new_agent: NewAgent, spawn: Any, tmp_path: Path, schema: Any
) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text(DEBIAN)
    install(root, "1.0-1", 1)
    agent = new_agent("stale_interval_s = 1\n[[rules]]\npattern = 'liblamp-of-a-test'\n").start()
    running = Jailed(spawn, root)
    running.map(LIBRARY)

    def plan(*words: str) -> list[str]:
        command = [sys.executable, "-m", "sowatch", "list", "--stale", "--plan", *words, "--agent", agent.socket]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    loaded = agent.get
    agent.wait_until(lambda: b"liblamp1" in loaded("/sbom").body, 60, "the package of what was loaded")
    install(root, "1.0-2", 2)
    agent.wait_until(plan, 60, "the upgrade")
    assert "still runs liblamp1 1.0-1 (liblamp-of-a-test.so.1)" in plan()[0]
    head, line = (strict.loads(one) for one in plan("--json"))
    schema(head), schema(line)
    ((process,), (file,)) = line["processes"], line["processes"][0]["files"]
    assert (process["process"]["pid"], process["listen"], file["mapped_package"]["version"]) == (
        running.pid,
        [],
        "1.0-1",
    )
    assert agent.stop() == 0
