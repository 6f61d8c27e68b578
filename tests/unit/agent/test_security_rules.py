"""The rules for code from where programs may write, as they ship."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sowatch.agent.settings import load_settings
from sowatch.model.rules import Rule, RuleSet

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "security.toml"


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("/memfd:x", "memory"),
        ("/memfd:/tmp/x.so", "memory"),
        ("/dev/shm/x.so", "shared-memory"),
        ("/tmp/x.so", "temporary"),
        ("/var/tmp/a/b/x.so", "temporary"),
        ("/home/ann/.cache/x.so", "writable"),
        ("/root/x.so", "writable"),
        ("/run/user/1000/x.so", "writable"),
        ("/var/www/uploads/x.so", "writable"),
        ("/usr/lib/x86_64-linux-gnu/libc.so.6", "all"),
        ("/usr/lib/tmp/x.so", "all"),
        ("/opt/tmp/x.so", "all"),
        ("/tmpfiles/x.so", "all"),
        ("/home/x.so", "all"),
    ],
)
def test_code_is_named_by_where_it_lies(path: str, rule: str) -> None:
    settings = load_settings(str(SHIPPED), environment={})
    found = RuleSet([one.make() for one in settings.rules]).match(path, "library")
    assert isinstance(found, Rule)
    assert found.name == rule


@pytest.mark.parametrize("path", ["/memfd:x", "/dev/shm/x", "/tmp/x", "/home/ann/x"])
def test_a_program_counts_like_a_library(path: str) -> None:
    settings = load_settings(str(SHIPPED), environment={})
    found = RuleSet([one.make() for one in settings.rules]).match(path, "executable")
    assert isinstance(found, Rule)
    assert found.name != "all"


def test_the_rules_that_ship_are_right_as_the_command_checks_them() -> None:
    command = [sys.executable, "-m", "sowatch", "serve", "--config", str(SHIPPED), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the settings are right\n", "")
