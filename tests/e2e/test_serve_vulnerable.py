"""The agent and data of vulnerabilities: an upgrade under a running process, as Prometheus and `/readyz` show it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

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
