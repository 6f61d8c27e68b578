"""What is deployed with a receiver: the unit, and the example of a Collector for a ClickHouse."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sowatch.cli._main import command_parser
from sowatch.fleet.service import DEFAULT_STORE

ROOT = Path(__file__).resolve().parents[3]
UNIT = ROOT / "deploy" / "systemd" / "sowatch-fleet.service"
COLLECTOR = ROOT / "deploy" / "clickhouse" / "collector.yaml"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def test_the_unit_starts_a_command_that_is_understood_with_the_store_that_questions_ask() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/sowatch/bin/sowatch fleet (.*)$", UNIT.read_text("utf-8"), re.MULTILINE)
    args = command_parser("fleet")[1].parse_words(line.split())
    assert args.patterns == ["receive"]
    assert (args.store, args.token_file) == (DEFAULT_STORE, "${CREDENTIALS_DIRECTORY}/fleet.token")
    assert args.page_token_file == "${CREDENTIALS_DIRECTORY}/fleet-page.token"
    assert f"StateDirectory={DEFAULT_STORE.removeprefix('/var/lib/')}\n" in UNIT.read_text("utf-8")


@needs_systemd
def test_systemd_finds_no_fault_in_the_unit_and_little_exposed(tmp_path: Path) -> None:
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text("utf-8").replace("/opt/sowatch/bin/sowatch", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


#: Of the exporter's README, and of what it says that it takes from the Collector's own helpers.
EXPORTER = {
    *("endpoint", "username", "password", "ttl", "database", "connection_params", "create_schema", "compress"),
    *("async_insert", "tls", "logs_table_name", "timeout", "sending_queue", "retry_on_failure"),
}
QUEUE = {"enabled", "num_consumers", "queue_size", "sizer", "block_on_overflow", "storage", "batch"}
BATCH = {"flush_timeout", "min_size", "max_size", "sizer"}


def test_the_example_of_a_collector_has_settings_that_exist_and_loses_nothing() -> None:
    found: dict[str, Any] = yaml.safe_load(COLLECTOR.read_text("utf-8"))
    exporter = found["exporters"]["clickhouse"]
    queue = exporter["sending_queue"]

    assert set(exporter) <= EXPORTER
    assert set(queue) <= QUEUE
    assert set(queue["batch"]) <= BATCH
    assert (exporter["create_schema"], queue["block_on_overflow"]) == (False, True)
    assert queue["storage"] in found["extensions"]
    assert queue["batch"]["min_size"] >= 5000
    assert queue["queue_size"] >= queue["batch"]["max_size"] >= queue["batch"]["min_size"]
    assert exporter["retry_on_failure"] == {"enabled": True, "max_elapsed_time": 0}
    (pipeline,) = found["service"]["pipelines"].values()
    assert pipeline == {"receivers": list(found["receivers"]), "exporters": list(found["exporters"])}
    assert found["service"]["extensions"] == list(found["extensions"])
