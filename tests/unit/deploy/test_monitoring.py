"""The alert rules and the dashboard: promtool's word, and every metric that they name is one of ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sowatch.telemetry.names import CATALOGUE, prometheus_name

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
TESTS = DEPLOY / "prometheus" / "alerts_test.yaml"
DASHBOARD = DEPLOY / "grafana" / "sowatch.json"

KNOWN = {prometheus_name(one.name, one.kind): one for one in CATALOGUE.values()}
LABELS_OF_PROMETHEUS = {"instance", "job", "le"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def expressions() -> Iterator[str]:
    for one in alerts():
        yield one["expr"]
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for one in board["templating"]["list"]:
        yield one.get("definition", "")


def metric_of(name: str) -> Any:
    """The definition, of the samples of a histogram as well; None: there is none."""
    return KNOWN.get(name) or KNOWN.get(re.sub(r"_(bucket|sum|count)$", "", name))


def test_every_metric_that_is_named_exists() -> None:
    named = {name for text in expressions() for name in re.findall(r"\bsowatch_\w+", text)}
    assert len(named) > 20
    assert [name for name in sorted(named) if metric_of(name) is None] == []


def test_every_label_that_is_selected_is_one_of_its_metric() -> None:
    for text in expressions():
        for name, selected in re.findall(r"\b(sowatch_\w+)\{([^}]*)\}", text):
            labels = {one.replace(".", "_") for one in metric_of(name).labels}
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selected))
            assert asked <= labels | LABELS_OF_PROMETHEUS, text


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert (done.returncode, f"{len(alerts())} rules found" in done.stdout) == (0, True), done.stderr + done.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_when_all_is_well() -> None:
    done = subprocess.run(["promtool", "test", "rules", TESTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    well, ill = yaml.safe_load(TESTS.read_text(encoding="utf-8"))["tests"]
    names = {one["alert"] for one in alerts()}
    assert {one["alertname"] for one in well["alert_rule_test"]} == names
    assert {one["alertname"] for one in ill["alert_rule_test"] if one.get("exp_alerts")} == names


@needs_promtool
def test_the_test_of_the_alerts_finds_one_that_does_not_fire(tmp_path: Path) -> None:
    text = RULES.read_text(encoding="utf-8")
    (tmp_path / RULES.name).write_text(text.replace("sowatch_config_valid == 0", "sowatch_config_valid == 2"), "utf-8")
    shutil.copy(TESTS, tmp_path)
    done = subprocess.run(["promtool", "test", "rules", tmp_path / TESTS.name], capture_output=True, check=False)
    assert done.returncode != 0


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for one in alerts():
        assert one["labels"]["severity"] in ("info", "warning")
        assert one["annotations"].keys() == {"summary", "description"}


def test_the_dashboard_can_be_imported_anywhere() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {"${datasource}"}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["description"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "two panels lie upon each other"
