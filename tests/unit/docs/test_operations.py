"""What docs/operations.md, the unit and the example say of the agent is so."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sowatch.linux.capabilities import NEEDED
from sowatch.telemetry.names import CATALOGUE, prometheus_name
from support.doc_blocks import blocks

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
UNIT = ROOT / "deploy" / "systemd" / "sowatch.service"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_page_and_the_unit_have_the_capabilities_that_are_kept() -> None:
    assert set(re.findall(r"^\| `(CAP_\w+)` \|", PAGE, flags=re.MULTILINE)) == set(NEEDED)
    for key in ("AmbientCapabilities", "CapabilityBoundingSet"):
        assert [set(one.split()) for one in values(key)] == [set(NEEDED)]


def test_every_metric_to_alert_on_exists() -> None:
    known = {prometheus_name(one.name, one.kind) for one in CATALOGUE.values()}
    named = set(re.findall(r"\bsowatch_\w+", PAGE))
    assert len(named) > 8
    assert named <= known


def test_every_expression_to_alert_on_is_one(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.fail("this test needs promtool; run scripts/setup --for test")
    section = PAGE.partition("## What to alert on\n")[2].partition("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", row)[1] for row in section.splitlines() if row.startswith("| `")]
    found = [one.replace("\\|", "|") for cell in cells for one in re.findall(r"`([^`]+)`", cell)]
    assert len(found) > 12
    rules = tmp_path / "rules.yml"
    alerts = ", ".join(f"{{alert: A{number}, expr: {expression!r}}}" for number, expression in enumerate(found))
    rules.write_text(f"groups: [{{name: page, rules: [{alerts}]}}]\n", encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


#: Where the pages, and the head of the unit, have the command installed from a wheel.
COMMAND = "/opt/sowatch/bin/sowatch"


def test_the_unit_starts_the_command_where_the_pages_install_it_and_the_package_where_it_has_it() -> None:
    text = UNIT.read_text(encoding="utf-8")
    assert re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE) == [COMMAND]
    for path in (
        UNIT,
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docs/start.md", "docs/operations.md")),
    ):
        said = path.read_text(encoding="utf-8")
        assert re.search(r"venv /opt/sowatch\s.{0,4}&& /opt/sowatch/bin/pip install", said, re.DOTALL), path
        # Of two wheels in a directory, that of this machine.
        assert "sowatch-*.whl" not in said, path
        assert "./sowatch-*_$(uname -m).whl" in said, path
    (edit,) = re.findall(
        r"^\tsed '(.*)' deploy/systemd/", (ROOT / "deploy/debian/rules").read_text("utf-8"), re.MULTILINE
    )
    packed = subprocess.run(["sed", edit, UNIT], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^ExecStart=(\S+)", packed, re.MULTILINE) == ["/usr/bin/sowatch"]


@pytest.fixture
def runnable_unit(tmp_path: Path) -> Path:
    """The unit with a command that is there, whatever is installed where."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text(encoding="utf-8").replace(COMMAND, "/bin/true"), encoding="utf-8")
    return path


@needs_systemd
def test_systemd_finds_no_fault_in_the_unit(runnable_unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", runnable_unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_systemd_finds_no_fault_in_the_unit_with_what_older_kernels_need(runnable_unit: Path) -> None:
    (block,) = [one for one in blocks() if one.page == "docs/operations.md" and one.language == "ini"]
    drop_in = runnable_unit.parent / f"{runnable_unit.name}.d"
    drop_in.mkdir()
    (drop_in / "attach.conf").write_text(block.text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", runnable_unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # A line of it that systemd does not know would be reported.
    (drop_in / "attach.conf").write_text(block.text.replace("AmbientCapabilities", "AmbientPowers"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", runnable_unit], capture_output=True, text=True, check=False)
    assert "AmbientPowers" in done.stderr


@needs_systemd
def test_systemd_finds_the_unit_little_exposed(runnable_unit: Path) -> None:
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=40", runnable_unit]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
