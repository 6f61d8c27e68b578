"""scripts/release: what it would do, what stands against a release, and the version of a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from setuptools.command.egg_info import FileList

import pack
import release
from support.debian import python_version

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "CHANGELOG.md": "# Changelog\n\n## [1.2.3] - 2026-11-29\n",
    "deploy/debian/control": "Maintainer: Somebody <somebody@sowatch.test>\n",
    "news/README.md": "One file a change.\n",
}


def git(directory: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=n@n.test", "-c", "commit.gpgsign=false", *words]
    # A user's settings (hooks, signing of tags) must not get into it.
    variables = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True, env=variables).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout of which nothing stands against release 1.2.3."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    git(tmp_path, "tag", "v1.2.3")
    return tmp_path


def version_of(directory: Path) -> str:
    """As a build finds it, with this checkout's settings."""
    (directory / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "setuptools_scm"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_stands_against_a_tagged_clean_checkout(repository: Path) -> None:
    assert list(release.obstacles(repository, "1.2.3")) == []


def test_a_commit_without_a_tag_is_no_release(repository: Path) -> None:
    git(repository, "tag", "--delete", "v1.2.3")
    (one,) = release.obstacles(repository, "1.2.3")
    assert one == "this commit has no tag. Tag it: git tag -s v1.2.3"


def test_a_tag_that_is_no_version_does_not_count(repository: Path) -> None:
    git(repository, "tag", "--delete", "v1.2.3")
    git(repository, "tag", "v1.2.3-wip")
    assert "no tag" in next(release.obstacles(repository, "1.2.3"))


def test_what_is_not_committed_and_news_that_are_left_stand_against_it(repository: Path) -> None:
    (repository / "news" / "one.added.md").write_text("One.\n")
    found = list(release.obstacles(repository, "1.2.3"))
    assert [one.split(".")[0] for one in found] == ["something is not committed", "news/ has 1 fragments"]


def test_another_version_than_the_tags_stands_against_it(repository: Path) -> None:
    found = list(release.obstacles(repository, "1.2.4"))
    assert "the tag says 1.2.3 and the build 1.2.4" in found[0]
    assert "CHANGELOG.md has no section of 1.2.4 with a date" in found[1]


def test_a_section_without_a_date_is_none(repository: Path) -> None:
    (repository / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.3] - not released yet\n")
    git(repository, "commit", "--quiet", "-am", "no date")
    git(repository, "tag", "--force", "v1.2.3")
    (one,) = release.obstacles(repository, "1.2.3")
    assert one.startswith("CHANGELOG.md has no section of 1.2.3 with a date.")


def test_a_placeholder_for_the_maintainer_stands_against_it(repository: Path) -> None:
    (repository / "deploy/debian/control").write_text("Maintainer: Somebody <somebody@sowatch.example>\n")
    git(repository, "commit", "--quiet", "-am", "placeholder")
    git(repository, "tag", "--force", "v1.2.3")
    (one,) = release.obstacles(repository, "1.2.3")
    assert "Maintainer" in one


def test_the_version_is_that_of_the_tag_and_names_the_commit_after_it(repository: Path) -> None:
    (repository / ".gitignore").write_text("pyproject.toml\n.gitignore\n")
    assert version_of(repository) == "1.2.3"
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "more")
    commit = git(repository, "rev-parse", "HEAD")
    version = version_of(repository)
    assert version.startswith("1.2.4.dev1+g")
    assert commit.startswith(version.partition("+g")[2])


def test_a_checkout_without_tags_and_a_plain_copy_have_versions_before_the_first_release(tmp_path: Path) -> None:
    plain, untagged = tmp_path / "plain", tmp_path / "untagged"
    for directory in (plain, untagged):
        directory.mkdir()
    (untagged / ".gitignore").write_text("pyproject.toml\n.gitignore\n")
    git(untagged, "init", "--quiet")
    git(untagged, "commit", "--quiet", "--allow-empty", "-m", "one")
    assert version_of(plain) == "0.1.dev0"
    assert version_of(untagged).startswith("0.1.dev1+g")


def test_the_hashes_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    for name in ("b.whl", "a.deb"):
        (tmp_path / name).write_text(name)
    (tmp_path / "SHA256SUMS").write_text(release.sums(tmp_path, [tmp_path / "b.whl", tmp_path / "a.deb"]))
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "a.deb: OK\nb.whl: OK\n"


def test_the_dry_run_names_every_part_its_checks_and_where_it_goes() -> None:
    command = [sys.executable, "tools/release.py", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for part in release.PARTS:
        assert f"{part.name}: {' '.join(part.build)}\n" in done.stdout
        assert all((ROOT / word).exists() for word in part.build if "/" in word)
        for pattern in part.makes:
            assert f"publish {pattern}" in done.stdout or f", {pattern}" in done.stdout
    assert "twine check --strict" in done.stdout
    assert "abi3audit --strict" in done.stdout
    assert "not in this checkout" not in done.stdout


@pytest.mark.parametrize(
    "version", ["1.2.3", "1.2.3rc1", "1.2.3a2", "0.1.dev507+g3780cdc", "1.2.4.dev3+gabc.d20261129"]
)
def test_the_version_of_the_debian_package_stands_for_one_version(version: str) -> None:
    (command,) = re.findall(r"^debian_version=\$\((sed .*) <<<", (ROOT / "scripts/deb").read_text(), flags=re.MULTILINE)
    done = subprocess.run(["sh", "-c", command], input=version, capture_output=True, text=True, check=True)
    assert python_version(done.stdout) == version


def test_the_sdist_has_what_is_committed_but_what_is_for_ci_and_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """src/ has rules of its own: what the package brings is in the wheel, which is compared with it elsewhere."""
    monkeypatch.chdir(ROOT)
    said = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    tracked = [name for name in said.split("\0") if Path(name).is_file()]
    found = FileList()
    found.allfiles = tracked
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        found.process_template_line(line)
    left = [name for name in tracked if name not in found.files and not name.startswith((".", "benchmarks/", "src/"))]
    assert left == ["MANIFEST.in", "pyproject.toml"], "which setuptools adds itself"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.2.3", "1.2.3"),
        ("1.2.3rc1", "1.2.3-rc.1"),
        ("1.2.4.dev3+gabc.d20261129", "1.2.4-dev.3+gabc.d20261129"),
        ("0.1.dev507+g3780cdc", "0.1.0-dev.507+g3780cdc"),
    ],
)
def test_the_version_of_the_chart_is_one_that_helm_takes(version: str, expected: str) -> None:
    assert pack.chart_version(version) == expected


def test_a_version_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="has no form that Helm takes"):
        pack.chart_version("1.2.3.post1")


def test_the_chart_is_packed_with_the_version_of_the_release(tmp_path: Path) -> None:
    made = pack.chart("1.2.3rc1", tmp_path / "charts")
    assert made == tmp_path / "charts" / "sowatch-1.2.3-rc.1.tgz"
    with tarfile.open(made) as archive:
        file = archive.extractfile("sowatch/Chart.yaml")
        assert file is not None
        text = file.read().decode()
    assert "version: 1.2.3-rc.1\n" in text
    assert "appVersion: 1.2.3rc1\n" in text
