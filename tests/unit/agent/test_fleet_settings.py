"""The table [fleet]: what it refuses, and where it says that."""

from __future__ import annotations

from pathlib import Path

import pytest

from sowatch.agent.fleet_feed import with_everything
from sowatch.agent.fleet_settings import FleetSettings
from sowatch.agent.preflight import check_settings
from sowatch.agent.settings import Settings, load_settings
from sowatch.model.errors import ConfigError
from sowatch.model.rules import Rule


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(str(path), environment={})


def test_it_is_off_by_default_and_adds_nothing() -> None:
    assert not FleetSettings().enabled
    assert [rule.name for rule in with_everything([Rule("x")], FleetSettings())] == ["x"]


def test_its_rule_stands_after_all_others_and_after_the_default() -> None:
    enabled = FleetSettings(enabled=True)
    assert [rule.name for rule in with_everything([Rule("x")], enabled)] == ["x", "fleet"]
    assert [rule.name for rule in with_everything([], enabled)] == ["all", "fleet"]
    assert with_everything([], enabled)[-1].kind == {"library", "executable", "interpreter"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("interval_s = 0.5", "fleet.interval_s"),
        ("interval_s = 'soon'", "fleet.interval_s"),
        ("snapshot_interval_s = 1", "fleet.snapshot_interval_s"),
        ("protocol = 'smtp'", "fleet.protocol"),
        ("headers = { 'a b' = 'c' }", "fleet.headers"),
        ('headers = { a = "b\\nc" }', "fleet.headers"),
        ("headers = { a = 1 }", "fleet.headers.a"),
        ("every_s = 30", "fleet.every_s"),
    ],
)
def test_an_error_names_the_line_and_the_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"\n[fleet]\n{text}\n")
    assert error.value.key == key
    assert error.value.source == f"{tmp_path}/config.toml:3"


def test_a_token_and_a_header_for_it_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Take one of both away"):
        load(tmp_path, "[fleet]\ntoken_file = '/x'\nheaders = { Authorization = 'y' }\n")


def test_the_name_of_its_rule_is_taken(tmp_path: Path) -> None:
    rules = "[[rules]]\nname = 'fleet'\npattern = 'x'\n"
    assert load(tmp_path, rules).rules[0].name == "fleet"
    with pytest.raises(ConfigError, match="the name of the rule"):
        load(tmp_path, f"{rules}[fleet]\nenabled = true\n")


@pytest.mark.parametrize(
    ("text", "key"),
    [("endpoint = 'fleet.example:4318'", "fleet.endpoint"), ("token_file = '/nowhere/token'", "fleet.token_file")],
)
def test_what_it_could_not_start_with_is_found_before(tmp_path: Path, text: str, key: str) -> None:
    settings = load(tmp_path, f"socket = '{tmp_path}/s.sock'\n[fleet]\nenabled = true\n{text}\n")
    with pytest.raises(ConfigError) as error:
        check_settings(settings)
    assert error.value.key == key
