"""What the Debian package bundles: wheels of several Pythons unpacked into one directory, and which ones."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]


def wheel(directory: Path, tag: str, files: dict[str, str], *, lie: bool = False) -> Path:
    path = directory / f"part-1.0-{tag}.whl"
    all_files = {**files, "part-1.0.dist-info/WHEEL": f"Tag: {tag}\n"}
    rows = []
    for name, text in all_files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        rows.append(f"{name},sha256={'x' if lie else ''}{digest},{len(text)}\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in all_files.items():
            archive.writestr(name, text)
        archive.writestr("part-1.0.dist-info/RECORD", "".join(rows) + "part-1.0.dist-info/RECORD,,\n")
    return path


def unpack(target: Path, *wheels: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy/debian/unpack.py"), str(target), *map(str, wheels)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_compiled_modules_of_two_pythons_stand_beside_each_other(tmp_path: Path) -> None:
    first = wheel(tmp_path, "cp311", {"part/__init__.py": "x = 1\n", "part/_c.cpython-311.so": "eleven"})
    second = wheel(tmp_path, "cp313", {"part/__init__.py": "x = 1\n", "part/_c.cpython-313.so": "thirteen"})
    assert unpack(tmp_path / "made", first, second).returncode == 0
    made = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made" / "part").iterdir()}
    assert made == {"part/__init__.py", "part/_c.cpython-311.so", "part/_c.cpython-313.so"}


def test_a_module_that_differs_between_two_wheels_is_refused(tmp_path: Path) -> None:
    first = wheel(tmp_path, "cp311", {"part.py": "x = 1\n"})
    second = wheel(tmp_path, "cp313", {"part.py": "x = 2\n"})
    done = unpack(tmp_path / "made", first, second)
    assert done.returncode == 1
    assert "another wheel has part.py with other bytes" in done.stderr


def test_a_file_that_is_not_what_its_record_says_is_refused(tmp_path: Path) -> None:
    done = unpack(tmp_path / "made", wheel(tmp_path, "cp311", {"part.py": "x = 1\n"}, lie=True))
    assert done.returncode == 1
    assert "is not what its RECORD says" in done.stderr


def test_a_file_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    done = unpack(tmp_path / "made", wheel(tmp_path, "cp311", {"../part.py": "x = 1\n"}))
    assert done.returncode == 1
    assert not (tmp_path / "part.py").exists()


def test_what_is_bundled_is_named_in_the_copyright_of_the_package() -> None:
    pins = (ROOT / "deploy/debian/wheels-run.txt").read_text()
    names = [line.split("==")[0].replace("-", "_") for line in pins.splitlines() if "==" in line and line[0] != " "]
    text = (ROOT / "deploy/debian/copyright").read_text()
    assert len(names) > 15
    assert [name for name in names if f"debian/wheels/run/{name}-*" not in text] == []


def test_all_that_the_package_needs_is_bundled_in_a_version_that_it_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = (ROOT / "deploy/debian/wheels-run.txt").read_text()
    bundled = dict(re.findall(r"^([\w.-]+)==([\w.]+)", pins, flags=re.MULTILINE))
    wanted = [Requirement(one) for one in [*project["dependencies"], *extras["agent"], *extras["http"]]]
    assert len(wanted) > 8
    for one in wanted:
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert name in bundled, f"{name}: run scripts/deb --pin"
        assert one.specifier.contains(bundled[name]), f"{name}: run scripts/deb --pin"


def test_the_tools_of_the_build_are_pinned_as_pyproject_asks_for_them() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    pins = (ROOT / "deploy/debian/wheels-build.txt").read_text()
    bundled = dict(re.findall(r"^([\w.-]+)==([\w.]+)", pins, flags=re.MULTILINE))
    for one in map(Requirement, requires):
        assert one.specifier.contains(bundled[one.name]), f"{one.name}: run scripts/deb --pin"


def test_the_pythons_of_the_package_are_those_of_its_classifiers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    (listed,) = re.findall(r"^pythons=\((.*)\)$", (ROOT / "scripts/deb").read_text(), flags=re.MULTILINE)
    assert listed.split() == named
