"""The Containerfile: its build step run by a shell as a build runs it, with a pip that only notes what it is asked."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.chart import ROOT

TEXT = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
MACHINE = platform.machine()
OTHER = {"x86_64": "aarch64"}.get(MACHINE, "x86_64")
VERSION = "0.1.dev507+g0a55b5a1c"

Build = Callable[..., subprocess.CompletedProcess[str]]


def name_of(version: str, machine: str) -> str:
    return f"sowatch-{version}-cp311-abi3-manylinux_2_27_{machine}.manylinux_2_28_{machine}.whl"


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Runs the step that installs the wheel; the words that pip got are lines of its output."""
    (step,) = re.findall(r"^RUN (set .*?[^\\])$", TEXT, re.MULTILINE | re.DOTALL)
    pip = tmp_path / "opt" / "sowatch" / "bin" / "python"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", encoding="utf-8")
    pip.chmod(0o755)
    (tmp_path / "dist").mkdir()
    for one in (name_of(VERSION, MACHINE), name_of(VERSION, OTHER), name_of("0.0.9", MACHINE)):
        (tmp_path / "dist" / one).touch()
    script = re.sub(r"(?<![\w/])/(dist|opt)\b", rf"{tmp_path}/\1", step)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": "/usr/bin:/bin", "PIP_OPTIONS": "--prefer-binary", **variables}
        return subprocess.run(["/bin/sh", "-c", script], check=False, env=variables, capture_output=True, text=True)

    return run


def test_the_wheel_is_installed_by_its_file_that_of_this_version_and_machine(build: Build, tmp_path: Path) -> None:
    words = build(VERSION=VERSION).stdout.splitlines()
    assert words[:3] == ["-m", "pip", "install"]
    assert words[-1] == f"{tmp_path}/dist/{name_of(VERSION, MACHINE)}[agent,http,kubernetes,otlp]"
    assert not [one for one in words if one.startswith("sowatch")], "an index would be asked for a package of that name"


@pytest.mark.parametrize("variables", [{}, {"VERSION": ""}], ids=["unset", "empty"])
def test_a_build_without_a_version_fails_and_says_which_argument_is_missing(
    build: Build, variables: dict[str, str]
) -> None:
    found = build(**variables)
    assert (found.returncode != 0, found.stdout) == (True, "")
    assert "--build-arg VERSION=" in found.stderr


def test_what_it_stands_on_is_named_by_who_builds_it() -> None:
    assert re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert re.findall(r"^ARG (BASE.*|VERSION.*)$", TEXT, re.MULTILINE) == ["BASE", "VERSION", "VERSION"]
