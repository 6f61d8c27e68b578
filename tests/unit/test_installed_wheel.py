"""The proof that a wheel is what is tested; what `scripts/wheels` and `scripts/test-wheel` read and write."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from outside import OutsideError, mirror
from roots.__main__ import main as wheel_command
from roots.page import NONE_MADE, Run, read, render
from roots.table import CI_ROOTS, LEFT_OUT, PYTHONS, ROOTS
from support import installed
from wheels.libraries import _listed
from wheels.sources import Source
from wheels.verify import faults_of, needed_versions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pythons.md"


# -- what is tested ----------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that Python takes for the one of its packages, with a package of the name sowatch in it."""
    made = tmp_path / "site-packages"
    (made / "sowatch").mkdir(parents=True)
    (made / "sowatch" / "__init__.py").write_text("VERSION = 1\n")
    monkeypatch.setattr(installed.sysconfig, "get_path", lambda _: str(made))
    monkeypatch.setattr("sowatch.__file__", str(made / "sowatch" / "__init__.py"))
    return made


def wheel(directory: Path, **files: str) -> Path:
    made = directory / "sowatch-1-cp311-abi3-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("sowatch-1.dist-info/RECORD", "of pip's own")
        for name, text in {"__init__": "VERSION = 1\n", **files}.items():
            archive.writestr(f"sowatch/{name}.py", text)
    return made


def test_a_package_with_every_file_of_the_wheel_is_the_wheel(site: Path, tmp_path: Path) -> None:
    assert installed.difference(wheel(tmp_path)) is None


def test_a_file_that_differs_or_is_missing_is_named(site: Path, tmp_path: Path) -> None:
    changed = installed.difference(wheel(tmp_path, __init__="VERSION = 2\n"))
    missing = installed.difference(wheel(tmp_path, more=""))

    assert changed == f"{site}/sowatch/__init__.py is not the file of sowatch-1-cp311-abi3-any.whl"
    assert missing == f"{site}/sowatch/more.py is missing"


def test_a_package_from_elsewhere_is_not_the_wheel(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sowatch.__file__", "/elsewhere/sowatch/__init__.py")

    said = installed.difference(wheel(tmp_path))
    assert said == f"sowatch is imported from /elsewhere/sowatch/__init__.py, not from {site}"


def test_the_suite_does_not_start_with_another_package_than_the_wheel(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "tests/unit/test_assertions.py",
    ]
    environment = {**os.environ, "SOWATCH_TEST_WHEEL": str(wheel(tmp_path, more=""))}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "the wheel is not what would be tested: " in done.stderr


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no", "cc"), FileNotFoundError(2, "no", "/etc/x"), OSError()])
def test_a_missing_compiler_is_no_excuse_where_no_wheel_is_tested(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "WHEEL", None)
    assert installed.missing_tool(error) is None


def test_a_missing_compiler_is_one_only_if_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installed, "WHEEL", "x.whl")
    error = FileNotFoundError(2, "no", "cc")
    (tmp_path / "cc").write_text("")
    (tmp_path / "cc").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed.missing_tool(error) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert installed.missing_tool(error) == "cc"
    assert installed.missing_tool(FileNotFoundError(2, "no", "/etc/x")) is None


# -- the table of Pythons ----------------------------------------------------------------------


def test_the_project_supports_the_pythons_of_the_table_and_no_others() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    prefix = "Programming Language :: Python :: 3."
    classified = [one.removeprefix(prefix) for one in project["classifiers"] if one.startswith(prefix)]

    assert tuple(f"3.{minor}" for minor in classified) == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"


def test_each_python_has_a_root_and_the_one_of_ci_is_among_them() -> None:
    assert {root.python for root in ROOTS} == set(PYTHONS)
    assert set(CI_ROOTS) <= {root.name for root in ROOTS if not root.may_be_absent}


