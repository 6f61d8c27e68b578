"""The wheel and what tests need, put into a root without network; pytest there, and what it gave."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from outside import OutsideError, run
from roots.root import Entered
from roots.table import LEFT_OUT, LIBRARIES, PROGRAMS, TEST_PARTS, Root
from wheels.place import ROOT, cache_directory

__all__ = ["Result", "compile_programs", "download", "facts", "install", "run_tests", "watch"]

_NEXT: Final = "Run `scripts/test-wheel` again."
#: Where things are in a root.
_WHEELS: Final = "/wheels"
_VENV: Final = "/venv"
_SUITE: Final = "/suite"
_PROGRAMS: Final = "/programs"


class Result(Struct, frozen=True):
    """What one run of pytest gave."""

    passed: int
    failed: int
    skipped: int
    names_of_failed: tuple[str, ...]


def download(root: Root, wheel: Path) -> Path:
    """A directory with the wheel, all that it needs and all that the tests need, for the root's Python.

    Raises:
        OutsideError: there is no wheel of something for that Python.
    """
    place = cache_directory("packages", f"{root.python}-{root.machine}")
    for old in place.glob("sowatch-*.whl"):
        old.unlink()
    shutil.copyfile(wheel, place / wheel.name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["agent"], *extras["http"], *extras["otlp"], *_test_parts()]
    wanted += [*extras["sbom"], *extras["vulnerabilities"]]
    # Its markers would be read for this machine.
    wanted = [one.partition(";")[0].strip() for one in wanted if "x86_64" not in one or root.machine == "x86_64"]
    platforms = [
        *(f"manylinux_2_{minor}_{root.machine}" for minor in range(36, 4, -1)),
        f"manylinux2014_{root.machine}",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", f"--python-version={root.python}", "--implementation=cp"]
    command += [f"--platform={platform}" for platform in platforms]
    run([*command, "--find-links", place, "-d", place, *wanted], next_step=_NEXT)
    return place


def install(entered: Entered, packages: Path) -> None:
    """What the README says, in the root: a virtual environment and `pip install` of the wheel; from files only.

    Raises:
        OutsideError: it cannot be installed.
    """
    shutil.copytree(packages, entered.path / _WHEELS.lstrip("/"))
    for name in _suite_files():
        target = entered.path / _SUITE.lstrip("/") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (entered.path / _PROGRAMS.lstrip("/")).mkdir()
    steps = [
        ["/usr/bin/python3", "-m", "venv", _VENV],
        [f"{_VENV}/bin/pip", "install", "--quiet", "--no-index", "--find-links", _WHEELS, *_install_words(packages)],
    ]
    for step in steps:
        if entered.run(step, {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}).returncode:
            raise OutsideError(f"{' '.join(step)} failed in the root, see above. {_NEXT}")


def _install_words(packages: Path) -> list[str]:
    wheel = next(packages.glob("sowatch-*.whl"))
    return [f"{_WHEELS}/{wheel.name}[agent,http,otlp,sbom,vulnerabilities]", *_test_parts()]


def _test_parts() -> list[str]:
    """What the tests need, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    dev = project["optional-dependencies"]["dev"]
    return [one for one in dev if re.split(r"[^\w-]", one)[0] in TEST_PARTS]


def _suite_files() -> list[str]:
    """All of the checkout but the package: what a test imports must come from the wheel."""
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        name
        for name in said.split("\0")
        if name and not name.startswith(("src/", "setup.py")) and (ROOT / name).is_file()
    ]


def facts(entered: Entered) -> tuple[str, str]:
    """The release of the root's Python, and of its C library."""
    code = "import platform; print(platform.python_version(), platform.libc_ver()[1])"
    python, glibc = entered.run([f"{_VENV}/bin/python", "-c", code], {}, is_kept=True).stdout.split()
    return python, glibc


def watch(entered: Entered) -> str:
    """The last line of `sowatch watch` in the root, by programs that were in the wheel.

    Raises:
        OutsideError: it does not work.
    """
    command = [f"{_VENV}/bin/sowatch", "watch", "--duration", "2", "--strategy", "core", "ssl|crypto"]
    done = entered.run(command, {}, is_kept=True)
    if done.returncode or "strategy core" not in done.stdout:
        raise OutsideError(f"{' '.join(command)} failed in the root, see above. {_NEXT}")
    return done.stdout.splitlines()[-1]


def compile_programs(place: Path) -> None:
    """Compiles, on this machine, what the tests need of C into ``place``."""
    code = (
        "import sys; from pathlib import Path; from support.programs import build, compile_library\n"
        "made, programs, libraries = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()\n"
        "for name in programs: build(name, made)\n"
        "for name in libraries: compile_library(made / name)\n"
    )
    with tempfile.TemporaryDirectory() as made:
        run(
            [sys.executable, "-c", code, made, " ".join(PROGRAMS), " ".join(LIBRARIES)],
            next_step=_NEXT,
            environment={"SOWATCH_TEST_PROGRAMS": str(place), "PYTHONPATH": str(ROOT / "tests")},
        )


def run_tests(entered: Entered, programs: Path, words: Sequence[str]) -> Result:
    """Runs tests against what is installed.

    Args:
        entered: with the wheel installed.
        programs: of `compile_programs`.
        words: arguments of pytest.
    """
    shutil.copytree(programs, entered.path / _PROGRAMS.lstrip("/"), dirs_exist_ok=True)
    wheel = next((entered.path / _WHEELS.lstrip("/")).glob("sowatch-*.whl"))
    deselected = [word for name in LEFT_OUT for word in ("--deselect" if "::" in name else "--ignore", name)]
    command = [f"{_VENV}/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml=/result.xml"]
    variables = {
        "SOWATCH_TEST_WHEEL": f"{_WHEELS}/{wheel.name}",
        "SOWATCH_TEST_PROGRAMS": _PROGRAMS,
        "SOWATCH_FORCE_KERNEL_TESTS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    (entered.path / "result.xml").unlink(missing_ok=True)
    entered.run(["/bin/sh", "-c", f'cd {_SUITE} && exec "$@"', "sh", *command, *deselected, *words], variables)
    return _result(entered.path / "result.xml")


def _result(path: Path) -> Result:
    if not path.is_file():
        raise OutsideError(f"pytest wrote no result, see above. {_NEXT}")
    counts = {"failed": 0, "skipped": 0, "passed": 0}
    failed = []
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314 - our own pytest wrote it
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return Result(counts["passed"], counts["failed"], counts["skipped"], tuple(failed))
