"""The section [http] of the agent's configuration: what is refused, with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sowatch.agent.settings import HttpSettings, load_settings
from sowatch.model.errors import ConfigError

REFUSED = [
    ("enabled = 'yes'", "http.enabled", "Give true or false."),
    ("enabeld = true", "http.enabeld", "Known ones: enabled, libraries"),
    ("libraries = '('", "http.libraries", "escape special characters with a backslash."),
    ("process = '['", "http.process", "escape special characters with a backslash."),
    ("path = '*'", "http.path", "escape special characters with a backslash."),
    ("side = 'both'", "http.side", "none of client, server. Use one of them."),
    ("containers = ['']", "http.containers", "Give beginnings of ids."),
    ("containers = 'abc'", "http.containers", 'Write ["one", "two"].'),
    ("capture_bytes = 63", "http.capture_bytes", "Use a number from 64 to 262144."),
    ("capture_bytes = 262145", "http.capture_bytes", "Use a number from 64 to 262144."),
    ("capture_bytes = 64.0", "http.capture_bytes", "Give a whole number."),
    ("linger_s = -1", "http.linger_s", "Use a number from 0 to 86400."),
    ("linger_s = nan", "http.linger_s", "Use a number from 0 to 86400."),
    ("linger_s = 86401", "http.linger_s", "Use a number from 0 to 86400."),
    ("max_endpoints = 0", "http.max_endpoints", "Use a number from 1 to 180."),
    ("max_endpoints = 181", "http.max_endpoints", "Use a number from 1 to 180."),
    ("keep_query = 1", "http.keep_query", "Give true or false."),
    ("events = 'none'", "http.events", "Give true or false."),
    ("flows_over_tcp = 'no'", "http.flows_over_tcp", "Give true or false."),
]


@pytest.mark.parametrize(("line", "key", "next_step"), REFUSED)
def test_a_wrong_value_of_http_is_refused_with_its_line_and_what_to_do(
    line: str, key: str, next_step: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[http]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(str(path), environment={})
    said = str(caught.value)
    assert key in said
    assert f"{path}:2" in said
    assert next_step in said
    assert said.endswith(".")


@pytest.mark.parametrize(
    "line", ["capture_bytes = 64", "capture_bytes = 262144", "linger_s = 0", "max_endpoints = 180", "side = 'server'"]
)
def test_the_bounds_of_http_themselves_are_taken(line: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[http]\nenabled = true\n{line}\n", encoding="utf-8")
    key, _, value = line.partition(" = ")
    assert str(getattr(load_settings(str(path), environment={}).http, key)) in (value, f"{value}.0", value.strip("'"))


def test_names_of_rules_that_begin_like_those_of_http_are_refused_while_it_is_on(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    rules = "[[rules]]\nname = 'http-openssl'\npattern = 'x'\n"
    path.write_text(rules, encoding="utf-8")
    assert load_settings(str(path), environment={}).http == HttpSettings()
    path.write_text(f"[http]\nenabled = true\n{rules}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rules.*'http-openssl' begins like.*Give it another name\.$"):
        load_settings(str(path), environment={})


def check(path: Path, *, before: str = "") -> subprocess.CompletedProcess[str]:
    words = ["serve", "--check", "--config", str(path)]
    program = f"import sys; {before}; from sowatch.cli import main; sys.exit(main({words!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


def test_the_command_that_checks_a_configuration_refuses_a_wrong_section_of_http(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[http]\nenabled = true\nmax_endpoints = 500\n", encoding="utf-8")
    done = check(path, before="pass")
    assert done.returncode == 2
    assert "http.max_endpoints" in done.stderr
    assert done.stderr.endswith("500 is out of range. Use a number from 1 to 180.\n")
    path.write_text("[http]\nenabled = true\n", encoding="utf-8")
    assert check(path, before="pass").returncode == 0


@pytest.mark.parametrize("package", ["httptools", "hpack", "ddsketch"])
def test_http_without_a_package_of_its_extra_is_refused_with_the_way_to_install_it(
    package: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[http]\nenabled = true\n", encoding="utf-8")
    done = check(path, before=f"sys.modules[{package!r}] = None")
    assert done.returncode == 2
    assert f"{package} is not installed, and decoding needs it." in done.stderr
    assert done.stderr.endswith("Install it: pip install 'sowatch[http]'.\n")
    path.write_text("[http]\nenabled = false\n", encoding="utf-8")
    assert check(path, before=f"sys.modules[{package!r}] = None").returncode == 0