@pytest.mark.parametrize(
    ("system", "variable", "found"),
    [
        ("debian", "SOWATCH_MATRIX_MIRROR", "http://mirror.test/debian/"),
        ("ubuntu", "SOWATCH_MIRROR_NOBLE", "http://mirror.test/ubuntu"),
    ],
)
def test_a_root_comes_from_the_mirror_that_is_named_else_from_that_of_apt_else_from_none(
    system: str, variable: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho http://other.test/other\necho http://mirror.test/debian/\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv(variable, raising=False)
    if system == "ubuntu":
        with pytest.raises(OutsideError, match=rf"nothing from a mirror of Ubuntu\. Set {variable}"):
            mirror("", system)
        apt.write_text(f"{apt.read_text()}echo {found}\n")
    assert mirror("", system) == found
    monkeypatch.setenv(variable, "http://named.test/x")
    assert mirror("", system) == "http://named.test/x"


def test_each_test_that_is_left_out_exists() -> None:
    assert [name for name in LEFT_OUT if not (ROOT / name.partition("::")[0]).exists()] == []


def test_the_page_is_what_the_table_and_its_runs_give() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert page == render(read(page))


def test_each_root_that_must_be_there_has_run_unless_the_page_says_that_none_was_made() -> None:
    page = PAGE.read_text(encoding="utf-8")
    required = {root.name for root in ROOTS if not root.may_be_absent}
    ran = {run.root for run in read(page)}

    assert NONE_MADE in page or required <= ran


def test_a_page_speaks_of_runs_only_of_systems_that_ran() -> None:
    runs = [Run(root.name, f"{root.python}.1", "2.36", 3000, 40) for root in ROOTS]

    assert NONE_MADE in render([])
    assert "was installed" not in render([])
    assert NONE_MADE not in render(runs[:1])
    assert "In each system that has a release in this table, the wheel was installed" in render(runs[:1])
    assert "nothing was tried." in render(runs[:1])
    assert "not run" not in render(runs)


@pytest.mark.parametrize("words", [["trixie"], ["--ci"], ["--full"], ["--", "-k", "doctor"]])
def test_the_page_is_written_of_every_root_only(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        wheel_command(["--write", *words])
    assert ended.value.code == 2


def test_a_root_that_did_not_run_is_shown_as_such() -> None:
    page = render([Run("trixie", "3.13.5", "2.41", 3000, 40)])

    assert read(page) == [Run("trixie", "3.13.5", "2.41", 3000, 40)]
    assert page.count("| not run") == len(ROOTS) - 1


# -- wheels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "upstream"),
    [("1.5.0-3", "1.5.0"), ("1:1.3.dfsg+really1.3.1-1", "1.3.1"), ("0.192-4+deb13u1", "0.192")],
)
def test_the_version_of_upstream_is_read_off_debians(version: str, upstream: str, tmp_path: Path) -> None:
    assert Source("x", version, tmp_path, {}).upstream == upstream


def test_what_is_compiled_is_read_from_the_makefile(tmp_path: Path) -> None:
    makefile = tmp_path / "Makefile.am"
    makefile.write_text("a_SOURCES = one.c two.h \\\n\tthree.c\nb_SOURCES = other.c\na_SOURCES += four.c $(MORE)\n")

    assert _listed(makefile, "a_SOURCES") == ["one.c", "two.h", "three.c", "four.c"]
    with pytest.raises(OutsideError, match="has no c_SOURCES"):
        _listed(makefile, "c_SOURCES")


def test_a_wheel_for_another_platform_is_a_fault(tmp_path: Path) -> None:
    assert faults_of(wheel(tmp_path), {}) == ["its name does not end with -cp311-abi3-manylinux_2_28_MACHINE.whl"]


def test_versions_of_symbols_are_those_that_readelf_gives() -> None:
    from sowatch.bpf.binding import libbpf

    path = libbpf().__file__
    said = subprocess.run(
        ["readelf", "--wide", "--version-info", path], capture_output=True, text=True, check=True
    ).stdout
    needs = said.partition(".gnu.version_r")[2]
    found = {version for _, version in needed_versions(Path(path).read_bytes())}

    assert found
    assert found == {line.split("Name: ")[1].split()[0] for line in needs.splitlines() if "Name: " in line}
