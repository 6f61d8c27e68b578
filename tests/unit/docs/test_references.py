"""What code and pages name is there: decisions, modules of a package."""

from __future__ import annotations

import re
import subprocess
from functools import reduce
from importlib import import_module

import pytest

from support.prose import ROOT

PACKAGES = sorted((ROOT / "src" / "sowatch").glob("*/__init__.py"))


def test_every_decision_that_is_named_exists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    named = set()
    for name in listed.stdout.split():
        if name.endswith((".py", ".md", ".h", ".c", ".toml")) and name != "CHANGELOG.md" and (ROOT / name).is_file():
            named |= set(re.findall(r"decisions/(\d{4}-[\w-]+\.md)", (ROOT / name).read_text(encoding="utf-8")))
    assert len(named) > 5
    assert named - {path.name for path in (ROOT / "docs" / "decisions").iterdir()} == set()


@pytest.mark.parametrize("init", PACKAGES, ids=lambda path: path.parent.name)
def test_every_module_that_the_head_of_a_package_names_exists(init) -> None:
    text = init.read_text(encoding="utf-8")
    named = set(re.findall(r"``(\w+\.py)``", text))
    assert {name for name in named if not (init.parent / name).exists()} == set()


@pytest.mark.parametrize("init", PACKAGES, ids=lambda path: path.parent.name)
def test_the_architecture_names_every_module_of_a_package(init) -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{init.parent.name}` |")]
    patterns = [re.escape(name).replace(r"\*", r"\w*") for name in re.findall(r"`([\w*]+)/?`", row)]
    # Of the command each file is a command, or begins with an underscore.
    there = {path.stem for path in init.parent.glob("*.py") if not path.stem.startswith("_")}
    if init.parent.name == "cli":
        return
    assert {name for name in there if not any(re.fullmatch(one, name) for one in patterns)} == set()


def test_what_the_walks_of_the_architecture_name_exists() -> None:
    named = re.findall(r"`([\w.]+):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    for module, name in named:
        assert reduce(getattr, name.split("."), import_module(f"sowatch.{module}")) is not None


def test_the_head_of_the_root_has_every_package_lowest_first() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    head = (ROOT / "src" / "sowatch" / "__init__.py").read_text(encoding="utf-8").partition('\n\n"""')[0]
    packages = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert [one for one in re.findall(r"^(\w+)  +\S", head, flags=re.MULTILINE) if one in packages] == packages
